package server

import (
	"fmt"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// mostTold is how many records that cannot be read one load of the view logs one by one.
const mostTold = 20

// tellUnreadable logs what has become unreadable, or readable again. It is apply's, without the lock.
func (v *view) tellUnreadable(changes []alloc.Change) {
	for _, c := range changes {
		switch was := v.told[c.Key]; {
		case !viewed(c.Key.Kind):
		case c.Err != nil && was != c.Err.Error():
			v.told[c.Key] = c.Err.Error()
			v.log.Warn("a record cannot be read; it is left out of all lists, and what needs it is refused", "record", c.Key, "error", c.Err)
		case c.Err == nil && was != "":
			delete(v.told, c.Key)
			v.log.Info("a record that could not be read was replaced or deleted", "record", c.Key)
		}
	}
}

// tellAllUnreadable is tellUnreadable after a load: what was told before is not repeated.
func (v *view) tellAllUnreadable() {
	told := make(map[alloc.Key]string, len(v.ix.unreadable))
	fresh := 0
	for key, err := range v.ix.unreadable { // reading ix needs no lock here: this is its writer
		told[key] = err.Error()
		if v.told[key] == told[key] {
			continue
		}
		if fresh++; fresh <= mostTold {
			v.log.Warn("a record cannot be read; it is left out of all lists, and what needs it is refused", "record", key, "error", err)
		}
	}
	if fresh > mostTold {
		v.log.Warn("more records cannot be read; nsalloc check names them", "more", fresh-mostTold, "in_all", len(told))
	}
	v.told = told
}

// viewed are the kinds that a load of the view reads; of the others it keeps nothing, readable or not.
func viewed(kind alloc.Kind) bool {
	switch kind {
	case alloc.KindPool, alloc.KindCounter, alloc.KindHost, alloc.KindSandbox, alloc.KindCheckpoint:
		return true
	}
	return false
}

// applyUnreadable comes before the record leaves the other indexes: they know its owner.
func (ix *index) applyUnreadable(u update) {
	_, was := ix.unreadable[u.key]
	is := u.err != nil && viewed(u.key.Kind)
	if u.key.Kind == alloc.KindSandbox && (is || was) && hides(u.key) {
		ix.hide(u, is, was)
	}
	switch {
	case is:
		ix.unreadable[u.key] = u.err
		if !was && hides(u.key) {
			ix.unread[u.key.Kind]++
		}
	case was:
		delete(ix.unreadable, u.key)
		if hides(u.key) {
			ix.unread[u.key.Kind]--
		}
	}
}

// hide keeps count of whose the sandboxes are that cannot be read: the owner that the value names, or else the
// one that was known before.
func (ix *index) hide(u update, is, was bool) {
	owner := u.owner
	if was {
		before := ix.hiddenOf[u.key]
		if owner == "" {
			owner = before
		}
		delete(ix.hiddenOf, u.key)
		if ix.unreadOf[before]--; ix.unreadOf[before] == 0 {
			delete(ix.unreadOf, before)
		}
	} else if owner == "" {
		owner = ix.ownerOf(u.key)
	}
	if is {
		ix.hiddenOf[u.key] = owner
		ix.unreadOf[owner]++
	}
}

// ownerOf is the owner of the sandbox under a key, "" when there is none.
func (ix *index) ownerOf(key alloc.Key) string {
	var s alloc.Serial
	if s.UnmarshalText([]byte(key.ID)) != nil {
		return ""
	}
	if e := ix.entries[ix.bySerial[s]]; e != nil && e.serial == s {
		return e.owner
	}
	return ""
}

// leftOut is how many sandboxes cannot be read that may be the owner's; for "", of the whole pool.
func (ix *index) leftOut(owner string) uint64 {
	if owner == "" {
		return ix.unread[alloc.KindSandbox]
	}
	return ix.unreadOf[owner] + ix.unreadOf[""]
}

// hides reports whether a record of ours may stand under a key. A value under any other one takes
// nobody's sandbox away.
func hides(key alloc.Key) bool {
	switch key.Kind {
	case alloc.KindSandbox, alloc.KindCheckpoint:
		var s alloc.Serial
		return s.UnmarshalText([]byte(key.ID)) == nil && s.Valid() && s.String() == key.ID
	}
	return true
}

// missing is the error for who asked for the record under one of keys and was not given it: that it cannot
// be read, or notFound.
func (ix *index) missing(notFound error, keys ...alloc.Key) error {
	for _, key := range keys {
		if err := ix.unreadable[key]; err != nil {
			return err
		}
	}
	return notFound
}

// hidden is the error for who asked by what only a record itself says, a namespace's serial or a run of
// CRIU, and was given none: while one record of that kind cannot be read, it may be the one.
func (ix *index) hidden(notFound *alloc.Error, kind alloc.Kind) error {
	n := ix.unread[kind]
	if n == 0 {
		return notFound
	}
	var first alloc.Key
	for key := range ix.unreadable {
		if key.Kind == kind && hides(key) && (first.ID == "" || key.ID < first.ID) {
			first = key
		}
	}
	err := *notFound
	err.Reason = alloc.ReasonOf(ix.unreadable[first])
	err.Msg = fmt.Sprintf("it is in no %s that can be read, and may be in one that cannot: there are %d", kind, n)
	err.Fix = "run nsalloc check, which names them"
	err.Err = ix.unreadable[first]
	return &err
}
