package main

import (
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
)

// The view holds a million sandboxes in one and a quarter gigabytes, and changes slowly: collecting when a
// half of what lives was allocated anew keeps the whole under two. In a small pool a half is little, and
// registrations, of which each allocates two megabytes, fill it many times a second; there, heapSlack may be
// allocated between two collections. That takes nothing from a large one, of which a half is more.
const (
	heapPercent = 50
	heapSlack   = 256 << 20
	// mostPercent bounds how far a heap that grows fast, as while the view loads, outgrows the percentage of
	// when it was small, should tuneHeap come late.
	mostPercent = 1000
)

// tuneHeap sets the collector's percentage after each collection, unless the environment has one.
func tuneHeap() {
	if os.Getenv("GOGC") != "" {
		return
	}
	live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(live)
	percent := mostPercent
	if n := live[0].Value.Uint64(); n > 0 {
		percent = int(min(max(heapPercent, heapSlack*100/n), mostPercent))
	}
	debug.SetGCPercent(percent)
	// Unreachable at once: the next collection finds it, and its finalizer runs.
	runtime.SetFinalizer(new([16]byte), func(*[16]byte) { tuneHeap() })
}
