package criuhook

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// ProtocolVersion is the version of Request and Response.
const ProtocolVersion = 1

const (
	// MaxMessage is the size of the largest message, in bytes.
	MaxMessage = 64 << 10
	// Deadline is how long a hook waits for its verdict. CRIU waits for ever with the source frozen,
	// so the hook does not. The agent answers within AgentDeadline, before the hook gives up.
	Deadline = 10 * time.Second
	// AgentDeadline is how long an agent takes at most.
	AgentDeadline = 9 * time.Second

	// MaxFDs is how many descriptors come with a request at most.
	MaxFDs = 8

	maxAction = 64      // bytes of an action's name
	maxFDName = 64      // bytes of a descriptor's name
	maxText   = 4096    // bytes of a message or path
	maxPID    = 1 << 22 // PID_MAX_LIMIT of the kernel's include/linux/threads.h
)

// Caller says who brings an action.
type Caller string

// The callers.
const (
	// Script is the hook that CRIU executes; its parent is CRIU.
	Script Caller = "script"
	// NotifyRPC is a program that drives CRIU through go-criu; CRIU is its child.
	NotifyRPC Caller = "notify"
)

// Names of the descriptors that come with a request by SCM_RIGHTS, in the order of Request.FDs. A newer
// hook of the same version may send more: whoever receives one that it does not know closes it, and does
// nothing else with it.
const (
	// FDCRIU is a pidfd of the CRIU process. It is missing when CRIU was gone by the time the sender
	// looked: then the request came late, and says nothing of what lives now (but see ParentUnseen).
	FDCRIU = "criu"
	// FDInit is a pidfd of the root task of the tree; missing where CRIU does not name it (pre-restore),
	// or where it is dead.
	FDInit = "init"
	// FDImages is the image directory, open for reading, so that files in it can be opened and made, and
	// the directory be synced. It is missing at post-resume: CRIU has closed it by then.
	FDImages = "images"
)

// Request is one action, as the hook saw it.
type Request struct {
	Version int    `json:"version"`
	Action  Action `json:"action"`
	Caller  Caller `json:"caller"`
	// ImageDir is CRTOOLS_IMAGE_DIR as it was, for messages; the agent works on the descriptor.
	ImageDir string `json:"image_dir,omitempty"`
	// InitPID is CRTOOLS_INIT_PID, in CRIU's PID namespace; 0 when it was not set.
	InitPID int `json:"init_pid,omitempty"`
	// CRIUPID is the CRIU process in the sender's PID namespace: the hook's parent, or, if that is not
	// who CRTOOLS_IMAGE_DIR names, the one named there, without FDCRIU.
	CRIUPID int `json:"criu_pid"`
	// ParentUnseen: the sender is CRIU's child, but in a PID namespace in which CRIU has no pid. That is
	// where CRIU (4.1) runs its scripts after pre-restore when it restores into an external PID
	// namespace. CRIUPID and InitPID are then numbers of CRIU's own PID namespace and no pidfd comes
	// along: who needs one finds CRIU as the parent of its peer (SO_PEERPIDFD), which waits meanwhile.
	ParentUnseen bool `json:"parent_unseen,omitempty"`
	// FDs names the descriptors that came along, in their order: at most MaxFDs, each name once, of a-z,
	// 0-9 and '-'.
	FDs []string `json:"fds"`
}

// Verdict is the answer to an action.
type Verdict string

// The verdicts.
const (
	Pass Verdict = "pass" // the hook exits 0
	Veto Verdict = "veto" // the hook exits 1 at the stages that can veto
)

// Response is the agent's answer.
type Response struct {
	Version int     `json:"version"`
	Verdict Verdict `json:"verdict"`
	// Message is one sentence for CRIU's log: cause, fix, where to look. Empty when there is nothing to say.
	Message string `json:"message,omitempty"`
}

// EncodeRequest makes the packet of a request. Text that is not fit for a log is made so.
func EncodeRequest(r Request) ([]byte, error) {
	r.Version = ProtocolVersion
	r.ImageDir = printable(r.ImageDir)
	if r.FDs == nil {
		r.FDs = []string{}
	}
	if err := r.validate(); err != nil {
		return nil, err
	}
	return encode(r)
}

// DecodeRequest reads and checks a packet. The error says what is wrong with it; a packet from a newer
// hook is refused with both versions named. What it returns can be logged as it is.
func DecodeRequest(packet []byte) (Request, error) {
	var r Request
	if err := decode(packet, &r); err != nil {
		return Request{}, err
	}
	r.ImageDir = printable(r.ImageDir)
	if err := r.validate(); err != nil {
		return Request{}, err
	}
	return r, nil
}

