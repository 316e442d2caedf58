package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/grpc"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

// What an operator's requests change, while a container runs on a.

// prepareAllocate notes where the counter is.
func (c *cellRun) prepareAllocate() {
	c.must(c.start())
	c.before = c.oneMore()
	c.request = client.NewRequestID()
}

// oneMore allocates one serial without a fault.
func (c *cellRun) oneMore() alloc.Range {
	c.p.t.Helper()
	var got alloc.Ranges
	c.must(client.Retry(c.p.ctx(), func(id string) (err error) {
		got, err = c.p.Client().Allocate(c.p.ctx(), alloc.AllocateCommand{RequestID: id, Count: 1})
		return err
	}))
	return got[0]
}

// ask asks for serials under the cell's request id until there is an answer.
func (c *cellRun) ask() (got alloc.Ranges, err error) {
	err = client.RetryID(c.p.ctx(), c.request, func(id string) (err error) {
		got, err = c.p.Client().Allocate(c.p.ctx(), alloc.AllocateCommand{RequestID: id, Count: 5})
		return err
	})
	return got, err
}

func (c *cellRun) allocate() (err error) {
	c.allocated, err = c.ask()
	return err
}

// allocatedOnce: the request was answered, it is answered the same again, and others get other serials: what a server
// committed before it died is what its successor answers.
func (c *cellRun) allocatedOnce() error {
	again, err := c.ask()
	if err != nil {
		return err
	}
	if len(again) != 1 || again[0].Count != 5 || !reflect.DeepEqual(again, c.allocated) {
		return fmt.Errorf("request %s was answered %v, and then %v", c.request, c.allocated, again)
	}
	if err := c.follows(c.before, again[0]); err != nil {
		return err
	}
	return c.follows(again[0], c.oneMore())
}

// follows: b was issued after a. What lies between them is other lanes', hosts', or burned with a server that died.
func (c *cellRun) follows(a, b alloc.Range) error {
	if b.First <= a.Last() {
		return fmt.Errorf("%s was issued, and after it %s", a, b)
	}
	return nil
}

// prepareMend allocates what is mended: nobody waits for that request any more.
func (c *cellRun) prepareMend() {
	c.prepareAllocate()
	c.must(c.allocate())
	c.mending = client.NewRequestID()
}

// askMend has the record of the cell's request put aside, until there is an answer.
func (c *cellRun) askMend() (done alloc.Mended, err error) {
	err = client.RetryID(c.p.ctx(), c.mending, func(id string) (err error) {
		done, err = c.p.Client().Mend(c.p.ctx(), alloc.MendCommand{RequestID: id, Kind: alloc.KindRequest, ID: c.request, Force: true})
		return err
	})
	return done, err
}

func (c *cellRun) mend() (err error) {
	c.mended, err = c.askMend()
	return err
}

// mendedOnce: the mend was answered, it is answered the same again, and who asks under the request that was
// put aside is refused. That Check finds nothing afterwards, every cell shows.
func (c *cellRun) mendedOnce() error {
	again, err := c.askMend()
	if err != nil {
		return err
	}
	if !slices.Contains(again.Changed, alloc.Key{Kind: alloc.KindRequest, ID: c.request}) || !reflect.DeepEqual(again, c.mended) {
		return fmt.Errorf("mend %s was answered %+v, and then %+v", c.mending, c.mended, again)
	}
	if got, err := c.ask(); !errors.Is(err, alloc.ErrRequestExpired) {
		return fmt.Errorf("request %s was put aside, and is answered %v, %w", c.request, got, err)
	}
	return nil
}

// preparePolicy has a container run; the cells of one pool each set a quota of their own.
func (c *cellRun) preparePolicy() {
	c.must(c.start())
	pool, _, err := c.p.Client().Pool(c.p.ctx())
	c.must(err)
	quota, _ := pool.Policy.Quota()
	c.quota = quota + 1
}

// setPolicy sets the cell's quota, until there is an answer.
func (c *cellRun) setPolicy() error {
	return client.Retry(c.p.ctx(), func(id string) error {
		pool, err := c.p.Client().SetPolicy(c.p.ctx(), alloc.SetPolicyCommand{RequestID: id, Fields: map[string]string{"host-quota": strconv.FormatUint(c.quota, 10)}})
		if err == nil && pool.Policy.HostQuota != c.quota {
			err = fmt.Errorf("the quota was set to %d, and is %d", c.quota, pool.Policy.HostQuota)
		}
		return err
	})
}

