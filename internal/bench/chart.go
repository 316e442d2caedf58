package main

import (
	"fmt"
	"html"
	"math"
	"strings"
)

// Measures of the chart, in its own pixels.
const (
	chartText = 372 // of names, at the left
	chartBars = 460
	chartLine = 17 // a row
	chartHead = 26 // a group's title
	chartPad  = 60 // of figures, at the right
)

// chart is a bar for each row, on a logarithmic scale, with a line from the least to the most of its rounds.
func (res *results) chart() string {
	low, high := math.Inf(1), 0.0
	for _, r := range res.rows {
		if s := res.of(r.name(), rate); s.median > 0 && !r.uncalled() { // it would leave no room for the others
			low, high = min(low, s.least), max(high, s.most)
		}
	}
	if high == 0 {
		low, high = 1, 10
	}
	from, to := math.Floor(math.Log10(low)), math.Ceil(math.Log10(high))
	if from == to {
		to++
	}
	at := func(v float64) float64 {
		return chartText + chartBars*min(max((math.Log10(v)-from)/(to-from), 0), 1)
	}
	var body strings.Builder
	y, group := 8, ""
	for _, r := range res.rows {
		s := res.of(r.name(), rate)
		if s.median == 0 {
			continue
		}
		if r.group != group {
			group = r.group
			fmt.Fprintf(&body, "<text x='8' y='%d' class='g'>%s</text>\n", y+18, html.EscapeString(group))
			y += chartHead
		}
		class := "o"
		if strings.HasPrefix(r.on, "nsalloc") {
			class = "n"
		}
		figure, end := count(s.median), at(s.median)
		if r.uncalled() {
			figure += " →"
		}
		fmt.Fprintf(&body, "<text x='%d' y='%d' class='t'>%s</text>", chartText-6, y+12, html.EscapeString(r.words+", "+short(r.load)))
		fmt.Fprintf(&body, "<rect x='%d' y='%d' width='%.1f' height='%d' class='%s'/>", chartText, y+2, end-chartText, chartLine-5, class)
		fmt.Fprintf(&body, "<line x1='%.1f' y1='%d' x2='%.1f' y2='%d' class='w'/>", at(s.least), y+8, at(s.most), y+8)
		fmt.Fprintf(&body, "<text x='%.1f' y='%d' class='f'>%s</text>\n", at(s.most)+4, y+12, figure)
		y += chartLine
	}
	var grid strings.Builder
	for e := from; e <= to; e++ {
		x := at(math.Pow(10, e))
		fmt.Fprintf(&grid, "<line x1='%.1f' y1='8' x2='%.1f' y2='%d' class='r'/><text x='%.1f' y='%d' class='a'>%s</text>\n", x, x, y+4, x, y+18, power(int(e)))
	}
	width, height := chartText+chartBars+chartPad, y+28
	return fmt.Sprintf(`<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 %d %d' width='%d' height='%d' font-family='sans-serif' font-size='11'>
<title>ids a second, logarithmic</title>
<style>
svg{background:#fff}.g{font-weight:bold;font-size:12px}.t{text-anchor:end}.f{fill:#444}.a{text-anchor:middle;fill:#666}
.n{fill:#1a6fb5}.o{fill:#b9c4cf}.w{stroke:#222;stroke-width:1.5}.r{stroke:#e3e3e3}
</style>
%s%s</svg>
`, width, height, width, height, grid.String(), body.String())
}

func short(l load) string {
	switch {
	case l.Processes > 1:
		return fmt.Sprintf("%d processes", l.Processes)
	case l.Shared:
		return fmt.Sprintf("%d in one process", l.Callers)
	}
	return fmt.Sprint(l.Callers)
}

// power is 10 to the e.
func power(e int) string {
	switch {
	case e >= 6:
		return fmt.Sprintf("%dM", int(math.Pow10(e-6)))
	case e >= 3:
		return fmt.Sprintf("%dk", int(math.Pow10(e-3)))
	}
	return fmt.Sprint(math.Pow10(e))
}
