package e2e

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/internal/testhost"
	"github.com/nsalloc/nsalloc/internal/testpool"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// TestPaths takes containers of several shapes on several ways among three hosts. docs/migrate.md says of each
// what it shows.
func TestPaths(t *testing.T) {
	shared := newPool(t, "a", "b", "c")
	for _, path := range []struct {
		name string
		take func(*pool)
	}{
		{"TenHandOffs", tenHandOffs},
		{"TwoAtOnce", twoAtOnce},
		{"Crosswise", crosswise},
		{"UserNS", userNS},
		{"Processes", severalProcesses},
		{"NestedMnt", nestedMnt},
		{"NestedNet", nestedNet},
		{"NetNSByPath", netNSByPath},
		{"HostPID", hostPID},
	} {
		t.Run(path.name, func(t *testing.T) {
			p := &pool{Pool: shared.Pool, t: t}
			path.take(p)
			p.check()
		})
	}
}

// along takes a container from host to host, beginning where it is.
func (c *container) along(s survey, hosts ...string) survey {
	c.p.t.Helper()
	for i, to := range hosts[1:] {
		s = c.hop(s, hosts[i], to)
	}
	return s
}

// tenHandOffs is the way back first, and then on: a history of eleven stints.
func tenHandOffs(p *pool) {
	route := strings.Split("a b a c b c a c b a b", " ")
	c := p.container("ten", "a", testhost.BundleOptions{})
	s := c.along(c.survey("a"), route...)
	f := p.stored(s.sandbox())
	if len(f.Sandbox.Stints) != len(route) {
		p.t.Fatalf("%d stints, want %d: %+v", len(f.Sandbox.Stints), len(route), f.Sandbox.Stints)
	}
	from := map[alloc.Serial]bool{0: true} // the first stint began from no checkpoint
	for i, st := range f.Sandbox.Stints {
		last := i == len(route)-1
		if st.Host != route[i] || st.Epoch != f.Sandbox.Stints[0].Epoch+alloc.Epoch(i) || (st.Over == alloc.OverHandedOff) == last || st.To.IsZero() != last {
			p.t.Errorf("stint %d: %+v", i, st)
		}
		if i > 0 && (st.Began != alloc.BeganClaimed || from[st.Checkpoint] || st.From.Before(f.Sandbox.Stints[i-1].To)) {
			p.t.Errorf("stint %d follows another: %+v", i, st)
		}
		from[st.Checkpoint] = true
	}
	c.remove("b", c.id)
	p.reaches(s.sandbox(), alloc.StateEnded, "b")
}

// mover is one of several containers that move at once.
type mover struct {
	*container
	from, to string
	before   survey
	source   *alloc.Sandbox
	count    int
}

func (p *pool) mover(id, from, to string) *mover {
	p.t.Helper()
	m := &mover{container: p.container(id, from, testhost.BundleOptions{}), from: from, to: to}
	m.before = m.survey(from)
	m.source = p.stored(m.before.sandbox()).Sandbox
	m.count = m.countsOn(from, 0)
	return m
}

// twoAtOnce: two containers of one host go to another at the same time.
func twoAtOnce(p *pool) { p.together(p.mover("one", "a", "b"), p.mover("other", "a", "b")) }

// crosswise: two containers change places at the same time.
func crosswise(p *pool) { p.together(p.mover("right", "a", "b"), p.mover("left", "b", "a")) }

// together moves containers so that each of them is at the last veto of its dump, and then of its restore,
// at one moment.
func (p *pool) together(movers ...*mover) {
	p.t.Helper()
	sources, targets := map[string]int{}, map[string]int{}
	for _, m := range movers {
		sources[m.from]++
		targets[m.to]++
	}
	all := func(do func(*mover) error) *errgroup.Group {
		var g errgroup.Group
		for _, m := range movers {
			g.Go(func() error { return do(m) })
		}
		return &g
	}
	p.meet("post-dump", sources, all, func(m *mover) error { return m.dump(m.from) })
	for _, m := range movers {
		m.left(m.before, m.from)
		m.move(m.from, m.to)
	}
	p.meet("post-restore", targets, all, func(m *mover) error { return m.restore(m.to, "") })
	for _, m := range movers {
		m.arrived(m.before, m.source, m.count, m.to)
		m.remove(m.to, m.id)
	}
}

