package criuhook

import (
	"bytes"
	"encoding/json"
	"fmt"
	"time"
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

// Names of the descriptors that come with a request by SCM_RIGHTS, in the order of Request.FDs.
const (
	// FDCRIU is a pidfd of the CRIU process.
	FDCRIU = "criu"
	// FDInit is a pidfd of the root task of the tree.
	FDInit = "init"
	// FDImages is the image directory.
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
	// CRIUPID is the CRIU process in the sender's PID namespace: the hook's parent.
	CRIUPID int `json:"criu_pid"`
	// FDs names the descriptors that came along, in their order.
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

// EncodeRequest makes the packet of a request.
func EncodeRequest(r Request) ([]byte, error) {
	r.Version = ProtocolVersion
	return encode(r)
}

// DecodeRequest reads and checks a packet. The error says what is wrong with it; a packet from a newer
// hook is refused with both versions named.
func DecodeRequest(packet []byte) (Request, error) {
	var r Request
	if err := decode(packet, &r); err != nil {
		return Request{}, err
	}
	switch {
	case r.Version != ProtocolVersion:
		return Request{}, versionError(r.Version)
	case r.Action == "" || len(r.Action) > 64:
		return Request{}, fmt.Errorf("hook request: action %.64q is empty or too long", r.Action)
	case r.Caller != Script && r.Caller != NotifyRPC:
		return Request{}, fmt.Errorf("hook request: caller %.64q is not %q or %q", r.Caller, Script, NotifyRPC)
	case r.CRIUPID <= 0 || r.InitPID < 0:
		return Request{}, fmt.Errorf("hook request: pid of CRIU %d and of init %d must be positive", r.CRIUPID, r.InitPID)
	case len(r.ImageDir) > 4096:
		return Request{}, fmt.Errorf("hook request: image directory is %d bytes long, 4096 are allowed", len(r.ImageDir))
	}
	seen := map[string]bool{}
	for _, name := range r.FDs {
		if name != FDCRIU && name != FDInit && name != FDImages || seen[name] {
			return Request{}, fmt.Errorf("hook request: descriptor %.64q is unknown or named twice", name)
		}
		seen[name] = true
	}
	return r, nil
}

// EncodeResponse makes the packet of a response. A message that does not fit is cut, the verdict never is.
func EncodeResponse(r Response) ([]byte, error) {
	r.Version = ProtocolVersion
	if len(r.Message) > 4096 {
		r.Message = r.Message[:4096]
	}
	return encode(r)
}

// DecodeResponse reads and checks a packet.
func DecodeResponse(packet []byte) (Response, error) {
	var r Response
	if err := decode(packet, &r); err != nil {
		return Response{}, err
	}
	switch {
	case r.Version != ProtocolVersion:
		return Response{}, versionError(r.Version)
	case r.Verdict != Pass && r.Verdict != Veto:
		return Response{}, fmt.Errorf("hook response: verdict %.64q is not %q or %q", r.Verdict, Pass, Veto)
	}
	return r, nil
}

func encode(v any) ([]byte, error) {
	b, err := json.Marshal(v)
	if err == nil && len(b) > MaxMessage {
		err = fmt.Errorf("hook message: %d bytes, %d are allowed", len(b), MaxMessage)
	}
	return b, err
}

func decode(packet []byte, v any) error {
	if len(packet) > MaxMessage {
		return fmt.Errorf("hook message: %d bytes, %d are allowed", len(packet), MaxMessage)
	}
	// Unknown fields pass: a newer hook of the same version may say more than an older agent knows.
	if err := json.NewDecoder(bytes.NewReader(packet)).Decode(v); err != nil {
		return fmt.Errorf("hook message: not the JSON of a request or response: %w", err)
	}
	return nil
}

func versionError(v int) error {
	return fmt.Errorf("hook message: version %d, this program speaks %d; install nsalloc-hook and nsalloc-agent of one release", v, ProtocolVersion)
}
