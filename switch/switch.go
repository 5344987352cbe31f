package vswitch

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// Errors of the control plane, wrapped with the name of what they are about.
var (
	// ErrNoPort: there is no port with that ID.
	ErrNoPort = errors.New("no such port")
	// ErrTaken: another port has that name or that MAC.
	ErrTaken = errors.New("taken by another port")
	// ErrFull: a limit of Config is reached.
	ErrFull = errors.New("the switch is full")
)

// Config is how a switch is made. The zero value is one with the defaults.
type Config struct {
	// Ageing is how long a source is remembered after it was last heard. 0 means 300 s.
	Ageing time.Duration
	// MaxMACs bounds the FDB, static entries included. 0 means 65,536; 16 bytes and a table at most half full make that at most 4 MB.
	MaxMACs int
	// MaxPorts bounds the ports. 0 means 4,096; more than 32,768 is not possible.
	MaxPorts int
	// Now is the clock. nil means time.Now. It is read once a batch.
	Now func() time.Time
	// Log takes ports that come and go, at debug level. nil means slog.Default().
	Log *slog.Logger
}

// Switch is one broadcast domain. Make one with New; it needs no closing.
type Switch struct {
	cfg   Config
	start time.Time
	ports atomic.Pointer[portSet]
	fdb   fdb

	observers atomic.Pointer[[]*observer] // nil: none

	mu        sync.Mutex // of the control plane; never taken by Forward
	byID      map[PortID]*port
	ingresses map[PortID][]*Ingress
	lastID    PortID
	free      []int32 // indexes to use again

	// What removed ports had counted, and frames that came after their port was gone.
	gone struct {
		rx rxCounters
		tx txCounters
	}
}

// New makes a switch without ports.
func New(cfg Config) *Switch {
	if cfg.Ageing <= 0 {
		cfg.Ageing = 300 * time.Second
	}
	if cfg.MaxMACs <= 0 {
		cfg.MaxMACs = 1 << 16
	}
	if cfg.MaxPorts <= 0 {
		cfg.MaxPorts = 4096
	}
	cfg.MaxPorts = min(cfg.MaxPorts, maxIdx+1)
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	s := &Switch{cfg: cfg, byID: map[PortID]*port{}, ingresses: map[PortID][]*Ingress{}}
	if cfg.Now == nil {
		s.start = time.Now()
	} else {
		s.start = cfg.Now()
	}
	s.ports.Store(&portSet{})
	s.fdb.seed = rand.Uint64()
	s.fdb.max = cfg.MaxMACs
	s.fdb.ageing = int64(cfg.Ageing)
	s.fdb.refresh = int64(cfg.Ageing / 10)
	s.fdb.tab.Store(newFDBTable(fdbMinSlots))
	return s
}

// now is nanoseconds since the switch was made.
func (s *Switch) now() int64 {
	if s.cfg.Now == nil {
		return int64(time.Since(s.start)) // one reading of the monotonic clock
	}
	return int64(s.cfg.Now().Sub(s.start))
}