// meet does something with every mover, and holds CRIU at an action until as many are there on each host
// as are to come.
func (p *pool) meet(action string, want map[string]int, all func(func(*mover) error) *errgroup.Group, do func(*mover) error) {
	p.t.Helper()
	const here, leave = "/run/meet", "/run/meet-leave"
	script := fmt.Sprintf("mkdir -p %s; : >%s/$PPID; i=0; until [ -e %s ] || [ $i = 400 ]; do sleep 0.02; i=$((i+1)); done", here, here, leave)
	for host := range want {
		h := p.Host(host)
		if err := errors.Join(os.RemoveAll(h.Path(here)), os.RemoveAll(h.Path(leave))); err != nil {
			p.t.Fatal(err)
		}
		defer p.at(host, action, beforeHook, script)()
	}
	g := all(do)
	p.eventually("all are at "+action, func() error {
		for host, n := range want {
			if came, err := os.ReadDir(p.Host(host).Path(here)); err != nil || len(came) < n {
				return fmt.Errorf("host %s: %d of %d (%v)", host, len(came), n, err)
			}
		}
		return nil
	})
	for host := range want {
		if err := p.Host(host).WriteFile(leave, nil, 0o644); err != nil {
			p.t.Fatal(err)
		}
	}
	if err := g.Wait(); err != nil {
		p.t.Fatal(err)
	}
}

func userNS(p *pool) {
	c := p.container("userns", "a", testhost.BundleOptions{UserNS: true})
	s := c.survey("a")
	if n := s.tasks[s.root].ns[alloc.User]; n.ofHost || n.sandbox != s.sandbox() {
		p.t.Errorf("its user namespace is %+v", n)
	}
	c.along(s, "a", "b", "a", "c")
	c.remove("c", c.id)
}

// severalProcesses: a tree of shells, one in a session of its own, and a zombie that nobody reaps. (A sleep that
// CRIU interrupts ends early; tail goes on.)
func severalProcesses(p *pool) {
	c := p.container("processes", "a", testhost.BundleOptions{Before: `
		( true & exec busybox tail -f /dev/null ) &
		setsid sh -c 'while :; do sleep 0.1; done' &
		sh -c 'sh -c "while :; do sleep 0.1; done" & wait' &`})
	s := c.survey("a")
	count := map[string]int{}
	for vpid, task := range s.tasks {
		count["all"]++
		for what, is := range map[string]bool{"zombie": task.zombie, "leads a session": task.session == vpid, "grandchild": task.parent != s.root && task.parent != 0} {
			if is {
				count[what]++
			}
		}
	}
	if want := map[string]int{"all": 6, "zombie": 1, "leads a session": 2, "grandchild": 2}; !maps.Equal(count, want) {
		p.t.Fatalf("the container is %v, want %v: %+v", count, want, s.tasks)
	}
	c.along(s, "a", "b", "a")
	c.remove("a", c.id)
}

// nestedMnt: a process inside has left the container's mount namespace for one of its own, and counts on a
// tmpfs that is mounted there only: so its namespace is known without anybody's word for it.
func nestedMnt(p *pool) {
	c := p.container("nestedmnt", "a", testhost.BundleOptions{Admin: true, Before: `
		unshare -m sh -c 'mount -t tmpfs private /tmp; n=0
			while :; do n=$((n+1)); echo $n > /tmp/.n && mv /tmp/.n /tmp/n; sleep 0.1; done' &`})
	inner := func(s survey) seenTask {
		for vpid, task := range s.tasks {
			if vpid != s.root {
				return task
			}
		}
		p.t.Fatalf("there is no second task: %+v", s.tasks)
		return seenTask{}
	}
	private := func(s survey) (n int) {
		p.eventually("the inner task counts in its own mount", func() error {
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/root/tmp/n", inner(s).outer))
			if err == nil {
				_, err = fmt.Sscan(string(b), &n)
			}
			return err
		})
		if _, err := os.Stat(fmt.Sprintf("/proc/%d/root/tmp/n", s.tasks[s.root].outer)); err == nil {
			p.t.Error("the first task sees the inner one's mount")
		}
		return n
	}
	s := c.survey("a")
	count := private(s)
	route := []string{"a", "b", "a"}
	for i, to := range route[1:] {
		s = c.hop(s, route[i], to)
		outer, nested := s.tasks[s.root].ns, inner(s).ns
		if outer[alloc.Mnt].serial == nested[alloc.Mnt].serial || outer[alloc.Mnt].sandbox != nested[alloc.Mnt].sandbox || outer[alloc.Net].serial != nested[alloc.Net].serial {
			p.t.Errorf("host %s: mnt %+v and %+v", to, outer[alloc.Mnt], nested[alloc.Mnt])
		}
		if n := private(s); n <= count {
			p.t.Errorf("host %s: the inner task is at %d, it was at %d", to, n, count)
		}
	}
	c.remove("a", c.id)
}

