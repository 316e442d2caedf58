package alloctest

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

func testAllocate(t *testing.T, p *Pool) {
	cmd := alloc.AllocateCommand{RequestID: p.Request(), Caller: "client/c", Count: 5}
	first := must[alloc.Ranges](t)(p.Allocate(t.Context(), cmd))
	if first.Count() != 5 {
		t.Errorf("5 asked for, got %v", first)
	}
	// Asked again, at this server and at another one.
	other := alloc.NewService(p.Store, p.Clock.Now)
	for _, s := range []*alloc.Service{p.Service, other} {
		if again := must[alloc.Ranges](t)(s.Allocate(t.Context(), cmd)); !slices.Equal(again, first) {
			t.Errorf("asked again: %v, before: %v", again, first)
		}
	}
	reused := cmd
	reused.Count = 6
	_, err := other.Allocate(t.Context(), reused)
	refused(t, err, alloc.ErrRequestReused)
	for range 2 {
		next := must[alloc.Ranges](t)(p.Allocate(t.Context(), alloc.AllocateCommand{RequestID: p.Request(), Caller: "client/c", Count: 7}))
		if next[0].First != first[0].Last()+1 || next.Count() != 7 { // nothing is burned while nothing is lost
			t.Errorf("%v follows %v", next, first)
		}
		first = next
	}
	elsewhere := must[alloc.Ranges](t)(other.Allocate(t.Context(), alloc.AllocateCommand{RequestID: p.Request(), Caller: "client/c", Count: alloc.MaxAllocate}))
	if elsewhere[0].First <= first[0].Last() || elsewhere.Count() != alloc.MaxAllocate {
		t.Errorf("%v after %v", elsewhere, first)
	}
	// What is left of a range and the next one make one answer.
	much := must[alloc.Ranges](t)(p.Allocate(t.Context(), alloc.AllocateCommand{RequestID: p.Request(), Caller: "client/c", Count: alloc.MaxAllocate}))
	if len(much) != 2 || much[0].First != first[0].Last()+1 || much[1].First <= elsewhere[0].Last() || much.Count() != alloc.MaxAllocate {
		t.Errorf("%v after %v and %v", much, first, elsewhere)
	}
	for _, n := range []uint64{0, alloc.MaxAllocate + 1, 1<<64 - 1} {
		_, err := p.Allocate(t.Context(), alloc.AllocateCommand{RequestID: p.Request(), Count: n})
		refused(t, err, alloc.ErrInvalid)
	}
	p.Clock.Move(alloc.RequestLife + time.Millisecond)
	_, err = p.Allocate(t.Context(), cmd)
	refused(t, err, alloc.ErrRequestExpired)
}

func testAllocateExhausts(t *testing.T, p *Pool) {
	c := &alloc.Counter{Generation: 1, Next: alloc.MaxCounter - 9}
	p.put(t, c)
	ask := func(n uint64) (alloc.Ranges, error) {
		return p.Allocate(t.Context(), alloc.AllocateCommand{RequestID: p.Request(), Caller: "c", Count: n})
	}
	_, err := ask(11)
	refused(t, err, alloc.ErrExhausted)
	if got := must[alloc.Ranges](t)(ask(10)); got[0].Last().Counter() != alloc.MaxCounter {
		t.Errorf("the last serials are %v", got)
	}
	_, err = ask(1)
	refused(t, err, alloc.ErrExhausted)
	// A counter that is damaged issues nothing.
	for _, c := range []*alloc.Counter{{Generation: 2, Next: 1}, {Generation: 1}} {
		p.put(t, c)
		_, err = ask(1)
		refused(t, err, alloc.ErrMalformed)
	}
	p.put(t, &alloc.Counter{Generation: 1, Next: alloc.MaxCounter + 1})
}

