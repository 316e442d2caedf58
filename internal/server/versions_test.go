package server

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

// nextVersion is the store of a server one step ahead: into every open message that it writes it puts a
// field that this version does not know, with a value of its own.
type nextVersion struct {
	alloc.Store
	fields atomic.Int64
}

func (s *nextVersion) extra(have []byte) []byte {
	if have != nil {
		return have // it was there when the record was read
	}
	b := protowire.AppendTag(nil, 1000, protowire.BytesType)
	return protowire.AppendString(b, fmt.Sprint("field ", s.fields.Add(1)))
}

func (s *nextVersion) Commit(ctx context.Context, tx alloc.Tx) (alloc.Revision, error) {
	puts := make([]alloc.Record, 0, len(tx.Put))
	for _, rec := range tx.Put {
		puts = append(puts, s.grown(rec))
	}
	tx.Put = puts
	return s.Store.Commit(ctx, tx)
}

func (s *nextVersion) grown(rec alloc.Record) alloc.Record {
	switch r := rec.(type) {
	case *alloc.Pool:
		p := *r
		p.Extra, p.PolicyExtra = s.extra(p.Extra), s.extra(p.PolicyExtra)
		return &p
	case *alloc.Counter:
		c := *r
		c.Extra = s.extra(c.Extra)
		return &c
	case *alloc.Host:
		h := *r
		h.Extra = s.extra(h.Extra)
		return &h
	case *alloc.Sandbox:
		sb := *r
		sb.Extra = s.extra(sb.Extra)
		sb.Bindings = append([]alloc.Binding(nil), sb.Bindings...)
		for i := range sb.Bindings {
			sb.Bindings[i].Extra = s.extra(sb.Bindings[i].Extra)
		}
		sb.Stints = append([]alloc.Stint(nil), sb.Stints...)
		for i := range sb.Stints {
			sb.Stints[i].Extra = s.extra(sb.Stints[i].Extra)
		}
		if sb.Claim != nil {
			c := *sb.Claim
			c.Extra = s.extra(c.Extra)
			sb.Claim = &c
		}
		return &sb
	case *alloc.OldStint:
		o := *r
		o.Extra, o.Stint.Extra = s.extra(o.Extra), s.extra(o.Stint.Extra)
		return &o
	case *alloc.Checkpoint:
		c := *r
		c.Extra = s.extra(c.Extra)
		return &c
	case *alloc.Request:
		q := *r
		q.Extra = s.extra(q.Extra)
		return &q
	}
	return rec
}

// extras is what every open message of a pool carries that this version does not know, and the token of
// the record that it stands in.
type extras map[string]struct {
	extra string
	token alloc.Token
}

func extrasOf(t *testing.T, st alloc.Store) extras {
	t.Helper()
	all := extras{}
	add := func(e alloc.Entry, extra []byte, format string, args ...any) {
		all[fmt.Sprintf(format, args...)] = struct {
			extra string
			token alloc.Token
		}{string(extra), e.Token}
	}
	entries, at, err := st.Get(t.Context(), alloc.Key{Kind: alloc.KindPool}, alloc.Key{Kind: alloc.KindCounter})
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range alloc.Kinds() {
		page, _, err := st.List(t.Context(), kind, "", 1000, at)
		if err != nil {
			t.Fatal(err)
		}
		entries = append(entries, page...)
	}
	for _, e := range entries {
		if e.Err != nil {
			t.Fatal(e.Err)
		}
		switch r := e.Record.(type) {
		case *alloc.Pool:
			add(e, r.Extra, "pool")
			add(e, r.PolicyExtra, "policy")
		case *alloc.Counter:
			add(e, r.Extra, "counter")
		case *alloc.Host:
			add(e, r.Extra, "host %s", r.Name)
		case *alloc.Sandbox:
			add(e, r.Extra, "sandbox %s", r.Serial)
			for _, b := range r.Bindings {
				add(e, b.Extra, "binding %s", b.Serial)
			}
			for _, s := range r.Stints {
				add(e, s.Extra, "stint %s %s", r.Serial, s.Epoch)
			}
			if r.Claim != nil {
				add(e, r.Claim.Extra, "claim %s %s", r.Serial, r.Epoch)
			}
		case *alloc.OldStint:
			add(e, r.Extra, "moved %s %s", r.Sandbox, r.Stint.Epoch)
			add(e, r.Stint.Extra, "stint %s %s", r.Sandbox, r.Stint.Epoch) // the same as before it moved
		case *alloc.Checkpoint:
			add(e, r.Extra, "checkpoint %s", r.Serial)
		case *alloc.Request:
			add(e, r.Extra, "request %s", r.ID)
		}
	}
	return all
}

