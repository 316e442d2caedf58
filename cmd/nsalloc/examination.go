package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/health/grpc_health_v1"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/internal/agent"
	"github.com/nsalloc/nsalloc/internal/agentconf"
	"github.com/nsalloc/nsalloc/internal/hookconf"
	"github.com/nsalloc/nsalloc/internal/kernelns"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
	"github.com/nsalloc/nsalloc/pkg/criuhook"
)

// examination is one run of the doctor.
type examination struct {
	*cli
	root hostRoot
}

// run makes all checks in the order in which one would mend them. None of them needs another to pass.
func (e *examination) run(ctx context.Context) []checkup {
	checks := []struct {
		name string
		do   func(context.Context) checkup
	}{
		{"root", e.user},
		{"kernel", e.kernel},
		{"criu", e.criu},
		{"criu check", e.criuCheck},
		{"hook", e.hook},
		{"other scripts", e.others},
		{"agent config", e.agentConfig},
		{"agent state", e.agentState},
		{"agent", e.agentSocket},
		{"hook socket", e.hookSocket},
		{"server", e.serverHealth},
		{"pool", e.poolState},
		{"host record", e.hostRecord},
		{"clock", e.clock},
		{"store", e.store},
	}
	var all []checkup
	for _, check := range checks {
		line := check.do(ctx)
		line.Check = check.name
		all = append(all, line)
	}
	return all
}

func (e *examination) user(context.Context) checkup {
	if uid := os.Geteuid(); uid != 0 {
		return doubtful("run it again as root", "uid %d: some of what follows cannot be seen", uid)
	}
	return good("running as root")
}

func (e *examination) kernel(context.Context) checkup {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return bad("report it", "uname: %v", err)
	}
	release := unix.ByteSliceToString(name.Release[:])
	k, err := kernelns.Open("/proc")
	if err != nil {
		return bad("run it where /proc is mounted", "Linux %s: %v", release, err)
	}
	f := k.Features()
	switch {
	case !f.KernelIDs:
		return doubtful("Linux 6.18 or later numbers namespaces itself; until then inode numbers, which the kernel reuses at once, have to do",
			"Linux %s: weak identity, NS_GET_ID does not work", release)
	case f.Liveness != nil:
		return doubtful("run the agent as root, in the host's own namespaces", "Linux %s: NS_GET_ID works, but deaths of namespaces are seen late: %v", release, f.Liveness)
	}
	return good("Linux %s, NS_GET_ID works", release)
}

func (e *examination) hook(context.Context) checkup {
	conf, err := e.root.readConf(hookconf.ConfPath)
	if err != nil {
		return bad("run it again as root", "%v", err)
	}
	var ours []hookconf.Script
	for _, s := range hookconf.Scripts(conf.text) {
		if s.Ours {
			ours = append(ours, s)
		}
	}
	shadows := e.root.shadows()
	switch {
	case len(ours) == 0 && conf.text == nil:
		return bad("nsalloc hook install", "%s does not exist: CRIU tells nobody", conf.path)
	case len(ours) == 0:
		return bad("nsalloc hook install", "%s does not run nsalloc-hook: CRIU tells nobody", conf.path)
	case len(ours) > 1:
		return bad("nsalloc hook install leaves one line of them", "%s runs nsalloc-hook %d times (lines %d and %d)", conf.path, len(ours), ours[0].Line, ours[1].Line)
	}
	if err := e.root.checkHook(ours[0].Path); err != nil {
		seen, fix, _ := strings.Cut(err.Error(), "; ")
		return bad(fix, "%s:%d: %s", conf.path, ours[0].Line, seen)
	}
	if len(shadows) > 0 {
		return bad(shadows[0].fix, "%s", shadows[0].seen)
	}
	return good("%s runs %s", conf.path, ours[0].Path)
}

func (e *examination) others(context.Context) checkup {
	if o := e.root.others(); len(o) > 0 {
		return doubtful("know them: each can stop a dump or a restore that the agent has let pass",
			"CRIU also runs %s", strings.Join(o, ", "))
	}
	return good("CRIU runs no other scripts")
}

