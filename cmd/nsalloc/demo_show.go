package main

import (
	"fmt"
	"strings"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// look is a container's namespaces as they were seen at one moment on one host.
type look struct {
	host    string
	sandbox alloc.Serial
	seen    []sight // one a type, in the order of alloc.NamespaceTypes
}

// sight is one namespace. ofHost: it is not the container's own but its host's.
type sight struct {
	typ            alloc.NamespaceType
	kernel         alloc.KernelID
	serial, parent alloc.Serial
	ofHost         bool
}

func (l look) of(t alloc.NamespaceType) (sight, bool) {
	for _, s := range l.seen {
		if s.typ == t {
			return s, true
		}
	}
	return sight{}, false
}

// own is what the container has for itself: what moves with it.
func (l look) own() (own []sight) {
	for _, s := range l.seen {
		if !s.ofHost {
			own = append(own, s)
		}
	}
	return own
}

func (l look) hosts() (hosts []sight) {
	for _, s := range l.seen {
		if s.ofHost {
			hosts = append(hosts, s)
		}
	}
	return hosts
}

// tableOf is a container's namespaces; those of its host come last and dim.
func tableOf(l look) *table {
	t := newTable("TYPE", "INODE#", "KERNEL ID#", "SERIAL", "WHOSE")
	for _, s := range l.own() {
		t.row(string(s.typ), number(s.kernel.Inode), kernelID(s.kernel), in(styleKey, s.serial.String()), "its own")
	}
	for _, s := range l.hosts() {
		id := kernelID(s.kernel)
		id.style = styleDim
		t.row(in(styleDim, string(s.typ)), in(styleDim, number(s.kernel.Inode)), id, in(styleDim, s.serial.String()), in(styleDim, "host's"))
	}
	return t
}

// pair is a namespace before and after a move.
type pair struct{ before, after sight }

// pairs are the namespaces that were the container's own before.
func pairs(before, after look) (all []pair) {
	for _, x := range before.own() {
		y, _ := after.of(x.typ)
		all = append(all, pair{x, y})
	}
	return all
}

// kept: the serial is the same, and it names another kernel namespace now.
func (p pair) kept() bool { return p.before.serial == p.after.serial }

// sameInode: the number that people take for an identity has not changed, although the namespace has.
func (p pair) sameInode() bool {
	return p.before.kernel.Inode == p.after.kernel.Inode && p.before.kernel.Inode != 0
}

func sameInodes(before, after look) (n int) {
	for _, p := range pairs(before, after) {
		if p.sameInode() {
			n++
		}
	}
	return n
}

// besides is two looks side by side, with a remark below each row whose inode number is the same.
func besides(before, after look, p palette, width int) string {
	all := pairs(before, after)
	text := besidesTable(before, after, all, " → ", p)
	if longest(text, p) > width {
		text = besidesTable(before, after, all, "→", p)
	}
	lines := strings.SplitAfter(text, "\n") // the first one is the head
	var b strings.Builder
	b.WriteString(lines[0])
	for i, pair := range all {
		b.WriteString(lines[i+1])
		if pair.sameInode() {
			b.WriteString(strings.Repeat(" ", len("cgroup  ")) + p.do(styleWarn, "└ same inode, different namespace!") + "\n")
		}
	}
	return b.String()
}

func besidesTable(before, after look, all []pair, arrow string, p palette) string {
	title := func(what string) string { return what + " " + before.host + arrow + after.host }
	t := newTable("TYPE", title("INODE"), title("KERNEL ID"), "SERIAL on "+before.host+" and "+after.host)
	for _, pair := range all {
		inode := in(stylePlain, number(pair.before.kernel.Inode)+arrow+number(pair.after.kernel.Inode))
		if pair.sameInode() {
			inode = in(styleWarn, strings.Replace(inode.text, "→", "=", 1))
		}
		id := in(stylePlain, kernelID(pair.before.kernel).text+arrow+kernelID(pair.after.kernel).text)
		serial := in(styleGood, pair.after.serial.String()+" ✓")
		if !pair.kept() {
			serial = in(styleBad, pair.before.serial.String()+" ✗ "+pair.after.serial.String())
		}
		t.row(string(pair.before.typ), inode, id, serial)
	}
	return tableText(t, p, 0)
}

func tableText(t *table, p palette, most int) string {
	var b strings.Builder
	_ = t.write(&b, p, most) // a strings.Builder takes everything
	return b.String()
}

// longest is the columns of the longest line; colours count as nothing.
func longest(text string, p palette) (most int) {
	if p.on {
		for _, code := range sgr {
			text = strings.ReplaceAll(text, "\x1b["+code+"m", "")
		}
		text = strings.ReplaceAll(text, "\x1b[0m", "")
	}
	for line := range strings.Lines(text) {
		most = max(most, columns(strings.TrimRight(line, "\n")))
	}
	return most
}

// hostsOwn says what became of the namespaces that were the host's before: a line for each, in the table's
// first column and then to the end.
func hostsOwn(before, after look, width int) (lines []string) {
	for _, x := range before.hosts() {
		y, ok := after.of(x.typ)
		text := fmt.Sprintf("host's own, stays behind: %s on %s, %s on %s", x.serial, before.host, y.serial, after.host)
		switch {
		case !ok:
			continue
		case !y.ofHost:
			text = fmt.Sprintf("host's own; CRIU restores it as a new one, with serial %s", y.serial)
		}
		const margin = len("cgroup  ")
		lines = append(lines, fmt.Sprintf("%-*s%s", margin, x.typ, wrap(text, width, margin)))
	}
	return lines
}

// cloneTable is a clone's namespaces with what they were cloned from.
func cloneTable(l look) *table {
	t := newTable("TYPE", "INODE#", "KERNEL ID#", "SERIAL", "CLONED FROM")
	for _, s := range l.own() {
		if s.parent == 0 {
			continue // new in the clone, as the time namespace is: nobody's copy
		}
		t.row(string(s.typ), number(s.kernel.Inode), kernelID(s.kernel), in(styleKey, s.serial.String()), in(styleDim, s.parent.String()))
	}
	return t
}

// checkMoved holds the demo to what it says of a move.
func checkMoved(before, after look) error {
	if len(before.own()) == 0 {
		return fmt.Errorf("the container on host %s has no namespaces of its own", before.host)
	}
	for _, p := range pairs(before, after) {
		switch {
		case !p.kept():
			return fmt.Errorf("the %s namespace had serial %s on host %s and has %s on host %s: a move must keep it",
				p.before.typ, p.before.serial, before.host, p.after.serial, after.host)
		case p.before.kernel.Key(p.before.typ) == p.after.kernel.Key(p.before.typ):
			return fmt.Errorf("the %s namespace is the same one on both hosts: nothing has moved", p.before.typ)
		}
	}
	return nil
}

// checkClone holds the demo to what it says of a clone of what was dumped.
func checkClone(dumped, clone look) error {
	if clone.sandbox == dumped.sandbox {
		return fmt.Errorf("the clone is in sandbox %s, as the original is", clone.sandbox)
	}
	for _, x := range dumped.own() {
		y, ok := clone.of(x.typ)
		switch {
		case !ok || y.ofHost:
			return fmt.Errorf("the clone has no %s namespace of its own", x.typ)
		case y.serial == x.serial:
			return fmt.Errorf("the clone's %s namespace has the original's serial %s", x.typ, x.serial)
		case y.parent != x.serial:
			return fmt.Errorf("the clone's %s namespace was cloned from %s, its record says from %s", x.typ, x.serial, y.parent)
		}
	}
	return nil
}
