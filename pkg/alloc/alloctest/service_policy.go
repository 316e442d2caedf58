package alloctest

import (
	"testing"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// testSetPolicy: what is named is set, all of it or nothing, and the rest of the pool's record stays.
func testSetPolicy(t *testing.T, p *Pool) {
	ctx := t.Context()
	found := must[*alloc.Pool](t)(func() (*alloc.Pool, error) { f, _, err := p.Pool(ctx); return f, err }())
	set := func(fields map[string]string) (*alloc.Pool, alloc.Policy, error) {
		return p.SetPolicy(ctx, alloc.SetPolicyCommand{RequestID: p.Request(), Fields: fields})
	}
	want := *found
	want.Policy.Live, want.Policy.HostQuota = alloc.PolicyRefuse, 1<<30
	for range 2 { // the second changes nothing
		got, _, err := set(map[string]string{"live": "refuse", "host-quota": "1073741824"})
		if err != nil || got.Policy != want.Policy || got.UUID != found.UUID {
			t.Fatalf("%+v, %v", got, err)
		}
		if now, _, err := p.Pool(ctx); err != nil || now.Policy != want.Policy || now.Nonce != found.Nonce || now.State != found.State {
			t.Errorf("%+v, %v", now, err)
		}
	}
	before := get(t, p.Store, found.Key())[0].Token
	if _, was, err := set(map[string]string{"live": "refuse"}); err != nil || was != want.Policy {
		t.Errorf("before: %+v, %v", was, err)
	}
	for _, wrong := range []map[string]string{
		nil, {"": ""}, {"quota": "1"}, {"live": "resume"}, {"live": ""}, {"host-quota": "-1"}, {"host-quota": "1"}, {"host-quota": ""},
		{"live": "clone", "over": "adopt"}, {"live": "clone", "nothing": "x"},
	} {
		_, _, err := set(wrong)
		refused(t, err, alloc.ErrInvalid)
	}
	if now := get(t, p.Store, found.Key())[0].Token; now != before {
		t.Errorf("what was refused, or said nothing new, has changed the pool: %q, then %q", before, now)
	}
	// An operator can while the pool recovers, and not where a newer version wrote.
	recovering := want
	recovering.State, recovering.Target = alloc.PoolRecovering, 7
	p.put(t, &recovering)
	if got, _, err := set(map[string]string{"host-quota": "0"}); err != nil || got.Policy.HostQuota != alloc.NoHostQuota || got.State != alloc.PoolRecovering || got.Target != 7 {
		t.Errorf("%+v, %v", got, err)
	}
	newer := want
	newer.Format = alloc.FormatVersion + 1
	p.put(t, &newer)
	_, _, err := set(map[string]string{"host-quota": "0"})
	refused(t, err, alloc.ErrFormat)
	p.put(t, found)
}
