/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Memory that outlives this process. The front holds it: for each call it is asked, over a socket that serves nothing
 * else, for the descriptor that belongs to a device and a name. docs/PROTOCOL.md has the messages; plugin/memory.go is
 * the other end.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <unistd.h>

#include "host.h"

#define KEEP_NAME_SIZE NATIVE_REGION_MAX
#define OBJECT_INDEX UINT32_MAX
#define KEEP_REPLY_TIMEOUT_S 5 /* the front answers at once; one that is stopped is no reason to hang for ever */

struct keep_request {
	uint32_t sequence; /* echoed; tells a reply from a late one to an earlier request */
	uint32_t device;
	char name[KEEP_NAME_SIZE]; /* padded with NULs */
};

struct keep_reply {
	uint32_t sequence;
	int32_t error; /* a positive errno, or 0: a descriptor is attached */
};

_Static_assert(sizeof(struct keep_request) == 40 && sizeof(struct keep_reply) == 8, "messages of plugin/memory.go");

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* one question at a time */
static int socket_fd = -1;                               /* guarded by lock, as all below */
static uint32_t last_sequence;

void keep_set_socket(int fd)
{
	const struct timeval timeout = { .tv_sec = KEEP_REPLY_TIMEOUT_S };

	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout));
	pthread_mutex_lock(&lock);
	socket_fd = fd;
	pthread_mutex_unlock(&lock);
}

/* The size of the message, or a negative errno; *fd is the descriptor that came along, or -1. */
static ssize_t receive(struct keep_reply *reply, int *fd)
{
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(sizeof(int))];
	} control;
	struct iovec iov = { .iov_base = reply, .iov_len = sizeof(*reply) };
	struct msghdr msg = {
		.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)
	};
	struct cmsghdr *c;
	ssize_t n;

	*fd = -1;
	do {
		n = recvmsg(socket_fd, &msg, MSG_CMSG_CLOEXEC);
	} while (n < 0 && errno == EINTR);
	if (n < 0)
		return errno == EAGAIN ? -ETIMEDOUT : -errno;
	c = CMSG_FIRSTHDR(&msg);
	if (c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS && c->cmsg_len == CMSG_LEN(sizeof(int)))
		memcpy(fd, CMSG_DATA(c), sizeof(*fd));
	return n;
}

/* lock is held. A descriptor, or a negative errno. */
static int ask(uint32_t device, const char *name)
{
	struct keep_request request = { .sequence = ++last_sequence, .device = device };
	ssize_t n;

	if (socket_fd < 0)
		return -EOPNOTSUPP;
	memcpy(request.name, name, strlen(name));
	do {
		n = send(socket_fd, &request, sizeof(request), MSG_NOSIGNAL);
	} while (n < 0 && errno == EINTR);
	if (n < 0)
		return errno == EAGAIN ? -ETIMEDOUT : -errno;
	for (;;) {
		struct keep_reply reply;
		int fd;

		n = receive(&reply, &fd);
		if (n < 0)
			return (int)n;
		if (n == sizeof(reply) && reply.sequence == request.sequence) {
			if (!reply.error && fd >= 0)
				return fd;
			if (fd >= 0)
				close(fd);
			return reply.error > 0 && reply.error < 4096 ? -reply.error : -EPROTO;
		}
		if (fd >= 0)
			close(fd);
		if (!n)
			return -EPIPE; /* the front is gone */
	}
}

int keep_object(void)
{
	int fd;

	pthread_mutex_lock(&lock);
	fd = ask(OBJECT_INDEX, "object");
	pthread_mutex_unlock(&lock);
	return fd;
}

int tcmur_dev_keep_memory(struct tcmu_device *dev, const char *name, size_t size)
{
	struct stat st;
	int fd, err;

	if (!name[0] || strlen(name) >= KEEP_NAME_SIZE || (ssize_t)size < 0)
		return -EINVAL;
	pthread_mutex_lock(&lock);
	fd = ask(dev->index, name);
	pthread_mutex_unlock(&lock);
	if (fd < 0)
		return fd;
	/* The front hands out new memory with size 0. */
	if (fstat(fd, &st) < 0)
		goto failed;
	if (st.st_size)
		return fd;
	if (!size) {
		close(fd);
		return -ENOENT;
	}
	if (ftruncate(fd, (off_t)size) == 0)
		return fd;
failed:
	err = errno;
	close(fd);
	return -err;
}
