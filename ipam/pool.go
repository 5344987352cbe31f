package ipam

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// Defaults of PoolConfig.
const (
	DefaultReuseDelay   = 5 * time.Minute
	DefaultDeclineDelay = 10 * time.Minute
	DefaultMaxReleased  = 4096
)

// PoolConfig says what a Pool hands out. Name and Prefix are required.
type PoolConfig struct {
	Name   string       // the network's; the Store keeps the pool under Name and Prefix, and errors show it
	Prefix netip.Prefix // what ParseSubnet takes

	Gateway   netip.Addr     // zero: DefaultGateway(Prefix)
	HostAlias netip.Addr     // zero: DefaultHostAlias(Prefix), which may be none
	Range     netip.Prefix   // where addresses nobody asked for by number come from; zero: all of Prefix
	Reserved  []netip.Prefix // never handed out

	ReuseDelay   time.Duration // how long a released address rests while there is another; zero: DefaultReuseDelay; negative: not at all
	DeclineDelay time.Duration // how long a declined one rests; zero: DefaultDeclineDelay
	MaxReleased  int           // records of released addresses kept; zero: DefaultMaxReleased

	Store Store            // zero: a MemStore of its own
	Now   func() time.Time // zero: time.Now
}

// Pool hands out the addresses of one subnet. It is safe for concurrent use.
type Pool struct {
	c           PoolConfig
	key         string // what the store knows the pool by
	first, last netip.Addr

	mu      sync.Mutex // held across calls of the Store, so that two requests cannot choose the same address
	recs    map[netip.Addr]Record
	byAtt   map[string]netip.Addr // leased records only
	next    netip.Addr            // where the sequence goes on
	expires time.Time             // no lease with a TTL ends before
	resting int                   // how many records are not leased
}

