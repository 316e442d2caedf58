package e2e

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// watch looks at the counters of both hosts from now on, until the function that it returns is called. That
// says in which order they were seen to move, each host once while only it moves: [a b] is a migration, and
// [a b a] two copies that ran at once, since nothing that a cell does in between brings a container back.
func (c *cellRun) watch() (stop func() []string) {
	type counter struct{ pid, n int }
	var order []string
	last := map[string]counter{}
	look := func() {
		for _, h := range c.p.Hosts() {
			procs, err := processes(h)
			if err != nil {
				continue // the host's table is being read while processes go
			}
			for _, p := range procs {
				if !p.isRoot() {
					continue
				}
				b, err := os.ReadFile(h.Path("/proc/" + strconv.Itoa(p.pid) + "/root/count/n"))
				n, notNumber := strconv.Atoi(strings.TrimSpace(string(b)))
				if err != nil || notNumber != nil {
					continue // not up yet, gone, or being written
				}
				was := last[h.Name()]
				last[h.Name()] = counter{p.pid, n}
				if was.pid == p.pid && n > was.n && (len(order) == 0 || order[len(order)-1] != h.Name()) {
					order = append(order, h.Name())
				}
			}
		}
	}
	over := make(chan struct{})
	var done sync.WaitGroup
	done.Go(func() {
		t := time.NewTicker(20 * time.Millisecond)
		defer t.Stop()
		for {
			look()
			select {
			case <-over:
				look() // whoever stops it may have seen what the last look did not
				return
			case <-t.C:
			}
		}
	})
	return sync.OnceValue(func() []string {
		close(over)
		done.Wait()
		return order
	})
}

// lostFirst says of which RPCs an answer must have been lost by the time the point struck, in cells that lose
// answers: those whose commits precede the point within the operation. For the first row whose expression
// matches point and role. Where none does, no commit precedes, or whether one does is a race: what such a cell
// loses belongs to what follows the strike.
var lostFirst = []struct {
	cells string
	rpcs  []string
}{
	{`^agent/Register/received source part$`, []string{"Register"}},
	{` part$`, nil},
	{`^agent/Bind/received target late$`, []string{"Claim", "Bind"}},
	{` late$`, []string{"Claim"}},
	{`^agent/Release/received target (bound-)?orphan$`, []string{"Hello", "Release"}},
	{` (bound-)?orphan$`, []string{"Hello"}},
	{`^agent/RegisterAgain/received `, []string{"Mend", "RegisterAgain"}},
	{`RegisterAgain/`, []string{"Mend"}},
	{`^server/Grant/`, []string{"Hello"}},
	{`^server/(Confirm|Abort)/`, []string{"Open"}},
	{`^server/Bind/`, []string{"Claim"}},
	{`^server/Release/`, []string{"Claim", "Bind"}},
	{`^agent/(Hello/received|identity/.*|Grant/sending) `, []string{"Hello"}},
	{`^agent/Grant/received `, []string{"Hello", "Grant"}},
	{`^agent/Register/received source$`, []string{"Register"}},
	{`^agent/End/received `, []string{"End"}},
	{`^(agent|hook)/network-unlock/.* source$|^agent/Abort/sending`, []string{"Open"}},
	{`^agent/Abort/received`, []string{"Open", "Abort"}},
	{`^agent/Open/received|^agent/post-dump/|^hook/post-dump/answered|^agent/Confirm/sending`, []string{"Open"}},
	{`^agent/Confirm/received|^agent/outcome/.* source$`, []string{"Open", "Confirm"}},
	{`^agent/Claim/received|^agent/Bind/sending|^agent/(root|tree)/|^hook/pre-restore/answered`, []string{"Claim"}},
	{`^agent/pre-restore/(verdict-.*|answer.*) |^(agent|hook)/(post-)?setup-namespaces/`, []string{"Claim"}},
	{`^hook/post-restore/asking`, []string{"Claim"}},
	{`^agent/(Bind/received|post-restore/.*|parked/.*|outcome/.* target)|^hook/post-restore/answered`, []string{"Claim", "Bind"}},
	{`^(agent|hook)/(network-unlock|pre-resume|post-resume)/.* target$|^agent/Release/sending`, []string{"Claim", "Bind"}},
	{`^agent/Release/received`, []string{"Claim", "Bind", "Release"}},
}

// losses lists the RPCs of which an answer was lost, before the point struck and after it.
func (c *cellRun) losses() (before, after []string) {
	at := func(host, name string) (int64, bool) {
		var st unix.Stat_t
		err := unix.Stat(filepath.Join(c.directory(host), name)+".hit", &st) // renamed when it was taken
		return st.Ctim.Nano(), err == nil
	}
	struck, _ := at(c.host(), string(c.point))
	for rpc := range byRPC {
		switch lost, ok := at("", "lose/"+rpc); {
		case ok && lost <= struck:
			before = append(before, rpc)
		case ok:
			after = append(after, rpc)
		}
	}
	slices.Sort(before)
	slices.Sort(after)
	return before, after
}
