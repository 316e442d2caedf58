package main

import (
	"math/bits"
	"time"
)

// histogram counts durations, to 3% of each.
type histogram []uint64

const histogramSize = 1024 // up to a minute

func newHistogram() histogram { return make(histogram, histogramSize) }

func (h histogram) add(d time.Duration) {
	v := uint64(max(d, 0))
	shift := max(bits.Len64(v)-6, 0) // six bits are kept
	h[min(shift*32+int(v>>shift), len(h)-1)]++
}

func (h histogram) merge(other histogram) {
	for i, n := range other {
		h[i] += n
	}
}

// quantile is the middle of the bucket that q of all are below.
func (h histogram) quantile(q float64) time.Duration {
	var all, seen uint64
	for _, n := range h {
		all += n
	}
	for i, n := range h {
		if seen += n; n > 0 && float64(seen) >= q*float64(all) {
			shift := max(i/32-1, 0)
			return time.Duration((uint64(i-32*shift) << shift) + 1<<shift/2)
		}
	}
	return 0
}
