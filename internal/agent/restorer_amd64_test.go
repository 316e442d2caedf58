package agent

import "testing"

// What /proc said of a task that CRIU 4.1.1 had left parked at post-restore, and of the same one running.
const (
	parkedCall  = "202 0x2d010 0x0 0x4 0x0 0x0 0x0 0x24ec8 0x18269\n"
	runningCall = "61 0xffffffffffffffff 0x7fff48c055bc 0x0 0x0 0x0 0x0 0x7fff48c05550 0x4ae3f7\n"
	parkedMaps  = `00010000-0001d000 rwxp 00000000 00:00 0 
0001d000-0002a000 rw-p 00000000 00:00 0 
00400000-00401000 r--p 00000000 00:29 803023                             /bin/busybox
00401000-0058d000 r-xp 00001000 00:29 803023                             /bin/busybox
11856000-11878000 rw-p 00000000 00:00 0                                  [heap]
`
	parkedStatus  = "Name:\tsh\nSigPnd:\t0000000000000000\nShdPnd:\t0000000000000000\nSigBlk:\tfffffffffffbfeff\n"
	runningStatus = "Name:\tsh\nSigPnd:\t0000000000000100\nShdPnd:\t0000000000000000\nSigBlk:\t0000000000000000\n"
)

func TestRestorer(t *testing.T) {
	for name, c := range map[string]struct {
		call, maps string
		in         bool
	}{
		"parked":           {parkedCall, parkedMaps, true},
		"its own program":  {runningCall, parkedMaps, false},
		"futex of its own": {"202 0x2d010 0x0 0x4 0x0 0x0 0x0 0x24ec8 0x4ae3f7", parkedMaps, false},
		"on a processor":   {"running\n", parkedMaps, false},
		"nothing":          {"", "", false},
		"no maps":          {parkedCall, "", false},
	} {
		if got := inRestorer([]byte(c.call), []byte(c.maps)); got != c.in {
			t.Errorf("%s: %v", name, got)
		}
	}
	if m, ok := signals([]byte(parkedStatus), "SigBlk"); !ok || m != allSignals {
		t.Errorf("blocked: %x, %v, want %x", m, ok, allSignals)
	}
	if pendingKill([]byte(parkedStatus)) || !pendingKill([]byte(runningStatus)) {
		t.Error("the pending SIGKILL is not told")
	}
	if _, ok := signals([]byte("SigBlk:\tnonsense\n"), "SigBlk"); ok {
		t.Error("nonsense is a mask")
	}
}