func (r Request) validate() error {
	switch {
	case r.Version != ProtocolVersion:
		return versionError(r.Version)
	case !wellFormed(string(r.Action), maxAction):
		return fmt.Errorf("hook request: action %.64q is not 1 to %d of a-z, 0-9 and '-'", string(r.Action), maxAction)
	case r.Caller != Script && r.Caller != NotifyRPC:
		return fmt.Errorf("hook request: caller %.64q is not %q or %q", string(r.Caller), Script, NotifyRPC)
	case r.CRIUPID <= 0 || r.CRIUPID > maxPID || r.InitPID < 0 || r.InitPID > maxPID:
		return fmt.Errorf("hook request: pid of CRIU %d or of init %d is out of range (1 to %d)", r.CRIUPID, r.InitPID, maxPID)
	}
	if len(r.FDs) > MaxFDs {
		return fmt.Errorf("hook request: %d descriptors are named, %d are allowed", len(r.FDs), MaxFDs)
	}
	seen := map[string]bool{}
	for _, name := range r.FDs {
		switch {
		case !wellFormed(name, maxFDName):
			return fmt.Errorf("hook request: descriptor name %.64q is not 1 to %d of a-z, 0-9 and '-'", name, maxFDName)
		case seen[name]:
			return fmt.Errorf("hook request: descriptor %q stands twice", name)
		}
		seen[name] = true
	}
	return nil
}

// wellFormed reports whether a name has the form of CRIU's action names, so that nothing else gets into
// logs.
func wellFormed(name string, most int) bool {
	return name != "" && len(name) <= most && strings.IndexFunc(name, func(r rune) bool {
		return r != '-' && (r < 'a' || r > 'z') && (r < '0' || r > '9')
	}) < 0
}

// EncodeResponse makes the packet of a response. A message that does not fit is cut, and what would not
// be one line of a log is made so; the verdict never changes.
func EncodeResponse(r Response) ([]byte, error) {
	r.Version = ProtocolVersion
	r.Message = printable(r.Message)
	if err := r.validate(); err != nil {
		return nil, err
	}
	return encode(r)
}

// DecodeResponse reads and checks a packet. The message can be printed as it is.
func DecodeResponse(packet []byte) (Response, error) {
	var r Response
	if err := decode(packet, &r); err != nil {
		return Response{}, err
	}
	r.Message = printable(r.Message)
	if err := r.validate(); err != nil {
		return Response{}, err
	}
	return r, nil
}

func (r Response) validate() error {
	switch {
	case r.Version != ProtocolVersion:
		return versionError(r.Version)
	case r.Verdict != Pass && r.Verdict != Veto:
		return fmt.Errorf("hook response: verdict %.64q is not %q or %q", string(r.Verdict), Pass, Veto)
	}
	return nil
}

func encode(v any) ([]byte, error) {
	b, err := json.Marshal(v)
	if err == nil && len(b) > MaxMessage {
		err = fmt.Errorf("hook message: %d bytes, %d are allowed", len(b), MaxMessage)
	}
	return b, err
}

// decode takes one JSON value and nothing after it. The version is read first, because a field of
// another version may have another type.
//
// encoding/json matches names whatever their case and lets the last of two win. That is harmless here:
// only root can write to the socket, and whatever comes out is validated.
func decode(packet []byte, v any) error {
	if len(packet) > MaxMessage {
		return fmt.Errorf("hook message: more than %d bytes", MaxMessage)
	}
	var probe struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(packet, &probe); err != nil {
		return fmt.Errorf("hook message: not the JSON of a request or response: %w", brief(err))
	}
	if probe.Version != ProtocolVersion {
		return versionError(probe.Version)
	}
	// Unknown fields pass: a newer hook of the same version may say more than an older agent knows.
	if err := json.Unmarshal(packet, v); err != nil {
		return fmt.Errorf("hook message: not the JSON of a request or response: %w", brief(err))
	}
	return nil
}

func versionError(v int) error {
	return fmt.Errorf("hook message: version %d, this program speaks %d; install nsalloc-hook and nsalloc-agent of one release", v, ProtocolVersion)
}

// brief keeps an error that quotes its input, as encoding/json does with numbers, from being as long.
func brief(err error) error {
	const most = 200
	text := err.Error()
	if len(text) <= most {
		return err
	}
	return errors.New(strings.ToValidUTF8(text[:most], "") + "...")
}

// printable makes text fit for one line of a log: at most maxText bytes of valid UTF-8, cut between
// runes, in which whatever does not print (control characters, line and paragraph separators, what turns
// the direction of writing) is a '?'.
func printable(s string) string {
	s = strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t':
			return ' '
		case r == utf8.RuneError || !strconv.IsPrint(r):
			return '?'
		}
		return r
	}, s[:min(len(s), maxText+utf8.UTFMax)])
	if len(s) <= maxText {
		return s
	}
	end := maxText
	for !utf8.RuneStart(s[end]) {
		end--
	}
	return s[:end]
}
