package criuhook

import (
	"bytes"
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"unicode/utf8"
)

func request() Request {
	return Request{
		Version: ProtocolVersion, Action: PostDump, Caller: Script, ImageDir: "/proc/7/fd/3",
		InitPID: 9, CRIUPID: 7, ParentUnseen: true, FDs: []string{FDCRIU, FDInit, FDImages},
	}
}

func TestRoundTrip(t *testing.T) {
	want := request()
	b, err := EncodeRequest(want)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := DecodeRequest(b); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v, want %+v", got, err, want)
	}
	for _, v := range []Verdict{Pass, Veto} {
		want := Response{Version: ProtocolVersion, Verdict: v, Message: "wäre es doch <so> & „so“"}
		b, err := EncodeResponse(want)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := DecodeResponse(b); err != nil || got != want {
			t.Errorf("%+v, %v, want %+v", got, err, want)
		}
	}
}

// TestWire pins the bytes: hook and agent are not always of one build.
func TestWire(t *testing.T) {
	b, err := EncodeRequest(request())
	const want = `{"version":1,"action":"post-dump","caller":"script","image_dir":"/proc/7/fd/3","init_pid":9,"criu_pid":7,"parent_unseen":true,"fds":["criu","init","images"]}`
	if err != nil || string(b) != want {
		t.Errorf("%s, %v", b, err)
	}
	b, err = EncodeRequest(Request{Action: PreRestore, Caller: NotifyRPC, CRIUPID: 1})
	if err != nil || string(b) != `{"version":1,"action":"pre-restore","caller":"notify","criu_pid":1,"fds":[]}` {
		t.Errorf("%s, %v", b, err)
	}
	b, err = EncodeResponse(Response{Verdict: Veto, Message: "why"})
	if err != nil || string(b) != `{"version":1,"verdict":"veto","message":"why"}` {
		t.Errorf("%s, %v", b, err)
	}
	// A newer hook of the same version may send more.
	r, err := DecodeRequest([]byte(`{"version":1,"action":"pre-dump","caller":"script","criu_pid":7,"fds":["criu","cgroup-2","init"],"more":1}`))
	if err != nil || !reflect.DeepEqual(r.FDs, []string{FDCRIU, "cgroup-2", FDInit}) {
		t.Errorf("%+v, %v", r, err)
	}
	// A newer agent may say more.
	if r, err := DecodeResponse([]byte(`{"version":1,"verdict":"pass","more":[1]}`)); err != nil || r.Verdict != Pass {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestRequestLimits(t *testing.T) {
	for name, change := range map[string]func(r *Request){
		"no action":             func(r *Request) { r.Action = "" },
		"long action":           func(r *Request) { r.Action = Action(strings.Repeat("a", maxAction+1)) },
		"action with a newline": func(r *Request) { r.Action = "pre-dump\n" },
		"action in capitals":    func(r *Request) { r.Action = "Pre-dump" },
		"no caller":             func(r *Request) { r.Caller = "" },
		"unknown caller":        func(r *Request) { r.Caller = "runc" },
		"no CRIU":               func(r *Request) { r.CRIUPID = 0 },
		"negative CRIU":         func(r *Request) { r.CRIUPID = -1 },
		"huge CRIU":             func(r *Request) { r.CRIUPID = maxPID + 1 },
		"negative init":         func(r *Request) { r.InitPID = -1 },
		"huge init":             func(r *Request) { r.InitPID = maxPID + 1 },
		"descriptor twice":      func(r *Request) { r.FDs = []string{FDInit, FDInit} },
		"unknown one twice":     func(r *Request) { r.FDs = []string{"root", FDInit, "root"} },
		"descriptor no name":    func(r *Request) { r.FDs = []string{""} },
		"descriptor long name":  func(r *Request) { r.FDs = []string{strings.Repeat("a", maxFDName+1)} },
		"descriptor newline":    func(r *Request) { r.FDs = []string{"init\n"} },
		"too many descriptors":  func(r *Request) { r.FDs = strings.Split("a b c d e f g h i", " ") },
	} {
		t.Run(name, func(t *testing.T) {
			r := request()
			change(&r)
			if b, err := EncodeRequest(r); err == nil {
				t.Errorf("encoded: %s", b)
			}
			b, err := json.Marshal(r)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := DecodeRequest(b); err == nil {
				t.Errorf("decoded: %+v", got)
			}
		})
	}
}

func TestHostilePackets(t *testing.T) {
	good, err := EncodeRequest(request())
	if err != nil {
		t.Fatal(err)
	}
	for name, packet := range map[string][]byte{
		"empty":               nil,
		"no object":           []byte("null"),
		"array":               []byte("[]"),
		"cut":                 good[:len(good)-1],
		"something follows":   append(bytes.Clone(good), '{', '}'),
		"too long":            append(bytes.Clone(good), bytes.Repeat([]byte(" "), MaxMessage)...),
		"no version":          []byte(strings.Replace(string(good), `"version":1,`, "", 1)),
		"another version":     []byte(strings.Replace(string(good), `"version":1,`, `"version":2,`, 1)),
		"another type":        []byte(strings.Replace(string(good), `"criu_pid":7`, `"criu_pid":"7"`, 1)),
		"number too large":    []byte(strings.Replace(string(good), `"criu_pid":7`, `"criu_pid":99999999999999999999`, 1)),
		"fraction":            []byte(strings.Replace(string(good), `"criu_pid":7`, `"criu_pid":7.5`, 1)),
		"deep":                append([]byte(`{"version":1,"x":`), bytes.Repeat([]byte("["), 30000)...),
		"caller stands twice": []byte(strings.Replace(string(good), `"caller":"script"`, `"caller":"script","caller":"x"`, 1)),
	} {
		t.Run(name, func(t *testing.T) {
			if r, err := DecodeRequest(packet); err == nil {
				t.Errorf("request: %+v", r)
			}
			if r, err := DecodeResponse(packet); err == nil {
				t.Errorf("response: %+v", r)
			}
		})
	}
	// Both versions are named even if another version's fields are of other types.
	_, err = DecodeRequest([]byte(`{"version":7,"action":{"name":"post-dump"}}`))
	if err == nil || !strings.Contains(err.Error(), "7") || !strings.Contains(err.Error(), "1") {
		t.Errorf("%v does not name versions 7 and 1", err)
	}
	if _, err := EncodeResponse(Response{Verdict: "maybe"}); err == nil {
		t.Error("an unknown verdict was encoded")
	}
}

func TestMessages(t *testing.T) {
	for in, want := range map[string]string{
		"":                      "",
		"plain, with ümlaut 漢字": "plain, with ümlaut 漢字",
		"two\nlines\tand a tab": "two lines and a tab",
		"esc\x1b[2Jape":         "esc?[2Jape",
		"nul\x00, bell\a, cr\r": "nul?, bell?, cr?",
		"broken \xff\xfe utf-8": "broken ?? utf-8",
		"\u202eright to left":   "?right to left",
		"line\u2028separator":   "line?separator",
	} {
		b, err := EncodeResponse(Response{Verdict: Pass, Message: in})
		if err != nil {
			t.Fatal(err)
		}
		if r, err := DecodeResponse(b); err != nil || r.Message != want {
			t.Errorf("%q became %q (%v), want %q", in, r.Message, err, want)
		}
	}
	// Cut between runes, for each alignment; and the verdict survives.
	for pad := range 4 {
		in := strings.Repeat("x", pad) + strings.Repeat("𐍈", maxText)
		b, err := EncodeResponse(Response{Verdict: Veto, Message: in})
		if err != nil {
			t.Fatal(err)
		}
		r, err := DecodeResponse(b)
		if err != nil || r.Verdict != Veto || !strings.HasPrefix(in, r.Message) || len(r.Message) > maxText || len(r.Message) < maxText-3 {
			t.Errorf("cut to %d bytes, %v", len(r.Message), err)
		}
	}
	// The worst text still fits a packet.
	for _, c := range []string{"<", "&", "\"", "\\", "\x00", "\xff"} {
		if _, err := EncodeResponse(Response{Verdict: Veto, Message: strings.Repeat(c, 1<<20)}); err != nil {
			t.Error(err)
		}
	}
	// An agent that does not clean its text does not get it into the log all the same.
	r, err := DecodeResponse([]byte("{\"version\":1,\"verdict\":\"veto\",\"message\":\"a\\nb\xff" + strings.Repeat("y", 9000) + "\"}"))
	if err != nil || len(r.Message) != maxText || !strings.HasPrefix(r.Message, "a b?y") {
		t.Errorf("%.20q, %d bytes, %v", r.Message, len(r.Message), err)
	}
}

func TestStages(t *testing.T) {
	list := Stages()
	if len(list) != 10 {
		t.Errorf("%d stages", len(list))
	}
	for _, s := range list {
		if got, ok := StageOf(s.Action); !ok || got != s || !wellFormed(string(s.Action), maxAction) {
			t.Errorf("%+v, %v", got, ok)
		}
	}
	list[0].CanVeto = false
	if s, _ := StageOf(PreDump); !s.CanVeto {
		t.Error("Stages gave its table away")
	}
	if _, ok := StageOf("orphan-pts-master"); ok {
		t.Error("an unknown action has a stage")
	}
}

// FuzzRequest: a packet that is taken means one thing, which can be sent on and logged as it is.
func FuzzRequest(f *testing.F) {
	b, err := EncodeRequest(request())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"version":1,"action":"pre-dump","caller":"notify","criu_pid":1,"fds":null}`))
	f.Add([]byte(`{"version":2}`))
	f.Add([]byte("{\"VERSION\":1,\"action\":\"x\",\"caller\":\"script\",\"criu_pid\":1,\"image_dir\":\"\\u0000\xff\"}"))
	for _, b := range recorded(f, "packets/*.request") {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, packet []byte) {
		r, err := DecodeRequest(packet)
		if err != nil {
			checkRefusal(t, err)
			if r.Version != 0 || r.FDs != nil {
				t.Errorf("refused with %+v", r)
			}
			return
		}
		checkText(t, r.ImageDir)
		checkText(t, string(r.Action))
		if len(packet) > MaxMessage || len(r.FDs) > MaxFDs || r.CRIUPID <= 0 || r.InitPID < 0 {
			t.Errorf("%d bytes: %+v", len(packet), r)
		}
		b, err := EncodeRequest(r)
		if err != nil {
			t.Fatalf("%+v was decoded and is not encoded: %v", r, err)
		}
		again, err := DecodeRequest(b)
		if r.FDs == nil {
			r.FDs = []string{}
		}
		if err != nil || !reflect.DeepEqual(again, r) {
			t.Errorf("%+v became %+v, %v", r, again, err)
		}
	})
}

// FuzzResponse: what an agent says can be printed as it is, and no packet is half a verdict.
func FuzzResponse(f *testing.F) {
	f.Add([]byte(`{"version":1,"verdict":"veto","message":"why"}`))
	f.Add([]byte(`{"version":1,"verdict":"pass"}`))
	f.Add([]byte("{\"version\":1,\"verdict\":\"pass\",\"message\":\"\\u2028\xf0\"} "))
	for _, b := range recorded(f, "packets/*.response") {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, packet []byte) {
		r, err := DecodeResponse(packet)
		// What a hook makes of it: a verdict it does not understand stops CRIU where it can be stopped, and
		// nothing else does but a veto.
		d := Decide(PostDump, r, err, false)
		if d.Veto != (err != nil || r.Verdict == Veto) || Decide(PreResume, r, err, false).Veto {
			t.Errorf("%+v, %v: %+v", r, err, d)
		}
		checkText(t, d.Message)
		if err != nil {
			checkRefusal(t, err)
			if r != (Response{}) {
				t.Errorf("refused with %+v", r)
			}
			return
		}
		checkText(t, r.Message)
		b, err := EncodeResponse(r)
		if err != nil {
			t.Fatalf("%+v was decoded and is not encoded: %v", r, err)
		}
		if again, err := DecodeResponse(b); err != nil || again != r {
			t.Errorf("%+v became %+v, %v", r, again, err)
		}
	})
}

// checkRefusal: what is wrong with a packet is said at bounded length, however long the packet.
func checkRefusal(t *testing.T, err error) {
	t.Helper()
	if s := err.Error(); s == "" || len(s) > 1000 {
		t.Errorf("a refusal of %d bytes: %.200s", len(s), s)
	}
}

func checkText(t *testing.T, s string) {
	t.Helper()
	if len(s) > maxText || !utf8.ValidString(s) || strings.ContainsAny(s, "\x00\n\r\x1b\u2028\u202e\ufffd") {
		t.Errorf("text for the log: %q", s)
	}
}
