package wire

import (
	"context"
	"errors"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// Domain is ErrorInfo.domain of every refusal.
const Domain = "nsalloc"

// The keys of ErrorInfo.metadata: an error's parts, so that the other side puts the same sentence
// together. Clients that are not ours read the status' message, which is the whole of it.
const (
	metaMsg = "message"
	metaFix = "fix"
)

// reasonCodes has a row for each reason of the domain; one that is missing becomes INTERNAL, and a test says so.
var reasonCodes = map[alloc.Reason]codes.Code{
	alloc.ReasonInvalid:            codes.InvalidArgument,
	alloc.ReasonSandboxNotFound:    codes.NotFound,
	alloc.ReasonCheckpointNotFound: codes.NotFound,
	alloc.ReasonHostUnknown:        codes.NotFound,
	alloc.ReasonSerialNotFound:     codes.NotFound,
	alloc.ReasonProcessNotFound:    codes.NotFound,
	alloc.ReasonPoolMissing:        codes.FailedPrecondition,
	alloc.ReasonPoolExists:         codes.AlreadyExists,
	alloc.ReasonRecovering:         codes.Unavailable,
	alloc.ReasonFormat:             codes.FailedPrecondition,
	alloc.ReasonMalformed:          codes.DataLoss,
	alloc.ReasonStaleIncarnation:   codes.FailedPrecondition,
	alloc.ReasonStaleEpoch:         codes.FailedPrecondition,
	alloc.ReasonNotOwner:           codes.FailedPrecondition,
	alloc.ReasonWrongState:         codes.FailedPrecondition,
	alloc.ReasonNotConfirmed:       codes.FailedPrecondition,
	alloc.ReasonSettling:           codes.FailedPrecondition,
	alloc.ReasonClaimed:            codes.FailedPrecondition,
	alloc.ReasonVoid:               codes.FailedPrecondition,
	alloc.ReasonRefused:            codes.FailedPrecondition,
	alloc.ReasonManifest:           codes.FailedPrecondition,
	alloc.ReasonRange:              codes.FailedPrecondition,
	alloc.ReasonBound:              codes.AlreadyExists,
	alloc.ReasonRequestReused:      codes.FailedPrecondition,
	alloc.ReasonRequestExpired:     codes.FailedPrecondition,
	alloc.ReasonExhausted:          codes.ResourceExhausted,
	alloc.ReasonConflict:           codes.Aborted,
	alloc.ReasonUnknownOutcome:     codes.Unavailable,
	alloc.ReasonUnavailable:        codes.Unavailable,
	alloc.ReasonTooLarge:           codes.ResourceExhausted,
	alloc.ReasonRecordNotFound:     codes.NotFound,
	alloc.ReasonNothingToMend:      codes.FailedPrecondition,
	alloc.ReasonMendFirst:          codes.FailedPrecondition,
	alloc.ReasonServerAnswers:      codes.FailedPrecondition,
	alloc.ReasonCaller:             codes.PermissionDenied,
}

// retryUnlessSaid is for refusals that another try heals, where the domain names no time.
var retryUnlessSaid = map[alloc.Reason]time.Duration{
	alloc.ReasonConflict:       200 * time.Millisecond,
	alloc.ReasonUnknownOutcome: 200 * time.Millisecond,
	alloc.ReasonUnavailable:    500 * time.Millisecond,
	alloc.ReasonRecovering:     500 * time.Millisecond,
}

// Status is err as it crosses the wire. An *alloc.Error carries its reason and, where they fit,
// RetryInfo and ResourceInfo; a context's end its code; a status stays what it is. Anything else is a
// mistake of ours: INTERNAL, without details, because what it says is for the log and not for callers.
func Status(err error) *status.Status {
	if err == nil {
		return nil
	}
	if e, ok := errors.AsType[*alloc.Error](err); ok {
		return refusal(e)
	}
	if s, ok := status.FromError(err); ok {
		return s
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return status.New(codes.DeadlineExceeded, "the deadline passed before there was an answer")
	case errors.Is(err, context.Canceled):
		return status.New(codes.Canceled, "the caller left before there was an answer")
	}
	return status.New(codes.Internal, "a mistake in the server: its log says more")
}

func refusal(e *alloc.Error) *status.Status {
	code, ok := reasonCodes[e.Reason]
	if !ok {
		code = codes.Internal
	}
	info := &errdetails.ErrorInfo{Domain: Domain, Reason: string(e.Reason), Metadata: map[string]string{metaMsg: valid(e.Msg)}}
	if e.Err != nil {
		info.Metadata[metaMsg] = valid(e.Msg + ": " + e.Err.Error())
	}
	if e.Fix != "" {
		info.Metadata[metaFix] = valid(e.Fix)
	}
	details := []protoadapt.MessageV1{info}
	retry := e.RetryAfter
	if retry == 0 {
		retry = retryUnlessSaid[e.Reason]
	}
	if retry > 0 {
		details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(retry)})
	}
	if e.Subject != "" {
		kind, name := e.Subject, ""
		if i := strings.LastIndexByte(e.Subject, ' '); i >= 0 {
			kind, name = e.Subject[:i], e.Subject[i+1:]
		}
		details = append(details, &errdetails.ResourceInfo{ResourceType: valid(kind), ResourceName: valid(name)})
	}
	s := status.New(code, valid(e.Error()))
	if with, err := s.WithDetails(details...); err == nil {
		return with
	}
	return s
}

