package secure

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"time"
)

// The handshake datagram's header; the wire is in the package comment.
const (
	HandshakeType = 0xC3 // first byte
	HeaderLen     = 20   // bytes before the DTLS datagram
	MaxHandshake  = 2048 // bytes a handshake datagram may have, header included; ours have fewer than 1232, what IPv6 carries everywhere

	fromResponder = 1 << 31
	maxVNI        = 1<<24 - 1
)

type header struct {
	vni       uint32
	number    uint32 // of the handshake, 31 bits
	responder bool   // sent by who answers
	cookie    uint64
}

// append writes h behind b.
func (h header) append(b []byte) []byte {
	n := h.number
	if h.responder {
		n |= fromResponder
	}
	b = append(b, HandshakeType, 0, 0, 0)
	b = binary.BigEndian.AppendUint32(b, h.vni)
	b = binary.BigEndian.AppendUint32(b, n)
	return binary.BigEndian.AppendUint64(b, h.cookie)
}

func parseHeader(d []byte) (h header, payload []byte, ok bool) {
	if len(d) < HeaderLen || len(d) > MaxHandshake || d[0] != HandshakeType || d[1]|d[2]|d[3] != 0 {
		return h, nil, false
	}
	n := binary.BigEndian.Uint32(d[8:])
	h = header{vni: binary.BigEndian.Uint32(d[4:]), number: n &^ fromResponder, responder: n&fromResponder != 0, cookie: binary.BigEndian.Uint64(d[12:])}
	return h, d[HeaderLen:], h.vni != 0 && h.vni <= maxVNI
}

// HandshakeVNI is the VNI that a datagram's handshake header names. It is not ok if the datagram is no handshake datagram, or a malformed one.
func HandshakeVNI(datagram []byte) (vni uint32, ok bool) {
	h, _, ok := parseHeader(datagram)
	return h.vni, ok
}

const cookieLife = time.Minute // for which a secret makes cookies; they are good for as long again

// cookies makes and knows what a responder sends before it remembers anything. It belongs to Run.
type cookies struct {
	secret, old [32]byte
	born        time.Time
}

func (c *cookies) turn(now time.Time) {
	switch age := now.Sub(c.born); {
	case c.born.IsZero(), age >= 2*cookieLife:
		mustRandom(c.old[:])
	case age < cookieLife:
		return
	default:
		c.old = c.secret
	}
	mustRandom(c.secret[:])
	c.born = now
}

func (c *cookies) make(now time.Time, h header) uint64 {
	c.turn(now)
	return cookie(&c.secret, h)
}

func (c *cookies) valid(now time.Time, h header) bool {
	c.turn(now)
	return h.cookie == cookie(&c.secret, h) || h.cookie == cookie(&c.old, h)
}

// cookie is never zero, which stands for none.
func cookie(secret *[32]byte, h header) uint64 {
	mac := hmac.New(sha256.New, secret[:])
	var in [8]byte
	binary.BigEndian.PutUint32(in[:], h.vni)
	binary.BigEndian.PutUint32(in[4:], h.number)
	mac.Write(in[:])
	return max(binary.BigEndian.Uint64(mac.Sum(nil)), 1)
}

// mustRandom fills b. Since Go 1.24 crypto/rand ends the process rather than return an error.
func mustRandom(b []byte) { _, _ = rand.Read(b) }
