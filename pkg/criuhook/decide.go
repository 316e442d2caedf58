package criuhook

import "errors"

// Decision is what a caller of Ask does with what came back.
type Decision struct {
	// Veto: stop CRIU. Never set at a stage that cannot.
	Veto bool
	// Message is one line for CRIU's log; empty when there is nothing to say.
	Message string
}

// Decide turns what Ask returned into what to do. Without an answer the action is vetoed: a tree that
// moved without its record would run under serials that another host holds too. bypassed says that an
// operator allowed just that (BypassPath): then it goes ahead, and the agent finds out later.
func Decide(a Action, answer Response, err error, bypassed bool) Decision {
	stage, known := StageOf(a)
	can := known && stage.CanVeto
	if err == nil {
		return Decision{Veto: can && answer.Verdict == Veto, Message: answer.Message}
	}
	text := err.Error()
	switch {
	case errors.Is(err, ErrNoAgent):
		text += "; start nsalloc-agent, as root"
	case errors.Is(err, ErrNoAnswer):
		text += "; nsalloc-agent's log says more"
	}
	switch {
	case !can:
		text += " (CRIU cannot be stopped at this point)"
	case bypassed:
		text += " (let through: " + BypassPath + " is there)"
	default:
		text += "; or, to let CRIU go ahead without it: touch " + BypassPath
	}
	return Decision{Veto: can && !bypassed, Message: printable(text)}
}
