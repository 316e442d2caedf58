package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// The exit codes; scripts rest on them.
const (
	exitOK          = 0
	exitError       = 1
	exitUsage       = 2
	exitNotFound    = 3
	exitConflict    = 4
	exitUnavailable = 5
)

// failure is an error with its exit code. An empty message means that everything was said already.
type failure struct {
	code    int
	message string
	cause   error
}

func (f *failure) Error() string { return f.message }
func (f *failure) Unwrap() error { return f.cause }

func fail(code int, format string, args ...any) error {
	err := fmt.Errorf(format, args...)
	return &failure{code: code, message: err.Error(), cause: errors.Unwrap(err)}
}

func usage(format string, args ...any) error { return fail(exitUsage, format, args...) }

// silent ends a command whose output has said it all, such as a check with findings.
func silent(code int) error { return &failure{code: code} }

// usageArgs makes a refusal of cobra's a usage error that shows how to write it.
func usageArgs(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch err := check(cmd, args); {
		case err == nil:
			return nil
		case !cmd.HasParent():
			hint := "`nsalloc --help` lists the commands"
			if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
				hint = "did you mean " + strings.Join(near, " or ") + "?"
			}
			return usage("%q is no command; %s", args[0], hint)
		default:
			return misuse(cmd, args)
		}
	}
}

// misuse says what a command expects instead of these arguments, and shows it.
func misuse(cmd *cobra.Command, args []string) error {
	name := cmd.CommandPath()
	want := wanted(cmd)
	example := name
	if line, _, _ := strings.Cut(strings.TrimSpace(cmd.Example), "\n"); line != "" {
		example, _, _ = strings.Cut(line, "   ") // what it is for
	}
	switch {
	case len(args) < len(want):
		return usage("%s needs %s; for example: %s", name, strings.Join(want[len(args):], " and "), example)
	case len(want) == 0:
		return usage("%s takes flags only, and %q is none; for example: %s", name, args[0], example)
	}
	return usage("%s takes %s, and %q is too much; for example: %s", name, strings.Join(want, " and "), args[len(want)], example)
}

// wanted are the arguments in a command's Use: the words before its flags.
func wanted(cmd *cobra.Command) (words []string) {
	for _, w := range strings.Fields(cmd.Use)[1:] {
		if strings.HasPrefix(w, "[") || strings.HasPrefix(w, "-") {
			break
		}
		words = append(words, strings.ReplaceAll(w, "|", " or "))
	}
	return words
}

var errTimeout = errors.New("--timeout is over")

// explain turns any error into one sentence with a cause and a fix, and an exit code.
func explain(err error) *failure {
	if f, ok := errors.AsType[*failure](err); ok {
		return f
	}
	if e, ok := errors.AsType[*alloc.Error](err); ok {
		return explainRefusal(e, err)
	}
	switch {
	case errors.Is(err, context.Canceled):
		return &failure{code: exitError, message: "interrupted"}
	case errors.Is(err, context.DeadlineExceeded):
		return &failure{code: exitUnavailable, message: "no answer in time; ask again with a longer --timeout"}
	}
	if s, ok := status.FromError(err); ok { // of a server that is not ours, or does not mean to say more
		return &failure{code: codeOfStatus(s.Code()), message: s.Message()}
	}
	return &failure{code: exitError, message: err.Error()}
}

// explainRefusal is for what the domain refuses, here or on the other side of the wire. The reason comes
// last: it is what one can search for.
func explainRefusal(e *alloc.Error, err error) *failure {
	f := &failure{code: codeOfReason(e.Reason), message: e.Error(), cause: err}
	s, remote := status.FromError(err)
	if f.code == exitError && remote { // a reason that this version does not know
		f.code = codeOfStatus(s.Code())
	}
	switch {
	case strings.Contains(f.message, "; "): // it has a fix already
	case fixes[e.Reason] != "":
		f.message += "; " + fixes[e.Reason]
	case e.RetryAfter > 0:
		f.message += fmt.Sprintf("; try again in %s", e.RetryAfter.Round(time.Millisecond))
	}
	if remote {
		f.message += " [" + string(e.Reason) + "]"
	}
	return f
}

// reasonProcess is the agent's.
const reasonProcess alloc.Reason = "PROCESS_NOT_FOUND"

// fixes are for refusals that come without one.
var fixes = map[alloc.Reason]string{
	alloc.ReasonSerialNotFound:     "is it of this pool (nsalloc pool status), and are all its digits there?",
	alloc.ReasonSandboxNotFound:    "nsalloc sandbox list shows those that are known",
	alloc.ReasonCheckpointNotFound: "nsalloc checkpoint list shows those that are known",
	alloc.ReasonHostUnknown:        "nsalloc host list shows those that are known",
	alloc.ReasonPoolMissing:        "nsalloc pool init creates one",
	alloc.ReasonRecovering:         "wait for the generation to be raised; the servers' logs say what they wait for",
	alloc.ReasonFormat:             "use a release as new as the one that wrote the store",
	alloc.ReasonMalformed:          "nothing was changed; look at the server's log",
	alloc.ReasonRecordNotFound:     "nsalloc check shows what there is to mend",
	reasonProcess:                  "give the pid of a process that lives on this host",
}

func codeOfReason(r alloc.Reason) int {
	switch r {
	case alloc.ReasonInvalid:
		return exitUsage
	case alloc.ReasonSandboxNotFound, alloc.ReasonCheckpointNotFound, alloc.ReasonHostUnknown, alloc.ReasonSerialNotFound, alloc.ReasonRecordNotFound, reasonProcess:
		return exitNotFound
	case alloc.ReasonPoolExists, alloc.ReasonConflict, alloc.ReasonNothingToMend, alloc.ReasonMendFirst, alloc.ReasonServerAnswers:
		return exitConflict
	case alloc.ReasonUnavailable, alloc.ReasonUnknownOutcome, alloc.ReasonRecovering:
		return exitUnavailable
	}
	return exitError
}

func codeOfStatus(c codes.Code) int {
	switch c {
	case codes.InvalidArgument, codes.OutOfRange:
		return exitUsage
	case codes.NotFound:
		return exitNotFound
	case codes.AlreadyExists, codes.Aborted, codes.FailedPrecondition:
		return exitConflict
	case codes.Unavailable, codes.DeadlineExceeded:
		return exitUnavailable
	}
	return exitError
}
