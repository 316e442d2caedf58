// Package agent is the daemon of a host: it knows which namespace is which, numbers those that have
// no serial yet, answers CRIU's hook, and tells the pool what it saw.
//
// # Who knows what
//
// The store is the truth about serials and owners; the kernel is the truth about what lives. The agent
// keeps neither: its book is a copy of the pool's records for this host, refreshed by every answer,
// and read anew when a request's outcome is unknown. What it must remember by itself is on its disk
// before it matters: its identity (state.go) and what it promised CRIU (run.go).
//
// # Order of events
//
// Everything that spends serials goes through one registrar (registrar.go), so that two parts of
// the agent never number one namespace twice. Hook actions of one CRIU run are handled one after the
// other; different runs wait for each other only there, one call to the pool at a time.
//
// # While the pool is away
//
// The host holds ranges of serials (ranges.go), and numbers what is born from them: such a serial is provisional
// until the pool has committed its registration (provisional.go). It is on the host's disk before it stands in the
// book, so before anybody is told, and everything that shows it says that it is provisional. An agent that is
// started meanwhile goes on: its ledger (ledger.go) has what is committed, what is provisional, and what is left.
// What needs the pool's commit, a dump or a restore above all, waits for it and then vetoes.
//
// When the pool is back the agent first reads what it has there, then commits what is provisional in the order
// in which it was given, 60 sandboxes a transaction, before anything else is spent: the pool compares that the
// serials are next in this host's ranges. So a registration whose answer was lost is found under the serials
// that it named, and never made a second time. What was gone meanwhile is registered all the same, on the same
// boot, and ended by the next sweep: its serial stays its own. What was gone with its boot the pool does not take
// any more: its serials are burned.
//
// Ranges that are not this life's any more (its state was copied, put back or lost; the pool has a new generation)
// are given up with what was given of them provisionally: it is logged as an error, the serials are burned, and
// what lives under them gets others, each of which is logged. What is committed never changes. Of two agents of one
// host name that are alive, one goes on (fenced.go).
//
// # When the pool's store has forgotten history
//
// The pool is in a new generation then, and its records are of a moment that is over. The agent says first what it has
// (again.go): each sandbox of its book of which something lives, under its serials, in its epoch. Only then it reads the
// pool's records into its book, which would else forget with the store. It also says what it has dumped last, and what it
// has restored and is over: else images would be nobody's, or be restored a second time. Until the last one is said the host is not
// settled, and an agent that dies begins anew: what it has is in its ledger. A sandbox that is refused has gone on
// elsewhere; what lives of it here gets fresh serials, and that is logged as an error.
//
// What the pool says is here and is not, is not in the book as living, and is ended as soon as the pool lets it: it may
// be on a host that has not come back yet. A restore that is under way is vetoed, and what it claimed goes back.
//
// Each Hello says what the agent has seen of the pool; where the store knows less, the pool closes itself.
//
// # What happens when it dies
//
// Nothing lives in memory alone that ownership rests on. A new agent says Hello as the same life,
// reads its sandboxes, opens the runs on its disk again and settles each by looking at the processes:
// the same code path as when CRIU goes while the agent runs (settle.go).
//
// # Its disk
//
// The state directory holds `identity`, which makes it one life of one host; `serials`, the ledger;
// `runs/BOOT-PID-START.run`, what must be remembered of one CRIU process; and `lock`, empty. A file is one line with its format and a SHA-256
// over format and body, then JSON. It is replaced as a whole and durable before the write returns, so a
// crash leaves the old one or the new one, and anything else is damage.
//
// The disk takes no write (full, read-only, failing): a stage that can veto does, with the disk's error;
// what is to be settled waits; no serial is given provisionally, while those that the pool commits still are. All of
// it goes on by itself when it takes writes again. An agent that died meanwhile and is started while the pool is away
// can know less than was committed, and show a provisional serial for what has another one; the pool's stays.
//
// The directory is removed or replaced in use: the agent ends, since nothing can be promised any more.
//
// The identity is damaged, another host's, or of a newer format: the agent does not start, leaves the file as
// it is, and names the command that begins a new life. A life that is lost costs the serials of its ranges:
// the pool gives the new one an incarnation and ranges of its own, and has the sandboxes that live here, by
// boot id and kernel id, under the serials that they have.
//
// The ledger is damaged or gone: what was provisional is forgotten, and must not be given again. The agent puts the
// file aside, says so, and begins a new life of the host, with ranges of its own; until it has joined the pool
// it gives no serials.
//
// A run's record is damaged: it counts as lost, as the whole disk would: 0 counts as given, so images of a
// dump are a copy, never void and never in transit; the host begins a new life, because only that record may
// have known that a serial was spent; and its CRIU, if it lives, is refused from then on. This is what the
// operator would be told to do, it is safe, and it keeps one bad block from stopping every other sandbox
// of the host; so the agent does it itself, puts the file aside as `.damaged`, and says so. A record of
// a newer format is not damaged: the agent that wrote it can settle that run exactly, so this one does
// not start.
//
// A field that an older agent may ignore is added without a new format: the older one keeps it when it
// writes that file. Everything else, fields inside of others among it, raises the format. A release
// that raises the format reads the one before too, and writes each file in its own when that changes
// next; no release reads two steps back (oldestFormat).
package agent

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/nsalloc/nsalloc/internal/kernelns"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// Pool is what the agent needs of the pool's servers. The host and the request id in each command are
// the implementation's to fill in: one id for one call, however often it has to be sent.
type Pool interface {
	Hello(ctx context.Context, cmd alloc.HelloCommand) (*alloc.Host, *alloc.Pool, error)
	Grant(ctx context.Context, cmd alloc.GrantCommand) (alloc.Ranges, error)
	Register(ctx context.Context, cmd alloc.RegisterCommand) ([]*alloc.Sandbox, alloc.Ranges, error)
	RegisterAgain(ctx context.Context, cmd alloc.AgainCommand) ([]alloc.AgainAnswer, error)
	End(ctx context.Context, cmd alloc.EndCommand) (*alloc.Sandbox, error)
	Open(ctx context.Context, cmd alloc.OpenCommand) (alloc.Handoff, error)
	Confirm(ctx context.Context, cmd alloc.ConfirmCommand) (alloc.Handoff, error)
	Abort(ctx context.Context, cmd alloc.AbortCommand) (alloc.Handoff, error)
	Claim(ctx context.Context, cmd alloc.ClaimCommand) (alloc.ClaimAnswer, error)
	Bind(ctx context.Context, cmd alloc.BindCommand) (alloc.Handoff, alloc.Ranges, error)
	Release(ctx context.Context, cmd alloc.ReleaseCommand) (alloc.Handoff, error)

	// Host reads a host's record; it may be a moment old.
	Host(ctx context.Context, name string) (*alloc.Host, error)
	// GetPool reads the pool's record.
	GetPool(ctx context.Context) (*alloc.Pool, error)
	// Owned reads the sandboxes that host owns and that run, or are dumped or claimed, as of everything
	// committed before the call.
	Owned(ctx context.Context, host string) ([]*alloc.Sandbox, error)
	// Sandbox reads one sandbox, as of everything committed before the call.
	Sandbox(ctx context.Context, serial alloc.Serial) (*alloc.Sandbox, *alloc.Checkpoint, error)
	// FindRun finds a checkpoint by CRIU's run id; alloc.ErrCheckpointNotFound when there is none.
	FindRun(ctx context.Context, runID string) (*alloc.Checkpoint, error)
	// Checkpoint reads one checkpoint; it may be a moment old.
	Checkpoint(ctx context.Context, serial alloc.Serial) (*alloc.Checkpoint, error)
}