// NewPool makes a pool and reads its records from the Store. The error is one line that names the network and the remedy.
func NewPool(ctx context.Context, c PoolConfig) (*Pool, error) {
	fail := func(err error) (*Pool, error) {
		return nil, fmt.Errorf("network %q: subnet %s: %w", c.Name, c.Prefix, err)
	}
	if err := checkSubnet(c.Prefix); err != nil {
		return fail(err)
	}
	if !c.Gateway.IsValid() {
		c.Gateway = DefaultGateway(c.Prefix)
	}
	if !c.Prefix.Contains(c.Gateway) || edge(c.Prefix, c.Gateway) != "" {
		return fail(fmt.Errorf("the gateway %s is no host address in it: choose one that is", c.Gateway))
	}
	if !c.HostAlias.IsValid() {
		if c.HostAlias = DefaultHostAlias(c.Prefix); c.HostAlias == c.Gateway {
			c.HostAlias = netip.Addr{}
		}
	} else if !c.Prefix.Contains(c.HostAlias) || edge(c.Prefix, c.HostAlias) != "" || c.HostAlias == c.Gateway {
		return fail(fmt.Errorf("the host alias %s is no free host address in it: choose one that is", c.HostAlias))
	}
	if !c.Range.IsValid() {
		c.Range = c.Prefix
	}
	c.Range = c.Range.Masked()
	if c.Range.Bits() < c.Prefix.Bits() || !c.Prefix.Contains(c.Range.Addr()) {
		return fail(fmt.Errorf("the range %s is not inside it: choose one that is", c.Range))
	}
	c.Reserved = slices.Clone(c.Reserved)
	for i, r := range c.Reserved {
		if !r.IsValid() || !r.Overlaps(c.Prefix) {
			return fail(fmt.Errorf("the reservation %s is not inside it: leave it away", r))
		}
		c.Reserved[i] = r.Masked()
	}
	c.ReuseDelay = cmp.Or(c.ReuseDelay, DefaultReuseDelay)
	c.DeclineDelay = cmp.Or(c.DeclineDelay, DefaultDeclineDelay)
	c.MaxReleased = cmp.Or(c.MaxReleased, DefaultMaxReleased)
	if c.Store == nil {
		c.Store = new(MemStore)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	p := &Pool{c: c, key: Key(c.Name, c.Prefix)}
	p.first, p.last = hosts(c.Prefix)
	if c.Range != c.Prefix {
		// The ends of a range inside the subnet are ordinary addresses.
		p.first, p.last = maxAddr(p.first, c.Range.Addr()), minAddr(p.last, lastAddr(c.Range))
	}
	p.next = p.first
	if err := p.load(ctx); err != nil {
		return nil, fmt.Errorf("network %q: read the leases of %s: %w", c.Name, c.Prefix, err)
	}
	return p, nil
}

func maxAddr(a, b netip.Addr) netip.Addr {
	if a.Less(b) {
		return b
	}
	return a
}

func minAddr(a, b netip.Addr) netip.Addr {
	if b.Less(a) {
		return b
	}
	return a
}

// Name is the network's name; Prefix, Gateway and HostAlias (zero if there is none) are its addresses.
func (p *Pool) Name() string { return p.c.Name }

// Prefix is the subnet.
func (p *Pool) Prefix() netip.Prefix { return p.c.Prefix }

// Gateway is the gateway's address.
func (p *Pool) Gateway() netip.Addr { return p.c.Gateway }

// HostAlias is the address that means the host, or the zero Addr.
func (p *Pool) HostAlias() netip.Addr { return p.c.HostAlias }

// load replaces the copy by what the store has. The caller holds mu, or is alone.
func (p *Pool) load(ctx context.Context) error {
	rs, err := p.c.Store.List(ctx, p.key)
	if err != nil {
		return err
	}
	p.recs, p.byAtt = make(map[netip.Addr]Record, len(rs)), make(map[string]netip.Addr, len(rs))
	p.resting, p.expires = 0, time.Time{}
	for _, r := range rs {
		p.remember(r)
	}
	return nil
}

// remember brings the copy up to date with r.
func (p *Pool) remember(r Record) {
	p.forget(r.Addr)
	p.recs[r.Addr] = r
	if r.State != Leased {
		p.resting++
		return
	}
	p.byAtt[r.Attachment] = r.Addr
	if !r.Expires.IsZero() && (p.expires.IsZero() || r.Expires.Before(p.expires)) {
		p.expires = r.Expires
	}
}

// forget takes a out of the copy.
func (p *Pool) forget(a netip.Addr) {
	old, ok := p.recs[a]
	if !ok {
		return
	}
	delete(p.recs, a)
	if old.State != Leased {
		p.resting--
	} else if p.byAtt[old.Attachment] == a {
		delete(p.byAtt, old.Attachment)
	}
}

// put writes r to the store and to the copy.
func (p *Pool) put(ctx context.Context, r Record) (Record, error) {
	v, err := p.c.Store.Put(ctx, p.key, r)
	if err != nil {
		return r, err
	}
	r.Version = v
	p.remember(r)
	return r, nil
}

// conflicts is how often an operation starts again after another node changed a record first.
const conflicts = 16

// update runs f under the lock, again on fresh records as long as another node got in between. what is for the error.
func (p *Pool) update(ctx context.Context, what string, f func() error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var err error
	looked := false
	for range conflicts {
		err = f()
		switch {
		case errors.Is(err, ErrConflict):
		case !looked && (errors.Is(err, ErrExhausted) || errors.Is(err, ErrTaken)):
			looked = true // another node may have released one meanwhile
		default:
			return p.wrap(what, err)
		}
		if lerr := p.load(ctx); lerr != nil {
			return p.wrap(what, lerr)
		}
	}
	return p.wrap(what, err)
}

func (p *Pool) wrap(what string, err error) error {
	var full *ExhaustedError
	if err == nil || errors.As(err, &full) {
		return err
	}
	return fmt.Errorf("network %q: %s: %w", p.c.Name, what, err)
}

// sortRecords puts rs in order of address.
func sortRecords(rs []Record) {
	slices.SortFunc(rs, func(a, b Record) int { return a.Addr.Compare(b.Addr) })
}

// Leases is a copy of all records that are leased now, in order of address. Where nodes share a Store, it is as of this pool's last
// reading of it; so are Holder and Of.
func (p *Pool) Leases() []Record {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.c.Now()
	rs := make([]Record, 0, len(p.byAtt))
	for _, a := range p.byAtt {
		if r := p.recs[a]; !r.ended(now) {
			rs = append(rs, r)
		}
	}
	sortRecords(rs)
	return rs
}

// Holder is the lease on a, if somebody holds it now.
func (p *Pool) Holder(a netip.Addr) (Record, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	r, ok := p.recs[a]
	return r, ok && r.State == Leased && !r.ended(p.c.Now())
}

// Of is the lease that attachment holds now, if it does.
func (p *Pool) Of(attachment string) (Record, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	a, ok := p.byAtt[attachment]
	return p.recs[a], ok && !p.recs[a].ended(p.c.Now())
}

// ended reports whether r is a lease with a TTL that is over.
func (r Record) ended(now time.Time) bool {
	return r.State == Leased && !r.Expires.IsZero() && !now.Before(r.Expires)
}

// reserved says why a, which is in the subnet, is for no container, or "".
func (p *Pool) reserved(a netip.Addr) string {
	switch why := edge(p.c.Prefix, a); {
	case why != "":
		return why
	case a == p.c.Gateway:
		return "it is the gateway's"
	case a == p.c.HostAlias:
		return "it is the host's alias"
	}
	for _, r := range p.c.Reserved {
		if r.Contains(a) {
			return fmt.Sprintf("it is reserved (%s)", r)
		}
	}
	return ""
}

// Key is what a Store knows the pool of a network's subnet by.
func Key(network string, subnet netip.Prefix) string { return network + "/" + subnet.String() }
