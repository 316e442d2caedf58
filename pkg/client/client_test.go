package client

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client/wire"
)

func TestTargets(t *testing.T) {
	for target, want := range map[string]string{
		"unix:///run/x.sock": "unix:///run/x.sock",
		"127.0.0.1:1":        "dns:///127.0.0.1:1",
		"[::1]:1":            "dns:///[::1]:1",
		"localhost:1":        "dns:///localhost:1",
		"192.0.2.1:1":        "insecure",
		"server.example:1":   "insecure",
		"[fe80::1%eth0]:1":   "insecure",
		"unix://x.sock":      "", "": "", "x": "", ":1": "", "host:": "", "http://127.0.0.1:1": "", "/run/x.sock": "",
	} {
		got, err := resolve(target, false)
		open, openErr := resolve(target, true)
		switch {
		case want == "insecure" && (err == nil || !strings.Contains(err.Error(), "plain text") || openErr != nil || open != "dns:///"+target):
			t.Errorf("%q: %q, %v; insecure %q, %v", target, got, err, open, openErr)
		case want == "" && (!errors.Is(err, alloc.ErrInvalid) || openErr == nil):
			t.Errorf("%q: %q, %v", target, got, err)
		case want != "" && want != "insecure" && (got != want || err != nil):
			t.Errorf("%q: %q, %v", target, got, err)
		}
	}
	if _, err := Dial("unix:///x", WithHost("../x")); !errors.Is(err, alloc.ErrInvalid) {
		t.Errorf("a host name that is a path: %v", err)
	}
}

func TestNobodyThere(t *testing.T) {
	c, err := Dial("unix:///nonexistent/nsalloc.sock")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, err = c.Allocate(t.Context(), alloc.AllocateCommand{RequestID: NewRequestID(), Count: 1})
	if !errors.Is(err, alloc.ErrUnavailable) || status.Code(err) != codes.Unavailable || !Again(err) {
		t.Errorf("a mutation that no server can know of: %v", err)
	}
	if _, _, err := c.Pool(t.Context()); !errors.Is(err, alloc.ErrUnavailable) {
		t.Errorf("a read: %v", err)
	}
	// What no server would take is refused before it leaves, so that it is no unknown outcome.
	big := alloc.RegisterCommand{Items: []alloc.RegisterItem{{Labels: map[string]string{"x": strings.Repeat("x", maxRequest)}}}}
	if _, _, err := c.Register(t.Context(), big); !errors.Is(err, alloc.ErrTooLarge) || Again(err) {
		t.Errorf("a request of more than %d bytes: %v", maxRequest, err)
	}
}

func TestRequestIDs(t *testing.T) {
	id, err := uuid.Parse(NewRequestID())
	if err != nil || id.Version() != 7 || id.String() != strings.ToLower(id.String()) {
		t.Errorf("%v, %v", id, err)
	}
	if Reason(alloc.ErrRange) != "RANGE_MISMATCH" || Reason(errors.New("x")) != "" {
		t.Error("Reason is wrong")
	}
}

func TestReadsAndMutations(t *testing.T) {
	for method, want := range map[string]bool{
		"/nsalloc.v1.Sandboxes/Get": true, "/nsalloc.v1.Hosts/List": true, "/nsalloc.v1.Handoff/Find": true,
		"/nsalloc.v1.Sandboxes/Register": false, "/nsalloc.v1.Allocator/Allocate": false, "/nsalloc.v1.Hosts/Hello": false, "/other/Get": false, "": false,
	} {
		if isRead(method) != want {
			t.Errorf("%s: isRead is %v", method, !want)
		}
	}
}

// script answers one error after the other, and notes under which id it was asked.
type script struct {
	errs []error
	ids  []string
}

func (s *script) do(id string) error {
	s.ids = append(s.ids, id)
	err := s.errs[0]
	if len(s.errs) > 1 {
		s.errs = s.errs[1:]
	}
	return err
}

func refusal(r alloc.Reason, after time.Duration) error {
	return &alloc.Error{Reason: r, Msg: "x", RetryAfter: after}
}

func TestRetry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &script{errs: []error{refusal(alloc.ReasonUnavailable, 0), refusal(alloc.ReasonConflict, 0), refusal(alloc.ReasonUnknownOutcome, 3*time.Second), refusal(alloc.ReasonRecovering, 0),
			refusal(alloc.ReasonExhausted, time.Millisecond), nil}}
		began := time.Now()
		if err := Retry(t.Context(), s.do); err != nil {
			t.Error(err)
		}
		if took := time.Since(began); took < 3*time.Second || took > 5*time.Second {
			t.Errorf("it took %v; RetryInfo asked for 3 s", took)
		}
		if len(s.ids) != 6 {
			t.Errorf("%d tries", len(s.ids))
		}
		for _, id := range s.ids {
			if id != s.ids[0] {
				t.Errorf("the id changed: %v", s.ids)
			}
		}
		for _, final := range []error{refusal(alloc.ReasonExhausted, 0), refusal(alloc.ReasonStaleEpoch, time.Second), refusal(alloc.ReasonNotConfirmed, time.Second), errors.New("x"), nil} {
			s := &script{errs: []error{final}}
			if err := Retry(t.Context(), s.do); !errors.Is(err, final) || len(s.ids) != 1 {
				t.Errorf("%v: %v after %d tries", final, err, len(s.ids))
			}
		}
	})
}

func TestRetryEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		s := &script{errs: []error{refusal(alloc.ReasonUnknownOutcome, 0)}}
		err := Retry(ctx, s.do)
		if !errors.Is(err, alloc.ErrUnknownOutcome) || !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		if len(s.ids) < 30 || len(s.ids) > 80 {
			t.Errorf("%d tries in a minute", len(s.ids))
		}
		if err := Retry(ctx, s.do); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, alloc.ErrUnknownOutcome) {
			t.Errorf("not even begun: %v", err)
		}
	})
}

// TestRetryKeepsUnknown: a try that never left the host says nothing of one that may have arrived.
func TestRetryKeepsUnknown(t *testing.T) {
	unknown, away := refusal(alloc.ReasonUnknownOutcome, 0), refusal(alloc.ReasonUnavailable, 0)
	for name, c := range map[string]struct {
		errs []error
		want bool // is it unknown in the end?
	}{
		"first unknown":        {[]error{unknown, away}, true},
		"unknown in between":   {[]error{away, unknown, away, refusal(alloc.ReasonConflict, 0)}, true},
		"last unknown":         {[]error{away, unknown}, true},
		"never unknown":        {[]error{away, refusal(alloc.ReasonConflict, 0), away}, false},
		"turned away":          {[]error{unknown, refusal(alloc.ReasonCaller, 0)}, true},
		"another pool":         {[]error{unknown, refusal(alloc.ReasonPoolMissing, 0)}, true},
		"not the server's":     {[]error{unknown, status.Error(codes.Unimplemented, "x")}, true},
		"ours":                 {[]error{unknown, errors.New("x")}, true},
		"ours at once":         {[]error{errors.New("x")}, false},
		"answered":             {[]error{unknown, away, refusal(alloc.ReasonStaleEpoch, 0)}, false},
		"answered by a server": {[]error{unknown, wire.FromError(wire.Status(alloc.ErrWrongState).Err(), wire.MaybeSent)}, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				s := &script{errs: c.errs}
				last := c.errs[len(c.errs)-1]
				err := Retry(ctx, s.do)
				if errors.Is(err, alloc.ErrUnknownOutcome) != c.want || !errors.Is(err, last) {
					t.Error(err)
				}
				if c.want && (Reason(err) != string(alloc.ReasonUnknownOutcome) || !strings.Contains(err.Error(), s.ids[len(s.ids)-1])) {
					t.Errorf("%q, under the id %s", err, s.ids[len(s.ids)-1])
				}
				if gaveUp := Again(last); errors.Is(err, context.DeadlineExceeded) != gaveUp {
					t.Errorf("%v: after %v", err, last)
				}
				if !c.want && !Again(last) && err != last {
					t.Errorf("%v instead of %v", err, last)
				}
			})
		})
	}
}

// TestRetryEndsWithTimer: ctx ends in the very moment in which the pause is over.
func TestRetryEndsWithTimer(t *testing.T) {
	for range 50 {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			s := &script{errs: []error{refusal(alloc.ReasonUnknownOutcome, time.Second)}}
			err := Retry(ctx, s.do)
			if !errors.Is(err, alloc.ErrUnknownOutcome) || !errors.Is(err, context.DeadlineExceeded) {
				t.Error(err)
			}
		})
	}
}

// TestRetryRenews: an id that certainly had no effect is replaced before it expires; one that may have
// had is kept, whatever comes.
func TestRetryRenews(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		count := func(retry func(context.Context, func(string) error) error, first error) (ids map[string]bool, last string) {
			ctx, cancel := context.WithTimeout(t.Context(), 12*time.Minute)
			defer cancel()
			ids = map[string]bool{}
			n := 0
			_ = retry(ctx, func(id string) error {
				ids[id], last = true, id
				if n++; n == 1 {
					return first
				}
				return refusal(alloc.ReasonUnavailable, 0)
			})
			return ids, last
		}
		if ids, _ := count(Retry, refusal(alloc.ReasonUnavailable, 0)); len(ids) != 3 {
			t.Errorf("%d ids in 12 minutes without a server, want 3", len(ids))
		}
		if ids, _ := count(Retry, refusal(alloc.ReasonUnknownOutcome, 0)); len(ids) != 1 {
			t.Errorf("%d ids after an unknown outcome", len(ids))
		}
		kept := func(ctx context.Context, do func(string) error) error { return RetryID(ctx, "mine", do) }
		if ids, last := count(kept, refusal(alloc.ReasonUnavailable, 0)); len(ids) != 1 || last != "mine" {
			t.Errorf("RetryID used %v", ids)
		}
	})
}
