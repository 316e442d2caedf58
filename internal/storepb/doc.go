// Package storepb holds the values that the store keeps, generated from store.proto, which says how
// they may change. It is the secret of internal/etcdstore: nothing else reads or writes them.
package storepb