// policySet: what was answered is in force.
func (c *cellRun) policySet() error {
	c.p.eventually("the policy is shown as it was set", func() error { // the server's view may be moments behind
		pool, _, err := c.p.Client().Pool(c.p.ctx())
		if err == nil && pool.Policy.HostQuota != c.quota {
			err = fmt.Errorf("the quota was set to %d, and is %d", c.quota, pool.Policy.HostQuota)
		}
		return err
	})
	return nil
}

// prepareUnlist names a server that was never there: the store may have forgotten one, and others remember it. The
// cells of one pool each remove another.
func (c *cellRun) prepareUnlist() {
	c.must(c.start())
	c.request = client.NewRequestID()
}

// unlist removes a server until there is an answer.
func (c *cellRun) unlist() error {
	return client.Retry(c.p.ctx(), func(string) error { return c.p.Client().RemoveServer(c.p.ctx(), c.request, 1, true) })
}

// unlistedOnce: it may be asked for again, and the one server that is there is the one that is listed.
func (c *cellRun) unlistedOnce() error {
	if err := c.unlist(); err != nil {
		return err
	}
	found, err := c.p.Client().Servers(c.p.ctx())
	if err == nil && (len(found) != 1 || found[0].Name == c.request || !found[0].Answers) {
		err = fmt.Errorf("of one server that runs and one that was removed, these are listed: %+v", found)
	}
	return err
}

// recover takes the pool into its next generation, as after a snapshot was put back: the hosts register again what
// lives on them.
func (c *cellRun) recover() error {
	return client.Retry(c.p.ctx(), func(id string) error {
		_, err := c.p.Client().Mend(c.p.ctx(), alloc.MendCommand{RequestID: id, Kind: alloc.KindCounter, Force: true})
		return err
	})
}

// settled: every host that is there says what lives on it, and the pool waits for nobody else than the one that another
// cell has left behind.
func (c *cellRun) settled() error {
	c.p.eventually("the pool is settled", func() error {
		pool, _, err := c.p.Client().Pool(c.p.ctx())
		if err != nil {
			return err
		}
		fine := pool.IsSettled()
		for h, err := range c.p.Client().Hosts(c.p.ctx()) {
			switch answered := err == nil && max(h.Settled, h.Waived) >= pool.Generation; {
			case err != nil:
				return err
			case !answered && h.Name == goneHost:
				fine = true
			case !answered:
				return fmt.Errorf("host %s is settled in generation %d, the pool is in %d", h.Name, h.Settled, pool.Generation)
			}
		}
		if !fine {
			return fmt.Errorf("every host has come, and the pool is in generation %d and settled in %d", pool.Generation, pool.Settled)
		}
		return nil
	})
	return nil
}

// goneHost is one that has joined and never comes back.
const goneHost = "gone"

// prepareWaive has a host join and go, and the pool in its next generation: it waits for that host.
func (c *cellRun) prepareWaive() {
	c.must(c.start())
	gone, err := client.Dial(c.p.ServerAddr(), client.WithInsecure(), client.WithHost(goneHost), client.WithDialOptions(grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
		return c.p.DialContext(ctx, "tcp", strings.TrimPrefix(addr, "passthrough:///"))
	})))
	c.must(err)
	defer gone.Close()
	c.must(client.Retry(c.p.ctx(), func(id string) error {
		_, _, err := gone.Hello(c.p.ctx(), alloc.HelloCommand{RequestID: id, BootID: "00000000-0000-4000-8000-000000000000", Nonce: "0123456789abcdef"})
		return err
	}), c.recover())
}

// waive says that nobody waits for that host, until there is an answer.
func (c *cellRun) waive() error {
	c.request = client.NewRequestID()
	return c.waiveAgain()
}

func (c *cellRun) waiveAgain() error {
	return client.RetryID(c.p.ctx(), c.request, func(id string) error {
		_, _, err := c.p.Client().Waive(c.p.ctx(), alloc.WaiveCommand{RequestID: id, Host: goneHost})
		return err
	})
}

// waived: it may be asked for again, and the pool waits for nobody.
func (c *cellRun) waived() error {
	return errors.Join(c.waiveAgain(), c.settled())
}