// nestedNet: CRIU itself refuses a second network namespace below runc, which has it dump the first one
// empty (--empty-ns). The container runs on as if nothing had been.
func nestedNet(p *pool) {
	c := p.container("nestednet", "a", testhost.BundleOptions{Admin: true, Before: "unshare -n sh -c 'while :; do sleep 0.1; done' &"})
	before := c.survey("a")
	source := p.stored(before.sandbox()).Sandbox
	err := c.dump("a")
	log, _ := p.Host("a").ReadFile(c.images + "-dump/dump.log")
	if err == nil || !strings.Contains(string(log), "Unable to dump more than one netns") {
		p.t.Fatalf("the dump: %v", err)
	}
	after := c.survey("a")
	for vpid, task := range before.tasks {
		for typ, n := range task.ns {
			if after.tasks[vpid].ns[typ] != n {
				p.t.Errorf("task %d, %s: %+v became %+v", vpid, typ, n, after.tasks[vpid].ns[typ])
			}
		}
	}
	if s := p.reaches(source.Serial, alloc.StateRunning, "a").Sandbox; s.Epoch != source.Epoch || s.Checkpoint != 0 {
		p.t.Errorf("%+v became %+v", source, s)
	}
	c.remove("a", c.id)
	p.reaches(source.Serial, alloc.StateEnded, "a")
}

// netNSByPath: a network namespace that was made beforehand, as CNI does, stays on each host under that
// host's serial, until it is deleted there.
func netNSByPath(p *pool) {
	const given = "/run/netns/given"
	everywhere := func(action string) {
		for _, h := range p.Hosts() {
			if err := testpool.Output(h.Command(p.ctx(), "ip", "netns", action, path.Base(given)), nil); err != nil {
				p.t.Fatal(err)
			}
		}
	}
	everywhere("add")
	c := p.container("netns", "a", testhost.BundleOptions{NetNS: given})
	c.external = map[alloc.NamespaceType]bool{alloc.Net: true}
	s := c.survey("a")
	seen := map[string]identified{"a": s.tasks[s.root].ns[alloc.Net]}
	route := []string{"a", "b", "a", "c"}
	for i, to := range route[1:] {
		s = c.hop(s, route[i], to)
		n := s.tasks[s.root].ns[alloc.Net]
		if _, k, err := p.kernel().ByPath(p.Host(to).Path(given)); err != nil || k.ID != n.kernel.ID {
			p.t.Errorf("host %s: %s is %+v (%v), the container is in %+v", to, given, k, err, n.kernel)
		}
		if was, ok := seen[to]; ok && (was.serial != n.serial || was.kernel != n.kernel) {
			p.t.Errorf("host %s: the namespace was %+v and is %+v", to, was, n)
		}
		seen[to] = n
	}
	// Another container in it meets the same serial, and is a sandbox of its own.
	next := p.container("netns-next", "b", testhost.BundleOptions{NetNS: given})
	if n := next.identify("b", next.id); n[alloc.Net] != seen["b"] || n.sandbox() == seen["b"].sandbox {
		p.t.Errorf("the next container on b: %+v, want %+v", n, seen["b"])
	}
	next.remove("b", next.id)
	c.remove("c", c.id)
	p.reaches(s.sandbox(), alloc.StateEnded, "c")
	everywhere("del")
	for host, n := range seen {
		if f := p.stored(n.serial); f.Sandbox.Owner != host {
			p.t.Errorf("serial %s is of host %s, not of %s", n.serial, f.Sandbox.Owner, host)
		}
		p.reaches(p.stored(n.serial).Sandbox.Serial, alloc.StateEnded, host)
	}
}

