package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nsalloc/nsalloc/internal/etcdstore"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

func (c *cli) poolCommand() *cobra.Command {
	return group("pool", "The pool: the hosts among which containers move", c.poolStatusCommand(), c.poolPolicyCommand(), c.poolInitCommand(), c.poolRecoverCommand())
}

func (c *cli) poolStatusCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "status",
		Short:   "Show the pool: whether it issues serials, and how many it has left",
		Example: "  nsalloc pool status",
		Args:    usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.withPool(cmd.Context(), func(ctx context.Context, p *client.Client) error {
				found, err := p.PoolStatus(ctx)
				if err != nil {
					return err
				}
				if found.Pool == nil {
					return errMissing("pool")
				}
				waitsFor, err := unsettled(ctx, p, found.Pool)
				if err != nil {
					return err
				}
				return c.printPool(poolView(found.Pool, found.Level, found.Standing, waitsFor), found.Level)
			})
		},
	}
}

func (c *cli) poolRecoverCommand() *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use:   "recover [--yes]",
		Short: "Open a pool whose store has lost history, in its next generation",
		Long: `Open a pool that a server has closed because its store has lost history, in a later generation.

A store that was put back to an older snapshot knows nothing of what was written since: which serials were
issued, which sandboxes there are, who owns them. The servers' logs say what they have seen and the store has
not. If there is a newer snapshot, put that back instead: then nothing is lost.

Servers do this by themselves, once in ten minutes and up to six times in a row, after they have heard what all of
them have seen; nsalloc pool status says what they wait for. This command waits for nobody.

No serial that was issued is issued again: the pool goes into a generation that nobody has seen, and its counter
begins at a random point of it. What is left of all ranges is burned. The hosts' agents register again what lives on
them, under the serials that it has, and tell again what they have dumped and restored lately. Images of before can be
restored when every host has come back, or was waived (nsalloc host waive).`,
		Example: "  nsalloc pool recover",
		Args:    usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c.takesLong(cmd)
			return c.mend(cmd.Context(), []string{string(alloc.KindCounter)}, mendFlags{yes: yes, force: true})
		},
	}
	cmd.Flags().BoolVar(&yes, "yes", false, "recover without asking")
	return cmd
}

func (c *cli) printPool(d poolDoc, l *alloc.Level) error {
	f := fields{}
	f.add("Pool", in(styleKey, d.UUID))
	state := in(styleGood, d.State)
	if d.State != string(alloc.PoolOpen) {
		state = in(styleBad, d.State+": its store has lost history, and nothing is issued until the servers have taken a new generation, or: nsalloc pool recover")
	}
	f.add("State", state)
	c.addStanding(&f, d.Standing)
	f.add("Generation", fmt.Sprintf("%d (serials begin with %04x)", d.Generation, d.Generation))
	if !d.Settled {
		f.add("Waits for", in(styleBad, namesOf(d.WaitsFor)+": the store has lost history, and older images are not restored before these hosts have come back; for one that is gone for good: nsalloc host waive NAME"))
	}
	if l != nil {
		c.addLevel(&f, *l)
	}
	f.add("Format", d.Format)
	f.add("Policy", fmt.Sprintf("a second restore of a live sandbox: %s", d.Policy.Live))
	f.add("", fmt.Sprintf("a copy of a sandbox that is over: %s", d.Policy.Over))
	f.add("", fmt.Sprintf("images that nobody knows: %s", d.Policy.Unknown))
	f.add("", fmt.Sprintf("a server that does not hear what another one has seen: %s", d.Policy.UnheardWitness))
	f.add("", "serials for one host in 24 hours: "+quotaText(d.Policy.HostQuota))
	return c.print(answer{doc: d, names: []string{d.UUID}, lines: c.fieldText(f)})
}

// addStanding says whether the server that was asked trusts its store, and what it has heard.
func (c *cli) addStanding(f *fields, s *standingDoc) {
	if s == nil {
		return
	}
	if !s.Trusts {
		f.add("Server", in(styleBad, s.Server+" issues nothing: "+s.Why))
	}
	for i, o := range s.Others {
		title, says := "", in(styleGood, o.Name+": "+o.Says)
		if i == 0 {
			title = "Heard"
		}
		switch {
		case o.Says == string(alloc.SaysSound) || o.Says == string(alloc.SaysNew):
		case o.Why != "":
			says = in(styleBad, o.Name+": "+o.Says+": "+o.Why)
		default:
			says = in(styleBad, o.Name+": "+o.Says)
		}
		f.add(title, says)
	}
}

