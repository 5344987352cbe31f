package stack

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"sync"
	"time"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// fragKey names one fragmented packet (RFC 791 §3.2, RFC 8200 §4.5).
type fragKey struct {
	src, dst netip.Addr
	id       uint32
	proto    uint8 // IPv4 only
}

// span is a stretch of payload that has arrived.
type span struct{ from, to int }

// partial is a packet of which some fragments have arrived.
type partial struct {
	born   time.Time
	eth    [wire.EthernetLen]byte
	header []byte // IP header of the first fragment, without an IPv6 fragment header
	proto  uint8
	data   []byte // payload so far, holes included
	spans  []span // sorted, disjoint
	total  int    // payload length; -1 before the last fragment came
	cost   int
	dead   bool // an overlap was seen (RFC 5722): whatever else arrives is dropped, until it expires
}

// Bounds on one packet: what IPv4 can express, and how finely an attacker may cut.
const (
	maxFragments  = 128
	partialCost   = 512 // bytes of bookkeeping that each packet is charged for
	maxIPv4Header = 60
)

// reassembly joins fragments. Safe for concurrent use; fragments are rare, so one lock does.
type reassembly struct {
	mu    sync.Mutex
	cfg   ReassemblyConfig
	drops *frame.DropCounters
	m     map[fragKey]*partial
	bySrc map[netip.Addr]int
	used  int // bytes
}

func (r *reassembly) init(cfg ReassemblyConfig, drops *frame.DropCounters) {
	r.cfg, r.drops = cfg, drops
	r.m = make(map[fragKey]*partial)
	r.bySrc = make(map[netip.Addr]int)
}

func (r *reassembly) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.m)
	clear(r.bySrc)
	r.used = 0
}

func (r *reassembly) charge(k fragKey, p *partial, n int) {
	p.cost += n
	r.used += n
	if r.bySrc[k.src] += n; r.bySrc[k.src] <= 0 {
		delete(r.bySrc, k.src)
	}
}

func (r *reassembly) remove(k fragKey, p *partial) {
	delete(r.m, k)
	r.charge(k, p, -p.cost)
}

// expire drops the packets that waited too long.
func (r *reassembly) expire(now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for k, p := range r.m {
		if now.Sub(p.born) >= r.cfg.Timeout {
			if !p.dead {
				r.drops.Add(frame.DropFragTimeout, len(p.spans))
			}
			r.remove(k, p)
		}
	}
}

