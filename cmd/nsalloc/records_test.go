package main

import (
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client/wire"
)

// The recorded pool: a container that moved from host a to host b, a clone of it, one in transit, one
// that is over, and the hosts' own sandboxes.

const (
	bootA = "aaaaaaaa-0000-4000-8000-000000000001"
	bootB = "bbbbbbbb-0000-4000-8000-000000000002"
	runID = "5a3b1c7e-9d1c-4f77-8c4d-0d5f0a6b2c11"
)

// noon is the moment of which ages count in golden files.
var noon = time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC)

// serial and epoch are both generation 1.
func serial(n uint64) uint64 { return 1<<48 | n }

func before(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(noon.Add(-d)) }

func kernel(boot string, n uint64) *nsallocv1.KernelId {
	return &nsallocv1.KernelId{BootId: boot, Id: n, Inode: 4026531000 + n}
}

var shown = []nsallocv1.NamespaceType{
	nsallocv1.NamespaceType_NAMESPACE_TYPE_MNT, nsallocv1.NamespaceType_NAMESPACE_TYPE_UTS, nsallocv1.NamespaceType_NAMESPACE_TYPE_PID,
	nsallocv1.NamespaceType_NAMESPACE_TYPE_NET,
}

func bindings(boot string, first uint64, bound time.Duration) (all []*nsallocv1.Binding) {
	for i, t := range shown {
		b := &nsallocv1.Binding{Serial: serial(first + uint64(i)), Type: t, Bound: before(bound)}
		if boot != "" {
			b.Kernel = kernel(boot, 100+first+uint64(i))
		}
		all = append(all, b)
	}
	return all
}

