package secure

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"patchbay/frame"
)

// LinkConfig says who is at the other end of a Link.
type LinkConfig struct {
	Identity *Identity // who this node is; required
	Network  string    // the network's name, the same on both nodes, 1 to 63 bytes; required
	VNI      uint32    // the network's VNI, 1 to 1<<24-1; required

	// Host is what the peer was named by: a DNS name or an IP address. The peer's certificate must have it as a SAN. With a pre-shared key it serves messages only. Required.
	Host string

	// Send sends one handshake datagram, header included and at most MaxHandshake bytes, to the peer. It is lent, and called from several goroutines, never from Deliver or Open. It should not
	// block for long. An error is like loss. Required.
	Send func(datagram []byte) error

	// OnSession hears of each session's beginning and end, so that whoever receives can find the Link by a session's id: it is called with up before anything can arrive under the
	// id, and without when nothing opens any more. It must not block nor call the Link; calls are one at a time. Ids of different links are the same once in 2^32: keep the first and have the
	// other Rekey. nil: nobody does.
	OnSession func(id uint32, up bool)

	Now        func() time.Time // for the validity of certificates; nil: time.Now
	RekeyAfter time.Duration    // a session's age at which a new one is made; 0: 10 minutes; at least 1 s
	RekeyBytes uint64           // sealed or opened under a session; 0: 64 GiB
	Log        *slog.Logger     // state changes; nil: none
}

const (
	maxSessions  = 8
	maxInbox     = 64 // datagrams
	graceSeconds = 30 // without anything heard, after which a session that was superseded ends
)

// Link is this node's half of the sealed path to one peer of one network. It is safe for concurrent use.
type Link struct {
	cfg   LinkConfig
	alpn  string // what both sides must speak of: the network and its VNI
	label string // of the export
	log   *slog.Logger
	psk   []byte // of the network; nil: certificates

	inbox   chan []byte   // handshake datagrams
	kick    chan struct{} // Run is to look again
	wanted  atomic.Bool   // another session is asked for
	running atomic.Bool

	current  atomic.Pointer[Session]    // sealed under
	sessions atomic.Pointer[[]*Session] // that open; copied on write

	ignored, unauthentic, replayed atomic.Uint64

	mu    sync.Mutex // sessions' beginning and end, and what follows
	stats LinkStats
	shut  bool // Close was called
}

