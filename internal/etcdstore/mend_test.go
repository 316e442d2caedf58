package etcdstore

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/alloc/alloctest"
)

// mortal is a store whose process dies after some commits.
type mortal struct {
	alloc.Store
	commits int
}

func (s *mortal) Commit(ctx context.Context, tx alloc.Tx) (alloc.Revision, error) {
	if s.commits--; s.commits < 0 {
		return 0, alloc.ErrUnavailable
	}
	return s.Store.Commit(ctx, tx)
}

// TestMendLargest mends the largest sandbox that requests can make, with hundreds of records more, in a real
// etcd, which takes 128 operations and 1.5 MiB. The process dies after each of its transactions: what is left
// says what is to be done, or breaks no promise, and the same request does the rest.
func TestMendLargest(t *testing.T) {
	for _, kind := range []alloc.Kind{alloc.KindCheckpoint, alloc.KindSandbox} {
		t.Run(string(kind), func(t *testing.T) {
			l := alloctest.NewLively(t, newStore(t, shared.Endpoint()))
			sb, size := largest(t, l)
			cmd := alloc.MendCommand{RequestID: l.Request(), Actor: strings.Repeat("a", 64), Kind: kind, ID: sb.Serial.String(), Force: true}
			if kind == alloc.KindCheckpoint {
				cmd.ID = sb.Checkpoint.String()
			}
			deaths := 0
			for {
				_, err := alloc.NewService(&mortal{l.Store, 1}, l.Clock.Now).Mend(t.Context(), cmd)
				if err == nil {
					break
				}
				if alloc.ReasonOf(err) != alloc.ReasonUnknownOutcome {
					t.Fatalf("after %d deaths: %v", deaths, err)
				}
				if deaths++; deaths == 1 && kind == alloc.KindCheckpoint {
					restIsRefused(t, l, cmd)
				}
				r, err := l.Check(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				for _, f := range r.Findings {
					if !slices.Equal(f.Mend, []string{"mend", string(alloc.KindSandbox), sb.Serial.String()}) {
						t.Errorf("after %d deaths: %+v", deaths, f)
					}
				}
			}
			done, err := l.Mend(t.Context(), cmd)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("its record has %d bytes; %d records changed, after %d deaths", size, len(done.Changed), deaths)
			if deaths == 0 {
				t.Error("it was one transaction: not large enough to show anything")
			}
			alloctest.Check(t, l.Store)
			f, _, err := l.Store.Get(t.Context(), sb.Key(), alloc.CheckpointKey(sb.Checkpoint))
			if err != nil || f[1].Record != nil {
				t.Errorf("the checkpoint is still there: %+v, %v", f[1].Key, err)
			}
			now, there := f[0].Record.(*alloc.Sandbox)
			if there != (kind == alloc.KindCheckpoint) || there && now.Checkpoint != 0 {
				t.Errorf("the sandbox is there: %v, with checkpoint %v", there, there && now.Checkpoint != 0)
			}
		})
	}
}

// restIsRefused: when what is left may not go now, that is said of the rest, and it goes later.
func restIsRefused(t *testing.T, l *alloctest.Lively, cmd alloc.MendCommand) {
	t.Helper()
	e, _, err := l.Store.Get(t.Context(), alloc.Key{Kind: alloc.KindCounter})
	if err != nil {
		t.Fatal(err)
	}
	back := *e[0].Record.(*alloc.Counter)
	back.Next = 1
	for _, c := range []*alloc.Counter{&back, e[0].Record.(*alloc.Counter)} {
		if _, err := l.Store.Commit(t.Context(), alloc.Tx{Put: []alloc.Record{c}}); err != nil {
			t.Fatal(err)
		}
		if c == &back {
			_, err := l.Mend(t.Context(), cmd)
			if alloc.ReasonOf(err) != alloc.ReasonMendFirst || !strings.Contains(err.Error(), "nothing more was changed") {
				t.Errorf("with the counter put back: %v", err)
			}
		}
	}
}

// largest makes a running sandbox of a lively pool as large as its limits allow, and gives it 200 older stints.
// It returns it with its size in the store.
func largest(t *testing.T, l *alloctest.Lively) (*alloc.Sandbox, int) {
	t.Helper()
	r, err := alloctest.Everything(t.Context(), l.Store)
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(r.Sandboxes, func(s *alloc.Sandbox) bool {
		return s.State == alloc.StateRunning && s.Checkpoint != 0 && len(s.Stints) == 32
	})
	sb := *r.Sandboxes[i]
	next := alloc.Serial(1)<<48 | alloc.Serial(r.Counter.Next)
	r.Counter.Next += 2 * alloc.MaxBindings
	at := time.Unix(2_000_000_000, 999_999_999).UTC()
	boot := sb.Bindings[0].Kernel.BootID
	for i := len(sb.Bindings); i < alloc.MaxBindings; i++ {
		sb.Bindings = append(sb.Bindings, alloc.Binding{
			Serial: next, Type: alloc.NamespaceTypes()[i%8], Bound: at, Gone: at, Parent: next + alloc.MaxBindings,
			Kernel: alloc.KernelID{BootID: boot, ID: math.MaxUint64 - uint64(i), Inode: math.MaxUint32, Weak: true},
		})
		next++
	}
	sb.Labels = map[string]string{}
	for i := range 32 {
		sb.Labels[fmt.Sprintf("%0256d", i)] = strings.Repeat("l", 256)
	}
	sb.Requests.Marks = nil
	for range alloc.KeptRequests {
		sb.Requests.Marks = append(sb.Requests.Marks, alloc.RequestMark{ID: uuid.Must(uuid.NewV7()).String()})
	}
	sb.Requests.Forgotten = sb.Requests.Marks[0].ID
	value, err := encode(&sb)
	if err != nil {
		t.Fatal(err)
	}
	// The requests that made it so were smaller each.
	s := l.Store.(*Store)
	if _, err := s.client.etcd.Put(t.Context(), s.keys.prefix+sb.Key().String(), string(value)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Commit(t.Context(), alloc.Tx{Put: []alloc.Record{r.Counter}}); err != nil {
		t.Fatal(err)
	}
	for batch := range 2 {
		var tx alloc.Tx
		for i := range 100 {
			st := r.OldStints[0].Stint
			st.Epoch, st.Checkpoint, st.Began = 1<<47+alloc.Epoch(100*batch+i), 0, alloc.BeganRegistered
			tx.Put = append(tx.Put, &alloc.OldStint{Sandbox: sb.Serial, Stint: st})
		}
		if _, err := s.Commit(t.Context(), tx); err != nil {
			t.Fatal(err)
		}
	}
	return &sb, len(value)
}