// AddPort plugs p in. It may be given frames before AddPort returns. The errors wrap ErrTaken and ErrFull.
func (s *Switch) AddPort(p Port, cfg PortConfig) (PortID, error) {
	if p == nil {
		return 0, fmt.Errorf("add port %q: it is nil", cfg.Name)
	}
	cfg.Addrs = slices.Clone(cfg.Addrs)
	if err := cfg.validate(); err != nil {
		return 0, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	set := s.ports.Load()
	if len(s.byID) >= s.cfg.MaxPorts {
		return 0, fmt.Errorf("add port %q: %w: it has %d ports; raise Config.MaxPorts", cfg.Name, ErrFull, len(s.byID))
	}
	id := s.lastID + 1
	if cfg.Name == "" {
		cfg.Name = fmt.Sprintf("port%d", id)
	}
	for _, q := range s.byID {
		if q.cfg.Name == cfg.Name {
			return 0, fmt.Errorf("add port %q: the name is %w (id %d); choose another", cfg.Name, ErrTaken, q.id)
		}
	}
	q := &port{id: id, dev: p, cfg: cfg}
	q.bind.Store(newBinding(cfg.MAC, cfg.Addrs))
	q.storm.limit(float64(cfg.StormLimit), float64(cfg.StormLimit))
	q.rate.limit(float64(cfg.RateLimit), max(float64(cfg.RateLimit)/10, 2*wire.MaxFrame))
	if n := len(s.free); n > 0 {
		q.idx = s.free[n-1]
	} else {
		q.idx = int32(len(set.byIdx))
	}
	if !cfg.MAC.IsZero() {
		if err := s.setStatic(q, set, cfg.MAC); err != nil {
			return 0, fmt.Errorf("add port %q: %w", cfg.Name, err)
		}
	}
	if n := len(s.free); n > 0 {
		s.free = s.free[:n-1]
	}
	s.lastID = id
	s.byID[id] = q
	s.ports.Store(set.with(q.idx, q))
	s.cfg.Log.Debug("port added", "port", cfg.Name, "id", id)
	return id, nil
}

// RemovePort unplugs a port and forgets its FDB entries. It returns when the last Transmit on it has returned and none will follow; it waits for
// every Forward under way, so it must not be called from inside one. Forward on its Ingresses then drops. Removing a port twice is an error
// that wraps ErrNoPort.
func (s *Switch) RemovePort(id PortID) error {
	s.mu.Lock()
	p := s.byID[id]
	if p == nil {
		s.mu.Unlock()
		return fmt.Errorf("remove port %d: %w", id, ErrNoPort)
	}
	delete(s.byID, id)
	s.ports.Store(s.ports.Load().with(p.idx, nil))
	var all []*Ingress
	for _, l := range s.ingresses {
		all = append(all, l...)
	}
	s.mu.Unlock()

	// An Ingress makes busy odd before it loads the snapshot. One that is even now, or moves on, has loaded ours. Those of p stay in the
	// list until they have left too: a port that is removed meanwhile waits for them as well.
	for _, in := range all {
		in.wait()
	}

	// Only now does nobody learn on the index any more.
	s.fdb.flush(p.idx, 0, true)
	s.mu.Lock()
	delete(s.ingresses, id)
	s.free = append(s.free, p.idx)
	s.gone.rx.add(&p.rx)
	s.gone.tx.add(&p.tx)
	s.mu.Unlock()
	s.cfg.Log.Debug("port removed", "port", p.cfg.Name, "id", id)
	return nil
}

// wait returns when the Forward that is running, if any, is over.
func (in *Ingress) wait() {
	for n, was := 0, in.busy.Load(); was&1 == 1 && in.busy.Load() == was; n++ {
		if n < 100 {
			runtime.Gosched()
		} else {
			time.Sleep(50 * time.Microsecond)
		}
	}
}

// Ingress makes an entry for one receiving goroutine of a port. It lives as long as the port; Close gives it up earlier. For a port that
// does not exist, it drops everything.
func (s *Switch) Ingress(id PortID) *Ingress {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.byID[id]
	if p == nil {
		return &Ingress{s: s, p: &port{id: id, idx: maxIdx}}
	}
	in := &Ingress{s: s, p: p}
	in.prepare(s.ports.Load())
	s.ingresses[id] = append(s.ingresses[id], in)
	return in
}

// Close gives the Ingress up, when a Forward under way is over; it must not be called from inside one, and Forward must not be called
// afterwards. A port's remaining ones go with the port.
func (in *Ingress) Close() {
	in.wait()
	s := in.s
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.ingresses[in.p.id]
	if i := slices.Index(l, in); i >= 0 {
		s.ingresses[in.p.id] = slices.Delete(l, i, i+1)
	}
}

// Bind changes what addresses a port may claim; see PortConfig.Addrs. Frames under way are judged by the old or the new ones.
func (s *Switch) Bind(id PortID, addrs []netip.Addr) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.byID[id]
	if p == nil {
		return fmt.Errorf("bind port %d: %w", id, ErrNoPort)
	}
	cfg := p.cfg
	cfg.Addrs = slices.Clone(addrs)
	if err := cfg.validate(); err != nil {
		return err
	}
	p.bind.Store(newBinding(cfg.MAC, cfg.Addrs))
	return nil
}

// AddStatic says that mac lives behind a port, for good: it is neither aged nor learned elsewhere, and frames that come from it on another port
// are dropped as spoofed.
func (s *Switch) AddStatic(id PortID, mac wire.MAC) error {
	if mac.IsGroup() || mac.IsZero() {
		return fmt.Errorf("static entry %s: not the address of one station", mac)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.byID[id]
	if p == nil {
		return fmt.Errorf("static entry %s on port %d: %w", mac, id, ErrNoPort)
	}
	return s.setStatic(p, s.ports.Load(), mac)
}

func (s *Switch) setStatic(p *port, set *portSet, mac wire.MAC) error {
	owner, ok := s.fdb.setStatic(macBits(mac[:]), p.idx, s.now())
	switch {
	case ok:
		return nil
	case owner < 0:
		return fmt.Errorf("static entry %s: %w: it has %d FDB entries; raise Config.MaxMACs", mac, ErrFull, s.cfg.MaxMACs)
	}
	name := "being removed"
	if int(owner) < len(set.byIdx) && set.byIdx[owner] != nil {
		name = set.byIdx[owner].cfg.Name
	}
	return fmt.Errorf("static entry %s: %w (%s); give each port a MAC of its own", mac, ErrTaken, name)
}

// RemoveStatic takes back AddStatic. It reports whether there was such an entry.
func (s *Switch) RemoveStatic(id PortID, mac wire.MAC) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.byID[id]
	return p != nil && !mac.IsZero() && mac != p.cfg.MAC && s.fdb.flush(p.idx, macBits(mac[:]), true) > 0
}

// Flush forgets the sources learned on a port and returns how many there were. Static entries stay.
func (s *Switch) Flush(id PortID) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.byID[id]; p != nil {
		return s.fdb.flush(p.idx, 0, false)
	}
	return 0
}

// countLate counts frames that came from a port after it was removed.
func (s *Switch) countLate(fs []frame.Frame) {
	bytes := 0
	for i := range fs {
		bytes += len(fs[i].Data)
	}
	s.gone.rx.frames.Add(uint64(len(fs)))
	s.gone.rx.bytes.Add(uint64(bytes))
	s.gone.rx.drops.Add(frame.DropPortDown, len(fs))
}

func (s *Switch) sorted() []*port {
	ps := slices.Clone(s.ports.Load().all)
	slices.SortFunc(ps, func(a, b *port) int { return cmp.Compare(a.id, b.id) })
	return ps
}