// add takes the fragment in d, whose IP header ip describes and starts at l3. When it was the last one missing, add returns the whole packet
// as a frame, which the caller owns.
func (r *reassembly) add(d []byte, l3 int, ip *wire.IP) []byte {
	payload := d[l3+ip.HdrLen : l3+ip.Len]
	end := ip.FragOff + len(payload)
	// All but the last fragment are a multiple of 8 long; a packet ends at 65535.
	if len(payload) == 0 || ip.MoreFrags && len(payload)%8 != 0 || end+headerRoom(ip) > maxMTU {
		r.drops.Add(frame.DropMalformed, 1)
		return nil
	}
	k := fragKey{src: ip.Src, dst: ip.Dst, id: ip.FragID}
	if ip.Version == 4 {
		k.proto = ip.Proto
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.m[k]
	if p == nil {
		if !r.fits(ip.Src, partialCost+end) {
			r.drops.Add(frame.DropFragLimit, 1)
			return nil
		}
		p = &partial{born: time.Now(), total: -1}
		r.m[k] = p
		r.charge(k, p, partialCost)
	}
	if p.dead {
		r.drops.Add(frame.DropMalformed, 1)
		return nil
	}
	if grow := end - len(p.data); grow > 0 {
		if !r.fits(ip.Src, grow) {
			r.drops.Add(frame.DropFragLimit, 1+len(p.spans))
			r.remove(k, p)
			return nil
		}
		r.charge(k, p, grow)
		p.data = append(p.data, make([]byte, grow)...)
	}
	dup, ok := p.insert(span{ip.FragOff, end}, !ip.MoreFrags)
	if dup && bytes.Equal(p.data[ip.FragOff:end], payload) {
		return nil // the same fragment once more: harmless, and what a network that duplicates does
	}
	ok = ok && !dup
	if !ok {
		r.drops.Add(frame.DropMalformed, 1+len(p.spans))
		p.kill(r, k)
		return nil
	}
	copy(p.data[ip.FragOff:], payload)
	if ip.FragOff == 0 {
		copy(p.eth[:], d)
		p.header = firstHeader(d[l3:], ip)
		p.proto = ip.Proto
		if p.header == nil {
			r.drops.Add(frame.DropMalformed, len(p.spans))
			p.kill(r, k)
			return nil
		}
	}
	if p.total < 0 || len(p.spans) != 1 || p.spans[0] != (span{0, p.total}) {
		return nil
	}
	r.remove(k, p)
	return p.join()
}

func headerRoom(ip *wire.IP) int {
	if ip.Version == 4 {
		return ip.HdrLen
	}
	return 0 // the payload length of IPv6 does not count the fixed header
}

func (r *reassembly) fits(src netip.Addr, n int) bool {
	return r.used+n <= r.cfg.MaxBytes && r.bySrc[src]+n <= r.cfg.MaxBytesPerSource
}

// kill keeps the key, so that the rest of a packet that overlapped is dropped too, but not the memory.
func (p *partial) kill(r *reassembly, k fragKey) {
	p.dead, p.data, p.spans = true, nil, nil
	r.charge(k, p, partialCost-p.cost)
}

// insert notes that s has arrived. dup: exactly s was there before. ok is false when s overlaps something else, contradicts the length or is
// one too many.
func (p *partial) insert(s span, last bool) (dup, ok bool) {
	if last {
		if p.total >= 0 && p.total != s.to {
			return false, false
		}
		if n := len(p.spans); n > 0 && p.spans[n-1].to > s.to {
			return false, false
		}
		p.total = s.to
	} else if p.total >= 0 && s.to > p.total {
		return false, false
	}
	i := 0
	for i < len(p.spans) && p.spans[i].from < s.from {
		i++
	}
	if i > 0 && p.spans[i-1].to > s.from || i < len(p.spans) && p.spans[i].from < s.to {
		// Joined spans forget where fragments met, so a repeated fragment is recognised as lying inside what arrived.
		for _, o := range p.spans {
			if o.from <= s.from && s.to <= o.to {
				return true, true
			}
		}
		return false, false
	}
	joinLeft := i > 0 && p.spans[i-1].to == s.from
	joinRight := i < len(p.spans) && p.spans[i].from == s.to
	switch {
	case joinLeft && joinRight:
		p.spans[i-1].to = p.spans[i].to
		p.spans = append(p.spans[:i], p.spans[i+1:]...)
	case joinLeft:
		p.spans[i-1].to = s.to
	case joinRight:
		p.spans[i].from = s.from
	default:
		if len(p.spans) >= maxFragments {
			return false, false
		}
		p.spans = append(p.spans, span{})
		copy(p.spans[i+1:], p.spans[i:])
		p.spans[i] = s
	}
	return false, true
}

// firstHeader copies the IP header of the first fragment as the whole packet's will be: for IPv6 the fragment header is taken out of the chain.
// It is nil when that header is not where the parser found it.
func firstHeader(b []byte, ip *wire.IP) []byte {
	if ip.Version == 4 {
		return append([]byte(nil), b[:ip.HdrLen]...)
	}
	// The fragment header must be the last one before the upper layer, which is where senders put it.
	f := ip.HdrLen - 8
	if f < wire.IPv6Len || b[f] != ip.Proto {
		return nil
	}
	h := append([]byte(nil), b[:f]...)
	// Point whoever named the fragment header at what it named.
	if f == wire.IPv6Len {
		if h[6] != 44 {
			return nil
		}
		h[6] = ip.Proto
		return h
	}
	off := wire.IPv6Len
	for off+2 <= f {
		at := off
		next := h[off]
		off += (int(h[off+1]) + 1) * 8
		if next == 44 {
			if off != f {
				return nil
			}
			h[at] = ip.Proto
			return h
		}
	}
	return nil
}

// join makes the whole frame.
func (p *partial) join() []byte {
	d := make([]byte, 0, wire.EthernetLen+len(p.header)+len(p.data))
	d = append(d, p.eth[:]...)
	d = append(d, p.header...)
	d = append(d, p.data...)
	h := d[wire.EthernetLen:]
	if h[0]>>4 == 4 {
		if len(p.header)+len(p.data) > maxMTU {
			return nil
		}
		binary.BigEndian.PutUint16(h[2:], uint16(len(p.header)+len(p.data)))
		h[6], h[7] = 0, 0
		h[10], h[11] = 0, 0
		binary.BigEndian.PutUint16(h[10:], ^wire.Fold(wire.Sum(h[:len(p.header)], 0)))
	} else {
		binary.BigEndian.PutUint16(h[4:], uint16(len(p.header)-wire.IPv6Len+len(p.data)))
	}
	return d
}
