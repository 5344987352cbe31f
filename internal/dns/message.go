package dns

import (
	"encoding/binary"

	"github.com/miekg/dns"
)

// Sizes in bytes.
const (
	headerLen = 12
	maxQuery  = 4096 // longest query taken
	maxExtra  = 8    // records in a query's additional section; clients send one (EDNS0), or one more (a signature)
	ednsSize  = 1232 // UDP size advertised with our own answers: what crosses any IPv6 path whole
	maxUDP    = 4096 // longest answer a resolver may send by UDP; a longer one counts as truncated
)

// reply is an empty answer to q, given by this server itself.
func reply(q *dns.Msg, rcode int) *dns.Msg {
	m := new(dns.Msg)
	m.SetRcode(q, rcode)
	m.RecursionAvailable = true
	m.Authoritative = rcode == dns.RcodeSuccess || rcode == dns.RcodeNameError
	m.Compress = true
	if opt := q.IsEdns0(); opt != nil {
		m.SetEdns0(ednsSize, opt.Do())
	}
	return m
}

// explain adds an extended error (RFC 8914) where the client speaks EDNS0.
func explain(m *dns.Msg, code uint16, text string) *dns.Msg {
	if opt := m.IsEdns0(); opt != nil {
		opt.Option = append(opt.Option, &dns.EDNS0_EDE{InfoCode: code, ExtraText: text})
	}
	return m
}

// question reads the header and the first question of a message. end is the offset behind it.
func question(b []byte) (q dns.Question, end int, ok bool) {
	if len(b) < headerLen || binary.BigEndian.Uint16(b[4:]) != 1 {
		return q, 0, false
	}
	name, off, err := dns.UnpackDomainName(b, headerLen)
	if err != nil || len(b) < off+4 {
		return q, 0, false
	}
	q.Name = name
	q.Qtype, q.Qclass = binary.BigEndian.Uint16(b[off:]), binary.BigEndian.Uint16(b[off+2:])
	return q, off + 4, true
}

// Header flags, in the third and fourth byte of a message.
const (
	flagQR = 0x80 // b[2]
	flagTC = 0x02 // b[2]
)

func rcode(b []byte) int { return int(b[3] & 0xf) }

// answers reports whether the message b answers query, which has the id id: the way in for forged answers (RFC 5452 §9.1).
func answers(b, query []byte, id uint16) bool {
	if len(b) < headerLen || b[2]&flagQR == 0 || binary.BigEndian.Uint16(b) != id {
		return false
	}
	if len(b) == headerLen && rcode(b) != dns.RcodeSuccess && binary.BigEndian.Uint16(b[4:]) == 0 {
		return true // some resolvers refuse with nothing but a header
	}
	q, _, qok := question(query)
	r, _, rok := question(b)
	return qok && rok && q.Qtype == r.Qtype && q.Qclass == r.Qclass && dns.CanonicalName(q.Name) == dns.CanonicalName(r.Name)
}

// limitUDP is how long an answer to q by UDP may be on a network whose packets carry room bytes of UDP payload.
func limitUDP(q *dns.Msg, room int) int {
	n := dns.MinMsgSize
	if opt := q.IsEdns0(); opt != nil {
		n = max(n, int(opt.UDPSize()))
	}
	return max(min(n, room), dns.MinMsgSize)
}

// fit makes an answer no longer than limit bytes, with TC set when something had to go.
func fit(b []byte, limit int) []byte {
	if len(b) <= limit {
		return b
	}
	m := new(dns.Msg)
	if err := m.Unpack(b); err == nil {
		m.Truncate(limit)
		// The library passes over counts that promise more than there is; who was promised shall ask again.
		m.Truncated = m.Truncated || len(m.Answer)+len(m.Ns)+len(m.Extra) != records(b)
		if b, err := m.Pack(); err == nil && len(b) <= limit {
			return b
		}
	}
	return bare(b)
}

// count is one of the four counts in the header of b: of questions at 4, of the records of each section at 6, 8 and 10.
func count(b []byte, at int) int { return int(binary.BigEndian.Uint16(b[at:])) }

// records is how many records the header of b promises, over all sections.
func records(b []byte) int { return count(b, 6) + count(b, 8) + count(b, 10) }

// bare is the answer b cut down to its header and question, with TC set.
func bare(b []byte) []byte {
	_, end, ok := question(b)
	if !ok {
		end = headerLen
	}
	c := append([]byte(nil), b[:end]...)
	c[2] |= flagTC
	clear(c[4:headerLen])
	if ok {
		c[5] = 1
	}
	return c
}
