package alloc

import (
	"errors"
	"fmt"
	"time"
)

// Reason is a stable name for why something was refused; it crosses the wire as ErrorInfo.reason.
type Reason string

// The reasons. The comment says what has happened to the data and whether trying again helps.
const (
	// ReasonInvalid: the request is malformed; nothing changed; correct it.
	ReasonInvalid Reason = "INVALID_ARGUMENT"
	// ReasonSandboxNotFound, ReasonCheckpointNotFound, ReasonHostUnknown, ReasonSerialNotFound: no such record.
	ReasonSandboxNotFound    Reason = "SANDBOX_NOT_FOUND"
	ReasonCheckpointNotFound Reason = "CHECKPOINT_NOT_FOUND"
	ReasonHostUnknown        Reason = "HOST_UNKNOWN"
	ReasonSerialNotFound     Reason = "SERIAL_NOT_FOUND"
	// ReasonProcessNotFound: the agent sees no process of that pid.
	ReasonProcessNotFound Reason = "PROCESS_NOT_FOUND"
	// ReasonPoolMissing: the store holds no pool, or not the one that is meant.
	ReasonPoolMissing Reason = "POOL_MISSING"
	// ReasonPoolExists: there is a pool already; nothing changed.
	ReasonPoolExists Reason = "POOL_EXISTS"
	// ReasonRecovering: the pool issues nothing until its generation was raised; try again.
	ReasonRecovering Reason = "POOL_RECOVERING"
	// ReasonFormat: the store is of a newer format; only a newer version can write it.
	ReasonFormat Reason = "FORMAT_UNSUPPORTED"
	// ReasonMalformed: a record in the store cannot be read; nothing was changed.
	ReasonMalformed Reason = "RECORD_MALFORMED"
	// ReasonStaleIncarnation: a newer life of this host's agent has taken over; say Hello.
	ReasonStaleIncarnation Reason = "STALE_INCARNATION"
	// ReasonStaleEpoch: the sandbox has, or had, another owner since.
	ReasonStaleEpoch Reason = "STALE_EPOCH"
	// ReasonNotOwner: the sandbox belongs to another host.
	ReasonNotOwner Reason = "NOT_OWNER"
	// ReasonWrongState: the event does not fit the sandbox's state.
	ReasonWrongState Reason = "WRONG_STATE"
	// ReasonNotConfirmed: the source has not said yet that the dumped tree is gone; try again.
	ReasonNotConfirmed Reason = "CHECKPOINT_NOT_CONFIRMED"
	// ReasonSettling: the store has forgotten history, and a host that may know more has not said yet what lives
	// on it; nothing changed; try again.
	ReasonSettling Reason = "POOL_SETTLING"
	// ReasonClaimed: another restore holds the claim; try again, it may go back.
	ReasonClaimed Reason = "CHECKPOINT_CLAIMED"
	// ReasonVoid: the images are of a dump that was vetoed.
	ReasonVoid Reason = "CHECKPOINT_VOID"
	// ReasonRefused: the pool's policy refuses this restore.
	ReasonRefused Reason = "POLICY_REFUSED"
	// ReasonManifest: the manifest is not the one that was recorded.
	ReasonManifest Reason = "MANIFEST_MISMATCH"
	// ReasonRange: the serials to spend are not next in the host's ranges: another life of its state spent them.
	ReasonRange Reason = "RANGE_MISMATCH"
	// ReasonBound: the namespace or serial is bound already, to something else.
	ReasonBound Reason = "ALREADY_BOUND"
	// ReasonRequestReused: the request id was used before with another body.
	ReasonRequestReused Reason = "REQUEST_REUSED"
	// ReasonRequestExpired: the request id is too old to tell whether it was committed.
	ReasonRequestExpired Reason = "REQUEST_EXPIRED"
	// ReasonExhausted: no serials are left in this generation, or the host holds too many ranges, or has used its quota up.
	ReasonExhausted Reason = "EXHAUSTED"
	// ReasonConflict: others wrote the same records again and again; nothing changed; try again.
	ReasonConflict Reason = "CONFLICT"
	// ReasonUnknownOutcome: the store's answer was lost: committed or not, nobody knows yet. Ask again
	// with the same request id.
	ReasonUnknownOutcome Reason = "OUTCOME_UNKNOWN"
	// ReasonUnavailable: the store was not reached; nothing changed; try again.
	ReasonUnavailable Reason = "STORE_UNAVAILABLE"
	// ReasonTooLarge: more than one transaction of the store can hold; nothing changed.
	ReasonTooLarge Reason = "TOO_LARGE"
	// ReasonRecordNotFound: there is no such record to mend.
	ReasonRecordNotFound Reason = "RECORD_NOT_FOUND"
	// ReasonNothingToMend: Check finds nothing about the object; nothing changed.
	ReasonNothingToMend Reason = "NOTHING_TO_MEND"
	// ReasonMendFirst: something else has to be mended before; nothing changed.
	ReasonMendFirst Reason = "MEND_FIRST"
	// ReasonServerAnswers: the server that is to be removed answers; nothing changed.
	ReasonServerAnswers Reason = "SERVER_ANSWERS"
	// ReasonCaller: the caller is unknown or may not do this; nothing changed.
	ReasonCaller Reason = "CALLER_REFUSED"
)

