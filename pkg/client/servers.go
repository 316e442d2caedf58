package client

import (
	"context"
	"time"

	nsallocv1 "github.com/nsalloc/nsalloc/api/proto/nsalloc/v1"
	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client/wire"
)

// ServerMetadata is the metadata key under which a server says its name on a plain-text connection.
const ServerMetadata = "nsalloc-server"

// ServerStatus is a server of the pool.
type ServerStatus struct {
	Name, Address string
	// Life counts its starts; Started is when this one was, by its clock.
	Life    uint64
	Started time.Time
	// Answers: it did so just now; else Trouble says what came instead.
	Answers bool
	Trouble string
}

// Servers are the servers of the pool, in the order of their names. Each was asked whether it answers.
func (c *Client) Servers(ctx context.Context) ([]ServerStatus, error) {
	resp, err := c.servers.List(ctx, &nsallocv1.ServersListRequest{})
	if err != nil {
		return nil, err
	}
	var out []ServerStatus
	for _, s := range resp.GetServers() {
		st := ServerStatus{Name: s.GetName(), Address: s.GetAddress(), Life: s.GetLife(), Answers: s.GetAnswers(), Trouble: s.GetTrouble()}
		if s.GetStarted() != nil {
			st.Started = s.GetStarted().AsTime()
		}
		out = append(out, st)
	}
	return out, nil
}

// RemoveServer unlists a server that is gone for good, through a life of it. force removes also one that
// answers, and one that nobody knows.
func (c *Client) RemoveServer(ctx context.Context, name string, life uint64, force bool) error {
	_, err := c.servers.Remove(ctx, &nsallocv1.ServersRemoveRequest{Name: name, Life: life, Force: force})
	return err
}

// Witness asks the server, in the name of another one, what it has seen of the store.
func (c *Client) Witness(ctx context.Context, q alloc.Question) (alloc.Testimony, error) {
	resp, err := c.servers.Witness(ctx, wire.WitnessRequest(q))
	if err != nil {
		return alloc.Testimony{}, err
	}
	return wire.TestimonyFromWire(resp), nil
}
