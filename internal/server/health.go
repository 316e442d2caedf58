package server

import (
	"context"
	"time"

	healthv1 "google.golang.org/grpc/health/grpc_health_v1"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
)

const (
	probeEvery   = 2 * time.Second
	probeTimeout = 2 * time.Second
)

// services are those that health speaks of; "" is all of them together.
var services = []string{
	"",
	nsallocv1.Allocator_ServiceDesc.ServiceName,
	nsallocv1.Sandboxes_ServiceDesc.ServiceName,
	nsallocv1.Handoff_ServiceDesc.ServiceName,
	nsallocv1.Hosts_ServiceDesc.ServiceName,
	nsallocv1.Records_ServiceDesc.ServiceName,
	nsallocv1.Servers_ServiceDesc.ServiceName,
}

func (s *Server) setHealth(status healthv1.HealthCheckResponse_ServingStatus) {
	for _, name := range services {
		s.health.SetServingStatus(name, status)
	}
}

// watchHealth makes, every two seconds and when something changed, what a linearizable read makes: it is
// SERVING exactly if the store answers, the view keeps up with it, and there is a pool. The same probe
// keeps the view's revision moving in a store where nothing else happens.
func (s *Server) watchHealth(ctx context.Context) error {
	serving := false
	for {
		err := s.probe(ctx)
		if ctx.Err() != nil {
			return nil
		}
		switch now := err == nil; {
		case now && !serving:
			s.log.InfoContext(ctx, "serving")
		case !now && serving:
			s.log.WarnContext(ctx, "not serving", "error", err)
		}
		serving = err == nil
		status := healthv1.HealthCheckResponse_NOT_SERVING
		if serving {
			status = healthv1.HealthCheckResponse_SERVING
		}
		s.setHealth(status)
		s.metrics.serving(serving)
		t := time.NewTimer(probeEvery)
		select {
		case <-t.C:
		case <-s.view.changed:
		case <-ctx.Done():
		}
		t.Stop()
	}
}

func (s *Server) probe(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	_, err := s.view.read(ctx, true, func(*index) error { return nil })
	return err
}
