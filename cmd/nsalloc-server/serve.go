package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/google/renameio/v2"
	"golang.org/x/sync/errgroup"

	"github.com/nsalloc/nsalloc/internal/etcdembed"
	"github.com/nsalloc/nsalloc/internal/etcdstore"
	"github.com/nsalloc/nsalloc/internal/server"
	"github.com/nsalloc/nsalloc/internal/witness"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// loadPatience is how long a start waits for the store before it says that it is ready: the service
// answers also without it, and begins to serve when it comes.
const loadPatience = 10 * time.Second

// serve runs the server until ctx ends. What is opened is closed in the opposite order.
func serve(ctx context.Context, cfg config, log *slog.Logger, stdout io.Writer) (err error) {
	if err := cfg.check(); err != nil {
		return err
	}
	log.InfoContext(ctx, "starting", "version", version)

	// Before the store: a server that cannot listen leaves no data directory and no pool behind.
	listeners, lines, err := openListeners(ctx, cfg)
	defer func() {
		for _, l := range listeners {
			_ = l.Close() // the server has closed it; this one gives its path free
		}
	}()
	if err != nil {
		return err
	}
	var metrics net.Listener
	if cfg.metrics != "" {
		l, err := listen(ctx, cfg.metrics, true) // metrics name no serial, host or caller
		if err != nil {
			return fmt.Errorf("--metrics: %w", err)
		}
		defer l.Close()
		metrics, lines = l.Listener, append(lines, "metrics "+l.name)
	}

	st, err := openStore(ctx, cfg, advertised(cfg.advertise, listeners), log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, st.Close()) }()

	s := server.New(server.Config{Store: st.witness, Witness: st.witness, Insecure: cfg.insecure, Logger: log, Metrics: metrics})
	plain := make([]net.Listener, 0, len(listeners))
	for _, l := range listeners {
		plain = append(plain, l.Listener)
	}
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.Run(gctx, plain...) })
	g.Go(func() error { return st.watch(gctx, log) })
	g.Go(func() error { st.witness.Run(gctx); return nil })
	g.Go(func() error { return st.missPool(gctx, s.Loaded(), cfg.etcd, log) })
	g.Go(func() error { return announce(gctx, s.Loaded(), cfg.readyFile, lines, log, stdout) })
	g.Go(func() error { return watchdog(gctx) })
	err = g.Wait()
	if err == nil {
		log.InfoContext(ctx, "stopped")
	}
	return err
}

func openListeners(ctx context.Context, cfg config) (listeners []listener, lines []string, err error) {
	for _, address := range cfg.listen {
		l, err := listen(ctx, address, cfg.insecure)
		if err != nil {
			return listeners, nil, fmt.Errorf("--listen: %w", err)
		}
		listeners, lines = append(listeners, l), append(lines, "listen "+l.name)
	}
	return listeners, lines, nil
}

// announce says that the server listens: on standard output, in the ready file, and to systemd.
func announce(ctx context.Context, loaded <-chan struct{}, file string, lines []string, log *slog.Logger, stdout io.Writer) error {
	t := time.NewTimer(loadPatience)
	defer t.Stop()
	select {
	case <-loaded:
	case <-t.C:
		log.WarnContext(ctx, "the store has not been read yet; until it is, calls are answered STORE_UNAVAILABLE")
	case <-ctx.Done():
		return nil
	}
	text := strings.Join(append(lines, "ready"), "\n") + "\n"
	log.InfoContext(ctx, "listening", "addresses", strings.Join(lines, ", "))
	if file != "" {
		if err := renameio.WriteFile(file, []byte(text), 0o644); err != nil {
			return fmt.Errorf("--ready-file: %w", err)
		}
	}
	if _, err := io.WriteString(stdout, text); err != nil {
		log.WarnContext(ctx, "standard output is gone", "error", err)
	}
	if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
		return fmt.Errorf("tell systemd: %w", err)
	}
	<-ctx.Done()
	_, _ = daemon.SdNotify(false, daemon.SdNotifyStopping)
	return nil
}

// watchdog tells systemd that this process is scheduled, twice as often as it asks.
func watchdog(ctx context.Context) error {
	every, err := daemon.SdWatchdogEnabled(false)
	if err != nil || every == 0 {
		return err
	}
	t := time.NewTicker(every / 2)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			_, _ = daemon.SdNotify(false, daemon.SdNotifyWatchdog)
		case <-ctx.Done():
			return nil
		}
	}
}

