package e2e

import (
	"errors"
	"fmt"
	"os/exec"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
	"github.com/nsalloc/nsalloc/pkg/client/wire"
)

// born is how many namespaces are born while the pool is away, at least: in processes of ownTypes each.
const (
	born     = 3600
	ownTypes = 6
)

// births are processes on a host, each in namespaces of its own.
type births struct {
	cmds []*exec.Cmd
	err  error
}

// spawn starts n processes in a host's PID namespace, beside what the test does; done is closed when all are there
// or one could not be started. They end with the test.
func (p *pool) spawn(host string, n int) (b *births, done <-chan struct{}) {
	p.t.Helper()
	b, over := &births{}, make(chan struct{})
	init := p.Host(host).InitPID()
	go func() {
		defer close(over)
		runtime.LockOSThread() // never unlocked: the thread's children are the host's, and it ends with the goroutine
		fd, err := unix.Open(fmt.Sprintf("/proc/%d/ns/pid", init), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			err = unix.Setns(fd, unix.CLONE_NEWPID)
			unix.Close(fd)
		}
		for b.err = err; len(b.cmds) < n && b.err == nil; {
			c := exec.Command("sleep", "600")
			c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWNET | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUSER}
			if b.err = c.Start(); b.err == nil {
				b.cmds = append(b.cmds, c)
			}
		}
	}()
	p.t.Cleanup(func() {
		<-over
		b.end()
	})
	return b, over
}

// end ends the processes, when all were started.
func (b *births) end() {
	for _, c := range b.cmds {
		_ = c.Process.Kill()
	}
	for _, c := range b.cmds {
		_ = c.Wait()
	}
	b.cmds = nil
}

// seenSerials is what a host's agent said of each namespace, by kernel id.
type seenSerials struct {
	mu        sync.Mutex
	given     map[string]alloc.Serial // guarded by mu: told first, provisional or not
	committed map[string]alloc.Serial // guarded by mu
	of        map[alloc.Serial]string // guarded by mu: whose a committed serial is
	changed   []string                // guarded by mu: what must not be, of committed serials
	replaced  []string                // guarded by mu: the same, provisional ones too
}

func newSeen() *seenSerials {
	return &seenSerials{given: map[string]alloc.Serial{}, committed: map[string]alloc.Serial{}, of: map[alloc.Serial]string{}}
}

// look reads what the agent lists, and notes what it has said otherwise before.
func (s *seenSerials) look(p *pool, host string) (provisional, committed int, err error) {
	a, err := p.Agent(host)
	if err != nil {
		return 0, 0, err
	}
	list, err := a.ListNamespaces(p.ctx(), &nsallocv1.ListNamespacesRequest{})
	if err != nil {
		return 0, 0, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range list.GetNamespaces() {
		b := wire.BindingFromWire(n.GetBinding())
		key := b.Kernel.Key(b.Type)
		if was, ok := s.given[key]; ok && was != b.Serial {
			s.replaced = append(s.replaced, fmt.Sprintf("%s: %s became %s", key, was, b.Serial))
		}
		s.given[key] = b.Serial
		if was, ok := s.committed[key]; ok && (was != b.Serial || n.GetProvisional()) {
			s.changed = append(s.changed, fmt.Sprintf("%s: %s was committed, it is %s, provisional %v", key, was, b.Serial, n.GetProvisional()))
		}
		if n.GetProvisional() {
			provisional++
		} else {
			committed++
			if was, ok := s.of[b.Serial]; ok && was != key {
				s.changed = append(s.changed, fmt.Sprintf("%s: %s was committed for %s", key, b.Serial, was))
			}
			s.committed[key], s.of[b.Serial] = b.Serial, key
		}
	}
	return provisional, committed, nil
}

// TestBornWhileAway: namespaces are born while the pool is away, and the agent is killed in the middle. All have
// serials at once, which say that they are provisional, survive the agent, and are committed as they are within
// seconds of the pool's return; what was committed before stays so all the while.
func TestBornWhileAway(t *testing.T) {
	p := newPool(t, "a")
	const host = "a"
	processes := (born + ownTypes - 1) / ownTypes
	seen := newSeen()
	early, done := p.spawn(host, 3)
	<-done
	if early.err != nil {
		t.Fatal(early.err)
	}
	p.eventually("the first are committed", func() error {
		if provisional, committed, err := seen.look(p, host); err != nil || provisional > 0 || committed < 3*ownTypes {
			return fmt.Errorf("%d are provisional, %d committed: %w", provisional, committed, err)
		}
		return nil
	})
	before := len(seen.committed)
	if err := p.KillServer(); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	late, done := p.spawn(host, processes)
	until := func(what string, try func() error) {
		t.Helper()
		deadline, tick := time.Now().Add(2*time.Minute), time.NewTicker(50*time.Millisecond)
		defer tick.Stop()
		for err := try(); err != nil; err = try() {
			if time.Now().After(deadline) {
				t.Fatalf("%s: %v", what, err)
			}
			<-tick.C
		}
	}
	numbered := func(least int) func() error {
		return func() error {
			provisional, _, err := seen.look(p, host)
			if err == nil && provisional < least {
				err = fmt.Errorf("%d have provisional serials", provisional)
			}
			return err
		}
	}
	until("some are numbered", numbered(1))
	select {
	case <-done:
		t.Log("all were born before the agent is killed")
	default:
	}
	if err := errors.Join(p.KillAgent(host), p.StartAgentAway(p.ctx(), host)); err != nil {
		t.Fatal(err)
	}
	<-done
	if late.err != nil {
		t.Fatal(late.err)
	}
	until("all are numbered", numbered(processes*ownTypes))
	t.Logf("%d namespaces in %d processes were born, and numbered provisionally, in %v", processes*ownTypes, processes, time.Since(began).Round(time.Millisecond))

	if err := p.StartServer(p.ctx()); err != nil {
		t.Fatal(err)
	}
	back := time.Now()
	p.eventually("all are committed", func() error {
		provisional, _, err := seen.look(p, host)
		if err == nil && provisional > 0 {
			err = fmt.Errorf("%d are provisional", provisional)
		}
		return err
	})
	t.Logf("all were committed %v after the pool was back", time.Since(back).Round(time.Millisecond))
	seen.mu.Lock()
	defer seen.mu.Unlock()
	for _, what := range slices.Concat(seen.changed, seen.replaced) {
		t.Error(what)
	}
	if n := len(seen.committed); n < before+processes*ownTypes {
		t.Errorf("%d are committed, want %d and more", n, before+processes*ownTypes)
	}
	stored := 0
	for s, err := range p.Client().Sandboxes(p.ctx(), client.Filter{Owner: host, States: []alloc.SandboxState{alloc.StateRunning}, Linearizable: true}) {
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range s.Bindings {
			if serial := seen.committed[b.Kernel.Key(b.Type)]; serial != b.Serial {
				t.Errorf("%s %d: the store has %s, the agent said %s", b.Type, b.Kernel.ID, b.Serial, serial)
			}
			stored++
		}
	}
	if stored != len(seen.committed) {
		t.Errorf("the store has %d, the agent said %d", stored, len(seen.committed))
	}
	p.check()
}
