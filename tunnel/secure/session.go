package secure

import (
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"patchbay/frame"
)

// Overhead is how much longer a sealed message is than its plaintext, in bytes: the tag of AES-GCM.
const Overhead = 16

const (
	keyLen   = 32 // AES-256
	nonceLen = 12

	maxMessages = 1 << 48 // under one session, each way
	maxForged   = 1 << 36 // that do not open (RFC 9147 §4.5.3)
)

// keys is what a handshake exports for a session, in this order.
type keys struct {
	Initiator, Responder     [keyLen]byte // what each seals with
	InitiatorIV, ResponderIV [nonceLen]byte
	ID                       [4]byte
}

const keysLen = 2*keyLen + 2*nonceLen + 4

func parseKeys(b []byte) (k keys, ok bool) {
	if len(b) != keysLen {
		return k, false
	}
	for _, f := range [][]byte{k.Initiator[:], k.Responder[:], k.InitiatorIV[:], k.ResponderIV[:], k.ID[:]} {
		b = b[copy(f, b):]
	}
	return k, true
}

func (k *keys) bytes() (b []byte) {
	for _, f := range [][]byte{k.Initiator[:], k.Responder[:], k.InitiatorIV[:], k.ResponderIV[:], k.ID[:]} {
		b = append(b, f...)
	}
	return b
}

// half is one direction of a session.
type half struct {
	aead cipher.AEAD
	iv   [nonceLen]byte
}

func newHalf(key [keyLen]byte, iv [nonceLen]byte) (half, error) {
	block, err := aes.NewCipher(key[:])
	if err != nil {
		return half{}, err
	}
	aead, err := cipher.NewGCM(block)
	return half{aead, iv}, err
}

// nonce is IV xor sequence number. It lives in a pool: handed to an interface, one on the stack would be allocated for each message.
func (h *half) nonce(seq uint64, n *[nonceLen]byte) []byte {
	*n = h.iv
	binary.BigEndian.PutUint64(n[4:], binary.BigEndian.Uint64(n[4:])^seq)
	return n[:]
}

// Session is a pair of keys, one each way, with one peer. It is safe for concurrent use.
type Session struct {
	id        uint32
	initiator bool      // this node made it
	began     time.Time // its handshake, here
	started   time.Time // by the monotonic clock; a successor's is moved back by the age
	keys      keys      // for Export
	limit     uint64    // bytes after which the link is asked for another session; at four times that it is over
	ask       func()    // asks, without waiting
	nonces    sync.Pool // of *[nonceLen]byte

	out    half
	next   atomic.Uint64 // sequence number
	sealed atomic.Uint64 // bytes
	asked  atomic.Bool   // for another session

	in     half
	opened atomic.Uint64 // bytes
	forged atomic.Uint64 // messages that did not open
	heard  atomic.Bool   // something opened since Run looked last
	first  atomic.Bool   // something opened before it was confirmed
	mu     sync.Mutex
	seen   window

	confirmed atomic.Bool   // the other side has the keys, too
	isOver    atomic.Bool   // neither seals nor opens any more
	over      chan struct{} // closed with isOver
	sure      chan struct{} // closed when confirmed

	// Of Link, under its mu:
	quiet int // seconds in which nothing was heard, since it was superseded
}

func newSession(k keys, initiator bool, started time.Time, limit uint64, ask func()) (*Session, error) {
	s := &Session{id: binary.BigEndian.Uint32(k.ID[:]), initiator: initiator, began: started, started: started, keys: k, limit: limit, ask: ask, over: make(chan struct{}), sure: make(chan struct{})}
	if s.id == 0 {
		return nil, errors.New("the session's id came out as zero")
	}
	s.nonces.New = func() any { return new([nonceLen]byte) }
	mine, theirs, mineIV, theirsIV := k.Initiator, k.Responder, k.InitiatorIV, k.ResponderIV
	if !initiator {
		mine, theirs, mineIV, theirsIV = theirs, mine, theirsIV, mineIV
	}
	var err error
	if s.out, err = newHalf(mine, mineIV); err == nil {
		s.in, err = newHalf(theirs, theirsIV)
	}
	return s, err
}

// ID names the session on the wire, the same on both sides; never zero.
func (s *Session) ID() uint32 { return s.id }

// Next takes the next sequence number. It is not ok when a hard limit is reached or the session has ended: the frame is dropped as frame.DropNoSession.
func (s *Session) Next() (seq uint64, ok bool) {
	seq = s.next.Add(1) - 1
	return seq, seq < maxMessages && s.sealed.Load() < 4*s.limit && !s.isOver.Load()
}

// Seal appends plaintext, sealed, to dst and returns it: len(plaintext)+Overhead bytes more. seq comes from Next and is used once; aad is authenticated and not sent. To seal in place, dst is
// plaintext[:0] with room for Overhead behind; otherwise the two must not overlap. It allocates nothing if dst has the room.
func (s *Session) Seal(dst []byte, seq uint64, aad, plaintext []byte) []byte {
	n := s.nonces.Get().(*[nonceLen]byte)
	dst = s.out.aead.Seal(dst, s.out.nonce(seq, n), plaintext, aad)
	s.nonces.Put(n)
	s.used(&s.sealed, len(plaintext))
	return dst
}

// used counts bytes and asks for another session when the time has come.
func (s *Session) used(c *atomic.Uint64, n int) {
	if c.Add(uint64(n)) >= s.limit {
		s.wantAnother()
	}
}

func (s *Session) wantAnother() {
	if !s.asked.Load() && s.asked.CompareAndSwap(false, true) {
		s.ask()
	}
}

// usedUp reports whether the session should have a successor for what it carried.
func (s *Session) usedUp() bool {
	return s.sealed.Load() >= s.limit || s.opened.Load() >= s.limit || s.next.Load() >= maxMessages/2 || s.forged.Load() >= maxForged/2
}

// open is Link.Open for a session that is known.
func (s *Session) open(seq uint64, aad, ciphertext []byte) ([]byte, frame.Drop, bool) {
	if s.isOver.Load() || s.opened.Load() >= 4*s.limit || s.forged.Load() >= maxForged {
		return nil, frame.DropNoSession, false
	}
	s.mu.Lock()
	fresh := s.seen.fresh(seq)
	s.mu.Unlock()
	if !fresh {
		return nil, frame.DropReplayed, false // before the work of opening it
	}
	n := s.nonces.Get().(*[nonceLen]byte)
	plaintext, err := s.in.aead.Open(ciphertext[:0], s.in.nonce(seq, n), ciphertext, aad)
	s.nonces.Put(n)
	if err != nil || seq >= maxMessages {
		if s.forged.Add(1) == maxForged/2 {
			s.wantAnother()
		}
		return nil, frame.DropUnauthentic, false
	}
	s.mu.Lock()
	over := s.isOver.Load()           // Export has read what was seen, under mu
	fresh = !over && s.seen.mark(seq) // another goroutine may have opened it meanwhile
	s.mu.Unlock()
	switch {
	case over:
		return nil, frame.DropNoSession, false
	case !fresh:
		return nil, frame.DropReplayed, false
	}
	s.used(&s.opened, len(plaintext))
	if !s.heard.Load() {
		s.heard.Store(true)
	}
	return plaintext, 0, true
}

// end makes the session neither seal nor open any more. What was taken from Next before may still be sealed.
func (s *Session) end() {
	if s.isOver.CompareAndSwap(false, true) {
		close(s.over)
	}
}
