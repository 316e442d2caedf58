package main

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/nsalloc/nsalloc/internal/etcdstore"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

const (
	defaultDataDir = "/var/lib/nsalloc/server"
	defaultListen  = "unix:///run/nsalloc/server.sock"
	defaultPool    = "default"
)

// etcdFlags say which etcd.
type etcdFlags struct {
	urls          []string
	ca, cert, key string
	pool          string
}

func (e *etcdFlags) add(f *pflag.FlagSet) {
	f.StringSliceVar(&e.urls, "etcd", nil, "client `URL`s of an etcd, with commas between them")
	f.StringVar(&e.ca, "etcd-cacert", "", "`FILE` with the certificates that etcd's one is checked against (default: the system's)")
	f.StringVar(&e.cert, "etcd-cert", "", "`FILE` with the certificate to show to etcd")
	f.StringVar(&e.key, "etcd-key", "", "`FILE` with its key")
	f.StringVar(&e.pool, "pool", defaultPool, "`NAME` of the pool in etcd's keyspace")
}

// config is what a server can be told.
type config struct {
	etcd      etcdFlags
	dataDir   string
	name      string
	listen    []string
	advertise string
	metrics   string
	insecure  bool
	readyFile string
	logLevel  string
	logFormat string
}

func command(stdout, stderr io.Writer) *cobra.Command {
	var cfg config
	root := &cobra.Command{
		Use:   "nsalloc-server",
		Short: "The service of an nsalloc pool",
		Long: `nsalloc-server hands out serials that are never reused and records which namespaces have them.

Without --etcd it keeps an etcd of its own in --data-dir, and creates the pool there when that is empty.
With --etcd it uses yours, where "nsalloc-server init-pool" creates the pool once.

When it listens it writes its addresses to standard output, one a line, and then the line "ready".`,
		Version:       version,
		Args:          noArgs,
		SilenceErrors: true, // main prints them
		SilenceUsage:  true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := cfg.logger(stderr)
			if err != nil {
				return err
			}
			return serve(cmd.Context(), cfg, log, stdout)
		},
	}
	root.SetVersionTemplate("nsalloc-server {{.Version}}\n")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usage("%w; `%s --help` lists the flags", err, cmd.CommandPath())
	})
	f := root.Flags()
	cfg.etcd.add(f)
	f.StringVar(&cfg.dataDir, "data-dir", defaultDataDir, "`DIR` for what this server has seen of its pool, and for the etcd of its own. It is this server's alone, and never a copy of another's")
	f.StringVar(&cfg.name, "name", "", "`NAME` of this server in the pool (default: of this machine, and kept in --data-dir)")
	f.StringArrayVar(&cfg.listen, "listen", []string{defaultListen}, "`ADDRESS` to serve on, unix:///PATH or HOST:PORT; may be repeated. Port 0 takes a free one, without HOST it is loopback (all interfaces with --insecure)")
	f.StringVar(&cfg.advertise, "advertise", "", "`ADDRESS` at which the pool's other servers reach this one, unix:///PATH or HOST:PORT (default: the first HOST:PORT of --listen, else the first socket)")
	f.StringVar(&cfg.metrics, "metrics", "", "`HOST:PORT` for Prometheus metrics (default: none)")
	f.BoolVar(&cfg.insecure, "insecure", false, "serve plain text to other machines, and believe the host names that they say")
	f.StringVar(&cfg.readyFile, "ready-file", "", "`FILE` to write the addresses to as well")
	f.StringVar(&cfg.logLevel, "log-level", "info", "`LEVEL`: debug (every call), info, warn, error")
	f.StringVar(&cfg.logFormat, "log-format", "text", "`FORMAT`: text, json")
	root.AddCommand(initPoolCommand(stdout))
	return root
}

func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usage("%q is not understood; `%s --help` shows what is", args[0], cmd.CommandPath())
	}
	return nil
}

func (c config) logger(w io.Writer) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.logLevel)); err != nil {
		return nil, usage("--log-level %q is not debug, info, warn or error", c.logLevel)
	}
	opts := &slog.HandlerOptions{Level: level}
	switch c.logFormat {
	case "text":
		return slog.New(slog.NewTextHandler(w, opts)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, opts)), nil
	}
	return nil, usage("--log-format %q is not text or json", c.logFormat)
}

