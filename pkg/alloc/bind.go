package alloc

import (
	"slices"
	"time"
)

// boundAs refuses a second Bound that says anything but the first: it would be acknowledged and not
// recorded.
func (s *Sandbox) boundAs(e Bound) error {
	for _, n := range slices.Concat(e.Bindings, e.Fresh) {
		if b, ok := s.Binding(n.Serial); !ok || b.Type != n.Type || b.Kernel != n.Kernel {
			return refuse(ReasonBound, subject(s), "it runs already, and serial %s was not bound to this %s namespace", n.Serial, n.Type)
		}
	}
	return nil
}

// undoBind makes the namespaces live again that a rebind at that moment found missing: the restore came
// to nothing, and the next one of the same images may have them. The zero moment undoes nothing.
func (s *Sandbox) undoBind(at time.Time) {
	for i := range s.Bindings {
		if b := &s.Bindings[i]; b.Gone.Equal(at) {
			b.Gone = time.Time{}
		}
	}
}

// rebind replaces the kernel identities after a restore. What is not in e.Bindings was not in the
// images: it is gone. A sandbox that is resumed may have been seen to end piece by piece after its dump:
// what the images have lives again.
func (s *Sandbox) rebind(e Bound, now time.Time) error {
	if len(e.Bindings) > len(s.Bindings) {
		return refuse(ReasonBound, subject(s), "%d bindings are named, it has %d", len(e.Bindings), len(s.Bindings))
	}
	seen := map[Serial]bool{}
	for _, n := range e.Bindings {
		b, ok := s.Binding(n.Serial)
		switch {
		case seen[n.Serial]:
			return refuse(ReasonBound, subject(s), "serial %s stands twice in the bindings", n.Serial)
		case !ok:
			return refuse(ReasonBound, subject(s), "serial %s is not of this sandbox", n.Serial)
		case b.Type != n.Type:
			return refuse(ReasonBound, subject(s), "serial %s is a %s namespace's, not a %s's", n.Serial, b.Type, n.Type)
		case !b.Live() && s.Claim.From != StateEnded:
			return refuse(ReasonBound, subject(s), "serial %s is of a namespace that is gone since %s", n.Serial, b.Gone.Format(time.RFC3339))
		}
		if err := n.validate(e.Claimant.BootID); err != nil {
			return err
		}
		seen[n.Serial], b.Kernel, b.Gone = true, n.Kernel, time.Time{}
	}
	for i := range s.Bindings {
		if b := &s.Bindings[i]; b.Live() && !seen[b.Serial] {
			b.Gone = now
		}
	}
	if err := s.add(e.Fresh, e.Claimant.BootID, now); err != nil {
		return err
	}
	return s.setLabels(e.Labels)
}

// add appends bindings of namespaces that the sandbox did not have, and proves that each live
// namespace of it stands under one serial.
func (s *Sandbox) add(fresh []Binding, bootID string, now time.Time) error {
	if n := len(s.Bindings) + len(fresh); n > MaxBindings {
		return refuse(ReasonTooLarge, subject(s), "%d namespaces, %d are allowed", n, MaxBindings)
	}
	s.Bindings = slices.Grow(s.Bindings, len(fresh))
	for _, b := range fresh {
		if err := b.validate(bootID); err != nil {
			return err
		}
		if _, ok := s.Binding(b.Serial); ok {
			return refuse(ReasonBound, subject(s), "serial %s is bound already", b.Serial)
		}
		b.Bound, b.Gone = now, time.Time{}
		s.Bindings = append(s.Bindings, b)
	}
	live := make(map[kernelKey]Serial, len(s.Bindings))
	for _, b := range s.Bindings {
		if !b.Live() {
			continue
		}
		key := b.Kernel.key(b.Type)
		if other, ok := live[key]; ok {
			return refuse(ReasonBound, subject(s), "%s namespace %s has serial %s already, %s cannot be added", b.Type, b.Kernel.Key(b.Type), other, b.Serial)
		}
		live[key] = b.Serial
	}
	return nil
}

func (s *Sandbox) setLabels(set map[string]string) error {
	if len(set) == 0 {
		return nil
	}
	labels := make(map[string]string, len(s.Labels)+len(set))
	for k, v := range s.Labels {
		labels[k] = v
	}
	for k, v := range set {
		labels[k] = v
	}
	if err := validateLabels(subject(s), labels); err != nil {
		return err
	}
	s.Labels = labels
	return nil
}