// valid keeps what a caller put into a message from making the status impossible to encode.
func valid(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }

// Sent says what is known of a call that failed without an answer of ours.
type Sent int

// What is known.
const (
	// NothingToLose: the call changes nothing.
	NothingToLose Sent = iota
	// NotSent: the call would have changed something and never reached a connection.
	NotSent
	// MaybeSent: the call would have changed something and may have arrived.
	MaybeSent
)

// FromError turns the error of a call back into an *alloc.Error, so that errors.Is(err,
// alloc.ErrStaleEpoch) works as it does in the server. status.FromError finds the status in the result.
//
// An error without a refusal of ours is the transport's. When it leaves open whether a mutation took
// effect it becomes ErrUnknownOutcome; where nothing happened and another try makes sense,
// ErrUnavailable, which keeps matching context.Canceled and context.DeadlineExceeded. What no other try
// can heal, such as UNIMPLEMENTED, stays as it is.
func FromError(err error, sent Sent) error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*alloc.Error](err); ok {
		return err
	}
	s, ok := status.FromError(err)
	if !ok {
		s = status.FromContextError(err)
	}
	if e := refused(s); e != nil {
		return &remote{refusal: e, s: s}
	}
	switch s.Code() {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled:
	case codes.Unimplemented, codes.Unauthenticated, codes.PermissionDenied, codes.InvalidArgument:
		return err // refused before anybody looked at it
	default:
		// RESOURCE_EXHAUSTED among them: without a refusal of ours it may be a request that was too large to
		// be looked at, but also an answer that is too large to be taken, after the commit, or a connection
		// that was closed for too many pings (ENHANCE_YOUR_CALM) in the middle of everything.
		if sent != MaybeSent {
			return err
		}
	}
	cause := &transport{s: s}
	if sent == MaybeSent {
		return &alloc.Error{Reason: alloc.ReasonUnknownOutcome, Msg: "the answer was lost: it was committed, or not, or will be",
			Fix: "ask again with the same request id", RetryAfter: retryUnlessSaid[alloc.ReasonUnknownOutcome], Err: cause}
	}
	return &alloc.Error{Reason: alloc.ReasonUnavailable, Msg: "the server was not reached, or did not answer; nothing changed",
		Fix: "check that it runs; try again", RetryAfter: retryUnlessSaid[alloc.ReasonUnavailable], Err: cause}
}

// refused puts an error of ours together again; nil when the status carries none.
func refused(s *status.Status) *alloc.Error {
	var e *alloc.Error
	var retry time.Duration
	var subject string
	for _, d := range s.Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			if d.GetDomain() == Domain {
				e = &alloc.Error{Reason: alloc.Reason(d.GetReason()), Msg: d.GetMetadata()[metaMsg], Fix: d.GetMetadata()[metaFix]}
			}
		case *errdetails.RetryInfo:
			retry = max(d.GetRetryDelay().AsDuration(), 0)
		case *errdetails.ResourceInfo:
			subject = strings.TrimSpace(d.GetResourceType() + " " + d.GetResourceName())
		}
	}
	if e == nil {
		return nil
	}
	e.RetryAfter, e.Subject = retry, subject
	if e.Msg == "" { // another implementation: its message is the whole sentence
		e.Msg, e.Subject = s.Message(), ""
	}
	return e
}

// remote is a refusal that crossed the wire, with the status that brought it.
type remote struct {
	refusal *alloc.Error
	s       *status.Status
}

func (r *remote) Error() string              { return r.refusal.Error() }
func (r *remote) Unwrap() error              { return r.refusal }
func (r *remote) GRPCStatus() *status.Status { return r.s }

// transport is the status below an error that no server of ours wrote.
type transport struct{ s *status.Status }

func (t *transport) Error() string              { return t.s.Code().String() + ": " + t.s.Message() }
func (t *transport) GRPCStatus() *status.Status { return t.s }

// Is lets a caller whose own deadline passed find that out.
func (t *transport) Is(target error) bool {
	return target == context.DeadlineExceeded && t.s.Code() == codes.DeadlineExceeded ||
		target == context.Canceled && t.s.Code() == codes.Canceled
}
