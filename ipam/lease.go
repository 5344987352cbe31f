package ipam

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"patchbay/internal/wire"
)

// Request asks a Pool for an address.
type Request struct {
	Attachment string     // who asks; required
	MAC        wire.MAC   // its MAC, if known: the same MAC gets the address it had before
	Hostname   string     // what the holder is called; only kept
	Addr       netip.Addr // this address or none; zero: any
	// Prefer is the address to take when nobody has it and the attachment holds none: what a DHCP client asks for. Any other is as good.
	Prefer netip.Addr
	// TTL is how long the lease lives. Zero: until it is released.
	TTL time.Duration
}

// Lease gives the attachment an address. An attachment that holds one gets the same one again; a later TTL moves its end, an
// earlier one does not, and a lease without an end stays so. The error is one line that names the network, the reason and the remedy; errors.Is finds ErrExhausted, ErrTaken, ErrReserved, ErrNotInPool
// or ErrHolds in it.
func (p *Pool) Lease(ctx context.Context, q Request) (Record, error) {
	if q.Attachment == "" {
		return Record{}, fmt.Errorf("network %q: lease an address: no attachment named", p.c.Name)
	}
	var r Record
	what := "lease an address for " + q.Attachment
	if q.Addr.IsValid() {
		what = fmt.Sprintf("lease %s for %s", q.Addr, q.Attachment)
	}
	err := p.update(ctx, what, func() (err error) {
		r, err = p.lease(ctx, q)
		return err
	})
	if err != nil {
		return Record{}, err
	}
	return r, nil
}

func (p *Pool) lease(ctx context.Context, q Request) (Record, error) {
	now := p.c.Now()
	if err := p.reap(ctx, now); err != nil {
		return Record{}, err
	}
	if a, ok := p.byAtt[q.Attachment]; ok {
		r := p.recs[a]
		if q.Addr.IsValid() && q.Addr != a {
			return r, fmt.Errorf("%w, %s: release it first", ErrHolds, a)
		}
		r.MAC, r.Hostname = cmp.Or(q.MAC, r.MAC), cmp.Or(q.Hostname, r.Hostname)
		r.Static = r.Static || q.Addr.IsValid()
		if e := end(now, q.TTL); e.IsZero() || !r.Expires.IsZero() && e.After(r.Expires) {
			r.Expires = e
		}
		if r == p.recs[a] {
			return r, nil
		}
		return p.put(ctx, r)
	}
	a, err := p.choose(q, now)
	if err != nil {
		return Record{}, err
	}
	return p.put(ctx, Record{
		Addr: a, State: Leased, Attachment: q.Attachment, MAC: q.MAC, Hostname: q.Hostname, Since: now,
		Expires: end(now, q.TTL), Static: q.Addr.IsValid(), Version: p.recs[a].Version,
	})
}

func end(now time.Time, ttl time.Duration) time.Time {
	if ttl <= 0 {
		return time.Time{}
	}
	return now.Add(ttl)
}

// choose finds the address for q, in the order the package comment gives.
func (p *Pool) choose(q Request, now time.Time) (netip.Addr, error) {
	if q.Addr.IsValid() {
		return q.Addr, p.free(q.Addr)
	}
	if a, ok := p.hadBefore(q); ok {
		return a, nil
	}
	if q.Prefer.IsValid() && p.free(q.Prefer) == nil && p.rested(q.Prefer, now) {
		return q.Prefer, nil
	}
	if a, ok := p.sequence(now); ok {
		p.next = a.Next()
		return a, nil
	}
	if a, ok := p.longestResting(); ok {
		return a, nil
	}
	full := &ExhaustedError{Pool: p.c.Name, Prefix: p.c.Range}
	rs := make([]Record, 0, len(p.byAtt))
	for _, a := range p.byAtt {
		rs = append(rs, p.recs[a])
	}
	sortRecords(rs)
	for _, r := range rs {
		if !p.inRange(r.Addr) {
			continue
		}
		full.Holders = append(full.Holders, r.Attachment)
	}
	return netip.Addr{}, full
}

// free is nil when a can be leased to somebody who asks for it by number.
func (p *Pool) free(a netip.Addr) error {
	if !p.c.Prefix.Contains(a) {
		return fmt.Errorf("%w %s: choose one inside", ErrNotInPool, p.c.Prefix)
	}
	if why := p.reserved(a); why != "" {
		return fmt.Errorf("%w: %s: choose another", ErrReserved, why)
	}
	if r, ok := p.recs[a]; ok && r.State == Leased {
		return fmt.Errorf("%w, %s: choose another address or stop it", ErrTaken, r.Attachment)
	}
	return nil
}

// rested reports whether a has no record that keeps it back.
func (p *Pool) rested(a netip.Addr, now time.Time) bool {
	r, ok := p.recs[a]
	return !ok || r.State != Leased && now.Sub(r.Since) >= p.delay(&r)
}

func (p *Pool) delay(r *Record) time.Duration {
	if r.State == Declined {
		return p.c.DeclineDelay
	}
	return p.c.ReuseDelay
}

