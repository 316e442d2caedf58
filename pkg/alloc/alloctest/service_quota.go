package alloctest

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// testQuota: a host is granted its quota in 24 hours, whatever lives its agent begins and whatever the clock does.
func testQuota(t *testing.T, p *Pool) {
	ctx, a, b := t.Context(), p.Agent("a"), p.Agent("b")
	const quota = alloc.MinHostQuota
	must[*alloc.Pool](t)(func() (*alloc.Pool, error) {
		pool, _, err := p.SetPolicy(ctx, alloc.SetPolicyCommand{RequestID: p.Request(), Fields: map[string]string{"host-quota": "1048576"}})
		return pool, err
	}())
	began := a.Record().Quota.Since
	if used := a.Record().Quota.Used; used != 1000 || !began.Equal(p.Clock.Now()) {
		t.Fatalf("%d used since %s of what the host was granted when it joined", used, began)
	}
	grant := func(n uint64) (alloc.GrantCommand, error) {
		cmd := alloc.GrantCommand{Mutation: a.Mutation(), Count: n}
		_, err := p.Grant(ctx, cmd)
		return cmd, err
	}
	granted := func(n uint64) alloc.GrantCommand {
		t.Helper()
		cmd, err := grant(n)
		if err != nil {
			t.Fatal(err)
		}
		return cmd
	}
	denied := func(n uint64, wait time.Duration) {
		t.Helper()
		before := get(t, p.Store, alloc.HostKey("a"), alloc.Key{Kind: alloc.KindCounter})
		_, err := grant(n)
		e, ok := errors.AsType[*alloc.Error](err)
		if !ok || e.Reason != alloc.ReasonExhausted || e.Subject != "host a" || e.RetryAfter != wait ||
			!strings.Contains(e.Fix, "nsalloc pool policy set host-quota=2097152") || !strings.Contains(e.Msg, "quota is 1048576 in 24 hours") {
			t.Errorf("%d more: %+v, %v", n, e, err)
		}
		if after := get(t, p.Store, alloc.HostKey("a"), alloc.Key{Kind: alloc.KindCounter}); after[0].Token != before[0].Token || after[1].Token != before[1].Token {
			t.Errorf("what was refused has changed the store")
		}
	}
	denied(quota, time.Hour)
	p.Clock.Move(time.Hour)
	last := granted(quota - 1000)
	if _, err := p.Grant(ctx, last); err != nil {
		t.Errorf("the last one asked for again: %v", err)
	}
	denied(1, time.Hour)
	a.Nonce = "another-life-0123456"
	if h, _, err := p.Hello(ctx, a.Hello()); err != nil || h.Quota.Used != quota {
		t.Fatalf("%+v, %v", h, err)
	} else {
		a.Incarnation = h.Incarnation
	}
	denied(1, time.Hour)
	if _, err := p.Grant(ctx, alloc.GrantCommand{Mutation: b.Mutation(), Count: quota - 1000}); err != nil {
		t.Errorf("another host pays for it: %v", err)
	}
	p.Clock.Move(alloc.QuotaWindow - time.Hour - time.Second)
	denied(1, time.Minute)
	p.Clock.Move(time.Second)
	granted(1)
	if q := a.Record().Quota; q.Used != 1 || !q.Since.Equal(began.Add(alloc.QuotaWindow)) {
		t.Errorf("the next window: %+v", q)
	}
	// Steps of the clock: ahead begins one window early; back, and ahead again, none.
	p.Clock.Move(365 * 24 * time.Hour)
	granted(quota)
	for range 3 {
		p.Clock.Move(-300 * 24 * time.Hour)
		denied(1, time.Hour)
		p.Clock.Move(300 * 24 * time.Hour)
		denied(1, time.Hour)
	}
	// An operator need not wait.
	for _, most := range []string{"2097152", "0"} {
		if _, _, err := p.SetPolicy(ctx, alloc.SetPolicyCommand{RequestID: p.Request(), Fields: map[string]string{"host-quota": most}}); err != nil {
			t.Fatal(err)
		}
		granted(quota)
	}
	granted(quota) // there is no limit
}
