package alloc_test

import (
	"reflect"
	"testing"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// TestPolicyFields: each field of a policy can be set by its name, and is shown as it is set.
func TestPolicyFields(t *testing.T) {
	fields := alloc.PolicyFields()
	if n := reflect.TypeFor[alloc.Policy]().NumField(); n != len(fields) {
		t.Errorf("a policy has %d fields, %d can be set", n, len(fields))
	}
	changed := map[string]string{"live": "refuse", "over": "clone", "unknown": "refuse", "unheard-witness": "wait", "host-quota": "0"}
	for _, f := range fields {
		was := alloc.DefaultPolicy()
		is, err := was.With(map[string]string{f.Name: changed[f.Name]})
		if err != nil || f.Of(is) != changed[f.Name] || f.Of(was) == changed[f.Name] {
			t.Errorf("%s: %q, then %q, %v", f.Name, f.Of(was), f.Of(is), err)
		}
		if back, err := is.With(map[string]string{f.Name: f.Of(was)}); err != nil || back != was {
			t.Errorf("%s set back: %+v, %v", f.Name, back, err)
		}
	}
}