// NewLink makes a link. It starts nothing; Run does. The error names what is wrong with cfg, such as a certificate of one's own that is not for the network.
func NewLink(cfg LinkConfig) (*Link, error) {
	switch {
	case cfg.Identity == nil:
		return nil, errors.New("sealed link: no identity; start the daemon with --identity or --psk-file")
	case cfg.Network == "" || len(cfg.Network) > 63 || strings.ContainsAny(cfg.Network, "/*? "):
		return nil, fmt.Errorf("sealed link: %.70q cannot name a network", cfg.Network)
	case cfg.VNI == 0 || cfg.VNI > maxVNI:
		return nil, fmt.Errorf("sealed link: VNI %d is out of range; take one from 1 to %d", cfg.VNI, maxVNI)
	case cfg.Host == "":
		return nil, errors.New("sealed link: no host is named")
	case cfg.Send == nil:
		return nil, errors.New("sealed link: no way to send")
	case cfg.RekeyAfter != 0 && cfg.RekeyAfter < time.Second:
		return nil, fmt.Errorf("sealed link: new keys every %v is too often; take 1s or more", cfg.RekeyAfter)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.RekeyAfter == 0 {
		cfg.RekeyAfter = 10 * time.Minute
	}
	if cfg.RekeyBytes == 0 {
		cfg.RekeyBytes = 64 << 30
	}
	if cfg.OnSession == nil {
		cfg.OnSession = func(uint32, bool) {}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if err := cfg.Identity.Check(cfg.Network, cfg.Now()); err != nil {
		return nil, err
	}
	if a, err := netip.ParseAddr(cfg.Host); err == nil {
		cfg.Host = a.Unmap().WithZone("").String()
	}
	l := &Link{
		cfg: cfg, log: cfg.Log.With("network", cfg.Network, "peer", cfg.Host),
		alpn:  fmt.Sprintf("patchbay-seal/1 %d %s", cfg.VNI, cfg.Network),
		label: fmt.Sprintf("EXPERIMENTAL patchbay seal 1 vni %06x network %s", cfg.VNI, cfg.Network),
		inbox: make(chan []byte, maxInbox), kick: make(chan struct{}, 1),
	}
	l.sessions.Store(new([]*Session))
	l.stats.Since = time.Now()
	if cfg.Identity.psk != nil {
		var err error
		if l.psk, err = cfg.Identity.networkKey(cfg.Network); err != nil {
			return nil, fmt.Errorf("sealed link: key of network %s: %w", cfg.Network, err)
		}
	}
	return l, nil
}

// Deliver hands over a handshake datagram from the peer's address, header included. It is lent and copied. Deliver never blocks; a datagram that is malformed, or one too many, is
// dropped and counted in LinkStats.Ignored.
func (l *Link) Deliver(datagram []byte) {
	if h, _, ok := parseHeader(datagram); !ok || h.vni != l.cfg.VNI || len(l.inbox) == cap(l.inbox) {
		l.ignored.Add(1)
		return
	}
	select {
	case l.inbox <- append([]byte(nil), datagram...):
	default:
		l.ignored.Add(1)
	}
}

// Replayed counts n messages that the caller has dropped, because they came before, without opening them.
func (l *Link) Replayed(n uint64) { l.replayed.Add(n) }

// Session is the session to seal under now, or nil when there is none: then the frame is dropped as frame.DropNoSession. It may change at any time; take it once a message.
func (l *Link) Session() *Session { return l.current.Load() }

// Open opens a message in place: plaintext begins where ciphertext does and is Overhead shorter, and ciphertext's bytes are gone whatever comes of it. id, seq and aad are as the sender wrote
// them. If not ok, drop says why: DropNoSession, DropUnauthentic, DropReplayed. It allocates nothing.
func (l *Link) Open(id uint32, seq uint64, aad, ciphertext []byte) (plaintext []byte, drop frame.Drop, ok bool) {
	for _, s := range *l.sessions.Load() {
		if s.id != id {
			continue
		}
		if plaintext, drop, ok = s.open(seq, aad, ciphertext); ok {
			if !s.confirmed.Load() && !s.first.Swap(true) {
				l.wake() // Run confirms it: OnSession may be under way, and its lock is not for here
			}
			return plaintext, 0, true
		}
		switch drop {
		case frame.DropUnauthentic:
			l.unauthentic.Add(1)
		case frame.DropReplayed:
			l.replayed.Add(1)
		}
		return nil, drop, false
	}
	return nil, frame.DropNoSession, false
}

// Rekey asks for a new session. It does not wait for it.
func (l *Link) Rekey() {
	l.wanted.Store(true)
	l.wake()
}

// wake has Run look again.
func (l *Link) wake() {
	select {
	case l.kick <- struct{}{}:
	default:
	}
}

// add takes a session in, so that it opens. It is refused when its id is that of another, which happens once in 2^32.
func (l *Link) add(s *Session) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.shut {
		return errors.New("the link is closed")
	}
	have := *l.sessions.Load()
	for _, o := range have {
		if o.id == s.id {
			return fmt.Errorf("session id %08x is in use", s.id)
		}
	}
	if len(have) >= maxSessions {
		for _, o := range have {
			if o != l.current.Load() {
				l.drop(o)
				break
			}
		}
		have = *l.sessions.Load()
	}
	l.cfg.OnSession(s.id, true)
	list := append(append(make([]*Session, 0, len(have)+1), have...), s)
	l.sessions.Store(&list)
	return nil
}

// confirm says that both sides have the session's keys, so that it may be sealed under.
func (l *Link) confirm(s *Session) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if s.isOver.Load() || s.confirmed.Swap(true) {
		return
	}
	close(s.sure)
	c := l.current.Load()
	if c == nil || glare(c, s) && s.id > c.id || !glare(c, s) && s.started.After(c.started) {
		l.choose(s)
	}
}

