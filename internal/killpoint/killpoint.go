// Package killpoint lets a test end nsalloc's own processes at a chosen line by SIGKILL: before and after
// every write that is durable, that leaves the process, or that others rest on. What the kernel was given
// stays; a disk that loses what was not synced is not what is tried here.
//
// Without the build tag `killpoints` At is an empty function, which the compiler removes with its
// argument: released binaries hold nothing of this package, and TestReleaseHasNone looks. With the tag,
// the environment variable NSALLOC_KILLPOINTS names a directory, and At(p) takes the file named p in it,
// if there is one: it is renamed to p.hit, and the process kills itself. So a test arms a point while the
// process runs, it strikes once, whoever of several comes first, and p.hit proves that it was reached.
//
// Every RPC that writes has its points (internal/server's TestEveryWriteHasPoints), and so has what a server writes
// of its own on its disk and into the pool. Three such commits have none: the pool's first records are one transaction
// before it serves anything, so that a server that dies there leaves the whole pool or none, and the next start makes
// it or finds it; the sweep of old requests only removes what no answer rests on any more; and the nonce under which
// the other servers are asked is of no use to anybody once the asker is dead.
//
// Every point is registered here. A test holds that each is used in the code, and the kill matrix
// (e2e/kill_matrix_test.go) that each has its cells: a point that nobody tests is a failure.
//
// Why not gofail: it keeps its points in comments and rewrites the sources before a build. So what is
// tested is not the tree that was committed, two builds of one tree disturb each other, and a point is a
// line that neither compiler nor linter sees. And all that is needed here is to die.
package killpoint

import "strings"

// Env names the directory of the armed points.
const Env = "NSALLOC_KILLPOINTS"

// Point is one line at which a process can be ended. Names read role/where/step: the line stands before
// the step when that is written -ing, and after it when it is written -ed. With a * for where it is a
// family, of which Of makes members.
type Point string

// The server's, by RPC: before the transaction is sent to the store, and when it is committed there and
// no answer has left.
const (
	ServerCommitting Point = "server/*/committing"
	ServerCommitted  Point = "server/*/committed"
)

// What the server writes of its own.
const (
	ServerWitnessRecording     Point = "server/witness/recording" // a page of what it has seen
	ServerWitnessRecorded      Point = "server/witness/recorded"
	ServerLifeCommitting       Point = "server/life/committing" // its record in the pool
	ServerLifeCommitted        Point = "server/life/committed"
	ServerCloseCommitting      Point = "server/close/committing" // the pool, whose store has lost history
	ServerCloseCommitted       Point = "server/close/committed"
	ServerGenerationCommitting Point = "server/generation/committing" // the pool again, open
	ServerGenerationCommitted  Point = "server/generation/committed"
)

// The agent's requests to the pool, by RPC: before it is sent, and when it is answered and nothing has
// been made of the answer.
const (
	AgentSending  Point = "agent/*/sending"
	AgentReceived Point = "agent/*/received"
)

// The agent's answers to the hook, by CRIU's action: the verdict on its disk, and on its way.
const (
	AgentVerdictRecording Point = "agent/*/verdict-recording"
	AgentVerdictRecorded  Point = "agent/*/verdict-recorded"
	AgentAnswering        Point = "agent/*/answering"
	AgentAnswered         Point = "agent/*/answered"
)

// The agent's other durable writes.
const (
	AgentNonceRecording      Point = "agent/nonce/recording" // a state directory that is new
	AgentNonceRecorded       Point = "agent/nonce/recorded"
	AgentIdentityRecording   Point = "agent/identity/recording" // what the first Hello answered
	AgentIdentityRecorded    Point = "agent/identity/recorded"
	AgentSerialsRecording    Point = "agent/serials/recording" // what serials were given, and what is left
	AgentSerialsRecorded     Point = "agent/serials/recorded"
	AgentNewLifeRecording    Point = "agent/new-life/recording" // another life of the host has taken its place
	AgentNewLifeRecorded     Point = "agent/new-life/recorded"
	AgentLostLifeRecording   Point = "agent/lost-life/recording" // its own records of the life before are damaged
	AgentLostLifeRecorded    Point = "agent/lost-life/recorded"
	AgentAsideRenaming       Point = "agent/aside/renaming" // a damaged record of a run
	AgentAsideRenamed        Point = "agent/aside/renamed"
	AgentManifestRenaming    Point = "agent/manifest/renaming"
	AgentManifestRenamed     Point = "agent/manifest/renamed"
	AgentCheckpointRecording Point = "agent/checkpoint/recording" // which checkpoint a dump is going to open
	AgentCheckpointRecorded  Point = "agent/checkpoint/recorded"
	AgentUntakenRecording    Point = "agent/untaken/recording" // a 0 that nobody took
	AgentUntakenRecorded     Point = "agent/untaken/recorded"
	AgentClaimRecording      Point = "agent/claim/recording" // what a restore is going to claim
	AgentClaimRecorded       Point = "agent/claim/recorded"
	AgentRootRecording       Point = "agent/root/recording" // the root task of a restore
	AgentRootRecorded        Point = "agent/root/recorded"
	AgentTreeRecording       Point = "agent/tree/recording" // every task of a restore
	AgentTreeRecorded        Point = "agent/tree/recorded"
	AgentParkedRecording     Point = "agent/parked/recording" // that a parked tree is going to be ended
	AgentParkedRecorded      Point = "agent/parked/recorded"
	AgentParkedEnding        Point = "agent/parked/ending"
	AgentParkedEnded         Point = "agent/parked/ended"
	AgentOutcomeRecording    Point = "agent/outcome/recording" // a run is settled
	AgentOutcomeRecorded     Point = "agent/outcome/recorded"
	AgentForgetting          Point = "agent/run/forgetting" // the record of an old run
	AgentForgotten           Point = "agent/run/forgotten"
)

