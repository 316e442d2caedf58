// Package criuhook is what nsalloc and CRIU say to each other: the actions that CRIU runs its script
// for and which of them can stop it, the protocol between the hook and the host's agent, and the
// manifest that travels in the images.
//
// # The hook
//
// CRIU runs a script at fixed points of a dump and of a restore, with the name of the point in
// CRTOOLS_SCRIPT_ACTION. A non-zero exit stops CRIU at some of them, is ignored at others, and at
// post-dump it resumes the source while the images stay and restore fine all the same. So what a hook
// answers is a verdict, not a report: all work and every decision is the agent's, which also watches
// what became of the processes, because nobody is told when a dump or a restore fails after the hook.
//
// The hook is a small static program. It connects to the agent's hook socket (SEQPACKET, so that one
// message is one packet), sends one Request as JSON together with descriptors, waits for one Response
// and exits 0 or 1. A host where the hook is installed has /etc/nsalloc/agent.yaml; without that file
// the hook exits 0 at once, so that a machine that was never set up is not in its own way.
//
// Everything said more than once, late, or by a process that CRIU never started has to end the same
// way: runs are told apart by the key (boot id, CRIU's pid, its start time), and an action that a run
// brought before gets the answer that it got before.
package criuhook

import "slices"

// Action is a point at which CRIU runs its script: the value of CRTOOLS_SCRIPT_ACTION.
type Action string

// CRIU's actions, in the order in which they come (read from CRIU 4.2's source).
const (
	PreDump             Action = "pre-dump"
	NetworkLock         Action = "network-lock"
	PostDump            Action = "post-dump"
	NetworkUnlock       Action = "network-unlock" // of a dump that failed, was vetoed or leaves the tree running; of every restore
	PreRestore          Action = "pre-restore"
	SetupNamespaces     Action = "setup-namespaces"
	PostSetupNamespaces Action = "post-setup-namespaces"
	PostRestore         Action = "post-restore"
	PreResume           Action = "pre-resume"
	PostResume          Action = "post-resume"
)

// Phase tells dumps from restores.
type Phase string

// The phases.
const (
	Dump    Phase = "dump"
	Restore Phase = "restore"
	Either  Phase = "" // network-unlock comes in both
)

// Stage is what is known of an action.
type Stage struct {
	Action Action
	Phase  Phase
	// CanVeto: a non-zero exit stops CRIU. Where it is false the exit code is ignored by CRIU and the
	// hook always exits 0.
	CanVeto bool
	// State says what the tasks do meanwhile.
	State string
}

var stages = []Stage{
	{PreDump, Dump, true, "running"},
	{NetworkLock, Dump, true, "frozen"},
	{PostDump, Dump, true, "frozen, every image written"},
	{NetworkUnlock, Either, false, "frozen"},
	{PreRestore, Restore, true, "nothing forked yet"},
	{SetupNamespaces, Restore, true, "root forked, namespaces not final"},
	{PostSetupNamespaces, Restore, true, "root forked, namespaces not final"},
	{PostRestore, Restore, true, "all forked, final namespaces, asleep in the restorer"},
	{PreResume, Restore, false, "stopped by ptrace"},
	{PostResume, Restore, false, "running"},
}

// Stages lists every action that CRIU is known to bring.
func Stages() []Stage { return slices.Clone(stages) }

// StageOf finds an action's stage; false for an action that is not known: a later CRIU's, which is
// answered 0 because nothing is known of what a veto would do.
func StageOf(a Action) (Stage, bool) {
	i := slices.IndexFunc(stages, func(s Stage) bool { return s.Action == a })
	if i < 0 {
		return Stage{}, false
	}
	return stages[i], true
}

// Paths that the hook and the agent agree on. They are fixed: the hook runs in an environment that a
// container's owner may have a say in, and takes nothing from it but CRTOOLS_*.
const (
	// ConfigPath marks a host that is set up; it is the agent's configuration.
	ConfigPath = "/etc/nsalloc/agent.yaml"
	// SocketPath is the agent's hook socket.
	SocketPath = "/run/nsalloc/hook.sock"
	// BypassPath lets actions pass while the agent does not answer, as long as the file exists. An
	// operator makes it; it is gone after a reboot. What the agent answers counts all the same.
	BypassPath = "/run/nsalloc/bypass"
	// ManifestName is the manifest's file in the image directory.
	ManifestName = "nsalloc.json"
)