func (e *examination) agentConfig(context.Context) checkup {
	path := e.root.path(criuhook.ConfigPath)
	st, err := os.Stat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return bad("write it (docs/install.md has a full example), then start nsalloc-agent (as root)", "%s is missing: the hook lets everything pass unseen", path)
	case err != nil:
		return bad("run it again as root", "%v", err)
	case st.Mode().Perm()&0o022 != 0:
		return bad("chmod 644 "+path, "%s can be written by others than its owner (%s)", path, st.Mode().Perm())
	}
	if _, err := agentconf.Load(path); errors.Is(err, fs.ErrPermission) {
		return doubtful("run it again as root", "%v", err)
	} else if err != nil {
		seen, keys, _ := strings.Cut(err.Error(), "; ")
		return bad("mend it, the agent does not start with it; "+keys, "%s", seen)
	}
	return good("%s is there, and can be read", path)
}

// agentState reads the state directory as the agent does at its start: where that fails the agent is not
// there to be asked.
func (e *examination) agentState(context.Context) checkup {
	s, err := agentconf.Load(e.root.path(criuhook.ConfigPath))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return skipped("the agent config does not say where it is")
	}
	if s.Host == "" {
		if s.Host, err = os.Hostname(); err != nil {
			return bad("set host in "+criuhook.ConfigPath, "%v", err)
		}
	}
	dir := e.root.path(s.StateDir)
	lost, err := agent.ExamineState(dir, s.Host)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return skipped("%s: nothing there yet; the agent makes it", dir)
	case errors.Is(err, fs.ErrPermission):
		return doubtful("run it again as root", "%v", err)
	case err != nil:
		seen, fix, _ := strings.Cut(err.Error(), "; ")
		return bad(fix, "%s", seen)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return bad("look at the kernel's log", "%s: %v", dir, err)
	}
	switch {
	case st.Flags&unix.ST_RDONLY != 0:
		return bad("have it mounted writable again; the kernel's log says why it is not", "%s: its file system is read-only: hand-offs are vetoed", dir)
	case st.Bavail == 0 || st.Files > 0 && st.Ffree == 0:
		return bad("free space, or inodes, on its disk (df, df -i)", "%s: its disk is full: hand-offs are vetoed", dir)
	case len(lost) > 0:
		seen, fix, _ := strings.Cut(lost[0].Error(), "; ")
		if more := len(lost) - 1; more > 0 {
			seen += fmt.Sprintf(" (and %d more)", more)
		}
		return doubtful(fix, "%s", seen)
	}
	return good("%s is host %s's, and can be read", dir, s.Host)
}

func (e *examination) agentSocket(ctx context.Context) checkup {
	st, err := e.agentStatus(ctx)
	if err != nil {
		return unreachable(err)
	}
	name := fmt.Sprintf("%s on host %s", e.agent, st.GetHost())
	if st.GetVersion() != "" {
		name += ", version " + st.GetVersion()
	}
	var swept time.Time
	if st.GetSwept() != nil {
		swept = st.GetSwept().AsTime()
	}
	switch {
	case st.GetDown():
		seen, fix, _ := strings.Cut(st.GetTrouble(), "; give ")
		return bad("give "+fix, "%s: %s", name, seen)
	case !st.GetConnected():
		trouble := st.GetTrouble()
		if trouble == "" {
			trouble = "it does not say why"
		}
		return bad("look at the agent's log and at the server line below; until then dumps and restores are refused, and what is new gets a provisional serial or waits for one",
			"%s: does not reach the pool: %s; %s with a provisional serial, and %s left to give", name, trouble,
			count(int(st.GetProvisional()), "namespace", "namespaces"), count(int(st.GetGranted()), "is", "are"))
	case st.GetReplaced() > 0:
		return doubtful("look at the agent's log, which names them; see that no other machine uses this host's state directory, then restart the agent",
			"%s: connected, but %s got other serials than the provisional ones that they had", name, count(int(st.GetReplaced()), "namespace", "namespaces"))
	case swept.IsZero():
		return doubtful("wait for the first sweep", "%s: connected, has not swept /proc yet", name)
	case e.now().Sub(swept) > 5*time.Minute:
		return doubtful("look at the agent's log; restart it when it hangs", "%s: connected, but its last sweep of /proc ended %s ago", name, e.age(swept))
	}
	return good("%s: incarnation %s, %s, %s, swept %s ago", name, alloc.Incarnation(st.GetIncarnation()),
		count(int(st.GetSandboxes()), "sandbox", "sandboxes"), count(int(st.GetNamespaces()), "namespace", "namespaces"), e.age(swept))
}