// Config is how an agent is set up.
type Config struct {
	// Host is the host's name in the pool.
	Host string
	// StateDir is where the agent keeps what it must remember. It is made if missing, for root only.
	StateDir string
	// HookSocket and AgentSocket are the paths of the two unix sockets.
	HookSocket  string
	AgentSocket string
	// SweepInterval is the pause between two sweeps of /proc.
	SweepInterval time.Duration
	// Labels are what the pool is told of the host.
	Labels map[string]string
	// Version is the agent's own, for Status.
	Version string
	Log     *slog.Logger
	// Ready is called once both sockets listen; it may be nil.
	Ready func()
}

// Agent is a running daemon. Make it with New and run it once.
type Agent struct {
	cfg    Config
	log    *slog.Logger
	kernel *kernelns.Kernel
	pool   Pool
	state  *stateDir
	exits  *kernelns.Exits[watched]
	host   map[alloc.NamespaceType]alloc.KernelID // of PID 1, read at start

	registrar *registrar
	book      *book
	runs      *runs

	kick     chan struct{} // asks for a sweep now; holds one
	settling settling
	tally    tally
	left     map[alloc.Serial]*leftTasks // of claims that nobody remembers, what the last looks saw; orphanLoop's
	// stood are the restored sandboxes whose tree was seen parked once, ran those whose tree was seen to run,
	// each in which epoch; orphanLoop's.
	stood, ran map[alloc.Serial]alloc.Epoch
	swept      atomic.Pointer[time.Time]
	trouble    atomic.Pointer[string] // why the pool is not reached; nil when it is
	poolRec    atomic.Pointer[alloc.Pool]
	joined     chan struct{} // closed after the first Hello and the first reading of our sandboxes
	joinOnce   sync.Once
	alone      chan struct{} // closed when the pool was not reached at first, and the state tells what has serials
	aloneOnce  sync.Once
	lost       notice // that the pool is not reached any more
	reached    notice // that it is again
}