func recorded() records {
	day := 24 * time.Hour
	hostA := &nsallocv1.Sandbox{
		Serial: serial(1), State: nsallocv1.SandboxState_SANDBOX_STATE_RUNNING, Owner: "a", Epoch: serial(1), OfHost: true,
		Bindings: []*nsallocv1.Binding{{Serial: serial(2), Type: nsallocv1.NamespaceType_NAMESPACE_TYPE_MNT, Bound: before(9 * day),
			Kernel: &nsallocv1.KernelId{BootId: bootA, Inode: 4026531841, Weak: true}}},
		Stints:  []*nsallocv1.Stint{{Host: "a", Epoch: serial(1), From: before(9 * day), Began: nsallocv1.StintBegan_STINT_BEGAN_REGISTERED, Actor: "host/a"}},
		Created: before(9 * day),
	}
	moved := &nsallocv1.Sandbox{
		Serial: serial(0x10), State: nsallocv1.SandboxState_SANDBOX_STATE_RUNNING, Owner: "b", Epoch: serial(2),
		Bindings: bindings(bootB, 0x11, 2*time.Hour), Checkpoint: serial(0x20), Created: before(2 * time.Hour),
		Labels:   map[string]string{"command": "nginx: master process", "cgroup": "/system.slice/runc-web.scope"},
		Claimant: &nsallocv1.Claimant{Host: "b", BootId: bootB, Run: "5120@88133"},
		Stints: []*nsallocv1.Stint{
			{Host: "a", Epoch: serial(1), From: before(2 * time.Hour), To: before(78 * time.Minute), Began: nsallocv1.StintBegan_STINT_BEGAN_REGISTERED, Over: nsallocv1.StintOver_STINT_OVER_HANDED_OFF, Actor: "host/a"},
			{Host: "b", Epoch: serial(2), From: before(77 * time.Minute), Began: nsallocv1.StintBegan_STINT_BEGAN_CLAIMED, Checkpoint: serial(0x20), Actor: "host/b"},
		},
	}
	moved.Bindings[1].Gone = before(50 * time.Second)
	moved.Bindings[1].Kernel = nil
	clone := &nsallocv1.Sandbox{
		Serial: serial(0x30), State: nsallocv1.SandboxState_SANDBOX_STATE_RUNNING, Owner: "a", Epoch: serial(1),
		Bindings: bindings(bootA, 0x31, 5*time.Minute), Created: before(5*time.Minute + 7*time.Second),
		Labels: map[string]string{"command": "データベース 水"}, Parent: serial(0x10), ParentCheckpoint: serial(0x20),
		Stints: []*nsallocv1.Stint{{Host: "a", Epoch: serial(1), From: before(5 * time.Minute), Began: nsallocv1.StintBegan_STINT_BEGAN_CLONED, Actor: "host/a", Checkpoint: serial(0x20)}},
	}
	for i, b := range clone.Bindings {
		b.Parent = serial(0x11 + uint64(i))
	}
	transit := &nsallocv1.Sandbox{
		Serial: serial(0x40), State: nsallocv1.SandboxState_SANDBOX_STATE_IN_TRANSIT, Owner: "a", Epoch: serial(1),
		Bindings: bindings("", 0x41, time.Minute), Checkpoint: serial(0x50), Created: before(time.Minute),
		Labels: map[string]string{"command": "evil\x1b]0;x\a\u202edne"},
		Stints: []*nsallocv1.Stint{{Host: "a", Epoch: serial(1), From: before(time.Minute), To: before(4 * time.Second), Began: nsallocv1.StintBegan_STINT_BEGAN_REGISTERED, Over: nsallocv1.StintOver_STINT_OVER_HANDED_OFF, Actor: "host/a"}},
	}
	over := &nsallocv1.Sandbox{
		Serial: serial(0x60), State: nsallocv1.SandboxState_SANDBOX_STATE_ENDED, Owner: "a", Epoch: serial(1),
		Bindings: bindings("", 0x61, 30*time.Hour), Created: before(30 * time.Hour),
		Stints: []*nsallocv1.Stint{{Host: "a", Epoch: serial(1), From: before(30 * time.Hour), To: before(29 * time.Hour), Began: nsallocv1.StintBegan_STINT_BEGAN_REGISTERED, Over: nsallocv1.StintOver_STINT_OVER_ENDED, Actor: "host/a"}},
	}
	var digest [32]byte
	digest[0], digest[31] = 0xab, 0xcd
	r := records{
		pool: &nsallocv1.Pool{Uuid: "0d7d2f4e-5a51-4d0e-9a65-1c1b6f3f2d10", Generation: 1, State: nsallocv1.PoolState_POOL_STATE_OPEN, Format: 1,
			Policy: &nsallocv1.Policy{Live: nsallocv1.PolicyAction_POLICY_ACTION_CLONE, Over: nsallocv1.PolicyAction_POLICY_ACTION_RESUME, Unknown: nsallocv1.PolicyAction_POLICY_ACTION_ADOPT, HostQuota: alloc.DefaultHostQuota}},
		level: wire.LevelToWire(alloc.Level{Next: 1 << 46, Left: alloc.MaxCounter - 1<<46 + 1, Generations: 32766, Burn: 1.25e6, Over: 47 * time.Minute,
			RunsOut: noon.Add(5*365*day + 3*time.Hour)}),
		sandboxes: []*nsallocv1.Sandbox{hostA, moved, clone, transit, over},
		checkpoints: []*nsallocv1.Checkpoint{
			{Serial: serial(0x20), State: nsallocv1.CheckpointState_CHECKPOINT_STATE_CONSUMED, Sandbox: serial(0x10), Epoch: serial(1), Source: "a", RunId: runID, Digest: digest[:],
				Claimant: &nsallocv1.Claimant{Host: "b", BootId: bootB, Run: "5120@88133"}, Created: before(79 * time.Minute), Consumed: before(77 * time.Minute)},
			{Serial: serial(0x50), State: nsallocv1.CheckpointState_CHECKPOINT_STATE_OPEN, Sandbox: serial(0x40), Epoch: serial(1), Source: "a", Digest: digest[:], Created: before(5 * time.Second)},
			{Serial: serial(0x51), State: nsallocv1.CheckpointState_CHECKPOINT_STATE_VOID, Sandbox: serial(0x60), Epoch: serial(1), Source: "a", Digest: digest[:], Created: before(29 * time.Hour)},
		},
		hosts: []*nsallocv1.Host{
			{Name: "a", Incarnation: serial(1), BootId: bootA, Hello: before(9 * day), Labels: map[string]string{"kernel": "6.12.48", "criu": "4.1.1"},
				Granted: []*nsallocv1.Range{{First: serial(0x100), Count: 256}, {First: serial(0x400), Count: 1024}}, QuotaSince: before(2 * time.Hour), QuotaUsed: 65_536},
			{Name: "b", Incarnation: serial(3), BootId: bootB, Hello: before(20 * time.Minute), Labels: map[string]string{"kernel": "6.18.44", "criu": "4.2.1"},
				Granted: []*nsallocv1.Range{{First: serial(0x800), Count: 900}}, QuotaSince: before(21 * time.Hour), QuotaUsed: 12_345_678},
			{Name: "c", Incarnation: serial(1), BootId: bootB, Hello: before(40 * day)},
		},
	}
	for i, b := range moved.Bindings {
		if b.Kernel != nil {
			r.live = append(r.live, &nsallocv1.LiveNamespace{Binding: b, Sandbox: moved.Serial, Pids: []int32{4711, 4712, 4713}[:3-i%3], Command: "nginx: master process /usr/sbin/nginx -g daemon off;"})
		}
	}
	r.live[2].Provisional = true
	r.live = append(r.live, &nsallocv1.LiveNamespace{
		Binding: &nsallocv1.Binding{Serial: serial(5), Type: nsallocv1.NamespaceType_NAMESPACE_TYPE_USER, Kernel: &nsallocv1.KernelId{BootId: bootB, Id: 7, Inode: 4026531837}, Bound: before(20 * time.Minute)},
		Sandbox: serial(4), OfHost: true, Pids: []int32{1}, Command: "systemd",
	})
	return r
}

// broken is the same with one contradiction of each kind that people can make by hand.
func broken() records {
	r := recorded()
	twin := proto.Clone(r.sandboxes[2]).(*nsallocv1.Sandbox)
	twin.Serial = serial(0x70)
	r.sandboxes = append(r.sandboxes, twin)
	r.sandboxes[3].Stints[0].To = nil
	return r
}