// TestMixedVersions: a server of this version and one a step ahead work on one pool, and move sandboxes
// from host to host, each host by either of them. What the newer one added to any open message is there
// after this one has written the record.
func TestMixedVersions(t *testing.T) {
	name := newPool()
	truth := openPool(t, shared.Endpoint(), name)
	ahead := &nextVersion{Store: openPool(t, shared.Endpoint(), name)}
	initPool(t, ahead)
	checked(t, truth)
	older, newer := start(t, Config{Store: openPool(t, shared.Endpoint(), name)}), start(t, Config{Store: ahead})
	older.waitLoaded()
	newer.waitLoaded()
	servers := []*running{older, newer}

	// By kind of message: those of the newer server in a record that the older one wrote over, and stints
	// that it moved out of theirs.
	kept := map[string]int{}
	step := func(by *running, do func()) {
		t.Helper()
		before := extrasOf(t, truth)
		do()
		after := extrasOf(t, truth)
		for what, was := range before {
			is, there := after[what]
			kind, _, _ := strings.Cut(what, " ")
			switch {
			case was.extra == "":
			case !there && kind != "claim": // a claim that is over is gone as a whole
				t.Errorf("%s is gone", what)
			case there && is.extra != was.extra:
				t.Errorf("%s carried %q, and now %q", what, was.extra, is.extra)
			case there && by == older && is.token != was.token:
				kept[kind]++
			}
		}
		for what := range after {
			of, moved := strings.CutPrefix(what, "moved ")
			if _, before := before[what]; moved && !before && by == older && after["stint "+of].extra != "" {
				kept["moved"]++
			}
		}
	}
	hosts := map[string]*machine{}
	for _, host := range []string{"a", "b"} {
		hosts[host] = join(t, newer.dial(host), host)
	}
	// through is a host that speaks to one server from now on.
	through := func(host string, by *running) *machine {
		m := hosts[host]
		m.Client = by.dial(host)
		return m
	}
	var sb *alloc.Sandbox
	step(newer, func() { sb = through("a", newer).register() })
	// Every call by either server; the record ends up with more stints than it keeps.
	const moves = 36
	for i := range moves {
		by := func(call int) *running { return servers[(i>>(call%3)+call+i)%2] }
		from, to, run := []string{"a", "b"}[i%2], []string{"b", "a"}[i%2], fmt.Sprint("r", i)
		var h alloc.Handoff
		step(by(0), func() { h = through(from, by(0)).dump(sb) })
		step(by(1), func() { h = through(from, by(1)).confirm(h, alloc.SeenStopped) })
		var c alloc.ClaimAnswer
		step(by(2), func() { c = through(to, by(2)).claim(h.Checkpoint, run) })
		if i%5 == 4 { // it goes back, and is claimed again by way of the other server
			step(by(3), func() {
				if _, err := through(to, by(3)).Release(t.Context(), alloc.ReleaseCommand{Mutation: hosts[to].mutation(), Sandbox: sb.Serial, Epoch: c.Sandbox.Epoch, BootID: hosts[to].boot, Run: run}); err != nil {
					t.Fatal(err)
				}
			})
			run += "again"
			step(by(4), func() { c = through(to, by(4)).claim(h.Checkpoint, run) })
		}
		step(by(5), func() {
			m := through(to, by(5))
			h, _, err := m.Bind(t.Context(), m.bindCommand(c.Sandbox, run))
			if err != nil {
				t.Fatal(err)
			}
			sb = &h.Sandbox
		})
		step(by(6), func() {
			if _, err := by(6).dial("").Allocate(t.Context(), alloc.AllocateCommand{RequestID: client.NewRequestID(), Count: 1}); err != nil {
				t.Fatal(err)
			}
		})
	}
	// A clone of what the newer server recorded, registered by the older one; and the end.
	owner := sb.Owner
	var h alloc.Handoff
	step(newer, func() { h = through(owner, newer).dump(sb) })
	step(older, func() {
		m := through(owner, older)
		var err error
		if h, err = m.Abort(t.Context(), alloc.AbortCommand{Mutation: m.mutation(), Sandbox: sb.Serial, Epoch: sb.Epoch, Checkpoint: h.Checkpoint.Serial, ZeroGiven: true}); err != nil {
			t.Fatal(err)
		}
	})
	step(older, func() {
		m := through(owner, older)
		if c := m.claim(h.Checkpoint, "clone"); c.Outcome != alloc.MayClone {
			t.Fatalf("a copy of what lives may %s", c.Outcome)
		}
		cmd := m.newSandbox(nil)
		cmd.Items[0].ParentCheckpoint = h.Checkpoint.Serial
		if _, _, err := m.Register(t.Context(), cmd); err != nil {
			t.Fatal(err)
		}
	})
	step(older, func() {
		m := through(owner, older)
		if _, err := m.End(t.Context(), alloc.EndCommand{Mutation: m.mutation(), Sandbox: sb.Serial, Epoch: sb.Epoch}); err != nil {
			t.Fatal(err)
		}
	})
	for _, kind := range []string{"counter", "host", "sandbox", "binding", "stint", "claim", "checkpoint", "moved"} {
		if kept[kind] == 0 {
			t.Errorf("the older server never wrote over a %s of the newer one", kind)
		}
	}
	t.Logf("kept: %v", kept)
}