// hadBefore finds the address the asker gave back last. A declined one is not it: somebody else sits there.
func (p *Pool) hadBefore(q Request) (a netip.Addr, ok bool) {
	var best Record
	for _, r := range p.recs {
		if r.State != Released {
			continue
		}
		same := r.MAC == q.MAC && !q.MAC.IsZero()
		if q.MAC.IsZero() || r.MAC.IsZero() {
			same = r.Attachment == q.Attachment // of two known MACs, the MAC is the machine
		}
		if same && (!ok || r.Since.After(best.Since)) && p.inRange(r.Addr) && p.reserved(r.Addr) == "" {
			best, ok = r, true
		}
	}
	return best.Addr, ok
}

func (p *Pool) inRange(a netip.Addr) bool { return !a.Less(p.first) && !p.last.Less(a) }

// sequence finds the next address behind the one handed out last that nobody holds and that has rested. Every step passes a record or a
// reservation, so it ends after as many steps as there are of these, however large the subnet is.
func (p *Pool) sequence(now time.Time) (netip.Addr, bool) {
	a, wrapped := p.next, false
	start := a
	for {
		if !a.IsValid() || !p.inRange(a) {
			if wrapped {
				return netip.Addr{}, false
			}
			a, wrapped = p.first, true
			if p.last.Less(a) {
				return netip.Addr{}, false
			}
		}
		if wrapped && !a.Less(start) && p.inRange(start) {
			return netip.Addr{}, false
		}
		skip := false
		for _, r := range p.c.Reserved {
			if r.Contains(a) {
				a, skip = lastAddr(r), true // a whole reservation is one step
			}
		}
		if !skip && p.reserved(a) == "" && p.rested(a, now) {
			return a, true
		}
		a = a.Next()
	}
}

// longestResting finds the released address, or else the declined one, that came into that state first.
func (p *Pool) longestResting() (netip.Addr, bool) {
	var best Record
	for _, r := range p.recs {
		if r.State == Leased || !p.inRange(r.Addr) || p.reserved(r.Addr) != "" {
			continue
		}
		if !best.Addr.IsValid() || older(&r, &best) {
			best = r
		}
	}
	return best.Addr, best.Addr.IsValid()
}

// older orders resting records: released before declined, then by time, then by address.
func older(a, b *Record) bool {
	return cmp.Or(cmp.Compare(a.State, b.State), a.Since.Compare(b.Since), a.Addr.Compare(b.Addr)) < 0
}

// reap turns leases that are over into released ones.
func (p *Pool) reap(ctx context.Context, now time.Time) error {
	if p.expires.IsZero() || now.Before(p.expires) {
		return nil
	}
	p.expires = time.Time{}
	for _, a := range p.byAtt {
		r := p.recs[a]
		if r.Expires.IsZero() {
			continue
		}
		if r.ended(now) {
			if err := p.rest(ctx, r, Released, r.Expires); err != nil {
				p.expires = now // so that the rest is looked at again
				return err
			}
			continue
		}
		if p.expires.IsZero() || r.Expires.Before(p.expires) {
			p.expires = r.Expires
		}
	}
	return nil
}

// rest ends the lease r, and forgets the longest resting record when there are too many.
func (p *Pool) rest(ctx context.Context, r Record, s State, since time.Time) error {
	r.State, r.Since, r.Expires, r.Static = s, since, time.Time{}, false
	if _, err := p.put(ctx, r); err != nil {
		return err
	}
	for p.resting > p.c.MaxReleased {
		var best Record
		for _, o := range p.recs {
			if o.State != Leased && (!best.Addr.IsValid() || older(&o, &best)) {
				best = o
			}
		}
		// Losing the race for a record that is only to be forgotten is no reason to start again: r is at rest already.
		if err := p.c.Store.Delete(ctx, p.key, best); err != nil && !errors.Is(err, ErrConflict) {
			return err
		}
		p.forget(best.Addr)
	}
	return nil
}

// Release gives back what the attachment holds. An attachment that holds nothing is no error, so that a teardown may run twice.
func (p *Pool) Release(ctx context.Context, attachment string) error {
	return p.update(ctx, "release the address of "+attachment, func() error {
		a, ok := p.byAtt[attachment]
		if !ok {
			return nil
		}
		return p.rest(ctx, p.recs[a], Released, p.c.Now())
	})
}

// Decline ends the attachment's lease on a, because somebody else was seen using that address; it rests for DeclineDelay. When
// the attachment does not hold a, nothing happens and there is an error.
func (p *Pool) Decline(ctx context.Context, attachment string, a netip.Addr) error {
	return p.update(ctx, fmt.Sprintf("decline %s for %s", a, attachment), func() error {
		if held, ok := p.byAtt[attachment]; !ok || held != a {
			return errNotHeld
		}
		return p.rest(ctx, p.recs[a], Declined, p.c.Now())
	})
}

var errNotHeld = errors.New("the attachment does not hold the address")

// Reconcile releases every lease whose attachment live does not name, and returns the released ones in order of address. A node calls it after a crash
// with the attachments that are still there.
func (p *Pool) Reconcile(ctx context.Context, live func(attachment string) bool) (gone []Record, err error) {
	err = p.update(ctx, "release leases without an attachment", func() error {
		for att, a := range p.byAtt {
			if live(att) {
				continue
			}
			r := p.recs[a]
			if err := p.rest(ctx, r, Released, p.c.Now()); err != nil {
				return err
			}
			gone = append(gone, r)
		}
		return nil
	})
	sortRecords(gone)
	return gone, err
}
