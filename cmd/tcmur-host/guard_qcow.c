/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the qcow handler gets wrong in reads and writes.
 *
 * A write to a part of a cluster that is not in the image yet leaves the rest of the cluster without what the backing
 * file has there, or, where the cluster was marked as zero, with the beginning of the image file. Reads are right. So
 * such a write is made one of the whole cluster, once for each: after that the cluster is in the image.
 *
 * The handler counts the lookups of each table of clusters in an int and crashes when that overflows. Opening the image
 * again starts the counting anew.
 */
#include <stdlib.h>
#include <string.h>

#include "host.h"

struct qcow_guard {
	uint64_t cluster; /* bytes, a power of two */
	uint64_t smallest;
	uint64_t lookups; /* since the last open */
	uint64_t limit;
	bool whole;
	uint8_t *present; /* a bit per cluster: it is in the image, by a write of ours. NULL: not known of any */
	uint8_t *buffer;  /* of a cluster */
};

struct qcow_guard *qcow_guard_make(const struct native_open *how)
{
	struct qcow_guard *g = calloc(1, sizeof(*g));

	if (!g)
		return NULL;
	g->cluster = how->qcow_cluster;
	g->smallest = how->qcow_smallest;
	g->limit = how->qcow_lookups;
	/* Requests are multiples of 512 already. */
	g->whole = how->qcow_whole && g->cluster > 512;
	if (!g->whole)
		return g;
	g->buffer = malloc(g->cluster);
	/* Memory of this that is never written to takes up none. */
	g->present = calloc(how->size / g->cluster / 8 + 1, 1);
	if (!g->buffer) {
		qcow_guard_free(g);
		return NULL;
	}
	return g;
}

void qcow_guard_free(struct qcow_guard *g)
{
	if (!g)
		return;
	free(g->buffer);
	free(g->present);
	free(g);
}

/* Before each callout: it may not be the one too many. */
static void count(struct tcmu_device *dev, uint64_t length)
{
	struct qcow_guard *g = dev->qcow;

	g->lookups += length / g->smallest + 2;
	if (g->lookups < g->limit)
		return;
	log_host(LOG_INFORMATION, dev, "%llu clusters looked up: opening the image again",
		 (unsigned long long)g->lookups);
	g->lookups = 0;
	device_lost(dev); /* as soon as this request has ended */
}

static int transfer(struct request *req, bool write, void *data, uint64_t at, size_t length)
{
	count(req->dev, length);
	return io_callout(req, write, data, at, length);
}

static bool is_present(const struct qcow_guard *g, uint64_t at)
{
	uint64_t n = at / g->cluster;

	return g->present && g->present[n / 8] >> n % 8 & 1;
}

static void set_present(struct qcow_guard *g, uint64_t at, uint64_t length)
{
	uint64_t end = (at + length + g->cluster - 1) / g->cluster;

	for (uint64_t n = at / g->cluster; g->present && n < end; n++)
		g->present[n / 8] |= (uint8_t)(1 << n % 8);
}

/* A write within one cluster, which it does not fill. */
static int write_part(struct request *req, void *data, uint64_t at, size_t length)
{
	struct qcow_guard *g = req->dev->qcow;
	uint64_t start = at & ~(g->cluster - 1);
	uint64_t left = device_size(req->dev) - start;
	size_t whole = left < g->cluster ? left : g->cluster; /* the last one may be cut short */
	int r;

	if (is_present(g, at))
		return transfer(req, true, data, at, length);
	if (length < whole) {
		r = transfer(req, false, g->buffer, start, whole);
		if (r != TCMU_STS_OK)
			return r;
		memcpy(g->buffer + (at - start), data, length);
		data = g->buffer;
	}
	r = transfer(req, true, data, start, whole);
	if (r == TCMU_STS_OK)
		set_present(g, start, whole);
	return r;
}

int qcow_guard_transfer(struct request *req, bool write, void *data, uint64_t at, size_t length)
{
	struct qcow_guard *g = req->dev->qcow;
	char *p = data;
	int r = TCMU_STS_OK;

	if (!write || !g->whole)
		return transfer(req, write, data, at, length);
	while (length && r == TCMU_STS_OK) {
		uint64_t rest = g->cluster - at % g->cluster;
		size_t n;

		if (rest == g->cluster && length >= g->cluster) {
			n = length - length % g->cluster;
			r = transfer(req, true, p, at, n);
			if (r == TCMU_STS_OK)
				set_present(g, at, n);
		} else {
			n = length < rest ? length : rest;
			r = write_part(req, p, at, n);
		}
		p += n;
		at += n;
		length -= n;
	}
	return r;
}