// TestNewerInOneRecord: what this version cannot carry, an unknown word or a field in a closed message,
// is refused for that record alone.
func TestNewerInOneRecord(t *testing.T) {
	name := newPool()
	st := openPool(t, shared.Endpoint(), name)
	initPool(t, st)
	checked(t, st)
	w := otherThan(t, name)
	r := start(t, Config{Store: st})
	r.waitLoaded()
	a := join(t, r.dial("a"), "a")
	varint := func(n protowire.Number) []byte {
		return protowire.AppendVarint(protowire.AppendTag(nil, n, protowire.VarintType), 99)
	}
	in := func(n protowire.Number, inner []byte) []byte {
		return protowire.AppendBytes(protowire.AppendTag(nil, n, protowire.BytesType), inner)
	}
	for what, c := range map[string]struct {
		added   []byte
		refused bool
	}{
		"a field of the sandbox":         {varint(1000), false},
		"a state":                        {varint(2), true},
		"a field of the parent":          {in(11, varint(1000)), true},
		"a field of a request mark":      {in(13, varint(1000)), true},
		"a binding of a type":            {in(6, varint(2)), true},
		"a stint that began in some way": {in(7, varint(5)), true},
		"a field of a claimant":          {in(10, append(varint(1000), in(1, varint(1000))...)), true},
	} {
		sb, beside := a.register(), a.register()
		was := w.get(sb.Key())
		w.put(sb.Key(), was+string(c.added))
		end := func(sb *alloc.Sandbox) error {
			_, err := a.End(t.Context(), alloc.EndCommand{Mutation: a.mutation(), Sandbox: sb.Serial, Epoch: sb.Epoch})
			return err
		}
		_, err := a.Sandbox(t.Context(), sb.Serial, true)
		switch {
		case c.refused && (!errors.Is(err, alloc.ErrFormat) || !errors.Is(end(sb), alloc.ErrFormat)):
			t.Errorf("%s: %v", what, err)
		case !c.refused && (err != nil || end(sb) != nil):
			t.Errorf("%s: %v", what, err)
		}
		if err := end(beside); err != nil {
			t.Errorf("beside %s: %v", what, err)
		}
		if c.refused {
			if got := w.get(sb.Key()); got != was+string(c.added) {
				t.Errorf("%s: the record was written over", what)
			}
			w.put(sb.Key(), was)
		}
	}
}

// TestNewerPool: a pool of a newer format is neither served nor written by this version, which says why
// and what to do.
func TestNewerPool(t *testing.T) {
	name := newPool()
	st := openPool(t, shared.Endpoint(), name)
	initPool(t, st)
	checked(t, st)
	w := otherThan(t, name)
	r := start(t, Config{Store: st})
	r.waitLoaded()
	a := join(t, r.dial("a"), "a")
	sb := a.register()
	key := alloc.Key{Kind: alloc.KindPool}
	was := w.get(key)
	w.put(key, was+string(protowire.AppendVarint(protowire.AppendTag(nil, 5, protowire.VarintType), alloc.FormatVersion+1)))
	revision := func() int64 {
		got, err := w.raw.Get(t.Context(), "/nsalloc/1/"+name+"/", clientv3.WithPrefix(), clientv3.WithSort(clientv3.SortByModRevision, clientv3.SortDescend), clientv3.WithLimit(1))
		if err != nil {
			t.Fatal(err)
		}
		return got.Kvs[0].ModRevision
	}
	before := revision()
	started := start(t, Config{Store: openPool(t, shared.Endpoint(), name)})
	started.waitLoaded()
	for _, r := range []*running{r, started} {
		a.Client = r.dial("a")
		for what, err := range map[string]error{
			"Get":      second(a.Sandbox(t.Context(), sb.Serial, true)),
			"GetPool":  func() error { _, _, err := a.Pool(t.Context()); return err }(),
			"Allocate": second(r.dial("").Allocate(t.Context(), alloc.AllocateCommand{RequestID: client.NewRequestID(), Count: 1})),
			"Grant":    second(a.Grant(t.Context(), alloc.GrantCommand{Mutation: a.mutation(), Count: 1})),
			"End":      second(a.End(t.Context(), alloc.EndCommand{Mutation: a.mutation(), Sandbox: sb.Serial, Epoch: sb.Epoch})),
			"Open":     second(a.Open(t.Context(), a.openCommand(sb))),
		} {
			if !errors.Is(err, alloc.ErrFormat) || !strings.Contains(err.Error(), "format 2") || !strings.Contains(err.Error(), "run servers of the version that wrote it") {
				t.Errorf("%s: %v", what, err)
			}
		}
		eventually(t, "health says it", func() bool { return r.gauge("nsalloc_serving", "") == 0 })
	}
	if after := revision(); after != before {
		t.Errorf("the pool was written at revision %d", after)
	}
	w.put(key, was)
	for _, r := range []*running{r, started} {
		if _, err := r.dial("").Sandbox(t.Context(), sb.Serial, true); err != nil {
			t.Errorf("of this format again: %v", err)
		}
	}
}
