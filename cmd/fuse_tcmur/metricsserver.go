// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

const (
	// metricsPath is where Prometheus looks for metrics unless told otherwise.
	metricsPath = "/metrics"
	// metricsPatience bounds each request, and the wait for those under way at the end.
	metricsPatience = 10 * time.Second
	metricsGrace    = 500 * time.Millisecond
)

// metricsAddress makes an address to listen on of what --metrics-listen was given: without a host it is that of the
// loopback interface, since nothing asks who is asking.
func metricsAddress(given string) (string, error) {
	host, port, err := net.SplitHostPort(given)
	if err != nil {
		return "", fmt.Errorf("--metrics-listen %q: must be [HOST]:PORT, such as :9100 or 0.0.0.0:9100", given)
	}
	if host == "" {
		host = "127.0.0.1"
	}
	return net.JoinHostPort(host, port), nil
}

// metricsServer serves metrics over HTTP.
type metricsServer struct {
	http  http.Server
	ended chan struct{}
}

// serveMetrics listens on an address. stop must be called in the end. The error is that of listen(2).
func serveMetrics(address string, from prometheus.Gatherer, log hclog.Logger) (*metricsServer, error) {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("--metrics-listen: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle(metricsPath, promhttp.HandlerFor(from, promhttp.HandlerOpts{Timeout: metricsPatience}))
	s := &metricsServer{
		http: http.Server{
			Handler: mux, ReadTimeout: metricsPatience, WriteTimeout: 2 * metricsPatience, IdleTimeout: time.Minute,
			ErrorLog: log.StandardLogger(&hclog.StandardLoggerOptions{ForceLevel: hclog.Debug}),
		},
		ended: make(chan struct{}),
	}
	log.Info("metrics", "url", "http://"+listener.Addr().String()+metricsPath)
	go func() {
		defer close(s.ended)
		if err := s.http.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			log.Error("metrics are not served any more", "reason", err)
		}
	}()
	return s, nil
}

// stop ends the service. To be called once; on nil it does nothing.
func (s *metricsServer) stop() {
	if s == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), metricsGrace)
	defer cancel()
	if s.http.Shutdown(ctx) != nil {
		_ = s.http.Close() // whoever is still reading has had the time
	}
	<-s.ended
}