// addLevel says how much is left, in words that need no arithmetic.
func (c *cli) addLevel(f *fields, l alloc.Level) {
	left := fmt.Sprintf("%s serials of this generation, and %d generations", thousands(l.Left), l.Generations)
	if l.Left == 0 {
		left = fmt.Sprintf("no serial of this generation, nothing is issued; %d generations: begin the next with nsalloc mend counter --force", l.Generations)
	}
	f.add("Left", left)
	if l.Generations < alloc.FewGenerations {
		f.add("", in(styleBad, fmt.Sprintf("fewer than %s generations are left: none is begun any more but by nsalloc pool recover; see in the servers' logs what uses them up", thousands(alloc.FewGenerations))))
	}
	switch {
	case l.Over == 0:
	case l.Burn == 0:
		f.add("Burn", "none in the last "+span(l.Over))
	case l.RunsOut.IsZero():
		f.add("Burn", fmt.Sprintf("%s a second in the last %s: more than 200 years are left", thousands(uint64(math.Ceil(l.Burn))), span(l.Over)))
	default:
		f.add("Burn", fmt.Sprintf("%s a second in the last %s: this generation is used up on %s, in %s",
			thousands(uint64(math.Ceil(l.Burn))), span(l.Over), c.local(l.RunsOut).Format(time.DateOnly), span(l.RunsOut.Sub(c.now()))))
	}
}

// thousands is a number with its digits in groups.
func thousands(n uint64) string {
	s := strconv.FormatUint(n, 10)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// quotaText is a host's quota in words.
func quotaText(n uint64) string {
	if n == 0 {
		return "no limit"
	}
	return thousands(n)
}

type poolFlags struct {
	etcd          []string
	ca, cert, key string
	name          string
	policy        map[string]*string // by the field's name
}

func (c *cli) poolInitCommand() *cobra.Command {
	f := poolFlags{policy: map[string]*string{}}
	cmd := &cobra.Command{
		Use:   "init --etcd URL[,URL...] [--pool NAME]",
		Short: "Create a pool in an etcd",
		Long: `Create a pool in an etcd, in generation 1.

It talks to the etcd itself, before any server does: a server never takes an empty store for a new pool,
because a store that lost everything looks the same. Where a pool is already, nothing is changed.

A server with an etcd of its own (nsalloc dev) does not need it.`,
		Example: "  nsalloc pool init --etcd http://10.0.0.1:2379,http://10.0.0.2:2379",
		Args:    usageArgs(cobra.NoArgs),
		RunE:    func(cmd *cobra.Command, _ []string) error { return c.poolInit(cmd.Context(), f) },
	}
	fl := cmd.Flags()
	fl.StringSliceVar(&f.etcd, "etcd", nil, "client `URL`s of the etcd")
	fl.StringVar(&f.ca, "etcd-cacert", "", "`FILE` with the certificates that etcd's one is checked against")
	fl.StringVar(&f.cert, "etcd-cert", "", "`FILE` with the certificate to show to etcd")
	fl.StringVar(&f.key, "etcd-key", "", "`FILE` with its key")
	fl.StringVar(&f.name, "pool", "default", "the pool's `NAME` in that etcd, as nsalloc-server --pool has it")
	for _, field := range alloc.PolicyFields() {
		f.policy[field.Name] = fl.String("policy-"+field.Name, field.Of(alloc.DefaultPolicy()), field.What)
	}
	return cmd
}

func (c *cli) poolInit(ctx context.Context, f poolFlags) error {
	if len(f.etcd) == 0 {
		return usage("pool init needs --etcd: the client URLs of the etcd that keeps the pool, such as http://127.0.0.1:2379")
	}
	fields := map[string]string{}
	for name, text := range f.policy {
		fields[name] = *text
	}
	policy, err := alloc.DefaultPolicy().With(fields)
	if err != nil {
		return err
	}
	cfg, err := f.store()
	if err != nil {
		return err
	}
	etcd, err := etcdstore.Dial(cfg)
	if err != nil {
		return usage("etcd %s: %w", strings.Join(f.etcd, ","), err)
	}
	defer etcd.Close()
	store, err := etcdstore.New(etcd, f.name)
	if err != nil {
		return err
	}
	ctx, cancel := c.deadline(ctx)
	defer cancel()
	pool, err := alloc.NewService(store, nil).InitPool(ctx, policy)
	if err != nil {
		return err
	}
	return c.printPool(poolView(pool, nil, nil, nil), nil)
}

// store is how to reach the etcd.
func (f poolFlags) store() (etcdstore.Config, error) {
	cfg := etcdstore.Config{Endpoints: f.etcd}
	for _, u := range f.etcd {
		if strings.HasPrefix(u, "https://") {
			cfg.TLS = &tls.Config{MinVersion: tls.VersionTLS12}
		}
	}
	switch {
	case cfg.TLS == nil && f.ca+f.cert+f.key != "":
		return cfg, usage("--etcd-cacert, --etcd-cert and --etcd-key are for https URLs in --etcd")
	case (f.cert == "") != (f.key == ""):
		return cfg, usage("--etcd-cert and --etcd-key go together")
	}
	if f.ca != "" {
		pem, err := os.ReadFile(f.ca)
		if err != nil {
			return cfg, usage("--etcd-cacert: %w", err)
		}
		cfg.TLS.RootCAs = x509.NewCertPool()
		if !cfg.TLS.RootCAs.AppendCertsFromPEM(pem) {
			return cfg, usage("--etcd-cacert %s has no certificate in PEM", f.ca)
		}
	}
	if f.cert != "" {
		pair, err := tls.LoadX509KeyPair(f.cert, f.key)
		if err != nil {
			return cfg, usage("--etcd-cert and --etcd-key: %w", err)
		}
		cfg.TLS.Certificates = []tls.Certificate{pair}
	}
	return cfg, nil
}
