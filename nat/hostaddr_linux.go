package nat

import (
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// hostAddrsTTL is how old the list of the host's addresses may be. A new address of the host is taken for a foreign one no longer than this.
const hostAddrsTTL = 2 * time.Second

// hostAddrs answers "is this address on the host": without a lock and without a system call as long as the list is fresh, which is
// why it is a cache with an age and not a netlink subscription: no goroutine, nothing to resynchronise. Safe for concurrent use.
type hostAddrs struct {
	now  func() time.Time
	list func() ([]hostAddr, error) // reads the addresses of the process's network namespace; a field for tests
	mu   sync.Mutex                 // one refresh at a time
	cur  atomic.Pointer[hostAddrSet]
}

type hostAddr struct {
	addr     netip.Addr // never v4-mapped, no zone
	loopback bool       // on an interface with IFF_LOOPBACK
}

type hostAddrSet struct {
	read time.Time
	m    map[netip.Addr]bool // value: on a loopback interface
	v6   bool                // there is an IPv6 address on another interface
}

func newHostAddrs(now func() time.Time) *hostAddrs {
	return &hostAddrs{now: now, list: listHostAddrs}
}

// local reports whether a is an address of the host, loopback included. Safe on every path: at worst it reads the list once.
func (h *hostAddrs) local(a netip.Addr) bool {
	a = a.Unmap().WithZone("")
	if a.IsLoopback() || a.IsUnspecified() {
		return true
	}
	_, ok := h.set().m[a]
	return ok
}

// onLoopback reports whether the host has a on a loopback interface, or a is a loopback address by itself.
func (h *hostAddrs) onLoopback(a netip.Addr) bool {
	a = a.Unmap()
	return a.IsLoopback() || h.set().m[a]
}

// has6 reports whether the host has an IPv6 address to go anywhere from.
func (h *hostAddrs) has6() bool { return h.set().v6 }

func (h *hostAddrs) set() *hostAddrSet {
	s := h.cur.Load()
	now := h.now()
	if s != nil && now.Sub(s.read) < hostAddrsTTL {
		return s
	}
	if s == nil {
		h.mu.Lock()
	} else if !h.mu.TryLock() {
		return s // somebody refreshes; a list a little older serves
	}
	defer h.mu.Unlock()
	if c := h.cur.Load(); c != nil && c != s {
		return c
	}
	as, err := h.list()
	next := &hostAddrSet{read: now, m: make(map[netip.Addr]bool, len(as))}
	if err != nil && s != nil {
		next.m = s.m // keep what was known rather than take the host's addresses for foreign ones
	}
	for _, a := range as {
		next.m[a.addr] = next.m[a.addr] || a.loopback
	}
	for a, loopback := range next.m {
		next.v6 = next.v6 || a.Is6() && !loopback
	}
	h.cur.Store(next)
	return next
}

func listHostAddrs() ([]hostAddr, error) {
	ifs, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	var out []hostAddr
	for _, i := range ifs {
		as, err := i.Addrs()
		if err != nil {
			continue // the interface went away meanwhile
		}
		for _, a := range as {
			n, ok := a.(*net.IPNet)
			if !ok {
				continue
			}
			if ip, ok := netip.AddrFromSlice(n.IP); ok {
				out = append(out, hostAddr{addr: ip.Unmap(), loopback: i.Flags&net.FlagLoopback != 0})
			}
		}
	}
	return out, nil
}
