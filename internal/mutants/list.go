package main

const (
	domain     = "pkg/alloc"
	agent      = "internal/agent"
	etcd       = "internal/etcdstore"
	serverTest = "internal/server"
	witnesses  = "internal/witness"
)

// panicking says with what the code panics, of mutations of which that is the true symptom: no test could
// assert more. For all others a panic does not count.
var panicking = map[string]string{}

// mutations is the list. What a line is for stands in its words; the test is named for what it proves.
var mutations = []mutation{
	// Epochs and incarnations: the fencing tokens.
	{"no epoch compare", domain + "/handoff.go", "if s.Epoch != epoch {", "if false {", domain, "TestNextAgainstModel"},
	{"no incarnation compare", domain + "/change.go", "if host.Incarnation != m.Incarnation {", "if false {", domain, "TestService/StaleCallers"},
	{"a claim does not raise the epoch", domain + "/handoff.go", "StateClaimed, e.Claimant.Host, s.Epoch.next(at.Generation)", "StateClaimed, e.Claimant.Host, s.Epoch", domain, "TestService/StraightPath"},
	{"the epoch goes back with a claim", domain + "/handoff.go", "	s.Claim = nil\n	s.closeStint(over, now)", "	s.Claim, s.Epoch = nil, s.Epoch-1\n	s.closeStint(over, now)", domain, "TestService/ReleaseBeforeAndAfterBind"},
	{"a fence does not raise the epoch", domain + "/handoff.go", "	s.Epoch = s.Epoch.next(at.Generation)\n	s.closeStint(OverFenced", "	s.closeStint(OverFenced", domain, "TestNextTable"},
	{"a state with another nonce goes on with the life", domain + "/hosts.go", "goesOn := host.Incarnation != 0 && host.Nonce == cmd.Nonce &&", "goesOn := host.Incarnation != 0 &&", domain, "TestService/HelloNewLife"},

	// Which images may become what.
	{"void accepted", domain + "/admit.go", "case c.State == CheckpointVoid:", "case false:", domain, "TestAdmit"},
	{"consumed accepted twice", domain + "/admit.go", "case current && s.State == StateInTransit && c.State == CheckpointOpen:", "case current && (s.State == StateInTransit && c.State == CheckpointOpen || c.State == CheckpointConsumed):", domain, "TestAdmit"},
	{"a restore does not consume its images", domain + "/handoff.go", "h.Checkpoint.State, h.Checkpoint.Consumed = CheckpointConsumed, at.Now", "h.Checkpoint.Consumed = at.Now", domain, "TestNextAgainstModel"},
	{"older images of the same epoch claim", domain + "/admit.go", "current := s.Checkpoint == c.Serial", "current := true", domain, "TestAdmit"},
	{"claim without waiting for the source", domain + "/admit.go", "case current && s.State == StateDumped:", "case false:", domain, "TestService/DumpVetoed"},
	{"claim from a source that is still dumped", domain + "/handoff.go", "fresh := s.State == StateInTransit &&", "fresh := (s.State == StateInTransit || s.State == StateDumped) &&", domain, "TestNextTable"},
	{"the claimant is the host, not the run", domain + "/handoff.go", "return s.Claim != nil && s.Claim.Claimant == who &&", "return s.Claim != nil && s.Claim.Host == who.Host &&", domain, "TestService/SecondClaimantWaits"},
	{"manifest digest not compared", domain + "/admit.go", "case digest != c.Digest:", "case false:", domain, "TestAdmit"},
	{"a late dump begins anew after it was taken back", domain + "/handoff.go", "		case s.State != StateDumped:\n			return s.wrongState(\"dump it as \"", "		case false:\n			return s.wrongState(\"dump it as \"", domain, "TestService/DumpVetoed"},

	// Guards and lost answers.
	{"the guard on the pool is left out", domain + "/change.go", "		w.tx.Guards = append(w.tx.Guards, Guard{Key: e.Key, Token: e.Token})", "		if e.Key.Kind != KindPool {\n			w.tx.Guards = append(w.tx.Guards, Guard{Key: e.Key, Token: e.Token})\n		}", domain, "TestPoolClosesMeanwhile"},
	{"the guard on the host is left out", domain + "/change.go", "		w.tx.Guards = append(w.tx.Guards, Guard{Key: e.Key, Token: e.Token})", "		if e.Key.Kind != KindHost {\n			w.tx.Guards = append(w.tx.Guards, Guard{Key: e.Key, Token: e.Token})\n		}", domain, "TestNewLifeMeanwhile"},
	{"the guard on the sandbox is left out", domain + "/change.go", "		w.tx.Guards = append(w.tx.Guards, Guard{Key: e.Key, Token: e.Token})", "		if e.Key.Kind != KindSandbox && e.Key.Kind != KindCheckpoint {\n			w.tx.Guards = append(w.tx.Guards, Guard{Key: e.Key, Token: e.Token})\n		}", domain, "TestLinearizable"},
	{"a full store's answer counts as a refusal", etcd + "/full.go", "if readErr != nil || !asked.Succeeded {", "if readErr != nil || asked == nil {", etcd, "TestCommitsAreSentOnce"},
	{"a full store leaves open what was written", etcd + "/full.go", "|| !changesGuarded(req) {", "|| changesGuarded(req) {", etcd, "TestFull"},
	{"the guard on the counter is left out", domain + "/lane.go", "	tx.Guards = append(tx.Guards, Guard{entries[1].Key, entries[1].Token})\n", "", domain, "TestServersAtOnce"},
	{"compare without nonce", domain + "/lane.go", "	counter.Nonce = newNonce()\n	next.Left", "	counter.Nonce = \"\"\n	next.Left", domain, "TestCounterNeverRepeatsAValue"},
	{"issue before commit", domain + "/lane.go", "	if _, err := s.store.Commit(ctx, tx); err != nil {\n", "	for i, a := range open {\n		c.answer(a, grants[i], nil)\n	}\n	open = nil\n	if _, err := s.store.Commit(ctx, tx); err != nil {\n", domain, "TestLaneNeverIssuesTwice"},
	{"a lane does not compare its own record", domain + "/lane.go", ", {l.Key(), l.token}}}", "}}", domain, "TestLaneNeverIssuesTwice"},
	{"a lane does not compare that a request is new", domain + "/lane.go", "		tx.Guards = append(tx.Guards, Guard{Key: Key{Kind: KindRequest, ID: a.cmd.RequestID}})\n", "", domain, "TestSameRequestAtTwoServers"},
	{"a lane does not compare how far the sweep got", domain + "/lane.go", ", {Key{Kind: KindRequest, ID: sweptID}, l.mark}, ", ", ", domain, "TestService/RequestsAreSwept"},
	{"unknown outcome retried as new: a move", domain + "/request.go", "		if m.ID == id {", "		if false {", domain, "TestFaults"},
	{"unknown outcome retried as new: serials", "pkg/client/retry.go", "unknown, mayRenew = err, false", "unknown, id = err, NewRequestID()", "pkg/client", "TestRetry"},
	{"an unknown outcome is called none", domain + "/change.go", "			unknown = err\n", "", domain, "TestFaults"},
	{"reused request id answered for another body", domain + "/request.go", "	if a != b {", "	if false {", domain, "TestService/Allocate"},
	{"a forgotten request is taken for a new one", domain + "/request.go", "if id <= l.Forgotten {", "if false {", domain, "TestService/ForgottenRequests"},
	{"serials spent before are spent again", domain + "/change.go", "	if !ok {\n		return &Error{Reason: ReasonRange", "	if !ok && false {\n		return &Error{Reason: ReasonRange", domain, "TestService/Register"},
	// A store that has forgotten history.
	{"forgotten: older images are claimed before every host has come", domain + "/settled.go", "	if w.pool.IsSettled() || c.Serial.Generation() >= w.pool.Generation {", "	if true {", domain, "TestService/AgainHolds"},
	{"forgotten: what may be elsewhere is ended", domain + "/settled.go", "	if !w.pool.Missing(s) {", "	if true {", domain, "TestService/AgainEnds"},
	{"forgotten: the pool does not wait for a host", domain + "/settled.go", "if h, ok := e.Record.(*Host); !ok || !h.answered(pool.Generation) {", "if _, ok := e.Record.(*Host); !ok {", domain, "TestService/AgainEnds"},
	{"forgotten: a claim survives", domain + "/handoff.go", "if s.State == StateClaimed && s.Epoch.Generation() < g {", "if false {", domain, "TestService/AgainClaimed"},
	{"forgotten: a lower epoch wins", domain + "/again.go", "	if s.Epoch >= e.Epoch {", "	if s.Epoch == e.Epoch {", domain, "TestService/AgainLost"},
	{"forgotten: what was seen dead lives again", domain + "/again.go", "		case StateRunning, StateDumped, StateClaimed:\n", "		case StateRunning, StateDumped, StateClaimed, StateEnded, StateInTransit:\n", domain, "TestService/AgainLost"},
	{"forgotten: images that a host went on from stay open", domain + "/again.go", "			c.State, c.Consumed = CheckpointConsumed, at.Now\n			if c.Claimant", "			if c.Claimant", domain, "TestService/AgainHolds"},
	{"forgotten: what the host lacks stays live", domain + "/again.go", "b.Live() && !lives[b.Serial] {", "false {", domain, "TestService/AgainDead"},
	{"forgotten: a serial stays in the record that it parted from", domain + "/again.go", "		s.Bindings = slices.DeleteFunc(s.Bindings, func(x Binding) bool { return x.Serial == b.Serial })\n", "		_ = slices.Clone[[]Binding]\n", domain, "TestService/AgainBindings"},
	{"forgotten: who has forgotten a host takes it for new", domain + "/hosts.go", "if cmd.Incarnation == 0 && cmd.PoolUUID == \"\" {", "if true {", domain, "TestService/AgainLate"},
	{"forgotten: an agent's generation is not compared", domain + "/seen.go", "	case seen.Generation > pool.Generation:", "	case false:", domain, "TestService/HelloOfOneThatHasSeenMore"},
	{"forgotten: an agent's incarnation is not compared", domain + "/seen.go", "	case cmd.Incarnation > life:", "	case false:", domain, "TestService/HelloOfOneThatHasSeenMore"},
	{"forgotten: an agent that lies uses generations up", domain + "/seen.go", "	case cmd.Seen.Generation > pool.Generation+maxAhead:", "	case false:", domain, "TestService/HelloOfOneThatHasSeenMore"},
	{"forgotten: an agent reads before it says what it has", agent + "/again.go", "if err != nil || pool.Generation <= 1 || host.Settled >= pool.Generation {", "if true {", agent, "TestStoreForgets/restarts=false"},
	{"forgotten: an agent's ledger does not come along", agent + "/provisional.go", "	r.a.book.replace(r.a.cfg.Host, known, r.pending, 0)\n", "	r.a.book.replace(r.a.cfg.Host, known[:0], r.pending, 0)\n", agent, "TestStoreForgets/restarts=true"},
	{"forgotten: what is committed can be seen before it is noted", agent + "/registrar.go", "	r.note(out...)\n", "", agent, "TestCommittedIsNoted"},
	{"forgotten: what the pool says is here is taken for here", agent + "/book.go", " || s.Unconfirmed(b.generation) {", " {", agent, "TestAbsentIsNotHere"},
	{"forgotten: nobody says which serials became which", agent + "/again.go", "	for _, b := range it.Bindings {\n		r.replaced[", "	for _, b := range it.Bindings[:0] {\n		r.replaced[", agent, "TestForgetsWhatIsElsewhere"},
	{"forgotten: images are consumed twice", agent + "/deeds.go", "|| !dumped && rec.Phase != criuhook.Restore {", "|| !dumped {", agent, "TestForgetsDump/ended=true"},
	{"forgotten: images are nobody's", agent + "/deeds.go", "			items[i].Dump = &alloc.AgainDump{", "			_ = &alloc.AgainDump{", agent, "TestForgetsDump/ended=true"},
	{"forgotten: an older epoch of a sandbox is not noticed", domain + "/seen.go", "sandbox.Epoch < seen.Epoch &&", "false &&", domain, "TestService/HelloOfOneThatHasSeenMore"},
	{"an agent that is fenced again goes on", agent + "/fenced.go", "	alive = f.contended || !f.last.IsZero() && now.Sub(f.last) < fenceWindow\n", "	alive = false\n", agent, "TestTwins"},
	{"a copy of the very life is not found out", agent + "/fenced.go", "	return !r.unsure &&", "	return false && !r.unsure &&", agent, "TestTwins"},
	{"an agent that is alone stands down", agent + "/fenced.go", "	alive = f.contended || !f.last.IsZero() && now.Sub(f.last) < fenceWindow\n", "	alive = true\n", agent, "TestFencedAlone"},
	{"a host that is down takes the place of one that is alive", agent + "/fenced.go", "if f.looked == host.Incarnation && f.hello.Equal(host.Hello) {", "if f.looked == host.Incarnation {", agent, "TestTwinGone"},
	{"a host's quota is not heeded", domain + "/quota.go", "limited && (n > most || q.Used > most-n)", "limited && false", domain, "TestService/HostQuota"},
	{"a new life begins a new quota", domain + "/hosts.go", "host.Nonce, host.Granted = cmd.Nonce, nil", "host.Nonce, host.Granted, host.Quota = cmd.Nonce, nil, Quota{}", domain, "TestService/HostQuota"},

	// What a mend must not give away.
	{"a mended counter begins at 1", domain + "/mendplan.go", "next, start := top+1, randomStart()", "next, start := top+1, uint64(1)", domain, "TestMend/PutBack"},
	{"a record that cannot be read gives up its serial", domain + "/checkserials.go", "if k.Kind != KindSandbox && k.Kind != KindCheckpoint {", "if true {", domain, "TestMend/UnreadableHeld"},
	{"serials leave that could be issued again", domain + "/mendplan.go", "	if err := r.keepIssued(key, serials); err != nil {", "	if err := r.keepIssued(key, serials[:0]); err != nil {", domain, "TestMend/Refuses"},
	{"an unreadable record leaves while the counter is wrong", domain + "/mendplan.go", "&& r.counterWrong() {", "&& false {", domain, "TestMend/UnreadableUnknown"},
	{"a mend puts nothing aside", domain + "/mend.go", "				tx.Put = append(tx.Put, aside)\n", "", domain, "TestMend/CutOff"},
	{"a late mend is done twice", domain + "/mend.go", "				tx.Guards = append(tx.Guards, Guard{Key: aside.Key()})\n", "", domain, "TestFaults"},
	{"a refused mend may still happen", domain + "/mend.go", "		if !begun && !wrote {", "		if false {", domain, "TestMendRefusedBeside"},
	{"a checkpoint leaves before its sandbox has forgotten it", domain + "/mendplan.go", "	return append(moves, r.broken(key)...), append(serials, r.named(key)...), nil", "	slices.Reverse(moves)\n	return append(moves, r.broken(key)...), append(serials, r.named(key)...), nil", etcd, "TestMendLargest/checkpoint"},
	{"what is parted with is not compared", domain + "/part.go", "if b.Type != was.Type || b.Kernel != was.Kernel {", "if false {", domain, "TestService/RegisterParts"},
	{"images from before a part are the sandbox's", domain + "/part.go", "		sb.Checkpoint, sb.Claim = 0, nil\n", "", domain, "TestService/PartsFromCopies"},

	// What servers ask each other when a store may have forgotten.
	{"a server asks no other one", witnesses + "/verify.go", "ask := (heard != connected || due != DueNothing) && len(others) > 0", "ask := heard != connected && false", witnesses, "TestIdleServer"},
	{"a server asks those alone that the store lists", witnesses + "/witness.go", "		all[name] = seen\n", "", witnesses, "TestUnheard"},
	{"a server that is not heard is not missed", witnesses + "/raise.go", "	case len(f.unheard) > 0:", "	case false:", witnesses, "TestUnheard"},
	{"who is asked keeps what it has under way", witnesses + "/ask.go", "	s.doubt()\n	seen := s.file.Seen()", "	seen := s.file.Seen()", witnesses, "TestAskedMeanwhile"},
	{"who is asked does not look whose store it is", witnesses + "/ask.go", "pool.UUID == q.Pool && rec.Asked == q.Nonce", "pool.UUID == q.Pool", witnesses, "TestAnotherStore"},
	{"a server without a witness trusts its store", witnesses + "/verify.go", "		due = DueGeneration\n", "		due = DueNothing\n", witnesses, "TestNewServer"},
	{"generations are taken one after the other", witnesses + "/raise.go", "	if !at.After(now) {", "	if true {", witnesses, "TestPutBack"},
	{"a store that is put back forgets how many generations were taken", witnesses + "/raise.go", "[]time.Time{s.file.Seen().Raised, l.pool.Raised}", "[]time.Time{l.pool.Raised}", witnesses, "TestPutBack"},
	{"a connection from while a generation was taken needs another one", witnesses + "/verify.go", "		heard = max(heard, s.taking.connected)\n", "", witnesses, "TestConnectedWhileRaising"},
	{"a generation covers the connections that were made since", witnesses + "/verify.go", "		heard = max(heard, s.taking.connected)\n", "		heard = connected\n", witnesses, "TestPutBackAfterRaising"},
	{"a request that is read is acknowledged as it is", domain + "/lane.go", "	if err := s.stillThere(ctx, entries[3:]); err != nil {\n		return err\n	}\n", "", witnesses, "TestReadBack"},
	{"a request that is asked again is acknowledged as it is", domain + "/issue.go", "	if err := s.stillThere(ctx, entries); err != nil {", "	if err := error(nil); err != nil {", witnesses, "TestReadBack"},

	// What is read.
	{"a history is read at two revisions", domain + "/history.go", "KindStint, from, limit, at)", "KindStint, from, limit, 0)", domain, "TestHistoryWhileItMoves"},
	{"a history has a hole where a stint cannot be read", domain + "/history.go", "			return nil, e.Err\n", "			continue\n", domain, "TestService/LongHistory"},
	{"a record that cannot be read is taken for absent", domain + "/service.go", "	return entries, rev, readable(entries)", "	return entries, rev, nil", domain, "TestService/UnreadableSandbox"},
	{"a server takes a record that cannot be read for absent", serverTest + "/unreadable.go", "	is := u.err != nil && viewed(u.key.Kind)", "	is := u.err != nil && false", serverTest, "TestUnreadableSandbox"},
	{"a host that cannot be read is one that is not known", serverTest + "/unreadable.go", "		if err := ix.unreadable[key]; err != nil {", "		if err := ix.unreadable[key]; err != nil && key.Kind != alloc.KindHost {", serverTest, "TestUnreadableHost"},

	// The store in etcd, and a server's answers.
	{"absence is not compared", etcd + "/store.go", "		req.Compare = append(req.Compare, compare(key, g.Token))", "		if g.Token != \"\" {\n			req.Compare = append(req.Compare, compare(key, g.Token))\n		}", etcd, "TestStore/GuardsCompareAbsence"},
	{"a lost answer of etcd is called not written", etcd + "/errors.go", "	case !onWire:", "	case !onWire || status.Code(err) == codes.Unavailable:", etcd, "TestAnswerLost"},
	{"a linearizable read does not ask the store", serverTest + "/view.go", "	rev, err := v.store.Sync(ctx)", "	rev, err := alloc.Revision(0), ctx.Err()", serverTest, "TestLinearizable"},

	// What the agent saw, and when it says so.
	{"confirm without looking whether the tree died before its CRIU", agent + "/settle.go", "case n.deaths.stoppedLive() && !n.rec.Resumed:", "case !n.rec.Resumed:", agent, "TestEvidence/CRIU_first"},
	{"zero given not written before the answer", agent + "/hook.go", "	rests := last || answer.Verdict", "	rests := answer.Verdict", agent, "TestEvidence/agent_restarted_meanwhile"},
	{"release on exit code", agent + "/settle.go", "	if !treeGone {\n		tasks, err := a.tasksOf(ctx, n)", "	if false {\n		tasks, err := a.tasksOf(ctx, n)", agent, "TestRanUnasked"},
	{"bind at setup-namespaces", agent + "/hook.go", "		return \"\", a.noteInit(n, req)", "		return a.postRestore(ctx, n, req)", agent, "TestBoundAtPostRestoreOnly"},
	{"double delivery counted twice", agent + "/hook.go", "if given, ok := n.rec.Answers[req.Action]; ok {", "if given, ok := n.rec.Answers[req.Action]; ok && false {", agent, "TestTwiceIsOnce"},
	{"late hook commits a dump after a veto", agent + "/dump.go", "	case n.rec.Closed:\n		return \"\", errors.New(\"this dump was refused before\")", "	case false:\n		return \"\", errors.New(\"this dump was refused before\")", agent, "TestVetoIsFinal/dump"},
	{"late hook commits a restore after a veto", agent + "/restore.go", "	case n.rec.Closed:\n		return \"\", errors.New(\"this restore was refused before\")", "	case false:\n		return \"\", errors.New(\"this restore was refused before\")", agent, "TestVetoIsFinal/restore"},
	{"an agent does not wait for the source", agent + "/restore.go", "e.Reason != alloc.ReasonNotConfirmed && e.Reason != alloc.ReasonClaimed", "e.Reason != \"\"", agent, "TestClaimWaitsForTheSource"},
	{"a manifest that changed after the claim is used", agent + "/restore.go", "if digest != n.rec.Manifest || m.Images != set.Digest {", "if digest == n.rec.Manifest && m.Images != set.Digest {", agent, "TestManifestChangedAfterClaim"},
	{"a claim forgets what CRIU executes", domain + "/handoff.go", ", Exe: e.Exe}", "}", domain, "TestService/StraightPathTwice"},
	{"what a forgotten restore left is numbered", agent + "/sweep.go", ", a.leftBehind(procs)", "", agent, "TestStateLost/everything/claimed,_parked"},
	{"another CRIU's tree is ended", agent + "/halfbuilt.go", "	case ok:\n		return fmt.Sprintf(\"process %d may be a CRIU that is making it\", maker)\n", "", agent, "TestOthersExecuteCRIU"},
	{"another claim ends a tree that was committed", agent + "/halfbuilt.go", "		if bound, ok := s.a.book.find(t, k); ok {", "		if bound, ok := s.a.book.find(t, k); ok && false {", agent, "TestForgottenBesideCommitted/claimed_first"},
	{"only the same CRIU makes trees", agent + "/halfbuilt.go", "!(calledCRIU(p) || executes(criu, exe)) ||", "!executes(criu, exe) ||", agent, "TestAnotherVersion"},
	{"a hook is vetoed for burned ranges", agent + "/hook.go", "alloc.ReasonOf(err) == alloc.ReasonRange {", "alloc.ReasonOf(err) == alloc.ReasonRange && false {", agent, "TestBurnedUnderHook"},

	// Serials while the pool is away.
	{"a provisional serial is told before it is on disk", agent + "/provisional.go", "	if err := r.save(pending); err != nil {\n		return err\n	}\n	r.pending = pending", "	_ = r.save(pending)\n	r.pending = pending", agent, "TestProvisionalDiskTrouble/full"},
	{"a provisional serial is called committed", agent + "/book.go", "			b.provisional[bd.Serial] = true\n", "			b.provisional[bd.Serial] = false\n", agent, "TestPoolAway"},
	{"a provisional serial is given again", agent + "/provisional.go", "			n = max(n, through)\n", "			_ = through\n", agent, "TestRestartAway"},
	{"what was committed before the agent died is given up", agent + "/provisional.go", "			case b.Serial:\n				continue\n", "", agent, "TestLedgerBehind"},
	{"serials of ranges that are lost stay", agent + "/provisional.go", "return !r.ranges.Contains(s) }):", "return false }):", agent, "TestRangesLostAway/a_new_generation"},
	{"who waits gets a provisional serial", agent + "/local.go", "	if committed || numbered && (noWait || a.away()) {", "	if committed || numbered {", agent, "TestNoWait"},
	{"what is being registered is given a second time", agent + "/books.go", "	if len(r.flying) > 0 && r.usable.Load() {", "	if len(r.flying) > 0 && !r.usable.Load() {", agent, "TestNoWaitBeside/answered"},
	{"what was given meanwhile is spent by somebody else", agent + "/registrar.go", "		if told {\n			r.pending = r.pending[len(flying):]\n		}\n", "		r.pending = nil\n", agent, "TestNoWaitBeside/answered"},
	{"who does not wait waits for the pool", agent + "/books.go", "	if r.firm {\n", "	if true {\n", agent, "TestNoWaitJoins"},
	{"an agent goes on without its ledger", agent + "/provisional.go", "\"file\", ledgerFile)\n		r.newLife()\n		return nil\n", "\"file\", ledgerFile)\n		return nil\n", agent, "TestLedgerLost/gone"},
	{"one registration that is refused holds up others", agent + "/number.go", "	if err == nil || !refused(err) || len(wishes) == 1 {", "	if true {", agent, "TestOneRefused/direct"},
	{"a refused batch is given up as a whole", agent + "/provisional.go", "	case n == 1:\n		r.drop(err)", "	case true:\n		r.drop(err)", agent, "TestOneRefused/provisional"},
	{"images swapped under their manifest", agent + "/restore.go", "	if m.Images != set.Digest {\n		return \"\", fmt.Errorf(\"%s is of other images", "	if false {\n		return \"\", fmt.Errorf(\"%s is of other images", agent, "TestTampered"},
}