// hostPID: a container in its host's PID namespace keeps its pids, so the hosts count theirs far apart. A
// task whose parent died is not below its first one any more: CRIU would leave it out, so the dump is
// refused while it is there. Nor is the first task's death the container's.
func hostPID(p *pool) {
	for i, h := range p.Hosts() {
		if err := testpool.Output(h.Command(p.ctx(), "sh", "-c", fmt.Sprintf("echo %d > /proc/sys/kernel/ns_last_pid", 8000+4000*i)), nil); err != nil {
			p.t.Fatal(err)
		}
	}
	c := p.container("hostpid", "a", testhost.BundleOptions{HostPID: true, Before: `
		sh -c 'while :; do sleep 0.1; done' &
		( setsid sh -c 'echo $$ > /count/stray; while :; do sleep 0.1; done' & )`})
	s := c.survey("a")
	if n := s.tasks[s.root].ns[alloc.PID]; !n.ofHost || len(s.tasks) != 2 || s.tasks[s.root].pid != s.root {
		p.t.Fatalf("it is not in the host's PID namespace with a child: %+v", s.tasks)
	}
	h := p.Host("a")
	kill := func(pid string) {
		if err := testpool.Output(h.Command(p.ctx(), "kill", "-9", "--", pid), nil); err != nil {
			p.t.Fatal(err)
		}
	}
	stray, err := os.ReadFile(fmt.Sprintf("/proc/%d/root/count/stray", s.tasks[s.root].outer))
	if err != nil {
		p.t.Fatal(err)
	}
	err = c.dump("a")
	log, _ := h.ReadFile(c.images + "-dump/dump.log")
	if err == nil || !strings.Contains(string(log), "would leave it behind") {
		p.t.Fatalf("a dump that leaves a task behind: %v", err)
	}
	kill("-" + strings.TrimSpace(string(stray))) // the group: a child that outlives it is one more stray
	s = c.along(s, "a", "b", "a")
	s = c.pidTaken(s, "a", "c", "b")
	h = p.Host("b")

	kill(fmt.Sprint(s.root))
	p.sweptAgain("b")
	var child int
	for vpid := range s.tasks {
		if vpid != s.root {
			child = vpid
		}
	}
	for typ, n := range c.identifyPID("b", child) {
		if was := s.tasks[child].ns[typ]; n != was {
			p.t.Errorf("after the first task's death, %s: %+v became %+v", typ, was, n)
		}
	}
	if f := p.stored(s.sandbox()); f.Sandbox.State != alloc.StateRunning {
		p.t.Errorf("the first task is dead, another lives, and the sandbox is %s", f.Sandbox.State)
	}
	kill(fmt.Sprint(child))
	p.reaches(s.sandbox(), alloc.StateEnded, "b")
	c.remove("b", c.id)
}

// pidTaken moves a container from a host to one on which its first task's pid is taken: nothing runs there, and
// the images restore on a third.
func (c *container) pidTaken(before survey, from, taken, to string) survey {
	p := c.p
	p.t.Helper()
	count := c.countsOn(from, 0)
	if err := c.dump(from); err != nil {
		p.t.Fatal(err)
	}
	c.left(before, from)
	c.move(from, taken)
	c.move(from, to)

	squatter := p.Host(taken).Command(p.ctx(), "sh", "-c", fmt.Sprintf("echo %d > /proc/sys/kernel/ns_last_pid; sleep 1000 & echo $!; wait", before.root-1))
	out, err := squatter.StdoutPipe()
	if err == nil {
		err = squatter.Start()
	}
	if err != nil {
		p.t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Fscan(out, &pid); err != nil || pid != before.root {
		p.t.Fatalf("process %d was to take pid %d (%v)", pid, before.root, err)
	}
	if err := c.restore(taken, ""); err == nil {
		p.t.Fatalf("host %s: restored although pid %d is taken", taken, pid)
	}
	back := p.reaches(before.sandbox(), alloc.StateInTransit, taken).Sandbox
	p.forgets(taken, before.sandbox())
	c.remove(taken, c.id)
	if err := errors.Join(squatter.Process.Kill(), c.restore(to, "")); err != nil {
		p.t.Fatal(err)
	}
	_ = squatter.Wait()
	back.Owner = from // who the container was compared on last
	return c.arrived(before, back, count, to)
}

// sweptAgain waits for a sweep of a host that began after now.
func (p *pool) sweptAgain(host string) {
	p.t.Helper()
	a, err := p.Agent(host)
	if err != nil {
		p.t.Fatal(err)
	}
	after := time.Now()
	for range 2 { // the sweep that is under way does not count
		p.eventually("a sweep of host "+host, func() error {
			s, err := a.Status(p.ctx(), &nsallocv1.StatusRequest{})
			if err == nil && !s.GetSwept().AsTime().After(after) {
				err = errors.New("not yet")
			}
			return err
		})
		after = time.Now()
	}
}
