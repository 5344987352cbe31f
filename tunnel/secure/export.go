package secure

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

const (
	exportVersion = 1
	// exportJump is how far the successor's sequence numbers begin behind the last that was given out: a margin, since nothing is sealed any more with numbers taken after Export.
	exportJump = 1 << 20
)

// exported is a link's sessions on their way to another process. Both are the same program, or one version apart: the version says whether they understand each other.
type exported struct {
	Version  int
	Network  string
	VNI      uint32
	Host     string
	Trust    []byte // whom the identity lets in that they were made with
	Current  uint32 // id
	Sessions []exportedSession
}

type exportedSession struct {
	Keys      []byte
	Initiator bool
	Confirmed bool
	Age       time.Duration
	Next      uint64
	Sealed    uint64
	Opened    uint64
	Forged    uint64
	Seen      uint64              // one above the highest sequence number that came
	Window    [windowWords]uint64 // which of those before it came
}

// Export takes the live sessions out of the link, for the process that takes over, as opaque bytes that hold their keys: hand them over a unix socket, never write them down. From here on the link neither seals nor opens
// anything under them, so that no nonce and no sequence number can be used twice; OnSession hears that they ended. If the takeover fails, Run makes new ones. Stop Run first.
func (l *Link) Export() ([]byte, error) {
	if l.running.Load() {
		return nil, errors.New("sealed link: stop Run before Export")
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	e := exported{Version: exportVersion, Network: l.cfg.Network, VNI: l.cfg.VNI, Host: l.cfg.Host, Trust: l.cfg.Identity.trust[:]}
	if c := l.current.Load(); c != nil {
		e.Current = c.id
	}
	now := time.Now()
	for _, s := range *l.sessions.Load() {
		s.end() // before its numbers are read
		s.mu.Lock()
		e.Sessions = append(e.Sessions, exportedSession{
			Keys: s.keys.bytes(), Initiator: s.initiator, Confirmed: s.confirmed.Load(), Age: now.Sub(s.started),
			Next: s.next.Load() + exportJump, Sealed: s.sealed.Load(), Opened: s.opened.Load(), Forged: s.forged.Load(), Seen: s.seen.next, Window: s.seen.bits,
		})
		s.mu.Unlock()
	}
	l.dropAll()
	return json.Marshal(e)
}

// Import puts sessions in place that Export took out of a link of the same network, VNI, host and CA or pre-shared key. Call it before Run. Sessions past their age are left out.
func (l *Link) Import(data []byte) error {
	var e exported
	if err := json.Unmarshal(data, &e); err != nil {
		return fmt.Errorf("sessions of a predecessor: %w", err)
	}
	if e.Version != exportVersion {
		return fmt.Errorf("sessions of a predecessor: version %d, and %d is understood", e.Version, exportVersion)
	}
	if e.Network != l.cfg.Network || e.VNI != l.cfg.VNI || e.Host != l.cfg.Host {
		return fmt.Errorf("sessions of a predecessor: they are of network %.70q, VNI %d, host %.100q", e.Network, e.VNI, e.Host)
	}
	// An operator who takes over with another CA or key wants those out whom the old one let in, and not when the sessions are old.
	if !bytes.Equal(e.Trust, l.cfg.Identity.trust[:]) {
		return errors.New("sessions of a predecessor: they were made under another CA, or another pre-shared key")
	}
	if len(e.Sessions) > maxSessions {
		return fmt.Errorf("sessions of a predecessor: %d of them", len(e.Sessions))
	}
	now := time.Now()
	var in []*Session
	for _, x := range e.Sessions {
		k, ok := parseKeys(x.Keys)
		if !ok || x.Age < 0 || x.Next >= maxMessages || x.Seen > maxMessages {
			return errors.New("sessions of a predecessor: numbers out of range")
		}
		if x.Age >= 2*l.cfg.RekeyAfter {
			continue
		}
		s, err := newSession(k, x.Initiator, now.Add(-x.Age), l.cfg.RekeyBytes, l.wake)
		if err != nil {
			return fmt.Errorf("sessions of a predecessor: %w", err)
		}
		s.next.Store(x.Next)
		s.sealed.Store(x.Sealed)
		s.opened.Store(x.Opened)
		s.forged.Store(x.Forged)
		s.seen = window{next: x.Seen, bits: x.Window}
		if x.Confirmed {
			s.confirmed.Store(true)
			close(s.sure)
		}
		in = append(in, s)
	}
	for _, s := range in {
		if err := l.add(s); err != nil {
			return fmt.Errorf("sessions of a predecessor: %w", err)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range in {
		if s.confirmed.Load() && (s.id == e.Current || l.current.Load() == nil) {
			l.choose(s)
		}
	}
	return nil
}
