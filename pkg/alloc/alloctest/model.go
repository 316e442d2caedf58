package alloctest

import (
	"fmt"
	"maps"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// Model is a sandbox and its checkpoints as the design describes them, and nothing else: no records,
// no history, small numbers. It was written from the design's text and its model-checked form, not
// from the code, so that the two can be compared. Nothing changes a Model; Step gives a new one.
type Model struct {
	State  string
	Owner  string
	Epoch  int
	Cur    string            // the current checkpoint, "" for none
	Images map[string]string // checkpoint -> open, copy, void, consumed
	Holder string            // HOST/RUN of the restore that made, or makes, the tree
	From   string            // where its claim goes back to
	Given  int               // the epoch of the last claim that was given back
}

// NewModel is a sandbox that runs on a host.
func NewModel(owner string) Model { return Model{State: "running", Owner: owner, Epoch: 1} }

// Command is one thing that can be said of the sandbox.
type Command struct {
	// What is dump, stopped, ran-on, claim, bind, release, over or fence.
	What  string
	Host  string
	Epoch int
	Ckpt  string
	// Seen is stopped, in_doubt or not_given, for stopped; yes or no, zero given, for ran-on.
	Seen string
	Run  string
}

func (c Command) String() string {
	return fmt.Sprintf("%s by %s/%s, epoch %d, %s %s", c.What, c.Host, c.Run, c.Epoch, c.Ckpt, c.Seen)
}

// Verdict is what a command gets: done, also when it had been done before; clone; wait; or no.
type Verdict string

// The verdicts.
const (
	Done  Verdict = "done"
	Clone Verdict = "clone"
	Wait  Verdict = "wait"
	No    Verdict = "no"
)

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

// Step is the model after a command, and what the command gets.
func (m Model) Step(c Command, p alloc.Policy) (Model, Verdict) {
	if c.What == "claim" {
		return m.claim(c, p)
	}
	if c.What == "fence" {
		return m.fence(c)
	}
	if m.Owner != c.Host || m.Epoch != c.Epoch {
		return m, No
	}
	holds := m.Holder == c.Host+"/"+c.Run && (m.State == "claimed" || m.State == "running")
	switch c.What {
	case "dump":
		if m.Images[c.Ckpt] != "" {
			return m, verdict(m.State == "dumped" && m.Cur == c.Ckpt)
		}
		if m.State != "running" {
			return m, No
		}
		images := maps.Clone(m.Images)
		if images == nil {
			images = map[string]string{}
		}
		m.Images, m.Cur, m.Holder = images, c.Ckpt, ""
		return m.to("dumped", "open"), Done
	case "stopped":
		to := map[string][2]string{"stopped": {"in_transit", "open"}, "in_doubt": {"ended", "copy"}, "not_given": {"ended", "void"}}[c.Seen]
		return m.afterDump(c, to[0], to[1])
	case "ran-on":
		return m.afterDump(c, "running", map[string]string{"yes": "copy", "no": "void"}[c.Seen])
	case "bind":
		if !holds {
			return m, No
		}
		return m.to("running", "consumed"), Done
	case "release":
		if !holds {
			return m, verdict(m.Given == m.Epoch && (m.State == "in_transit" || m.State == "ended"))
		}
		return m.back(), Done
	case "over":
		if m.State != "running" {
			return m, verdict(m.State == "ended")
		}
		m.Holder = ""
		return m.to("ended", ""), Done
	}
	panic(c.What)
}

// afterDump is what became of the dumped tree.
func (m Model) afterDump(c Command, state, images string) (Model, Verdict) {
	switch {
	case c.Ckpt == "" || m.Cur != c.Ckpt:
		return m, No
	case m.State == state && m.Images[m.Cur] == images:
		return m, Done
	case m.State != "dumped":
		return m, No
	}
	return m.to(state, images), Done
}

func (m Model) claim(c Command, p alloc.Policy) (Model, Verdict) {
	who, images, current := c.Host+"/"+c.Run, m.Images[c.Ckpt], m.Cur == c.Ckpt
	copyOfOver := current && m.State == "ended" && images == "copy"
	switch {
	case images == "":
		return m, No // nobody recorded them
	case current && m.Holder == who:
		return m, Done
	case images == "void":
		return m, No
	case current && m.State == "in_transit", copyOfOver && p.Over == alloc.PolicyResume:
		m.From, m.Holder, m.Owner, m.Epoch = m.State, who, c.Host, m.Epoch+1
		return m.to("claimed", ""), Done
	case current && (m.State == "dumped" || m.State == "claimed"):
		return m, Wait
	case copyOfOver && p.Over == alloc.PolicyRefuse, !copyOfOver && p.Live == alloc.PolicyRefuse:
		return m, No
	}
	return m, Clone
}

func (m Model) fence(c Command) (Model, Verdict) {
	if m.Owner != c.Host {
		return m, No
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
		return m, Done
	}
	m.Epoch++
	return m, Done
}

func verdict(ok bool) Verdict {
	if ok {
		return Done
	}
	return No
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
