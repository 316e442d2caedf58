package alloctest

import (
	"fmt"
	"maps"
	"slices"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// Model is a sandbox and its checkpoints as the design describes them, and the lives of the hosts; and
// nothing else: no records, no history, small numbers. It was written from the design's text and its
// model-checked form, not from the code, so that the two can be compared. Nothing changes a Model: Step
// is a pure function, which random histories (rapid), every short history (TestNextAgainstModel) and
// recorded concurrent ones (porcupine) are checked against. The zero Model is a sandbox that is not yet.
type Model struct {
	State  string
	Owner  string
	Epoch  int
	Cur    string            // the current checkpoint, "" for none
	Images map[string]string // checkpoint -> open, copy, void, consumed
	Holder string            // HOST/RUN of the restore that made, or makes, the tree
	From   string            // where its claim goes back to
	Given  int               // the epoch of the last claim that was given back
	Label  string            // what the last register said
	Lives  map[string]int    // host -> its current life; 0 for one that nobody counts
}

// NewModel is a sandbox that runs on a host.
func NewModel(owner string) Model { return Model{State: "running", Owner: owner, Epoch: 1} }

// Command is one thing that can be said of the sandbox.
type Command struct {
	// What is new, register, dump, stopped, ran-on, claim, bind, release, over or fence; get, which
	// changes nothing; or hello, a new life of a host.
	What  string
	Host  string
	Life  int // of the host, as the caller knows it
	Epoch int
	Ckpt  string
	// Seen is stopped, in_doubt or not_given, for stopped; yes or no, zero given, for ran-on; the label,
	// for register.
	Seen   string
	Run    string
	Forged bool // claim: with another manifest than the one that was recorded
}

func (c Command) String() string {
	s := fmt.Sprintf("%s by %s/%s, epoch %d, %s %s", c.What, c.Host, c.Run, c.Epoch, c.Ckpt, c.Seen)
	if c.Life != 0 {
		s += fmt.Sprintf(", life %d", c.Life)
	}
	if c.Forged {
		s += ", forged"
	}
	return s
}

// Answer is what a command gets: Done, also when it had been done before; Clone; or why it was refused.
type Answer string

// The answers that are no refusals.
const (
	Done  Answer = "done"
	Clone Answer = "clone"
)

// AnswerOf is the answer that an error is.
func AnswerOf(err error) Answer {
	if err == nil {
		return Done
	}
	return Answer(alloc.ReasonOf(err))
}

// Answers are those that a command may get. A refusal may name any cause that is true.
type Answers []Answer

// Allow reports whether a is one of them.
func (as Answers) Allow(a Answer) bool { return slices.Contains(as, a) }

func (as *Answers) because(r alloc.Reason, is bool) {
	if is {
		*as = append(*as, Answer(r))
	}
}

func (m Model) to(state, images string) Model {
	m.State = state
	if images != "" {
		m.Images = maps.Clone(m.Images)
		m.Images[m.Cur] = images
	}
	return m
}

// back is where a claim goes: in transit with its images open, or over with its copy.
func (m Model) back() Model {
	images := "open"
	if m.From == "ended" {
		images = "copy"
	}
	m.Given, m.Holder = m.Epoch, ""
	return m.to(m.From, images)
}

// Step is the model after a command, and the answers that the command may get. One that may not be
// answered Done has changed nothing.
func (m Model) Step(c Command, p alloc.Policy) (Model, Answers) {
	switch c.What {
	case "get":
		return m, Answers{Done}
	case "hello":
		lives := maps.Clone(m.Lives)
		if lives == nil {
			lives = map[string]int{}
		}
		lives[c.Host]++
		m.Lives = lives
		return m, Answers{Done}
	case "fence":
		return m.fence(c)
	}
	var no Answers
	no.because(alloc.ReasonStaleIncarnation, m.Lives[c.Host] != c.Life)
	switch c.What {
	case "claim":
		return m.claim(c, p, no)
	case "new":
		no.because(alloc.ReasonBound, m.State != "")
		if len(no) > 0 {
			return m, no
		}
		lives := m.Lives
		m = NewModel(c.Host)
		m.Lives = lives
		return m, Answers{Done}
	}
	no.because(alloc.ReasonSandboxNotFound, m.State == "")
	if m.State != "" {
		no.because(alloc.ReasonNotOwner, m.Owner != c.Host)
		no.because(alloc.ReasonStaleEpoch, m.Epoch != c.Epoch)
	}
	return m.byOwner(c, no)
}

// byOwner is what only the owner may say, in the epoch that it owns.
func (m Model) byOwner(c Command, no Answers) (Model, Answers) {
	holds := m.Holder == c.Host+"/"+c.Run && (m.State == "claimed" || m.State == "running")
	next, again := m, false // again: it has had its effect already
	switch c.What {
	case "register":
		no.because(alloc.ReasonWrongState, m.State != "running")
		next.Label = c.Seen
	case "dump":
		recorded := m.Images[c.Ckpt] != ""
		no.because(alloc.ReasonBound, recorded && m.Cur != c.Ckpt)
		again = recorded && m.Cur == c.Ckpt && m.State == "dumped"
		no.because(alloc.ReasonWrongState, !again && (recorded || m.State != "running"))
		if !recorded {
			next.Images, next.Cur, next.Holder = maps.Clone(m.Images), c.Ckpt, ""
			if next.Images == nil {
				next.Images = map[string]string{}
			}
			next = next.to("dumped", "open")
		}
	case "stopped", "ran-on":
		// What became of the dumped tree.
		to := map[string][2]string{
			"stopped": {"in_transit", "open"}, "in_doubt": {"ended", "copy"}, "not_given": {"ended", "void"},
			"yes": {"running", "copy"}, "no": {"running", "void"},
		}[c.Seen]
		current := c.Ckpt != "" && m.Cur == c.Ckpt
		again = current && m.State == to[0] && m.Images[m.Cur] == to[1]
		no.because(alloc.ReasonWrongState, !current || !again && m.State != "dumped")
		if current {
			next = m.to(to[0], to[1])
		}
	case "bind":
		no.because(alloc.ReasonWrongState, !holds)
		if again = holds && m.State == "running"; holds {
			next = m.to("running", "consumed")
		}
	case "release":
		again = !holds && m.Given == m.Epoch && (m.State == "in_transit" || m.State == "ended")
		no.because(alloc.ReasonWrongState, !holds && !again)
		if holds {
			next = m.back()
		}
	case "over":
		again = m.State == "ended"
		no.because(alloc.ReasonWrongState, !again && m.State != "running")
		next.Holder = ""
		next = next.to("ended", "")
	default:
		panic(c.What)
	}
	switch {
	case len(no) > 0:
		return m, no
	case again:
		return m, Answers{Done}
	}
	return next, Answers{Done}
}

func (m Model) claim(c Command, p alloc.Policy, no Answers) (Model, Answers) {
	who, images, current := c.Host+"/"+c.Run, m.Images[c.Ckpt], m.Cur == c.Ckpt
	copyOfOver := current && m.State == "ended" && images == "copy"
	mine := current && m.Holder == who
	may := current && m.State == "in_transit" || copyOfOver && p.Over == alloc.PolicyResume
	later := current && (m.State == "dumped" || m.State == "claimed")
	no.because(alloc.ReasonCheckpointNotFound, images == "") // nobody recorded them
	no.because(alloc.ReasonManifest, c.Forged)
	if !mine && images != "" {
		no.because(alloc.ReasonVoid, images == "void")
		no.because(alloc.ReasonNotConfirmed, current && m.State == "dumped")
		no.because(alloc.ReasonClaimed, current && m.State == "claimed")
		no.because(alloc.ReasonRefused, !may && !later && images != "void" &&
			(copyOfOver && p.Over == alloc.PolicyRefuse || !copyOfOver && p.Live == alloc.PolicyRefuse))
	}
	switch {
	case len(no) > 0:
		return m, no
	case mine:
		return m, Answers{Done}
	case may:
		m.From, m.Holder, m.Owner, m.Epoch = m.State, who, c.Host, m.Epoch+1
		return m.to("claimed", ""), Answers{Done}
	}
	return m, Answers{Clone}
}

func (m Model) fence(c Command) (Model, Answers) {
	if m.Owner != c.Host {
		return m, Answers{Answer(alloc.ReasonNotOwner)}
	}
	switch m.State {
	case "running":
		m.Holder = ""
		m = m.to("ended", "")
	case "dumped":
		m = m.to("in_transit", "")
	case "claimed":
		m = m.back()
		m.Given = 0 // a fence, not a release
	default:
		return m, Answers{Done}
	}
	m.Epoch++
	return m, Answers{Done}
}

// ModelOf is what records say, in the model's words, with the checkpoints that the caller names. What
// only guides later steps, where a claim goes and which one was given back, is the records' too.
func ModelOf(s *alloc.Sandbox, checkpoints []*alloc.Checkpoint) Model {
	m := Model{State: string(s.State), Owner: s.Owner, Epoch: int(uint64(s.Epoch) & alloc.MaxCounter)}
	if s.Checkpoint != 0 {
		m.Cur = s.Checkpoint.String()
	}
	for _, c := range checkpoints {
		if m.Images == nil {
			m.Images = map[string]string{}
		}
		m.Images[c.Serial.String()] = string(c.State)
	}
	if s.Claim != nil {
		m.Holder = s.Claim.Host + "/" + s.Claim.Run
	}
	return m
}

// Same reports whether two models look alike from outside.
func (m Model) Same(o Model) bool {
	return m.State == o.State && m.Owner == o.Owner && m.Epoch == o.Epoch && m.Cur == o.Cur && m.Holder == o.Holder && maps.Equal(m.Images, o.Images)
}