// testLastGeneration: the last generation is issued from to its end, and nothing after it.
func testLastGeneration(t *testing.T, p *Pool) {
	found := must[*alloc.Pool](t)(func() (*alloc.Pool, error) { f, _, err := p.Pool(t.Context()); return f, err }())
	late := *found
	late.Generation, late.Nonce = alloc.MaxGeneration-1, "late"
	p.put(t, &late, &alloc.Counter{Generation: late.Generation, Next: alloc.MaxCounter + 1})
	ask := func(n uint64) (alloc.Ranges, error) {
		return p.Allocate(t.Context(), alloc.AllocateCommand{RequestID: p.Request(), Caller: "c", Count: n})
	}
	raise := func() error {
		_, err := p.Mend(t.Context(), alloc.MendCommand{RequestID: p.Request(), Actor: "operator/ann", Kind: alloc.KindCounter, Force: true})
		return err
	}
	says := func(err error, want string) {
		t.Helper()
		if refused(t, err, alloc.ErrExhausted); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	_, err := ask(1)
	says(err, "begin the next generation: nsalloc mend counter --force")
	if err := raise(); err != nil {
		t.Fatal(err)
	}
	got := must[alloc.Ranges](t)(ask(1))
	if g := got[0].First.Generation(); g != alloc.MaxGeneration {
		t.Errorf("issued from generation %d", g)
	}
	a := p.Agent("a") // a host that holds some of the last ones
	p.put(t, &alloc.Counter{Generation: alloc.MaxGeneration, Next: alloc.MaxCounter - 9})
	if got := must[alloc.Ranges](t)(p.Grant(t.Context(), alloc.GrantCommand{Mutation: a.Mutation(), Count: 10})); got[len(got)-1].Last() != 1<<63-1 {
		t.Errorf("the last serials are %v", got)
	}
	_, err = p.Grant(t.Context(), alloc.GrantCommand{Mutation: a.Mutation(), Count: 1})
	says(err, "create another pool")
	_, err = ask(alloc.MaxAllocate)
	says(err, "create another pool")
	before := get(t, p.Store, found.Key(), alloc.Key{Kind: alloc.KindCounter})
	says(raise(), "create another pool")
	if after := get(t, p.Store, found.Key(), alloc.Key{Kind: alloc.KindCounter}); after[0].Token != before[0].Token || after[1].Token != before[1].Token {
		t.Errorf("what was refused has changed the pool")
	}
	a.Sandbox() // what was granted can be spent
}

// testSweep: what was swept is expired for ever, whatever the clocks say.
func testSweep(t *testing.T, p *Pool) {
	var cmds []alloc.AllocateCommand
	for range 5 {
		cmd := alloc.AllocateCommand{RequestID: p.Request(), Caller: "c", Count: 1}
		must[alloc.Ranges](t)(p.Allocate(t.Context(), cmd))
		cmds = append(cmds, cmd)
		p.Clock.Move(time.Minute)
	}
	if n, err := p.SweepRequests(t.Context(), 100); n != 0 || err != nil {
		t.Errorf("swept %d young ones, %v", n, err)
	}
	// This server's clock steps an hour forward, and it sweeps.
	ahead := alloc.NewService(p.Store, func() time.Time { return p.Clock.Now().Add(time.Hour) })
	for _, want := range []int{3, 2, 0} {
		if n, err := ahead.SweepRequests(t.Context(), 3); n != want || err != nil {
			t.Errorf("swept %d, %v; want %d", n, err, want)
		}
	}
	for _, cmd := range cmds {
		_, err := p.Allocate(t.Context(), cmd)
		refused(t, err, alloc.ErrRequestExpired)
	}
	// So is one that came late and would have been swept too.
	_, err := p.Allocate(t.Context(), alloc.AllocateCommand{RequestID: RequestID(p.Clock.Now().Add(-90*time.Second), 77), Caller: "c", Count: 1})
	refused(t, err, alloc.ErrRequestExpired)
	must[alloc.Ranges](t)(p.Allocate(t.Context(), alloc.AllocateCommand{RequestID: p.Request(), Caller: "c", Count: 1}))
}

func testHelloAgain(t *testing.T, p *Pool) {
	a := p.Agent("a")
	before := a.Record()
	// The same life, also one that never heard its incarnation.
	for _, inc := range []alloc.Incarnation{a.Incarnation, 0} {
		cmd := a.Hello()
		cmd.Incarnation = inc
		h, pool, err := p.Hello(t.Context(), cmd)
		if err != nil || h.Incarnation != a.Incarnation || !slices.Equal(h.Granted, before.Granted) || pool.Generation != 1 {
			t.Errorf("the same life is %+v, %v", h, err)
		}
	}
	// A new boot of the same life keeps its ranges.
	a.BootID = BootID(77)
	cmd := a.Hello()
	cmd.Labels = map[string]string{"rack": "r1"}
	h, _, err := p.Hello(t.Context(), cmd)
	if err != nil || h.BootID != a.BootID || h.Incarnation != a.Incarnation || h.Granted.Count() != 1000 || h.Labels["rack"] != "r1" {
		t.Errorf("after a boot: %+v, %v", h, err)
	}
	cmd.Labels["rack"] = "changed by the caller"
	if h.Labels["rack"] != "r1" {
		t.Error("the answer shares the request's labels")
	}
	cmd.Labels["rack"] = "r1"
	reused := cmd
	reused.Labels = nil
	_, _, err = p.Hello(t.Context(), reused)
	refused(t, err, alloc.ErrRequestReused)
	if h, _, err = p.Hello(t.Context(), cmd); err != nil || h.Labels["rack"] != "r1" {
		t.Errorf("asked again: %+v, %v", h, err)
	}
}

func testHelloNewLife(t *testing.T, p *Pool) {
	a := p.Agent("a")
	clone := *a
	a.Nonce = "another-life-0123456"
	for _, inc := range []alloc.Incarnation{a.Incarnation, 0, a.Incarnation + 7} {
		cmd := a.Hello()
		cmd.Incarnation, cmd.Nonce = inc, a.Nonce+inc.String()
		before := a.Record()
		h, _, err := p.Hello(t.Context(), cmd)
		if err != nil || h.Incarnation <= before.Incarnation || len(h.Granted) != 0 {
			t.Errorf("a new life: %+v, %v", h, err)
		}
	}
	// The other one is fenced at its next write.
	_, err := p.Grant(t.Context(), alloc.GrantCommand{Mutation: clone.Mutation(), Count: 1})
	refused(t, err, alloc.ErrStaleIncarnation)
}

func testHelloReplayed(t *testing.T, p *Pool) {
	a := &Agent{Pool: p, Name: "a", BootID: BootID(1), Nonce: "first-life-012345678", t: t}
	first := a.Hello()
	if _, _, err := p.Hello(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	b := *a
	b.Nonce = "second-life-01234567"
	h, _, err := p.Hello(t.Context(), b.Hello())
	if err != nil {
		t.Fatal(err)
	}
	b.Incarnation = h.Incarnation
	if _, err := p.Grant(t.Context(), alloc.GrantCommand{Mutation: b.Mutation(), Count: 10}); err != nil {
		t.Fatal(err)
	}
	// The first one's answer was late; it must not get the second one's incarnation and ranges.
	_, _, err = p.Hello(t.Context(), first)
	refused(t, err, alloc.ErrStaleIncarnation)
}

func testHelloRefuses(t *testing.T, p *Pool) {
	a := p.Agent("a")
	many := map[string]string{}
	for i := range 33 {
		many[BootID(i)] = ""
	}
	for name, change := range map[string]func(c *alloc.HelloCommand){
		"host":          func(c *alloc.HelloCommand) { c.Host = "A" },
		"no host":       func(c *alloc.HelloCommand) { c.Host = "" },
		"slash":         func(c *alloc.HelloCommand) { c.Host = "a/b" },
		"long host":     func(c *alloc.HelloCommand) { c.Host = strings.Repeat("a", 64) },
		"boot":          func(c *alloc.HelloCommand) { c.BootID = "1" },
		"upper boot":    func(c *alloc.HelloCommand) { c.BootID = strings.ToUpper(BootID(0xabc)) },
		"short nonce":   func(c *alloc.HelloCommand) { c.Nonce = "0123456789abcde" },
		"long nonce":    func(c *alloc.HelloCommand) { c.Nonce = strings.Repeat("0", 65) },
		"nonce":         func(c *alloc.HelloCommand) { c.Nonce = strings.Repeat("\xff", 16) },
		"labels":        func(c *alloc.HelloCommand) { c.Labels = many },
		"empty label":   func(c *alloc.HelloCommand) { c.Labels = map[string]string{"": "x"} },
		"long label":    func(c *alloc.HelloCommand) { c.Labels = map[string]string{"x": strings.Repeat("x", 257)} },
		"label's bytes": func(c *alloc.HelloCommand) { c.Labels = map[string]string{"x": "\xff"} },
	} {
		cmd := a.Hello()
		change(&cmd)
		if _, _, err := p.Hello(t.Context(), cmd); alloc.ReasonOf(err) != alloc.ReasonInvalid {
			t.Errorf("%s: %v", name, err)
		}
	}
	cmd := a.Hello()
	cmd.PoolUUID = BootID(9)
	_, _, err := p.Hello(t.Context(), cmd)
	refused(t, err, alloc.ErrPoolMissing)
}

func testGrant(t *testing.T, p *Pool) {
	a := p.Agent("a")
	cmd := alloc.GrantCommand{Mutation: a.Mutation(), Count: 7}
	got := must[alloc.Ranges](t)(p.Grant(t.Context(), cmd))
	if len(got) != 2 || got[1].Count != 7 || got[1].First != got[0].Last()+1 {
		t.Errorf("granted %v", got)
	}
	if again := must[alloc.Ranges](t)(p.Grant(t.Context(), cmd)); !slices.Equal(again, got) {
		t.Errorf("asked again: %v, before %v", again, got)
	}
	reused := cmd
	reused.Count++
	_, err := p.Grant(t.Context(), reused)
	refused(t, err, alloc.ErrRequestReused)
	for _, n := range []uint64{0, alloc.MaxAllocate + 1} {
		_, err := p.Grant(t.Context(), alloc.GrantCommand{Mutation: a.Mutation(), Count: n})
		refused(t, err, alloc.ErrInvalid)
	}
	for len(a.Record().Granted) < alloc.MaxGrantedRanges {
		must[alloc.Ranges](t)(p.Grant(t.Context(), alloc.GrantCommand{Mutation: a.Mutation(), Count: 1}))
	}
	_, err = p.Grant(t.Context(), alloc.GrantCommand{Mutation: a.Mutation(), Count: 1})
	refused(t, err, alloc.ErrExhausted)
}

// testOlderGeneration: ranges die with their generation, and do not stand in the way of new ones.
func testOlderGeneration(t *testing.T, p *Pool) {
	a := p.Agent("a")
	old := a.New()
	pool, _, err := p.Pool(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	raised := *pool
	raised.Generation, raised.Nonce = 2, "other"
	p.put(t, &raised, &alloc.Counter{Generation: 2, Next: 1000})
	_, _, err = p.Register(t.Context(), old)
	refused(t, err, alloc.ErrRange)
	h, _, err := p.Hello(t.Context(), a.Hello())
	if err != nil || len(h.Granted) != 0 {
		t.Errorf("in generation 2 the host still holds %v, %v", h.Granted, err)
	}
	got := must[alloc.Ranges](t)(p.Grant(t.Context(), alloc.GrantCommand{Mutation: a.Mutation(), Count: 10}))
	if len(got) != 1 || got[0].First.Generation() != 2 {
		t.Errorf("granted %v", got)
	}
	sb := a.Sandbox()
	if sb.Serial.Generation() != 2 || sb.Epoch != 2<<48|1 {
		t.Errorf("%s, epoch %s", sb.Serial, sb.Epoch)
	}
}
