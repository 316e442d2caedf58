package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"time"

	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/recovery"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/nsalloc/nsalloc/internal/identity"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client/wire"
)

// Every call, from the connection to the handler and back: who calls, may they, by when; what an error
// means on the wire; what is logged and counted.

// admit settles who calls and whether they may.
func (s *Server) admit(ctx context.Context, method string) (context.Context, identity.Caller, error) {
	who, err := s.rules.Identify(ctx)
	if err != nil {
		return ctx, who, err
	}
	if err := identity.Check(method, who); err != nil {
		return ctx, who, err
	}
	return identity.NewContext(ctx, who), who, nil
}

// caller is who makes the call; admit has put it there.
func caller(ctx context.Context) identity.Caller {
	c, ok := identity.FromContext(ctx)
	if !ok {
		panic("a handler was reached without admit")
	}
	return c
}

func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	began := time.Now()
	var resp any
	in, who, err := s.admit(ctx, info.FullMethod)
	if err == nil {
		if _, ok := in.Deadline(); !ok {
			var cancel context.CancelFunc
			in, cancel = context.WithTimeout(in, s.cfg.CallTimeout)
			defer cancel()
		}
		resp, err = handle(in, req)
	}
	err = s.answer(ctx, info.FullMethod, who, began, err)
	if err != nil {
		return nil, err
	}
	return resp, nil
}

func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
	began := time.Now()
	ctx, who, err := s.admit(ss.Context(), info.FullMethod)
	if err == nil {
		// A stream ends by itself only when its caller leaves; a server that stops must not wait for that.
		ctx, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		go func() {
			select {
			case <-s.ending:
				cancel(errEnding)
			case <-ctx.Done():
			}
		}()
		err = handle(srv, &streamIn{ServerStream: ss, ctx: ctx})
	}
	return s.answer(ss.Context(), info.FullMethod, who, began, err)
}

var errEnding = &alloc.Error{Reason: alloc.ReasonUnavailable, Msg: "this server stops", Fix: "connect again"}

// streamIn is a stream with a context of ours.
type streamIn struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *streamIn) Context() context.Context { return s.ctx }

// answer makes err what crosses the wire, and says in the log what happened.
func (s *Server) answer(ctx context.Context, method string, who identity.Caller, began time.Time, err error) error {
	if err == nil && !s.log.Enabled(ctx, slog.LevelDebug) {
		return nil
	}
	st := wire.Status(err)
	attrs := []slog.Attr{
		slog.String("method", method), slog.String("caller", who.String()), slog.String("code", st.Code().String()),
		slog.Duration("took", time.Since(began)),
	}
	level := slog.LevelDebug
	if err != nil {
		attrs = append(attrs, slog.String("error", err.Error()))
		if reason := alloc.ReasonOf(err); reason != "" {
			s.metrics.refusals.WithLabelValues(string(reason)).Inc()
		} else if st.Code() == codes.Internal {
			level = slog.LevelError // a mistake of ours, of which the caller learns nothing
		}
	}
	s.log.LogAttrs(ctx, level, "call", attrs...)
	return st.Err()
}

// A panic is one call's, and its outcome is unknown to the caller, like that of a lost connection.
func (s *Server) recoverUnary() grpc.UnaryServerInterceptor {
	return recovery.UnaryServerInterceptor(recovery.WithRecoveryHandlerContext(s.panicked))
}

func (s *Server) recoverStream() grpc.StreamServerInterceptor {
	return recovery.StreamServerInterceptor(recovery.WithRecoveryHandlerContext(s.panicked))
}

func (s *Server) panicked(ctx context.Context, p any) error {
	s.metrics.panics.Inc()
	s.log.ErrorContext(ctx, "a handler panicked", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
	return errPanic
}

var errPanic = errors.New("the handler panicked")
