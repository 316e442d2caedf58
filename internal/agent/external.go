package agent

import (
	"context"
	"maps"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/criuhook/images"
)

// A namespace that CRIU joins instead of restoring it (--external; a runtime's `path` of a namespace) is
// none of the container's: it was there before, outlives it, and the target has another one in its place.
// So it has a sandbox of its own on its host, and keeps its serial there for as long as it lives. A sweep
// cannot tell such a namespace from the container's own ones: it is numbered with the container that it
// is first seen in, and parts from it when a dump's images name it.

// labelHandedIn marks the sandbox of a namespace that was handed in; its value is the sandbox that it was
// handed in to first.
const labelHandedIn = "handed_in_to"

// partExternal takes the namespaces that the images call external out of the sandbox that is dumped. It
// reports whether any are left that move. Dying between two of them leaves a sandbox that has not parted
// with the others yet: the next dump does.
func (a *Agent) partExternal(ctx context.Context, s *alloc.Sandbox, list []images.Namespace) (moves bool, err error) {
	var external []alloc.Binding
	for _, ns := range list {
		p, ok := a.book.find(ns.ID.Type, ns.Kernel)
		switch {
		case !ok || p.sandbox != s.Serial:
		case ns.External:
			external = append(external, p.binding)
		default:
			moves = true
		}
	}
	if !moves {
		return false, nil // what it has stays, so it does
	}
	for _, b := range external {
		if err := a.part(ctx, s.Serial, b); err != nil {
			return true, err
		}
	}
	return true, nil
}

func (a *Agent) part(ctx context.Context, from alloc.Serial, b alloc.Binding) error {
	done, err := a.registrar.hold(ctx)
	if err != nil {
		return err
	}
	defer done()
	s := a.book.sandbox(from)
	if p, ok := a.book.find(b.Type, b.Kernel); !ok || p.sandbox != from || s == nil {
		return nil // an answer that was thought lost had been given
	}
	spend, serials, err := a.registrar.take(ctx, 1)
	if err != nil {
		return err
	}
	_, err = a.registrar.register(ctx, spend, nil,
		alloc.RegisterItem{Sandbox: from, Epoch: s.Epoch, Part: []alloc.Serial{b.Serial}},
		alloc.RegisterItem{Sandbox: serials[0], Add: []alloc.Binding{{Serial: b.Serial, Type: b.Type, Kernel: b.Kernel}}, Labels: handedIn(from, s.Labels)},
	)
	if err == nil {
		a.log.Info("a namespace was handed in from outside and stays on this host", "type", b.Type, "serial", b.Serial, "sandbox", serials[0], "handed_in_to", from)
	}
	return err
}

// numberExternal gives a namespace that a restore joins, and that has no serial yet, a sandbox of its own;
// by the registrar's holder.
func (a *Agent) numberExternal(ctx context.Context, ns images.Namespace, sandbox alloc.Serial, labels map[string]string) error {
	_, err := a.registerOne(ctx, wish{item: alloc.RegisterItem{Labels: handedIn(sandbox, labels)}, add: []unnumbered{{ns.ID.Type, ns.Kernel}}})
	return err
}

func handedIn(to alloc.Serial, labels map[string]string) map[string]string {
	return map[string]string{"command": labels["command"], labelHandedIn: to.String()}
}

// dropParted takes out of a clone's parents what has parted since from the sandbox whose images it is of:
// another dump of it named that external, and the pool takes only the sandbox's own for parents.
func (a *Agent) dropParted(ctx context.Context, sandbox alloc.Serial, parents map[string]alloc.Serial) error {
	if len(parents) == 0 {
		return nil
	}
	s, _, err := a.pool.Sandbox(ctx, sandbox)
	if err != nil {
		return err
	}
	maps.DeleteFunc(parents, func(_ string, parent alloc.Serial) bool {
		_, ok := s.Binding(parent)
		return !ok
	})
	return nil
}