// store is the pool's store with what it rests on.
type store struct {
	*etcdstore.Store
	client  *etcdstore.Client
	etcd    *etcdembed.Server // nil: one that is not ours
	witness *witness.Store
	// connected is the witness, for the client, which is there before it.
	connected *atomic.Pointer[witness.Store]
	seen      *witness.File
}

// watched puts the witness in front of the store. Connections that were made before it was there count as
// one that is not verified.
func (s *store) watched(cfg config, address string, log *slog.Logger) (err error) {
	var fresh bool
	if s.seen, fresh, err = witness.Open(filepath.Join(cfg.dataDir, "witness")); err != nil {
		return err
	}
	if s.witness, err = witness.New(s.Store, cfg.name, s.seen, log, nil); err != nil {
		return err
	}
	s.witness.Join(address, asker(s.witness.Name(), cfg.insecure))
	s.connected.Store(s.witness)
	if fresh && len(cfg.etcd.urls) > 0 {
		log.Info("this server has seen nothing of its pool yet: from now on it notices when the store loses history", "server", s.witness.Name(), "data_dir", cfg.dataDir)
	}
	return nil
}

func openStore(ctx context.Context, cfg config, address string, log *slog.Logger) (*store, error) {
	st, err := openEtcd(ctx, cfg, log)
	if err != nil {
		return nil, err
	}
	if err := st.watched(cfg, address, log); err != nil {
		return nil, errors.Join(err, st.Close())
	}
	return st, nil
}

func openEtcd(ctx context.Context, cfg config, log *slog.Logger) (*store, error) {
	if len(cfg.etcd.urls) > 0 {
		if plain := cfg.etcd.plainRemote(); plain != "" {
			log.WarnContext(ctx, "etcd is reached in plain text: whoever sits between can change serials; use https with client certificates", "etcd", plain)
		}
		st, err := cfg.etcd.open()
		if err != nil {
			return nil, err
		}
		return st, nil
	}
	etcd, err := etcdembed.Start(ctx, etcdembed.Config{Dir: cfg.dataDir, Logger: log})
	if err != nil {
		return nil, err
	}
	own := cfg.etcd
	own.urls = []string{etcd.Endpoint()}
	st, err := own.open()
	if err != nil {
		return nil, errors.Join(err, etcd.Close())
	}
	st.etcd = etcd
	if err := initEmpty(ctx, st, log); err != nil {
		return nil, errors.Join(err, st.Close())
	}
	return st, nil
}

func (e etcdFlags) open() (*store, error) {
	cfg, err := e.store()
	if err != nil {
		return nil, err
	}
	connected := new(atomic.Pointer[witness.Store])
	cfg.Connected = func() {
		if w := connected.Load(); w != nil {
			w.Connected()
		}
	}
	client, err := etcdstore.Dial(cfg)
	if err != nil {
		return nil, err
	}
	st, err := etcdstore.New(client, e.pool)
	if err != nil {
		return nil, errors.Join(err, client.Close())
	}
	return &store{Store: st, client: client, connected: connected}, nil
}

// watch notices an etcd of ours that stopped by itself, and looks once at one that is not.
func (s *store) watch(ctx context.Context, log *slog.Logger) error {
	if s.etcd == nil {
		warnings, err := s.client.CheckServer(ctx)
		for _, w := range warnings {
			log.WarnContext(ctx, w)
		}
		if err != nil && ctx.Err() == nil {
			log.WarnContext(ctx, "etcd was not checked", "error", err)
		}
		return nil
	}
	select {
	case <-s.etcd.Done():
		return errors.New("the embedded etcd has stopped; the log says why")
	case <-ctx.Done():
		return nil
	}
}

// missPool says how to create the pool where there is none once the store was read. A server never does
// it by itself in an etcd that is not its own: one that has lost everything looks the same.
func (s *store) missPool(ctx context.Context, loaded <-chan struct{}, etcd etcdFlags, log *slog.Logger) error {
	if s.etcd != nil {
		return nil
	}
	select {
	case <-loaded:
	case <-ctx.Done():
		return nil
	}
	entries, _, err := s.Get(ctx, alloc.Key{Kind: alloc.KindPool})
	if err == nil && entries[0].Token == "" && entries[0].Err == nil {
		log.WarnContext(ctx, "the store holds no pool; this server serves as soon as one is created", "create_it", etcd.initCommand())
	}
	return nil // an error is the view's to tell
}

func (s *store) Close() error {
	if s.witness != nil {
		s.witness.Close()
	}
	err := s.client.Close()
	if s.seen != nil {
		err = errors.Join(err, s.seen.Close())
	}
	if s.etcd != nil {
		err = errors.Join(err, s.etcd.Close())
	}
	return err
}
