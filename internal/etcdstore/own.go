package etcdstore

import (
	"sync"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

// mostOwn bounds how many sandboxes wait to be delivered: those of 60 registrations and more.
const mostOwn = 4096

// own is the sandboxes that this process wrote a moment ago, by their values: what a watch delivers of
// them need not be read again. A value that is found here reads as what it was made of, whoever wrote it
// and whatever became of the transaction, so that one that is here in vain does no harm; it goes
// when others need its place.
type own struct {
	mu      sync.Mutex
	records map[alloc.Token]ownWrite // guarded by mu
	turn    [mostOwn]alloc.Token     // guarded by mu: the values in the order in which they came
	next    int                      // guarded by mu
}

type ownWrite struct {
	token   alloc.Token
	sandbox *alloc.Sandbox
}

// remember is called before the transaction is sent: a watch can be faster than its answer.
func (o *own) remember(value []byte, sb *alloc.Sandbox) {
	token := alloc.Token(value)
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.records == nil {
		o.records = map[alloc.Token]ownWrite{}
	}
	delete(o.records, o.turn[o.next])
	o.records[token], o.turn[o.next] = ownWrite{token, sb}, token
	o.next = (o.next + 1) % mostOwn
}

// take is what was remembered for a value that is under key, once.
func (o *own) take(key alloc.Key, value []byte) (alloc.Token, *alloc.Sandbox) {
	o.mu.Lock()
	defer o.mu.Unlock()
	w, ok := o.records[alloc.Token(value)]
	if !ok || w.sandbox.Key() != key {
		return "", nil
	}
	delete(o.records, w.token)
	return w.token, w.sandbox
}
