package dhcp

import (
	"cmp"
	"context"
	"errors"
	"net/netip"
	"strings"
	"time"

	"patchbay/internal/wire"
	"patchbay/ipam"
)

// Lease is what a client is given.
type Lease struct {
	Addr     netip.Addr
	Hostname string // what the client is to be called; "" if nobody minds
}

// Leaser knows which address belongs to which MAC. Its calls may block and then heed ctx; they come one at a time.
type Leaser interface {
	// Lease gives the MAC an address for d at least: always the same one while it holds it, else want (which may be zero) if that is
	// free, else any. hostname is what the client calls itself, or "".
	Lease(ctx context.Context, mac wire.MAC, want netip.Addr, hostname string, d time.Duration) (Lease, error)
	// Release gives back the address that the MAC holds; when it does not hold a, nothing happens.
	Release(ctx context.Context, mac wire.MAC, a netip.Addr) error
	// Decline does the same because somebody else uses a.
	Decline(ctx context.Context, mac wire.MAC, a netip.Addr) error
}

// PoolLeaser is a Leaser on an IPv4 pool. A MAC of an attachment gets the attachment's address, which is not given back by DHCP, as it lives as long as
// the attachment. Any other MAC (a guest behind a container's bridge) gets a lease of its own, under the attachment id "dhcp:MAC".
type PoolLeaser struct {
	Pool *ipam.Pool
	// Attachment is the id of the attachment with that MAC, or "". Nil: there are none.
	Attachment func(mac wire.MAC) string
	// MaxGuests is how many MACs that are no attachment's may hold an address. Zero: 256.
	MaxGuests int
}

const (
	guestPrefix      = "dhcp:"
	defaultMaxGuests = 256
)

var errTooManyGuests = errors.New("too many machines that are not attached hold a lease: give their leases back, or attach them")

// owner is the id a MAC's lease is under, and whether that is an attachment's.
func (l *PoolLeaser) owner(mac wire.MAC) (id string, attached bool) {
	if l.Attachment != nil {
		if id := l.Attachment(mac); id != "" {
			return id, true
		}
	}
	return guestPrefix + mac.String(), false
}

// Lease implements Leaser.
func (l *PoolLeaser) Lease(ctx context.Context, mac wire.MAC, want netip.Addr, hostname string, d time.Duration) (Lease, error) {
	id, attached := l.owner(mac)
	q := ipam.Request{Attachment: id, MAC: mac, Prefer: want}
	if !attached {
		q.TTL, q.Hostname = d, hostname
		if _, ok := l.Pool.Of(id); !ok && l.guests() >= cmp.Or(l.MaxGuests, defaultMaxGuests) {
			return Lease{}, errTooManyGuests
		}
	}
	r, err := l.Pool.Lease(ctx, q)
	lease := Lease{Addr: r.Addr}
	if attached {
		lease.Hostname = r.Hostname
	}
	return lease, err
}

func (l *PoolLeaser) guests() int {
	n := 0
	for _, r := range l.Pool.Leases() {
		if strings.HasPrefix(r.Attachment, guestPrefix) {
			n++
		}
	}
	return n
}

// Release implements Leaser.
func (l *PoolLeaser) Release(ctx context.Context, mac wire.MAC, a netip.Addr) error {
	id, attached := l.owner(mac)
	if r, ok := l.Pool.Of(id); !ok || attached || r.Addr != a {
		return nil
	}
	return l.Pool.Release(ctx, id)
}

// Decline implements Leaser.
func (l *PoolLeaser) Decline(ctx context.Context, mac wire.MAC, a netip.Addr) error {
	id, attached := l.owner(mac)
	if r, ok := l.Pool.Of(id); !ok || attached || r.Addr != a {
		return nil
	}
	return l.Pool.Decline(ctx, id, a)
}
