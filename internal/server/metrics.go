package server

import (
	"context"
	"errors"
	"log"
	"log/slog"
	"net/http"
	"time"

	grpcprom "github.com/grpc-ecosystem/go-grpc-middleware/providers/prometheus"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// metrics are never labelled by serial, host or caller: their number must not grow with the pool.
type metrics struct {
	registry *prometheus.Registry
	grpc     *grpcprom.ServerMetrics

	serials  *prometheus.CounterVec
	allocate prometheus.Counter // of serials, found once: each call counts
	refusals *prometheus.CounterVec
	commits  *prometheus.HistogramVec
	panics   prometheus.Counter
	swept    prometheus.Counter
	lanes    *prometheus.CounterVec
	again    *prometheus.CounterVec
	lives    prometheus.Counter
	up       prometheus.Gauge
}

func newMetrics(r *prometheus.Registry, v *view, w Witness) *metrics {
	const ns = "nsalloc"
	m := &metrics{
		registry: r,
		grpc:     grpcprom.NewServerMetrics(grpcprom.WithServerHandlingTimeHistogram(grpcprom.WithHistogramBuckets(prometheus.ExponentialBuckets(0.0005, 2, 15)))),
		serials: prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: ns, Name: "serials_issued_total",
			Help: "Serials that answers of this server issued, to callers (allocate) and to hosts (grant). A repeated answer counts again."}, []string{"to"}),
		refusals: prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: ns, Name: "refusals_total",
			Help: "Calls that were refused, by reason."}, []string{"reason"}),
		commits: prometheus.NewHistogramVec(prometheus.HistogramOpts{Namespace: ns, Name: "store_commit_seconds",
			Help:    "Transactions of the store, by outcome: ok, or the reason that they failed with, such as CONFLICT or OUTCOME_UNKNOWN.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 2, 15)}, []string{"outcome"}),
		panics: prometheus.NewCounter(prometheus.CounterOpts{Namespace: ns, Name: "panics_total", Help: "Handlers that panicked. Each one is a bug; the log has its stack."}),
		swept:  prometheus.NewCounter(prometheus.CounterOpts{Namespace: ns, Name: "requests_swept_total", Help: "Records of old requests that were deleted."}),
		lanes: prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: ns, Name: "lanes_lost_total",
			Help: "Lanes that this server lost, with the rest of their ranges: taken by a copy of this server or by a store that was put back, or swept because they were not used for long."}, []string{"why"}),
		again: prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: ns, Name: "sandboxes_registered_again_total",
			Help: "Sandboxes that hosts registered again after the store had forgotten history: done, or refused because they have gone on elsewhere or are over."}, []string{"outcome"}),
		lives: prometheus.NewCounter(prometheus.CounterOpts{Namespace: ns, Name: "host_lives_total",
			Help: "Incarnations that hosts of the pool began, other than their first: an agent's state was lost or put back, or two agents of one name are alive."}),
		up: prometheus.NewGauge(prometheus.GaugeOpts{Namespace: ns, Name: "serving", Help: "1 while the store answers, the view keeps up and there is a pool."}),
	}
	if w != nil {
		r.MustRegister(witnessCollector{w})
	}
	r.MustRegister(m.grpc, m.serials, m.refusals, m.commits, m.panics, m.swept, m.lanes, m.again, m.lives, m.up, viewCollector{v},
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	for _, why := range []string{laneTaken, laneSwept} {
		m.lanes.WithLabelValues(why)
	}
	for _, outcome := range []string{againDone, againRefused} {
		m.again.WithLabelValues(outcome)
	}
	for _, outcome := range []string{"ok", string(alloc.ReasonConflict), string(alloc.ReasonUnknownOutcome), string(alloc.ReasonUnavailable)} {
		m.commits.WithLabelValues(outcome) // a rate needs the zero
	}
	m.allocate = m.serials.WithLabelValues("allocate")
	return m
}

// Why a lane was lost.
const (
	laneTaken = "taken"
	laneSwept = "swept"
)

// What became of a sandbox that was registered again.
const (
	againDone    = "done"
	againRefused = "refused"
)

func (m *metrics) serving(yes bool) {
	if yes {
		m.up.Set(1)
	} else {
		m.up.Set(0)
	}
}

// measured is a store whose commits are counted.
type measured struct {
	alloc.Store
	m *metrics
}

func (s measured) Commit(ctx context.Context, tx alloc.Tx) (alloc.Revision, error) {
	began := time.Now()
	rev, err := s.Store.Commit(ctx, tx)
	outcome := "ok"
	if err != nil {
		if outcome = string(alloc.ReasonOf(err)); outcome == "" {
			outcome = "other"
		}
	}
	s.m.commits.WithLabelValues(outcome).Observe(time.Since(began).Seconds())
	return rev, err
}

// viewCollector reads the view when somebody asks.
type viewCollector struct{ v *view }