// The hook's, by CRIU's action: before the agent is asked, when it was and has not answered, and with its
// answer in hand.
const (
	HookAsking   Point = "hook/*/asking"
	HookAsked    Point = "hook/*/asked"
	HookAnswered Point = "hook/*/answered"
)

// The names that families are completed with; constants all, so that no initialization is left in a binary.
var (
	agents  = []string{"Hello", "Grant", "Register", "RegisterAgain", "End", "Open", "Confirm", "Abort", "Claim", "Bind", "Release"}
	rpcs    = []string{"Allocate", "Mend", "SetPolicy", "Remove", "Waive", "Hello", "Grant", "Register", "RegisterAgain", "End", "Open", "Confirm", "Abort", "Claim", "Bind", "Release"}
	actions = []string{"pre-dump", "network-lock", "post-dump", "network-unlock",
		"pre-restore", "setup-namespaces", "post-setup-namespaces", "post-restore", "pre-resume", "post-resume"}
	// recorded are the actions whose verdict something rests on (agent.settleAnswer); a veto at any other is
	// written at the same line.
	recorded = []string{"pre-dump", "post-dump", "pre-restore", "post-restore"}
)

// registered says which points there are.
var registered = []struct {
	family Point
	of     []string // nil: it is a point, not a family
}{
	{ServerCommitting, rpcs}, {ServerCommitted, rpcs},
	{ServerWitnessRecording, nil}, {ServerWitnessRecorded, nil},
	{ServerLifeCommitting, nil}, {ServerLifeCommitted, nil},
	{ServerCloseCommitting, nil}, {ServerCloseCommitted, nil},
	{ServerGenerationCommitting, nil}, {ServerGenerationCommitted, nil},
	{AgentSending, agents}, {AgentReceived, agents},
	{AgentVerdictRecording, recorded}, {AgentVerdictRecorded, recorded},
	{AgentAnswering, actions}, {AgentAnswered, actions},
	{AgentNonceRecording, nil}, {AgentNonceRecorded, nil},
	{AgentIdentityRecording, nil}, {AgentIdentityRecorded, nil},
	{AgentSerialsRecording, nil}, {AgentSerialsRecorded, nil},
	{AgentNewLifeRecording, nil}, {AgentNewLifeRecorded, nil},
	{AgentLostLifeRecording, nil}, {AgentLostLifeRecorded, nil},
	{AgentAsideRenaming, nil}, {AgentAsideRenamed, nil},
	{AgentManifestRenaming, nil}, {AgentManifestRenamed, nil},
	{AgentCheckpointRecording, nil}, {AgentCheckpointRecorded, nil},
	{AgentUntakenRecording, nil}, {AgentUntakenRecorded, nil},
	{AgentClaimRecording, nil}, {AgentClaimRecorded, nil},
	{AgentRootRecording, nil}, {AgentRootRecorded, nil},
	{AgentTreeRecording, nil}, {AgentTreeRecorded, nil},
	{AgentParkedRecording, nil}, {AgentParkedRecorded, nil}, {AgentParkedEnding, nil}, {AgentParkedEnded, nil},
	{AgentOutcomeRecording, nil}, {AgentOutcomeRecorded, nil},
	{AgentForgetting, nil}, {AgentForgotten, nil},
	{HookAsking, actions}, {HookAsked, actions}, {HookAnswered, actions},
}

// All lists every point, in the order of this file.
func All() []Point {
	var list []Point
	for _, r := range registered {
		if r.of == nil {
			list = append(list, r.family)
		}
		for _, what := range r.of {
			list = append(list, Point(strings.Replace(string(r.family), "*", what, 1)))
		}
	}
	return list
}
