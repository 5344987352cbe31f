package dns

import (
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// upstream is one of the host's resolvers.
type upstream struct {
	addr netip.AddrPort
	// misses counts how often in a row another one answered while this one had had its time; late is when that made it last in line.
	misses atomic.Int32
	late   atomic.Int64 // unix nanoseconds; 0: never
}

const (
	missesAllowed = 2                // in a row
	lateFor       = 30 * time.Second // a resolver that missed more is asked last for so long
)

func (u *upstream) answered() {
	u.misses.Store(0)
	u.late.Store(0)
}

func (u *upstream) missed(now time.Time) {
	if u.misses.Add(1) >= missesAllowed {
		u.late.Store(now.UnixNano())
	}
}

func (u *upstream) isLate(now time.Time) bool {
	l := u.late.Load()
	return l != 0 && now.Sub(time.Unix(0, l)) < lateFor
}

// upstreams follows the host's resolv.conf.
type upstreams struct {
	path  string
	every time.Duration
	log   *slog.Logger

	cur atomic.Pointer[[]*upstream]

	mu      sync.Mutex // who checks
	checked time.Time
	seen    fileID
}

// fileID tells one content of a file from another.
type fileID struct {
	dev, ino uint64
	size     int64
	mtime    time.Time
}

// newUpstreams reads the file, unless fixed says which resolvers to ask.
func newUpstreams(fixed []netip.AddrPort, path string, every time.Duration, log *slog.Logger) *upstreams {
	u := &upstreams{path: path, every: every, log: slog.New(slog.DiscardHandler)}
	if len(fixed) > 0 {
		u.path = ""
		list := make([]*upstream, len(fixed))
		for i, a := range fixed {
			if a.Port() == 0 {
				a = netip.AddrPortFrom(a.Addr(), 53)
			}
			list[i] = &upstream{addr: a}
		}
		u.cur.Store(&list)
		return u
	}
	u.store(nil)
	u.check()
	u.log = log // the first reading is no change
	return u
}

// store puts servers in force; none means the one libc falls back to.
func (u *upstreams) store(servers []netip.AddrPort) {
	if len(servers) == 0 {
		servers = []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 53)}
	}
	list := make([]*upstream, len(servers))
	for i, a := range servers {
		list[i] = &upstream{addr: a}
	}
	u.cur.Store(&list)
}

// get is the resolvers to ask, in this order. It may stat and read the file, which is why no frame-reading goroutine calls it.
func (u *upstreams) get() []*upstream {
	if u.path != "" && u.mu.TryLock() { // while another one looks, the list in force will do
		if now := time.Now(); now.Sub(u.checked) >= u.every {
			u.checked = now
			u.check()
		}
		u.mu.Unlock()
	}
	list := *u.cur.Load()
	if len(list) > 1 {
		now := time.Now()
		list = slices.Clone(list)
		slices.SortStableFunc(list, func(a, b *upstream) int { return boolInt(a.isLate(now)) - boolInt(b.isLate(now)) })
	}
	return list
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

// check reads the file if it changed.
func (u *upstreams) check() {
	st, err := os.Stat(u.path)
	if err != nil || st.Size() == 0 {
		return // it is being replaced or written; the next query looks again
	}
	id := fileID{size: st.Size(), mtime: st.ModTime()}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		id.dev, id.ino = uint64(sys.Dev), sys.Ino
	}
	if id == u.seen {
		return
	}
	h, err := ReadResolvConf(u.path)
	if err != nil {
		return
	}
	u.seen = id
	var before []netip.AddrPort
	for _, o := range *u.cur.Load() {
		before = append(before, o.addr)
	}
	u.store(h.Servers)
	var after []netip.AddrPort
	for _, n := range *u.cur.Load() {
		after = append(after, n.addr)
	}
	if !slices.Equal(before, after) {
		u.log.Info("resolvers changed", "file", u.path, "from", before, "to", after)
	}
}