var (
	descLoaded     = prometheus.NewDesc("nsalloc_view_loaded", "1 while reads are answered from the view.", nil, nil)
	descRevision   = prometheus.NewDesc("nsalloc_view_revision", "The store's revision that the view reflects.", nil, nil)
	descLag        = prometheus.NewDesc("nsalloc_view_lag_revisions", "How far the view was behind the store's newest known revision.", nil, nil)
	descLoads      = prometheus.NewDesc("nsalloc_view_loads_total", "How often the whole store was read.", nil, nil)
	descRecords    = prometheus.NewDesc("nsalloc_view_records", "Records in the view.", []string{"kind"}, nil)
	descUnread     = prometheus.NewDesc("nsalloc_view_unreadable_records", "Records that cannot be read and are left out of the view; the log names them.", []string{"kind"}, nil)
	descCounter    = prometheus.NewDesc("nsalloc_pool_counter", "The next free counter of the pool's generation.", nil, nil)
	descLeft       = prometheus.NewDesc("nsalloc_pool_serials_left", "Serials of the pool's generation that nobody holds. At 0 no server and no host gets another range.", nil, nil)
	descGensLeft   = prometheus.NewDesc("nsalloc_pool_generations_left", "Generations that the pool can still begin.", nil, nil)
	descBurn       = prometheus.NewDesc("nsalloc_pool_burn_per_second", "Serials a second that were taken from the pool's counter over the last hour, as far as this server saw it; what the ranges of servers and hosts hold counts.", nil, nil)
	descQuota      = prometheus.NewDesc("nsalloc_host_quota_used_max_ratio", "The largest part of its quota for 24 hours that a host has used; at 1 it is granted no more serials. nsalloc host list names it.", nil, nil)
	descRecovering = prometheus.NewDesc("nsalloc_pool_recovering", "1 while the pool is closed because its store has lost history.", nil, nil)
	descSettled    = prometheus.NewDesc("nsalloc_pool_settled", "0 while the store has forgotten history and a host has not said yet what lives on it, else 1.", nil, nil)
	descGen        = prometheus.NewDesc("nsalloc_pool_generation", "The pool's generation.", nil, nil)
)

func (viewCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descLoaded, descRevision, descLag, descLoads, descRecords, descUnread, descCounter, descLeft, descGensLeft, descBurn, descQuota, descRecovering, descGen, descSettled} {
		ch <- d
	}
}

func (c viewCollector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	c.v.mu.RLock()
	defer c.v.mu.RUnlock()
	loaded := 0.0
	if c.v.loaded {
		loaded = 1
	}
	gauge(descLoaded, loaded)
	gauge(descRevision, float64(c.v.rev))
	gauge(descLag, float64(max(c.v.newest.Load()-int64(c.v.rev), 0)))
	ch <- prometheus.MustNewConstMetric(descLoads, prometheus.CounterValue, float64(c.v.loads))
	gauge(descRecords, float64(c.v.ix.order.Len()), "sandbox")
	gauge(descRecords, float64(len(c.v.ix.bySerial)-c.v.ix.order.Len()), "namespace")
	gauge(descRecords, float64(len(c.v.ix.checkpoints)), "checkpoint")
	gauge(descRecords, float64(len(c.v.ix.hosts)), "host")
	for _, kind := range []alloc.Kind{alloc.KindPool, alloc.KindCounter, alloc.KindHost, alloc.KindSandbox, alloc.KindCheckpoint} {
		gauge(descUnread, float64(c.v.ix.unread[kind]), string(kind))
	}
	if c.v.ix.counter != nil {
		l := c.v.gauge.Level(c.v.ix.counter, c.v.now())
		gauge(descCounter, float64(l.Next))
		gauge(descLeft, float64(l.Left))
		gauge(descGensLeft, float64(l.Generations))
		gauge(descBurn, l.Burn)
	}
	if c.v.ix.pool != nil {
		most := 0.0
		for _, h := range c.v.ix.hosts {
			share, _ := h.Quota.Share(c.v.ix.pool, c.v.now())
			most = max(most, share)
		}
		gauge(descQuota, most)
		gauge(descGen, float64(c.v.ix.pool.Generation))
		settled := 0.0
		if c.v.ix.pool.IsSettled() {
			settled = 1
		}
		gauge(descSettled, settled)
		recovering := 0.0
		if c.v.ix.pool.State != alloc.PoolOpen {
			recovering = 1
		}
		gauge(descRecovering, recovering)
	}
}

// serveMetrics answers /metrics, on a listener of its own because it has no callers to tell apart.
func (s *Server) serveMetrics(ctx context.Context) error {
	if s.cfg.Metrics == nil {
		return nil
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(s.cfg.Registry, promhttp.HandlerOpts{Registry: s.cfg.Registry}))
	srv := &http.Server{
		Handler: mux, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: maxHeader,
		ErrorLog: log.New(logWriter{s.log}, "", 0),
	}
	stopped := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stopped()
	if err := srv.Serve(s.cfg.Metrics); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// logWriter hands net/http's own messages to slog.
type logWriter struct{ log *slog.Logger }

func (w logWriter) Write(p []byte) (int, error) {
	w.log.Debug("metrics listener", "message", string(p))
	return len(p), nil
}
