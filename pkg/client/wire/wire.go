// Package wire is the one place where the domain's types become nsalloc's protobuf messages and come
// back, and where its errors become gRPC statuses and come back. Server, agent, command and client
// share it, so that none of them can say a thing in a way that another does not understand.
//
// It is under pkg/client because a program that brings its own stubs needs it too.
//
// Reading is lenient where a newer peer may speak: an enum value that this version has no word for
// becomes "unknown(N)", which the domain's checks refuse in a request and which stays visible in an
// answer. Reading a request is strict where the domain's types could not hold what was sent, such as
// a digest that is not 32 bytes.
package wire

import (
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// vocabulary translates an enum in both directions.
type vocabulary[E ~int32, W ~string] struct {
	words  map[E]W
	values map[W]E
}

func vocabularyOf[E ~int32, W ~string](words map[E]W) vocabulary[E, W] {
	v := vocabulary[E, W]{words: words, values: make(map[W]E, len(words))}
	for e, w := range words {
		v.values[w] = e
	}
	return v
}

// word is the domain's word for e: "" for the unspecified value, "unknown(N)" for one of a newer version.
func (v vocabulary[E, W]) word(e E) W {
	if w, ok := v.words[e]; ok || e == 0 {
		return w
	}
	return W(fmt.Sprintf("unknown(%d)", int32(e)))
}

// value is 0, unspecified, for a word that the wire has no value for.
func (v vocabulary[E, W]) value(w W) E { return v.values[w] }

var (
	namespaceTypes = vocabularyOf(map[nsallocv1.NamespaceType]alloc.NamespaceType{
		nsallocv1.NamespaceType_NAMESPACE_TYPE_MNT:    alloc.Mnt,
		nsallocv1.NamespaceType_NAMESPACE_TYPE_UTS:    alloc.UTS,
		nsallocv1.NamespaceType_NAMESPACE_TYPE_IPC:    alloc.IPC,
		nsallocv1.NamespaceType_NAMESPACE_TYPE_PID:    alloc.PID,
		nsallocv1.NamespaceType_NAMESPACE_TYPE_NET:    alloc.Net,
		nsallocv1.NamespaceType_NAMESPACE_TYPE_CGROUP: alloc.Cgroup,
		nsallocv1.NamespaceType_NAMESPACE_TYPE_USER:   alloc.User,
		nsallocv1.NamespaceType_NAMESPACE_TYPE_TIME:   alloc.Time,
	})
	sandboxStates = vocabularyOf(map[nsallocv1.SandboxState]alloc.SandboxState{
		nsallocv1.SandboxState_SANDBOX_STATE_RUNNING:    alloc.StateRunning,
		nsallocv1.SandboxState_SANDBOX_STATE_DUMPED:     alloc.StateDumped,
		nsallocv1.SandboxState_SANDBOX_STATE_IN_TRANSIT: alloc.StateInTransit,
		nsallocv1.SandboxState_SANDBOX_STATE_CLAIMED:    alloc.StateClaimed,
		nsallocv1.SandboxState_SANDBOX_STATE_ENDED:      alloc.StateEnded,
	})
	checkpointStates = vocabularyOf(map[nsallocv1.CheckpointState]alloc.CheckpointState{
		nsallocv1.CheckpointState_CHECKPOINT_STATE_OPEN:     alloc.CheckpointOpen,
		nsallocv1.CheckpointState_CHECKPOINT_STATE_COPY:     alloc.CheckpointCopy,
		nsallocv1.CheckpointState_CHECKPOINT_STATE_VOID:     alloc.CheckpointVoid,
		nsallocv1.CheckpointState_CHECKPOINT_STATE_CONSUMED: alloc.CheckpointConsumed,
	})
	evidences = vocabularyOf(map[nsallocv1.Evidence]alloc.Evidence{
		nsallocv1.Evidence_EVIDENCE_STOPPED:   alloc.SeenStopped,
		nsallocv1.Evidence_EVIDENCE_IN_DOUBT:  alloc.InDoubt,
		nsallocv1.Evidence_EVIDENCE_NOT_GIVEN: alloc.NotGiven,
	})
	outcomes = vocabularyOf(map[nsallocv1.ClaimOutcome]alloc.Outcome{
		nsallocv1.ClaimOutcome_CLAIM_OUTCOME_CLAIMED: alloc.MayClaim,
		nsallocv1.ClaimOutcome_CLAIM_OUTCOME_CLONE:   alloc.MayClone,
	})
	stintBegans = vocabularyOf(map[nsallocv1.StintBegan]alloc.StintBegan{
		nsallocv1.StintBegan_STINT_BEGAN_REGISTERED: alloc.BeganRegistered,
		nsallocv1.StintBegan_STINT_BEGAN_CLAIMED:    alloc.BeganClaimed,
		nsallocv1.StintBegan_STINT_BEGAN_CLONED:     alloc.BeganCloned,
		nsallocv1.StintBegan_STINT_BEGAN_AGAIN:      alloc.BeganAgain,
	})
	stintOvers = vocabularyOf(map[nsallocv1.StintOver]alloc.StintOver{
		nsallocv1.StintOver_STINT_OVER_HANDED_OFF:   alloc.OverHandedOff,
		nsallocv1.StintOver_STINT_OVER_RELEASED:     alloc.OverReleased,
		nsallocv1.StintOver_STINT_OVER_ENDED:        alloc.OverEnded,
		nsallocv1.StintOver_STINT_OVER_FENCED:       alloc.OverFenced,
		nsallocv1.StintOver_STINT_OVER_CLAIM_FENCED: alloc.OverClaimFenced,
		nsallocv1.StintOver_STINT_OVER_LOST:         alloc.OverLost,
	})
	poolStates = vocabularyOf(map[nsallocv1.PoolState]alloc.PoolState{
		nsallocv1.PoolState_POOL_STATE_OPEN:       alloc.PoolOpen,
		nsallocv1.PoolState_POOL_STATE_RECOVERING: alloc.PoolRecovering,
	})
	unheards = vocabularyOf(map[nsallocv1.UnheardWitness]alloc.Unheard{
		nsallocv1.UnheardWitness_UNHEARD_WITNESS_NEW_GENERATION: alloc.UnheardNewGeneration,
		nsallocv1.UnheardWitness_UNHEARD_WITNESS_WAIT:           alloc.UnheardWait,
	})
	sayings = vocabularyOf(map[nsallocv1.Saying]alloc.Saying{
		nsallocv1.Saying_SAYING_SOUND:     alloc.SaysSound,
		nsallocv1.Saying_SAYING_BEHIND:    alloc.SaysBehind,
		nsallocv1.Saying_SAYING_NEW:       alloc.SaysNew,
		nsallocv1.Saying_SAYING_LOST:      alloc.SaysLost,
		nsallocv1.Saying_SAYING_ELSEWHERE: alloc.SaysElsewhere,
		nsallocv1.Saying_SAYING_NOTHING:   alloc.SaysNothing,
	})
	policyActions = vocabularyOf(map[nsallocv1.PolicyAction]alloc.Action{
		nsallocv1.PolicyAction_POLICY_ACTION_CLONE:  alloc.PolicyClone,
		nsallocv1.PolicyAction_POLICY_ACTION_RESUME: alloc.PolicyResume,
		nsallocv1.PolicyAction_POLICY_ACTION_ADOPT:  alloc.PolicyAdopt,
		nsallocv1.PolicyAction_POLICY_ACTION_REFUSE: alloc.PolicyRefuse,
	})
)

// NamespaceTypeToWire is the wire's value for a namespace type.
func NamespaceTypeToWire(t alloc.NamespaceType) nsallocv1.NamespaceType {
	return namespaceTypes.value(t)
}

// NamespaceTypeFromWire is the domain's word for a namespace type.
func NamespaceTypeFromWire(t nsallocv1.NamespaceType) alloc.NamespaceType {
	return namespaceTypes.word(t)
}

// SandboxStateToWire is the wire's value for a sandbox's state.
func SandboxStateToWire(s alloc.SandboxState) nsallocv1.SandboxState { return sandboxStates.value(s) }

// SandboxStateFromWire is the domain's word for a sandbox's state.
func SandboxStateFromWire(s nsallocv1.SandboxState) alloc.SandboxState { return sandboxStates.word(s) }

// A time that is zero here is absent there.
func timeToWire(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

// stamps converts times, most of which are the same as the one before. Nobody changes what it makes.
type stamps struct {
	last time.Time
	made *timestamppb.Timestamp
}

func (s *stamps) wire(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	if s.made == nil || !s.last.Equal(t) {
		s.last, s.made = t, timestamppb.New(t)
	}
	return s.made
}

func timeFromWire(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

func invalid(subject, msg string) *alloc.Error {
	return &alloc.Error{Reason: alloc.ReasonInvalid, Subject: subject, Msg: msg}
}