// New prepares an agent: it reads its state, which must be this host's, and looks at the kernel. The
// error says what is wrong with the state and what to do.
func New(cfg Config, pool Pool) (*Agent, error) {
	if err := alloc.ValidateName("host name", cfg.Host); err != nil {
		return nil, err
	}
	if cfg.SweepInterval <= 0 {
		return nil, fmt.Errorf("sweep interval %v must be positive", cfg.SweepInterval)
	}
	kernel, err := kernelns.Open("/proc")
	if err != nil {
		return nil, err
	}
	host, err := kernel.Host()
	if err != nil {
		return nil, fmt.Errorf("read the host's own namespaces: %w; the agent runs as root in the host's PID and mount namespaces", err)
	}
	state, err := openState(cfg.StateDir, cfg.Host)
	if err != nil {
		return nil, err
	}
	exits, err := kernelns.NewExits[watched]()
	if err != nil {
		state.Close()
		return nil, err
	}
	a := &Agent{
		cfg: cfg, log: cfg.Log, kernel: kernel, pool: pool, state: state, exits: exits, host: host,
		book: newBook(), kick: make(chan struct{}, 1), settling: newSettling(), joined: make(chan struct{}), alone: make(chan struct{}),
		left: map[alloc.Serial]*leftTasks{}, stood: map[alloc.Serial]alloc.Epoch{}, ran: map[alloc.Serial]alloc.Epoch{},
	}
	a.registrar = newRegistrar(a)
	a.runs = newRuns(a)
	if err := a.registrar.load(); err != nil {
		exits.Close()
		state.Close()
		return nil, err
	}
	return a, nil
}

// Run works until ctx ends, and returns nil then; or until a part fails, and returns why. Whatever it
// began has ended by then: the state directory is another agent's as soon as it is closed.
func (a *Agent) Run(ctx context.Context) error {
	defer a.state.Close()
	defer a.exits.Close()
	hook, err := listenHook(a.cfg.HookSocket)
	if err != nil {
		return err
	}
	defer hook.Close()
	local, err := listenLocal(a.cfg.AgentSocket)
	if err != nil {
		return err
	}
	defer local.Close()
	if err := a.runs.load(); err != nil {
		return err
	}
	a.log.Info("agent started", "host", a.cfg.Host, "boot_id", a.kernel.BootID(), "hook_socket", a.cfg.HookSocket, "agent_socket", a.cfg.AgentSocket,
		"kernel_ids", a.kernel.Features().KernelIDs)
	if err := a.kernel.Features().Liveness; err != nil {
		a.log.Warn("namespaces without a process cannot be told alive from gone", "cause", err)
	}
	if outside := notInitial("/proc/self/ns"); len(outside) > 0 {
		a.log.Warn("the agent is in a container: what it numbers as this host's own is the container's; run it in the machine's own namespaces", "not_the_machines", outside)
	}
	if a.cfg.Ready != nil {
		a.cfg.Ready()
	}
	g, ctx := errgroup.WithContext(ctx)
	for _, part := range []struct {
		name string
		run  func(context.Context) error
	}{
		{"join", a.stayJoined},
		{"ranges", a.rangesLoop},
		{"sweep", a.sweepLoop},
		{"exits", a.watchExits},
		{"settle", a.settleLoop},
		{"orphans", a.orphanLoop},
		{"hook", func(ctx context.Context) error { return a.serveHook(ctx, hook) }},
		{"local", func(ctx context.Context) error { return a.serveLocal(ctx, local) }},
	} {
		g.Go(func() error {
			if err := part.run(ctx); err != nil && ctx.Err() == nil {
				return fmt.Errorf("%s: %w", part.name, err)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	a.log.Info("stopped")
	return nil
}

// sweepSoon asks for a sweep without waiting for it.
func (a *Agent) sweepSoon() {
	select {
	case a.kick <- struct{}{}:
	default: // one is asked for already
	}
}

// bootID is the boot that this agent runs on.
func (a *Agent) bootID() string { return a.kernel.BootID() }

// DefaultLabels says of a host what the kernel tells.
func DefaultLabels() map[string]string {
	labels := map[string]string{}
	if b, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		labels["kernel"] = string(b[:max(0, len(b)-1)])
	}
	return labels
}

// poolUUID names the pool; "" before the first Hello was answered.
func (a *Agent) poolUUID() string {
	if p := a.poolRec.Load(); p != nil {
		return p.UUID
	}
	return ""
}
