// Package alloc is the domain of nsalloc: serials that are never used twice, the bindings that tie
// them to kernel namespaces, and the hand-off that carries them from host to host. It depends on the
// standard library alone; stores, transports and kernels are behind interfaces or above it.
//
// # Issued means committed
//
// A serial is issued when the transaction that records it has committed, and no earlier. No clock and
// no lease is in that argument, so a killed server, a paused one or two copies of one never answer
// the same serial. What a crash leaves over is burned: nothing is ever put back.
//
// An answer that was lost is unknown, and asking again with the same request id settles it: every
// write stands under a request id, and guards that exclude that it takes effect twice. See Store for
// what that rests on.
//
// # The hand-off
//
// A sandbox has one owner at any revision of the store. Ownership follows what was observed of
// processes, never exit codes. Handoff.Next is the whole table, as a pure function:
//
//	state       event                                   next         checkpoint    epoch
//	running     Dumped by the owner                     dumped       open          -
//	dumped      Stopped, seen while its CRIU lived      in_transit   open          -
//	dumped      Stopped, 0 was given but in doubt       ended        copy          -
//	dumped      Stopped, 0 was never given              ended        void          -
//	dumped      RanOn, 0 was given                      running      copy          -
//	dumped      RanOn, 0 was never given                running      void          -
//	in_transit  Claimed: current checkpoint             claimed      open          +1
//	ended       Claimed: current copy, policy resume    claimed      copy          +1
//	claimed     Bound by the claimant                   running      consumed      -
//	claimed     Released by the claimant                where the claim came from  -
//	running     Released by the claimant: nothing ran   where the claim came from  -
//	running     Over: its processes were seen gone      ended        -             -
//	running     Fenced: its host is given up            ended        -             +1
//	dumped      Fenced                                  in_transit   open          +1
//	claimed     Fenced                                  where the claim came from  +1
//	any         Again by a host that has a higher epoch running      -             the host's
//	claimed     Again by the claimant, in that epoch    running      consumed      -
//
// Anything else changes nothing and is refused with the reason; an event that has already had its
// effect is accepted and changes nothing, because every hook may come twice and every answer may get
// lost. The epoch never goes back, not even when a claim does: what was said under an older one
// counts no more.
//
// # Who decides
//
// The rules are here, in Next and in the use cases of Service; a Store only keeps. Each use case reads
// what it needs, decides, and commits one transaction guarded by the exact values that it read.
package alloc