func (e *examination) hookSocket(ctx context.Context) checkup {
	st, err := e.agentStatus(ctx)
	switch {
	case err != nil:
		return skipped("the agent does not answer")
	case st.GetHookSocket() == "":
		return skipped("the agent does not say where it listens for the hook")
	case st.GetHookSocket() != criuhook.SocketPath:
		return bad("set hook_socket to "+criuhook.SocketPath+" in "+criuhook.ConfigPath,
			"the agent listens at %s, the hook looks at %s and nowhere else", st.GetHookSocket(), criuhook.SocketPath)
	}
	return good("%s", st.GetHookSocket())
}

func (e *examination) agentStatus(ctx context.Context) (*nsallocv1.StatusResponse, error) {
	var st *nsallocv1.StatusResponse
	err := e.withAgent(ctx, func(ctx context.Context, h *host) (err error) {
		st, err = h.Status(ctx, &nsallocv1.StatusRequest{})
		return err
	})
	return st, err
}

func (e *examination) serverHealth(ctx context.Context) checkup {
	var answer *grpc_health_v1.HealthCheckResponse
	err := e.withPool(ctx, func(ctx context.Context, p *client.Client) (err error) {
		answer, err = grpc_health_v1.NewHealthClient(p.Conn()).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
		return err
	})
	if err != nil {
		return unreachable(err)
	}
	if s := answer.GetStatus(); s != grpc_health_v1.HealthCheckResponse_SERVING {
		return bad("look at the server's log: mostly its store is away", "%s answers: %s", e.server, s)
	}
	return good("%s is serving", e.server)
}

func (e *examination) poolState(ctx context.Context) checkup {
	var pool *alloc.Pool
	err := e.withPool(ctx, func(ctx context.Context, p *client.Client) (err error) {
		pool, _, err = p.Pool(ctx)
		if err == nil && pool == nil {
			err = errMissing("pool")
		}
		return err
	})
	if err != nil {
		f := explain(err)
		if f.code == exitUnavailable {
			return skipped("the server does not answer")
		}
		seen, fix, _ := strings.Cut(f.message, "; ")
		return bad(fix, "%s", seen)
	}
	if st, err := e.agentStatus(ctx); err == nil && st.GetPool() != nil && st.GetPool().GetUuid() != pool.UUID {
		return bad("name the same server in "+criuhook.ConfigPath+" and in --server",
			"the agent is in pool %s, the server serves pool %s", st.GetPool().GetUuid(), pool.UUID)
	}
	if pool.State != alloc.PoolOpen {
		return bad("wait for the generation to be raised; the servers' logs say what they wait for", "pool %s is recovering: nothing is issued", pool.UUID)
	}
	return good("%s, generation %d, open", pool.UUID, pool.Generation)
}

// hostRecord compares the agent's life with the one that the pool has of this host. The pool refuses what
// an earlier life says.
func (e *examination) hostRecord(ctx context.Context) checkup {
	st, err := e.agentStatus(ctx)
	switch {
	case err != nil:
		return skipped("the agent does not answer")
	case st.GetIncarnation() == 0:
		return skipped("the agent has not joined a pool yet")
	}
	var record *alloc.Host
	err = e.withPool(ctx, func(ctx context.Context, p *client.Client) (err error) {
		record, err = p.Host(ctx, st.GetHost())
		if err == nil && record == nil {
			err = errMissing("host")
		}
		return err
	})
	if err != nil {
		f := explain(err)
		if f.code == exitUnavailable {
			return skipped("the server does not answer")
		}
		seen, fix, _ := strings.Cut(f.message, "; ")
		return doubtful(fix, "%s", seen)
	}
	if own := alloc.Incarnation(st.GetIncarnation()); own != record.Incarnation {
		return doubtful("look for another agent, on this machine or another one, that joins as "+record.Name+" (host in "+criuhook.ConfigPath+"), then restart this one",
			"the agent's incarnation is %s, the pool's record of host %s has %s", own, record.Name, record.Incarnation)
	}
	return good("host %s, incarnation %s, in the pool as in the agent", record.Name, record.Incarnation)
}

// clock: no promise rests on clocks, but histories are read beside logs.
func (e *examination) clock(context.Context) checkup {
	return skipped("the server does not tell its time; keep hosts synchronized, so that histories and logs line up")
}

func (e *examination) store(context.Context) checkup {
	return skipped("the server does not tell its store's version")
}

// unreachable splits a dial error at its fix.
func unreachable(err error) checkup {
	seen, fix, _ := strings.Cut(explain(err).message, "; ")
	return bad(fix, "%s", seen)
}
