package e2e

import "regexp"

// What a cell may show at the moment at which processes and store agree, from the model: who runs, and what
// its images are. Images say what was promised: `void` that no 0 was given, `copy` that one was, or may have
// been, and nobody saw the tree stopped by it; `open` that it was seen stopped, or that a claim was given
// back; `consumed` that it was restored, or that 0 was given to a restore whose tree was then seen dead.
const (
	onA        = `runs on a`
	onAVoid    = `runs on a, images void`
	onACopy    = `runs on a, images copy`
	onB        = `runs on b, images consumed`
	transit    = `in_transit, images open`
	overCopy   = `ended, images copy`
	overOnB    = `ended, images consumed`
	either     = `|`
	anyOfDump  = onA + either + onAVoid + either + onACopy
	anyRestore = transit + either + onB
)

// expected holds for the first row whose expression matches the point and the role. Alternatives stand where
// two processes race: a hook that is killed against the agent's answer to it, an agent's restart against the
// next action of a CRIU that lives.
var expected = []struct{ cells, verdict string }{
	// Ways to a request that have code of their own. A dump's agent dies before it has asked for a checkpoint.
	{`^agent/Register/.* source part$`, onA},
	{`^server/Register/.* server part$`, transit + either + onA + either + onAVoid}, // as Open
	{`^(agent|server)/Bind/.* late$`, onB},
	{`^(agent|server)/Release/.* orphan$`, transit},
	{`^agent/Release/sending target bound-orphan$`, overOnB}, // a dead tree does not say that it never ran
	{`^(agent|server)/Release/.* bound-orphan$`, transit},

	// What a server writes of its own is nobody's answer.
	{`^server/(witness|life|close|generation)/`, onA},

	// A server's answer is late, and its callers ask again.
	{`^server/(Allocate|Mend|SetPolicy|Remove|Waive|Hello|Grant|Register|RegisterAgain)/`, onA},
	{`^server/End/`, `ended`},
	{`^server/Open/`, transit + either + onA + either + onAVoid}, // the restart may take longer than a hook waits
	{`^server/Confirm/`, transit},
	{`^server/Abort/`, onACopy},
	{`^server/(Claim|Bind)/`, anyRestore},
	{`^server/Release/`, transit},

	// What is not of a hand-off.
	{`^agent/(Hello|Grant|nonce|identity)/.* target$`, anyRestore},
	{`^agent/(Hello|Grant|Register|RegisterAgain|nonce|identity)/.* source$`, onA},
	{`^agent/Register/.* target$`, onACopy},
	{`^agent/End/.* source$`, `ended`},
	{`^agent/End/.* target$`, overOnB},
	{`^agent/new-life/.* source$`, onA},
	{`^agent/new-life/.* target$`, transit},
	{`^agent/(lost-life|aside)/.* source$`, onACopy}, // what is not remembered counts as given
	{`^agent/(lost-life|aside)/.* target$`, transit},
	{`^agent/run/`, transit},

	// What serials were given is written at the end of every turn that changed it: of a dump's first when the
	// checkpoint is committed, where the one before had nothing to say; of a restore's when it is claimed.
	{`^agent/serials/.* source$`, onA + either + onAVoid},
	{`^agent/serials/.* born-away$`, onA},
	{`^agent/serials/.* target$`, transit},

	// A dump. Nothing is promised before the checkpoint is committed, a veto after; 0 counts as given from the
	// moment at which it is on disk.
	{`^agent/(pre-dump|network-lock)/answered`, onA + either + onAVoid + either + transit + either + overCopy},
	{`^agent/(pre-dump|network-lock|manifest|checkpoint)/|^agent/Open/sending`, onA},
	{`^agent/Open/received|^agent/post-dump/verdict-recording`, onAVoid},
	{`^agent/post-dump/(verdict-recorded|answering)`, onACopy},
	{`^agent/post-dump/answered|^agent/Confirm/sending`, overCopy}, // nobody saw in which order tree and CRIU ended
	{`^agent/(Confirm/received|outcome/.* source)`, transit},
	{`^agent/(Abort|network-unlock)/.* source$`, onACopy},
	{`^agent/untaken/recording`, onACopy},
	{`^agent/untaken/recorded`, onAVoid},
	{`^hook/(pre-dump|network-lock)/|^hook/post-dump/asking`, onA},
	{`^hook/post-dump/asked`, anyOfDump},
	{`^hook/post-dump/answered|^hook/network-unlock/.* source$`, onACopy},

	// A restore. The claim goes back while nothing was answered that lets the tree run; after that its death is
	// an end.
	{`^agent/(pre-restore|setup-namespaces|post-setup-namespaces)/answered`, anyRestore},
	{`^agent/post-restore/(verdict-recorded|answering)|^hook/post-restore/answered`, overOnB},
	{`^(agent|hook)/(network-unlock|pre-resume|post-resume)/.* target$|^agent/post-restore/answered|^agent/outcome/.* target$`, onB},
	{`^hook/post-restore/asked`, transit + either + overOnB},
	{`^agent/(pre-restore/(verdict-.*|answering)|(setup-namespaces|post-setup-namespaces)/answering|post-restore/verdict-recording) target$`, transit},
	{`^agent/(Claim|Bind|Release|claim|root|tree|parked)/.* target$`, transit},
	{`^hook/((pre-restore|setup-namespaces|post-setup-namespaces)/.*|post-restore/asking) target$`, transit},
}

// mayShow reports whether a cell may show a verdict, and what it should.
func (c cell) mayShow(verdict string) (want string, ok bool) {
	for _, e := range expected {
		if regexp.MustCompile(e.cells).MatchString(c.name()) {
			return e.verdict, regexp.MustCompile(`^(` + e.verdict + `)$`).MatchString(verdict)
		}
	}
	return "", false
}
