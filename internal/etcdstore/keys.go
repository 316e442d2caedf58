package etcdstore

import (
	"fmt"
	"strings"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// root is the part of etcd's keyspace that is ours, with the layout's version in it.
const root = "/nsalloc/1/"

// keys maps a pool's records to etcd keys: root POOL / kind / id, with a _ before the kinds that no watch
// follows. Neither a pool's name nor a kind has a slash in it, so that no key of one pool or kind begins
// with the prefix of another.
type keys struct{ prefix string }

func singleton(k alloc.Kind) bool { return k == alloc.KindPool || k == alloc.KindCounter }

// etcd is the etcd key of a record. It refuses a key that no record can have.
func (ks keys) etcd(k alloc.Key) ([]byte, error) {
	if newMessage(k.Kind) == nil {
		return nil, invalid("key "+k.String(), fmt.Sprintf("there is no kind %q", k.Kind))
	}
	if singleton(k.Kind) != (k.ID == "") {
		return nil, invalid("key "+k.String(), "pool and counter have no id, all others have one")
	}
	return []byte(ks.prefix + directory(k.Kind) + k.String()), nil
}

// directory is what stands before a kind. The underscore sorts before all letters.
func directory(k alloc.Kind) string {
	if k.Watched() {
		return ""
	}
	return "_"
}

// parse is the opposite of etcd. It reports false for keys of kinds that this version does not know:
// a newer one may keep more in the pool.
func (ks keys) parse(key []byte) (alloc.Key, bool) {
	rest, ok := strings.CutPrefix(string(key), ks.prefix)
	kind, id, _ := strings.Cut(rest, "/")
	k := alloc.Key{Kind: alloc.Kind(strings.TrimPrefix(kind, "_")), ID: id}
	if !ok || newMessage(k.Kind) == nil || directory(k.Kind)+k.String() != rest || singleton(k.Kind) != (k.ID == "") {
		return alloc.Key{}, false
	}
	return k, true
}

// after is the etcd range of the records of a kind with greater ids than after. The key that ends where
// the id would begin is no record's, and not in it.
func (ks keys) after(kind alloc.Kind, after string) (first, end []byte, err error) {
	if newMessage(kind) == nil || singleton(kind) {
		return nil, nil, invalid("kind "+string(kind), "it cannot be listed: it is unknown, or has one record only")
	}
	prefix := ks.prefix + directory(kind) + string(kind) + "/"
	return []byte(prefix + after + "\x00"), prefixEnd(prefix), nil
}

// watched is the etcd range of all kinds that watches deliver.
func (ks keys) watched() (first, end []byte) { return []byte(ks.prefix + "a"), prefixEnd(ks.prefix) }

// prefixEnd is the first key after all that begin with prefix, which ends in a slash.
func prefixEnd(prefix string) []byte {
	end := []byte(prefix)
	end[len(end)-1]++
	return end
}
