package main

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
)

// TestServerRemove: exit codes, and that the life that was listed is the one that is removed.
func TestServerRemove(t *testing.T) {
	for line, want := range map[string]int{
		"server remove etcd-2-1f4c9a03":         exitOK,
		"server remove etcd-1-0a1b2c3d":         exitConflict,
		"server remove etcd-1-0a1b2c3d --force": exitOK,
		"server remove etcd-3":                  exitNotFound,
		"server remove -- -x":                   exitUsage,
		"server remove":                         exitUsage,
	} {
		if code, out, errs := invoke(t, &fake{records: recorded()}, strings.Fields(line)...); code != want || (code == exitOK) == (errs != "") {
			t.Errorf("%s: exit code %d, want %d\n%s%s", line, code, want, out, errs)
		}
	}
}

// TestPoolWaits: what a server waits for is what the pool's status shows.
func TestPoolWaits(t *testing.T) {
	r := recorded()
	r.pool.State = nsallocv1.PoolState_POOL_STATE_RECOVERING
	r.standing = &nsallocv1.Standing{Server: "etcd-1", Why: "it waits for etcd-2", NotBefore: timestamppb.New(noon.Add(4 * time.Minute)), Others: []*nsallocv1.OtherServer{
		{Name: "etcd-2", Address: "192.0.2.2:7000", Says: nsallocv1.Saying_SAYING_NOTHING, Why: "connection refused", Asked: timestamppb.New(noon)},
		{Name: "etcd-3", Address: "192.0.2.3:7000", Says: nsallocv1.Saying_SAYING_BEHIND, Why: "its counter is at 1", Asked: timestamppb.New(noon)},
		{Name: "etcd-4", Address: "192.0.2.4:7000", Says: nsallocv1.Saying_SAYING_SOUND, Asked: timestamppb.New(noon)},
	}}
	code, out, errs := invoke(t, &fake{records: r}, "pool", "status")
	for _, want := range []string{"recovering", "etcd-1 issues nothing: it waits for etcd-2", "etcd-2: not heard: connection refused", "etcd-3: behind: its counter is at 1", "etcd-4: sound"} {
		if code != exitOK || !strings.Contains(strings.Join(strings.Fields(out), " "), want) {
			t.Errorf("exit code %d, it does not say %q:\n%s%s", code, want, out, errs)
		}
	}
	code, out, errs = invoke(t, &fake{records: r}, "pool", "status", "-o", "json")
	if code != exitOK || !strings.Contains(out, `"not_before": "2026-`) || !strings.Contains(out, `"says": "not heard"`) {
		t.Errorf("exit code %d\n%s%s", code, out, errs)
	}
}
