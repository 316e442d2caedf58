package alloc

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// PolicyField is one field of a policy as people set it: NAME=VALUE.
type PolicyField struct {
	// Name is what it is called in commands and in the API, such as host-quota.
	Name string
	// What says what it orders, and which values there are.
	What string

	get func(*Policy) string
	set func(*Policy, string) error
}

// Of is the field's value in p, as it is set.
func (f PolicyField) Of(p Policy) string { return f.get(&p) }

// policyFields has a row for each field of Policy, in the order in which they are shown.
var policyFields = []PolicyField{
	action("live", "a second restore while the sandbox lives: clone or refuse", func(p *Policy) *Action { return &p.Live }),
	action("over", "a copy of a sandbox that is over: resume, clone or refuse", func(p *Policy) *Action { return &p.Over }),
	action("unknown", "images that the pool never heard of: adopt or refuse", func(p *Policy) *Action { return &p.Unknown }),
	{
		Name: "unheard-witness",
		What: "a server does not hear what another one has seen of the store: new-generation or wait",
		get: func(p *Policy) string {
			if p.UnheardWitness == "" {
				return string(UnheardNewGeneration)
			}
			return string(p.UnheardWitness)
		},
		set: func(p *Policy, text string) error {
			if p.UnheardWitness = Unheard(text); text == "" { // which Validate takes in a record
				return invalid("policy unheard-witness", "it is empty")
			}
			return nil
		},
	},
	{
		Name: "host-quota",
		What: fmt.Sprintf("the most serials that a host is granted in 24 hours: %d or more, 0 for no limit", MinHostQuota),
		get: func(p *Policy) string {
			n, _ := p.Quota()
			return strconv.FormatUint(n, 10)
		},
		set: func(p *Policy, text string) error {
			n, err := strconv.ParseUint(text, 10, 64)
			if err != nil {
				return invalid("policy host-quota", fmt.Sprintf("%.40q is not a number of serials", text))
			}
			if p.HostQuota = n; n == 0 {
				p.HostQuota = NoHostQuota
			}
			return nil
		},
	},
}

func action(name, what string, of func(*Policy) *Action) PolicyField {
	return PolicyField{
		Name: name, What: what,
		get: func(p *Policy) string { return string(*of(p)) },
		set: func(p *Policy, text string) error { *of(p) = Action(text); return nil }, // Validate knows which there are
	}
}

// PolicyFields lists the fields of a policy in the order in which they are shown.
func PolicyFields() []PolicyField { return slices.Clone(policyFields) }

// With is p after the named fields were set to the values given. ErrInvalid for a name that is of no field, and for a
// value that its field does not take.
func (p Policy) With(fields map[string]string) (Policy, error) {
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		i := slices.IndexFunc(policyFields, func(f PolicyField) bool { return f.Name == name })
		if i < 0 {
			return p, invalid("policy", fmt.Sprintf("%.40q is no field of it; there are: %s", name, strings.Join(policyNames(), ", ")))
		}
		if err := policyFields[i].set(&p, fields[name]); err != nil {
			return p, err
		}
	}
	return p, p.Validate()
}

func policyNames() []string {
	var names []string
	for _, f := range policyFields {
		names = append(names, f.Name)
	}
	return names
}

// SetPolicyCommand sets fields of the pool's policy; what it does not name stays.
type SetPolicyCommand struct {
	RequestID string `json:"-"`
	// Fields are the values by the fields' names (PolicyField).
	Fields map[string]string `json:"fields"`
}

// SetPolicy sets fields of the pool's policy, and returns the pool and the policy that this call found. It is the
// last one that counts: the same request again sets the same values again, also where another one has changed
// them since. It works while the pool is recovering.
//
// Committed when it returns: the policy. What was decided by the one before stays as it is. Errors: ErrInvalid,
// ErrPoolMissing, ErrFormat, ErrRequestExpired, ErrConflict, ErrUnknownOutcome (ask again).
func (s *Service) SetPolicy(ctx context.Context, cmd SetPolicyCommand) (pool *Pool, before Policy, err error) {
	if err := s.checkRequest(cmd.RequestID); err != nil {
		return nil, before, err
	}
	if len(cmd.Fields) == 0 {
		return nil, before, invalid("policy", "no field of it is named; there are: "+strings.Join(policyNames(), ", "))
	}
	first := true
	err = settle(ctx, func() (bool, error) {
		entries, _, err := s.get(ctx, Key{Kind: KindPool})
		if err != nil {
			return false, err
		}
		found, err := openPool(entries[0])
		if err != nil && ReasonOf(err) != ReasonRecovering {
			return false, err
		}
		next := *found
		if next.Policy, err = found.Policy.With(cmd.Fields); err != nil {
			return true, err
		}
		if first {
			before, first = found.Policy, false
		}
		if pool = &next; next.Policy == found.Policy {
			return true, nil
		}
		_, err = s.store.Commit(ctx, Tx{Guards: []Guard{{Key: next.Key(), Token: entries[0].Token}}, Put: []Record{&next}})
		return false, err
	})
	if err != nil {
		return nil, Policy{}, err
	}
	return pool, before, nil
}
