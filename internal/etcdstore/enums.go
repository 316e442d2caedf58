package etcdstore

import (
	"github.com/nsalloc/nsalloc/internal/storepb"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// enum is one word of the domain in both of its forms. The stored form is a number, so that a word
// can be renamed and a record stays small.
type enum[D ~string, P ~int32] struct {
	what   string
	domain map[P]D
	stored map[D]P
}

func newEnum[D ~string, P ~int32](what string, domain map[P]D) enum[D, P] {
	stored := make(map[D]P, len(domain))
	for p, d := range domain {
		stored[d] = p
	}
	return enum[D, P]{what, domain, stored}
}

var (
	poolStates = newEnum("pool state", map[storepb.PoolState]alloc.PoolState{
		storepb.PoolState_POOL_STATE_OPEN:       alloc.PoolOpen,
		storepb.PoolState_POOL_STATE_RECOVERING: alloc.PoolRecovering,
	})
	actions = newEnum("action", map[storepb.Action]alloc.Action{
		storepb.Action_ACTION_CLONE:  alloc.PolicyClone,
		storepb.Action_ACTION_RESUME: alloc.PolicyResume,
		storepb.Action_ACTION_ADOPT:  alloc.PolicyAdopt,
		storepb.Action_ACTION_REFUSE: alloc.PolicyRefuse,
	})
	unheards = newEnum("answer to an unheard witness", map[storepb.UnheardWitness]alloc.Unheard{
		storepb.UnheardWitness_UNHEARD_WITNESS_UNSPECIFIED:    "", // before there was a choice
		storepb.UnheardWitness_UNHEARD_WITNESS_NEW_GENERATION: alloc.UnheardNewGeneration,
		storepb.UnheardWitness_UNHEARD_WITNESS_WAIT:           alloc.UnheardWait,
	})
	sandboxStates = newEnum("sandbox state", map[storepb.SandboxState]alloc.SandboxState{
		storepb.SandboxState_SANDBOX_STATE_RUNNING:    alloc.StateRunning,
		storepb.SandboxState_SANDBOX_STATE_DUMPED:     alloc.StateDumped,
		storepb.SandboxState_SANDBOX_STATE_IN_TRANSIT: alloc.StateInTransit,
		storepb.SandboxState_SANDBOX_STATE_CLAIMED:    alloc.StateClaimed,
		storepb.SandboxState_SANDBOX_STATE_ENDED:      alloc.StateEnded,
	})
	checkpointStates = newEnum("checkpoint state", map[storepb.CheckpointState]alloc.CheckpointState{
		storepb.CheckpointState_CHECKPOINT_STATE_OPEN:     alloc.CheckpointOpen,
		storepb.CheckpointState_CHECKPOINT_STATE_COPY:     alloc.CheckpointCopy,
		storepb.CheckpointState_CHECKPOINT_STATE_VOID:     alloc.CheckpointVoid,
		storepb.CheckpointState_CHECKPOINT_STATE_CONSUMED: alloc.CheckpointConsumed,
	})
	stintBegans = newEnum("beginning of a stint", map[storepb.StintBegan]alloc.StintBegan{
		storepb.StintBegan_STINT_BEGAN_REGISTERED: alloc.BeganRegistered,
		storepb.StintBegan_STINT_BEGAN_CLAIMED:    alloc.BeganClaimed,
		storepb.StintBegan_STINT_BEGAN_CLONED:     alloc.BeganCloned,
		storepb.StintBegan_STINT_BEGAN_AGAIN:      alloc.BeganAgain,
	})
	stintOvers = newEnum("end of a stint", map[storepb.StintOver]alloc.StintOver{
		storepb.StintOver_STINT_OVER_UNSPECIFIED:  "", // it lasts
		storepb.StintOver_STINT_OVER_HANDED_OFF:   alloc.OverHandedOff,
		storepb.StintOver_STINT_OVER_RELEASED:     alloc.OverReleased,
		storepb.StintOver_STINT_OVER_ENDED:        alloc.OverEnded,
		storepb.StintOver_STINT_OVER_FENCED:       alloc.OverFenced,
		storepb.StintOver_STINT_OVER_CLAIM_FENCED: alloc.OverClaimFenced,
		storepb.StintOver_STINT_OVER_LOST:         alloc.OverLost,
	})
	namespaceTypes = newEnum("namespace type", map[storepb.NamespaceType]alloc.NamespaceType{
		storepb.NamespaceType_NAMESPACE_TYPE_MNT:    alloc.Mnt,
		storepb.NamespaceType_NAMESPACE_TYPE_UTS:    alloc.UTS,
		storepb.NamespaceType_NAMESPACE_TYPE_IPC:    alloc.IPC,
		storepb.NamespaceType_NAMESPACE_TYPE_PID:    alloc.PID,
		storepb.NamespaceType_NAMESPACE_TYPE_NET:    alloc.Net,
		storepb.NamespaceType_NAMESPACE_TYPE_CGROUP: alloc.Cgroup,
		storepb.NamespaceType_NAMESPACE_TYPE_USER:   alloc.User,
		storepb.NamespaceType_NAMESPACE_TYPE_TIME:   alloc.Time,
	})
)