// glare reports whether the two sessions come of handshakes that crossed: each began before the other had ended, so that neither is the newer. Of those that did not, the later one counts, however soon it
// came: its initiator may have lost the other.
func glare(a, b *Session) bool {
	return a.initiator != b.initiator && a.began.Before(b.started) && b.began.Before(a.started)
}

// choose makes s the session that is sealed under. l.mu is held.
func (l *Link) choose(s *Session) {
	s.quiet = 0
	if old := l.current.Swap(s); old != nil {
		old.quiet = 0
	}
	if s.isOver.Load() {
		return
	}
	if !l.stats.Sealed {
		l.stats.Sealed, l.stats.Since = true, time.Now()
		l.log.Info("tunnel sealed", "session", fmt.Sprintf("%08x", s.id), "initiator", s.initiator)
	}
}

// drop ends a session, and chooses another if it was the current one. l.mu is held.
func (l *Link) drop(s *Session) {
	s.end()
	have := *l.sessions.Load()
	list := make([]*Session, 0, len(have))
	var next *Session
	for _, o := range have {
		if o == s {
			continue
		}
		list = append(list, o)
		if o.confirmed.Load() {
			next = o // the newest is last
		}
	}
	if len(list) == len(have) {
		return
	}
	l.sessions.Store(&list)
	if l.current.Load() == s {
		l.current.Store(next)
		if next == nil && l.stats.Sealed {
			l.stats.Sealed, l.stats.Since = false, time.Now()
			l.log.Warn("tunnel has no keys: frames are dropped until there are", "last-error", l.stats.LastError)
		}
	}
	l.cfg.OnSession(s.id, false)
	l.wake()
}

// LinkStats is what a Link knows of itself.
type LinkStats struct {
	Sealed     bool      // there is a session to seal under
	Since      time.Time // of the last change of Sealed
	Session    uint32    // id of the session that is sealed under; 0: none
	Started    time.Time // of that session
	Sessions   int       // that open now
	Handshakes uint64    // that ended in a session
	Failed     uint64    // that did not
	LastError  string    // of the last one that did not, in one line; empty after one that did
	Ignored    uint64    // handshake datagrams: malformed, unknown, too many
}

// Stats returns them as of now.
func (l *Link) Stats() LinkStats {
	l.mu.Lock()
	defer l.mu.Unlock()
	st := l.stats
	st.Sessions, st.Ignored = len(*l.sessions.Load()), l.ignored.Load()
	if s := l.current.Load(); s != nil {
		st.Session, st.Started = s.id, s.started
	}
	return st
}

// Close ends all sessions, and the link takes no others. Stop Run first. It is idempotent.
func (l *Link) Close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.shut = true
	l.dropAll()
}

// dropAll ends all sessions. l.mu is held.
func (l *Link) dropAll() {
	l.current.Store(nil)
	if l.stats.Sealed {
		l.stats.Sealed, l.stats.Since = false, time.Now()
	}
	for _, s := range *l.sessions.Load() {
		l.drop(s)
	}
}

// Run makes sessions and keeps them fresh until ctx ends; it returns ctx's error. Sessions that are there stay, for Export or a later Run. One Run at a time.
func (l *Link) Run(ctx context.Context) error {
	if !l.running.CompareAndSwap(false, true) {
		return errors.New("sealed link: it runs already")
	}
	defer l.running.Store(false)
	return newRunner(l).run(ctx)
}