// check refuses what cannot be meant, before anything is opened or made.
func (c config) check() error {
	if err := alloc.ValidateName("pool name", c.etcd.pool); err != nil {
		return usage("--pool: %w", err)
	}
	if _, err := c.etcd.store(); err != nil {
		return err
	}
	if c.dataDir == "" {
		return usage("--data-dir is empty: where is what this server has seen to be kept?")
	}
	if c.name != "" {
		if err := alloc.ValidateName("server name", c.name); err != nil {
			return usage("--name: %w", err)
		}
	}
	if len(c.listen) == 0 {
		return usage("--listen: no address")
	}
	for _, address := range c.listen {
		if _, err := parseAddress(address, c.insecure); err != nil {
			return usage("--listen: %w", err)
		}
	}
	if c.advertise != "" {
		if a, err := parseAddress(c.advertise, true); err != nil {
			return usage("--advertise: %w", err)
		} else if a.path == "" && a.host == "" {
			return usage("--advertise %s has no host: other servers would reach themselves", c.advertise)
		}
		if err := alloc.ValidateAddress(c.advertise); err != nil {
			return usage("--advertise: %w", err)
		}
	}
	if c.metrics != "" {
		if _, err := parseAddress(c.metrics, true); err != nil {
			return usage("--metrics: %w", err)
		}
	}
	return nil
}

// initCommand is the command that creates the pool which this server misses.
func (e etcdFlags) initCommand() string {
	words := []string{"nsalloc", "pool", "init", "--etcd", strings.Join(e.urls, ","), "--pool", e.pool}
	for _, f := range [][2]string{{"--etcd-cacert", e.ca}, {"--etcd-cert", e.cert}, {"--etcd-key", e.key}} {
		if f[1] != "" {
			words = append(words, f[0], f[1])
		}
	}
	return strings.Join(words, " ")
}

// store is the client's configuration for an etcd that is not ours.
func (e etcdFlags) store() (etcdstore.Config, error) {
	cfg := etcdstore.Config{Endpoints: e.urls}
	secure := 0
	for _, raw := range e.urls {
		u, err := url.Parse(raw)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" && u.Scheme != "unix" {
			return cfg, usage("--etcd %q is not a URL such as https://etcd-1:2379", raw)
		}
		if u.Scheme == "https" {
			secure++
		}
	}
	if secure > 0 && secure < len(e.urls) {
		return cfg, usage("--etcd mixes https with plain URLs; use one of them")
	}
	if e.ca == "" && e.cert == "" && e.key == "" {
		if secure > 0 {
			cfg.TLS = &tls.Config{MinVersion: tls.VersionTLS12}
		}
		return cfg, nil
	}
	switch {
	case secure == 0:
		return cfg, usage("--etcd-cacert, --etcd-cert and --etcd-key are for https URLs in --etcd")
	case (e.cert == "") != (e.key == ""):
		return cfg, usage("--etcd-cert and --etcd-key go together")
	}
	var err error
	cfg.TLS, err = e.tls()
	return cfg, err
}

func (e etcdFlags) tls() (*tls.Config, error) {
	cfg := &tls.Config{MinVersion: tls.VersionTLS12}
	if e.ca != "" {
		pem, err := os.ReadFile(e.ca)
		if err != nil {
			return nil, fmt.Errorf("--etcd-cacert: %w", err)
		}
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(pem) {
			return nil, usage("--etcd-cacert %s has no certificate in PEM", e.ca)
		}
	}
	if e.cert != "" {
		load := func() (*tls.Certificate, error) {
			c, err := tls.LoadX509KeyPair(e.cert, e.key)
			if err != nil {
				return nil, fmt.Errorf("--etcd-cert and --etcd-key: %w", err)
			}
			return &c, nil
		}
		if _, err := load(); err != nil {
			return nil, err
		}
		// Read again for each connection, so that a renewed certificate needs no restart.
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return load() }
	}
	return cfg, nil
}

// plainRemote is an endpoint that sends everything in plain text over a network; "" when there is none.
func (e etcdFlags) plainRemote() string {
	for _, raw := range e.urls {
		u, err := url.Parse(raw)
		if err != nil || u.Scheme != "http" {
			continue
		}
		if ip := net.ParseIP(u.Hostname()); u.Hostname() != "localhost" && (ip == nil || !ip.IsLoopback()) {
			return raw
		}
	}
	return ""
}

// policyFlags are init-pool's: a flag for each field of a policy.
type policyFlags map[string]*string

func (p policyFlags) add(f *pflag.FlagSet) {
	for _, field := range alloc.PolicyFields() {
		p[field.Name] = f.String("policy-"+field.Name, field.Of(alloc.DefaultPolicy()), field.What)
	}
}

func (p policyFlags) policy() (alloc.Policy, error) {
	fields := map[string]string{}
	for name, text := range p {
		fields[name] = *text
	}
	policy, err := alloc.DefaultPolicy().With(fields)
	if err != nil {
		return policy, usage("--%s", strings.Replace(err.Error(), "policy ", "policy-", 1))
	}
	return policy, nil
}
