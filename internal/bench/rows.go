package main

import (
	"fmt"
	"strings"
)

// load is who asks.
type load struct {
	Callers   int // of all processes
	Processes int // 0: this one load process
	Shared    bool
}

// The loads.
var (
	one      = load{Callers: 1}
	some     = load{Callers: 16}
	many     = load{Callers: 128}
	manyHere = load{Callers: 128, Shared: true}
	crowd    = load{Callers: 1000, Shared: true}
	spread   = load{Callers: 128, Processes: 16, Shared: true}
	// The same without a client to share.
	spreadOwn = load{Callers: 128, Processes: 16}
)

func (l load) String() string {
	switch {
	case l.Processes > 1:
		return fmt.Sprintf("%d-processes", l.Processes)
	case l.Shared:
		return fmt.Sprintf("%d-shared", l.Callers)
	}
	return fmt.Sprint(l.Callers)
}

func (l load) words() string {
	switch {
	case l.Processes > 1 && l.Shared:
		return fmt.Sprintf("%d processes, %d callers and one client each", l.Processes, l.Callers/l.Processes)
	case l.Processes > 1:
		return fmt.Sprintf("%d processes, %d callers each", l.Processes, l.Callers/l.Processes)
	case l.Shared:
		return fmt.Sprintf("%d callers, one client", l.Callers)
	case l.Callers == 1:
		return "1 caller"
	}
	return fmt.Sprintf("%d callers", l.Callers)
}

// row is one line of the table.
type row struct {
	group string // of the table
	what  string // in a name
	words string // in the table
	ask   string // how callers ask: one of openers
	on    string // the system that they ask: one of starters
	load  load
}

func (r row) name() string { return r.what + "/" + r.load.String() }

// The groups, in their order.
const (
	groupOurs   = "One serial a call"
	groupLimits = "Limits: nothing is kept"
	groupEtcd   = "etcd without us"
	groupOthers = "Others"
	groupRegs   = "Registrations, sandboxes of 8 namespaces, 60 a request"
)

func allRows() (rows []row) {
	add := func(group, what, words, ask, on string, loads ...load) {
		for _, l := range loads {
			rows = append(rows, row{group, what, words, ask, on, l})
		}
	}
	add(groupOurs, "nsalloc", "nsalloc Allocate, committed", "nsalloc", "nsalloc", one, some, many, crowd, spread)

	add(groupLimits, "echo", "gRPC unary echo", "unary", "echo", one, some, many)
	add(groupLimits, "echo-client", "gRPC unary echo, our client", "nsalloc", "echo", many, crowd, spread)
	add(groupLimits, "stream", "gRPC stream echo, gathered", "stream", "echo", crowd)
	add(groupLimits, "stream-plain", "gRPC stream echo, gathered by channels", "stream-plain", "echo", crowd)
	add(groupLimits, "stream-batch", "gRPC stream echo, 1000 ids a message", "stream-batch", "echo", one)
	add(groupLimits, "fsync", "2 KiB written and synced to the disk", "fsync", "", one)
	add(groupLimits, "atomic", "atomic add in the process", "atomic", "", one, many)

	add(groupEtcd, "etcd-counter", "etcd counter, compare-and-swap", "counter", "etcd", one, some, many)
	add(groupEtcd, "etcd-put", "etcd Put, its revision", "put", "etcd", one, some, many)
	add(groupEtcd, "etcd-owner", "etcd, one owner gathers", "owner", "etcd", manyHere, crowd)

	for _, aof := range []string{"always", "off"} {
		on, words := "redis-aof-"+aof, "Redis INCR, AOF "+aof
		add(groupOthers, on, words, "redis", on, one, some, many, spreadOwn)
		add(groupOthers, on+"-gathered", "Redis INCRBY, AOF "+aof+", gathered", "redis-gathered", on, crowd)
	}
	add(groupOthers, "postgres", "PostgreSQL nextval", "postgres", "postgres", one, some, many, spreadOwn)

	add(groupRegs, "register", "nsalloc Register, committed", "register", "nsalloc-register", one, some)
	add(groupRegs, "etcd-register", "etcd, the same transactions", "etcd-register", "etcd", one, some)
	return rows
}

// target is a promise of ours about a ratio, or a difference.
type target struct {
	words string
	ours  string // rows
	other string
	least float64 // of ours by other in ids a second; 0: a latency
	more  float64 // milliseconds that our p50 may take longer
}

var targets = []target{
	{"1000 callers in one process, of the batched stream echo", "nsalloc/1000-shared", "stream/1000-shared", 0.4, 0},
	{"128 callers, of the unary echo", "nsalloc/128", "echo/128", 0.7, 0},
	{"128 callers, of the etcd counter", "nsalloc/128", "etcd-counter/128", 100, 0},
	{"1 caller, p50 beyond one etcd Put, ms", "nsalloc/1", "etcd-put/1", 0, 1},
	{"registrations, of raw etcd, 1 host", "register/1", "etcd-register/1", 0.5, 0},
	{"registrations, of raw etcd, 16 hosts", "register/16", "etcd-register/16", 0.5, 0},
}

// unit is what a row counts.
func (r row) unit() string {
	if strings.HasSuffix(r.what, "register") {
		return "sandbox"
	}
	return "id"
}

// uncalled reports whether ids come without a call for each.
func (r row) uncalled() bool { return r.ask == "atomic" || r.ask == "stream-batch" }