// Error is every refusal of this package. Compare with errors.Is against the Err values, or look at
// the reason with ReasonOf.
type Error struct {
	Reason Reason
	// Subject is what it is about, kind first: "sandbox 0001000000000007".
	Subject string
	// Msg is the cause, in one sentence without a full stop.
	Msg string
	// Fix is what to do, in the imperative; empty when Msg says it.
	Fix string
	// RetryAfter is when another try makes sense; 0 when it does not.
	RetryAfter time.Duration
	// Err is the cause below, if any.
	Err error
}

// retrySoon is the pause that a refused caller is asked to make.
const retrySoon = 200 * time.Millisecond

func (e *Error) Error() string {
	s := e.Msg
	if e.Subject != "" {
		s = e.Subject + ": " + s
	}
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	if e.Fix != "" {
		s += "; " + e.Fix
	}
	return s
}

func (e *Error) Unwrap() error { return e.Err }

// Is makes errors with the same reason match, so that the sentinels below work with errors.Is.
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Reason == e.Reason && t.Subject == "" && t.Msg == ""
}

// Sentinels for errors.Is.
var (
	ErrInvalid            = &Error{Reason: ReasonInvalid}
	ErrSandboxNotFound    = &Error{Reason: ReasonSandboxNotFound}
	ErrCheckpointNotFound = &Error{Reason: ReasonCheckpointNotFound}
	ErrHostUnknown        = &Error{Reason: ReasonHostUnknown}
	ErrSerialNotFound     = &Error{Reason: ReasonSerialNotFound}
	ErrPoolMissing        = &Error{Reason: ReasonPoolMissing}
	ErrPoolExists         = &Error{Reason: ReasonPoolExists}
	ErrRecovering         = &Error{Reason: ReasonRecovering}
	ErrFormat             = &Error{Reason: ReasonFormat}
	ErrMalformed          = &Error{Reason: ReasonMalformed}
	ErrStaleIncarnation   = &Error{Reason: ReasonStaleIncarnation}
	ErrStaleEpoch         = &Error{Reason: ReasonStaleEpoch}
	ErrNotOwner           = &Error{Reason: ReasonNotOwner}
	ErrWrongState         = &Error{Reason: ReasonWrongState}
	ErrNotConfirmed       = &Error{Reason: ReasonNotConfirmed}
	ErrSettling           = &Error{Reason: ReasonSettling}
	ErrClaimed            = &Error{Reason: ReasonClaimed}
	ErrVoid               = &Error{Reason: ReasonVoid}
	ErrRefused            = &Error{Reason: ReasonRefused}
	ErrManifest           = &Error{Reason: ReasonManifest}
	ErrRange              = &Error{Reason: ReasonRange}
	ErrBound              = &Error{Reason: ReasonBound}
	ErrRequestReused      = &Error{Reason: ReasonRequestReused}
	ErrRequestExpired     = &Error{Reason: ReasonRequestExpired}
	ErrExhausted          = &Error{Reason: ReasonExhausted}
	ErrConflict           = &Error{Reason: ReasonConflict}
	ErrUnknownOutcome     = &Error{Reason: ReasonUnknownOutcome}
	ErrUnavailable        = &Error{Reason: ReasonUnavailable}
	ErrTooLarge           = &Error{Reason: ReasonTooLarge}
	ErrRecordNotFound     = &Error{Reason: ReasonRecordNotFound}
	ErrNothingToMend      = &Error{Reason: ReasonNothingToMend}
	ErrMendFirst          = &Error{Reason: ReasonMendFirst}
	ErrServerAnswers      = &Error{Reason: ReasonServerAnswers}
	ErrCaller             = &Error{Reason: ReasonCaller}
)

// ReasonOf is the reason of the first Error in err's chain, "" if there is none.
func ReasonOf(err error) Reason {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Reason
	}
	return ""
}

func invalid(subject, msg string) *Error {
	return &Error{Reason: ReasonInvalid, Subject: subject, Msg: msg}
}

func refuse(r Reason, subject, format string, args ...any) *Error {
	return &Error{Reason: r, Subject: subject, Msg: fmt.Sprintf(format, args...)}
}
