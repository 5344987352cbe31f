package capture

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"sync"

	"patchbay/internal/wire"
)

// Filter decides about frames. It is safe for concurrent use.
type Filter struct {
	match matcher
	pool  sync.Pool // of *packet, which would otherwise be allocated for each frame
}

// Match reports whether the filter takes the frame. It allocates nothing.
func (f *Filter) Match(data []byte) bool {
	if f.match == nil {
		return true
	}
	p, _ := f.pool.Get().(*packet)
	if p == nil {
		p = new(packet)
	}
	*p = packet{}
	p.decode(data)
	ok := f.match(p)
	p.data = nil // lent
	f.pool.Put(p)
	return ok
}

// packet is a frame as far as filters look.
type packet struct {
	data     []byte
	vlan     int    // the tag's VLAN id, or -1
	ether    uint16 // behind the tag
	l3       int    // offset
	ip       bool   // src, dst, proto and l4 are valid
	arp      bool   // src and dst are
	src, dst netip.Addr
	proto    uint8
	l4       int  // offset
	first    bool // not a later fragment: ports can be looked at
}

// decode looks as far as it can: what is short or broken simply has no addresses.
func (p *packet) decode(data []byte) {
	p.data, p.vlan = data, -1
	if len(data) < wire.EthernetLen {
		return
	}
	p.ether, p.l3 = binary.BigEndian.Uint16(data[12:]), wire.EthernetLen
	if (p.ether == wire.EtherTypeVLAN || p.ether == wire.EtherTypeQinQ) && len(data) >= wire.EthernetLen+wire.VLANTagLen {
		p.vlan = int(binary.BigEndian.Uint16(data[14:]) & 0xfff)
		p.ether, p.l3 = binary.BigEndian.Uint16(data[16:]), wire.EthernetLen+wire.VLANTagLen
	}
	b := data[p.l3:]
	switch p.ether {
	case wire.EtherTypeIPv4:
		if len(b) < wire.IPv4Len || b[0]>>4 != 4 || int(b[0]&15)*4 < wire.IPv4Len {
			return
		}
		p.ip, p.proto, p.l4 = true, b[9], p.l3+int(b[0]&15)*4
		p.src, p.dst = netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:]))
		p.first = binary.BigEndian.Uint16(b[6:])&0x1fff == 0
	case wire.EtherTypeIPv6:
		if len(b) < wire.IPv6Len || b[0]>>4 != 6 {
			return
		}
		p.ip, p.proto, p.l4, p.first = true, b[6], p.l3+wire.IPv6Len, true
		p.src, p.dst = netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:]))
		if ip, ok := wire.ParseIP(b, true); ok { // behind extension headers, where they are in order
			p.proto, p.l4, p.first = ip.Proto, p.l3+ip.HdrLen, ip.FragOff == 0
		}
	case wire.EtherTypeARP:
		if len(b) >= 28 && binary.BigEndian.Uint16(b[2:]) == wire.EtherTypeIPv4 {
			p.arp = true
			p.src, p.dst = netip.AddrFrom4([4]byte(b[14:])), netip.AddrFrom4([4]byte(b[24:]))
		}
	}
}

// ports are those of TCP, UDP and SCTP.
func (p *packet) ports() (src, dst uint16, ok bool) {
	if !p.ip || !p.first || p.proto != wire.ProtoTCP && p.proto != wire.ProtoUDP && p.proto != protoSCTP || p.l4+4 > len(p.data) {
		return 0, 0, false
	}
	return binary.BigEndian.Uint16(p.data[p.l4:]), binary.BigEndian.Uint16(p.data[p.l4+2:]), true
}

const protoSCTP = 132

// ParseFilter compiles a tcpdump expression: primitives joined by "and", "or", "not" (or &&, ||, !) and parentheses, where "and" and "or" bind alike, from the left. The primitives are
//
//	[ip|ip6|arp|tcp|udp|sctp] [src|dst|src or dst] host ADDR | net CIDR | port N | portrange N-M
//	ether [src|dst] host MAC     ether|ip|ip6 proto N     ether broadcast|multicast     ip|ip6 multicast
//	ip  ip6  arp  tcp  udp  sctp  icmp  icmp6  broadcast  multicast     vlan [N]     less N  greater N
//	ether|ip|ip6|tcp|udp|icmp|icmp6 "[" OFFSET [":" 1|2|4] "]" [& MASK] =|!=|<|>|<=|>= VALUE
//
// with tcpflags, icmptype and tcp-syn, tcp-ack, tcp-fin, tcp-rst, tcp-push, tcp-urg by name. An address, port or net without a keyword has the one before it: "port 80 or 443". Unlike
// pcap-filter(7), a VLAN tag is looked through everywhere, tcp[…] and udp[…] look into IPv6 too, and names of hosts and services are not looked up. The empty expression takes every frame. An error names the expression,
// the word and its position.
func ParseFilter(expr string) (*Filter, error) {
	const maxExpr = 4096
	if len(expr) > maxExpr {
		return nil, fmt.Errorf("filter of %d bytes: at most %d; shorten it", len(expr), maxExpr)
	}
	p := &parser{expr: expr}
	p.scan()
	if len(p.words) == 0 {
		return &Filter{}, nil
	}
	m, err := p.alternatives(0)
	if err == nil && p.at < len(p.words) {
		err = p.fail("nothing can follow here; join with and, or")
	}
	if err != nil {
		return nil, err
	}
	return &Filter{match: m}, nil
}

type matcher = func(p *packet) bool

type word struct {
	text string
	pos  int // bytes from the beginning
}

type parser struct {
	expr  string
	words []word
	at    int
	// last is what a bare value means: the qualifiers of the primitive before it.
	last qualifiers
}

type qualifiers struct {
	proto, dir, kind string
}

// maxDepth bounds parentheses and negations.
const maxDepth = 64

func (p *parser) scan() {
	const single = "()[]!&|=<>:"
	for i := 0; i < len(p.expr); {
		c := p.expr[i]
		switch {
		case c == ' ' || c == '\t' || c == '\n' || c == '\r':
			i++
		case i+1 < len(p.expr) && isPair(p.expr[i:i+2]):
			p.words = append(p.words, word{p.expr[i : i+2], i})
			i += 2
		case strings.IndexByte(single, c) >= 0 && (c != ':' || p.inBrackets()):
			p.words = append(p.words, word{p.expr[i : i+1], i})
			i++
		default:
			start := i
			for i < len(p.expr) && strings.IndexByte(" \t\r\n()[]!&|=<>", p.expr[i]) < 0 && (p.expr[i] != ':' || !p.inBrackets()) {
				i++
			}
			p.words = append(p.words, word{p.expr[start:i], start})
		}
	}
}

func isPair(s string) bool {
	return s == "&&" || s == "||" || s == "!=" || s == "<=" || s == ">=" || s == "=="
}

// inBrackets reports whether a bracket is open: there a colon stands by itself, elsewhere it is part of an address.
func (p *parser) inBrackets() bool {
	n := 0
	for _, w := range p.words {
		switch w.text {
		case "[":
			n++
		case "]":
			n--
		}
	}
	return n > 0
}

func (p *parser) peek() string {
	if p.at < len(p.words) {
		return p.words[p.at].text
	}
	return ""
}

func (p *parser) next() string {
	w := p.peek()
	p.at++
	return w
}

// accept takes the next word if it is one of these.
func (p *parser) accept(words ...string) bool {
	for _, w := range words {
		if p.at < len(p.words) && p.words[p.at].text == w {
			p.at++
			return true
		}
	}
	return false
}

// fail is an error at the present word.
func (p *parser) fail(format string, args ...any) error {
	where := "at its end"
	if p.at < len(p.words) {
		w := p.words[p.at]
		where = fmt.Sprintf("at %.40q, byte %d", w.text, w.pos+1)
	}
	return fmt.Errorf("filter %.200q: %s: %s", p.expr, where, fmt.Sprintf(format, args...))
}

// alternatives reads primitives joined by and, or.
func (p *parser) alternatives(depth int) (matcher, error) {
	if depth > maxDepth {
		return nil, p.fail("nested more than %d deep; write it flatter", maxDepth)
	}
	left, err := p.negation(depth)
	if err != nil {
		return nil, err
	}
	for {
		and := p.accept("and", "&&")
		if !and && !p.accept("or", "||") {
			return left, nil
		}
		right, err := p.negation(depth)
		if err != nil {
			return nil, err
		}
		l := left
		if and {
			left = func(q *packet) bool { return l(q) && right(q) }
		} else {
			left = func(q *packet) bool { return l(q) || right(q) }
		}
	}
}

func (p *parser) negation(depth int) (matcher, error) {
	switch {
	case p.accept("not", "!"):
		if depth > maxDepth {
			return nil, p.fail("nested more than %d deep; write it flatter", maxDepth)
		}
		m, err := p.negation(depth + 1)
		if err != nil {
			return nil, err
		}
		return func(q *packet) bool { return !m(q) }, nil
	case p.accept("("):
		m, err := p.alternatives(depth + 1)
		if err != nil {
			return nil, err
		}
		if !p.accept(")") {
			return nil, p.fail("a closing parenthesis is missing")
		}
		return m, nil
	}
	return p.primitive()
}

// protos are the words that name a protocol, and what they ask of a packet.
var protos = map[string]matcher{
	"ether": func(*packet) bool { return true },
	"ip":    func(p *packet) bool { return p.ether == wire.EtherTypeIPv4 },
	"ip6":   func(p *packet) bool { return p.ether == wire.EtherTypeIPv6 },
	"arp":   func(p *packet) bool { return p.ether == wire.EtherTypeARP },
	"tcp":   func(p *packet) bool { return p.ip && p.proto == wire.ProtoTCP },
	"udp":   func(p *packet) bool { return p.ip && p.proto == wire.ProtoUDP },
	"sctp":  func(p *packet) bool { return p.ip && p.proto == protoSCTP },
	"icmp":  func(p *packet) bool { return p.ether == wire.EtherTypeIPv4 && p.ip && p.proto == wire.ProtoICMP },
	"icmp6": func(p *packet) bool { return p.ether == wire.EtherTypeIPv6 && p.ip && p.proto == wire.ProtoICMPv6 },
}

func broadcast(p *packet) bool {
	return len(p.data) >= 6 && [6]byte(p.data) == [6]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
}

func multicast(p *packet) bool { return len(p.data) > 0 && p.data[0]&1 != 0 }

// primitive reads one.
func (p *parser) primitive() (matcher, error) {
	if p.at >= len(p.words) {
		return nil, p.fail("a primitive is missing, such as host, port, tcp or arp")
	}
	var q qualifiers
	if protos[p.peek()] != nil {
		q.proto = p.next()
		if p.peek() == "[" {
			return p.comparison(q.proto)
		}
	}
	switch p.peek() {
	case "src", "dst":
		q.dir = p.next()
		if p.at+1 < len(p.words) && p.peek() == "or" && (p.words[p.at+1].text == "src" || p.words[p.at+1].text == "dst") && p.words[p.at+1].text != q.dir {
			p.at += 2
			q.dir = "" // either, which is what no direction means
		}
	}
	switch w := p.peek(); {
	case w == "host" || w == "net" || w == "port" || w == "portrange" || w == "proto":
		q.kind = p.next()
	case w == "broadcast" && (q.proto == "" || q.proto == "ether") && q.dir == "":
		p.at++
		return broadcast, nil
	case w == "multicast" && q.dir == "":
		p.at++
		return p.multicast(q.proto)
	case q == qualifiers{}:
		switch w {
		case "vlan":
			p.at++
			return p.vlan()
		case "less", "greater":
			p.at++
			return p.length(w == "less")
		}
		if p.last.kind == "" || w == ")" || w == "and" || w == "or" {
			return nil, p.fail("it is no primitive; use host, net, port, portrange, proto, vlan, less, greater, broadcast, multicast, or a protocol such as tcp")
		}
		q = p.last // a bare value
	case q.dir == "":
		return protos[q.proto], nil
	default:
		q.kind = "host" // src 10.0.0.1
	}
	p.last = q
	return p.value(q)
}

func (p *parser) multicast(proto string) (matcher, error) {
	switch proto {
	case "", "ether":
		return multicast, nil
	case "ip", "ip6":
		m := protos[proto]
		return func(q *packet) bool { return m(q) && q.ip && q.dst.IsMulticast() }, nil
	}
	return nil, p.fail("%s has no multicast; use ether, ip or ip6", proto)
}

func (p *parser) vlan() (matcher, error) {
	if n, err := strconv.ParseUint(p.peek(), 0, 12); err == nil {
		p.at++
		return func(q *packet) bool { return q.vlan == int(n) }, nil
	}
	return func(q *packet) bool { return q.vlan >= 0 }, nil
}

func (p *parser) length(less bool) (matcher, error) {
	n, err := strconv.ParseUint(p.peek(), 0, 31)
	if err != nil {
		return nil, p.fail("a number of bytes is wanted here")
	}
	p.at++
	if less {
		return func(q *packet) bool { return len(q.data) <= int(n) }, nil
	}
	return func(q *packet) bool { return len(q.data) >= int(n) }, nil
}

// value reads what the qualifiers are about.
func (p *parser) value(q qualifiers) (matcher, error) {
	is := func(*packet) bool { return true }
	if q.proto != "" {
		is = protos[q.proto]
	}
	text := p.peek()
	switch q.kind {
	case "host":
		if q.proto == "ether" {
			return p.etherHost(q.dir)
		}
		a, err := netip.ParseAddr(text)
		if err != nil {
			return nil, p.fail("it is not an address; names are not looked up")
		}
		return p.addrs(q, is, func(b netip.Addr) bool { return b == a })
	case "net":
		n, err := parseNet(text)
		if err != nil {
			return nil, p.fail("it is not a network; write one such as 10.0.0.0/8")
		}
		return p.addrs(q, is, n.Contains)
	case "port", "portrange":
		first, last, ok := parsePorts(text, q.kind == "portrange")
		if !ok {
			return nil, p.fail("it is not a %s; write a number from 0 to 65535, or two for portrange, such as 80-90", q.kind)
		}
		switch q.proto {
		case "", "ip", "ip6", "tcp", "udp", "sctp":
		default:
			return nil, p.fail("%s has no ports; use tcp or udp", q.proto)
		}
		p.at++
		in := func(v uint16) bool { return first <= v && v <= last }
		return func(k *packet) bool {
			src, dst, ok := k.ports()
			return ok && is(k) && (q.dir != "dst" && in(src) || q.dir != "src" && in(dst))
		}, nil
	}
	return p.protoNumber(q)
}

func (p *parser) addrs(q qualifiers, is matcher, in func(netip.Addr) bool) (matcher, error) {
	switch q.proto {
	case "", "ip", "ip6", "arp", "tcp", "udp", "sctp", "icmp", "icmp6":
	default:
		return nil, p.fail("%s has no such addresses", q.proto)
	}
	p.at++
	return func(k *packet) bool {
		return (k.ip || k.arp) && is(k) && (q.dir != "dst" && in(k.src) || q.dir != "src" && in(k.dst))
	}, nil
}

func (p *parser) etherHost(dir string) (matcher, error) {
	m, err := wire.ParseMAC(p.peek())
	if err != nil {
		return nil, p.fail("it is not a MAC; write one such as 02:00:5e:00:00:01")
	}
	p.at++
	return func(k *packet) bool {
		return len(k.data) >= wire.EthernetLen && (dir != "src" && wire.Dst(k.data) == m || dir != "dst" && wire.Src(k.data) == m)
	}, nil
}

// protoNumber reads "ip proto 6" and its kind.
func (p *parser) protoNumber(q qualifiers) (matcher, error) {
	n, err := strconv.ParseUint(strings.TrimPrefix(p.peek(), `\`), 0, 16)
	if err != nil || q.dir != "" {
		return nil, p.fail("a protocol's number is wanted here, as in ip proto 47")
	}
	p.at++
	switch q.proto {
	case "ether":
		return func(k *packet) bool { return uint64(k.ether) == n }, nil
	case "", "ip", "ip6":
		is := func(*packet) bool { return true }
		if q.proto != "" {
			is = protos[q.proto]
		}
		return func(k *packet) bool { return k.ip && is(k) && uint64(k.proto) == n }, nil
	}
	return nil, p.fail("%s has no protocol number; use ether, ip or ip6", q.proto)
}

func parseNet(s string) (netip.Prefix, error) {
	if n, err := netip.ParsePrefix(s); err == nil {
		return n.Masked(), nil
	}
	a, err := netip.ParseAddr(s)
	if err != nil {
		return netip.Prefix{}, err
	}
	return netip.PrefixFrom(a, a.BitLen()), nil
}

func parsePorts(s string, isRange bool) (first, last uint16, ok bool) {
	a, b, two := strings.Cut(s, "-")
	x, err1 := strconv.ParseUint(a, 10, 16)
	if !isRange {
		return uint16(x), uint16(x), err1 == nil && !two
	}
	y, err2 := strconv.ParseUint(b, 10, 16)
	if !two {
		y, err2 = x, nil
	}
	return uint16(x), uint16(y), err1 == nil && err2 == nil && x <= y
}

// numbers are the constants that have names.
var numbers = map[string]uint32{
	"tcpflags": 13, "icmptype": 0, "icmpcode": 1, "icmp6type": 0, "icmp6code": 1,
	"tcp-fin": 1, "tcp-syn": 2, "tcp-rst": 4, "tcp-push": 8, "tcp-ack": 16, "tcp-urg": 32, "tcp-ece": 64, "tcp-cwr": 128,
	"icmp-echo": 8, "icmp-echoreply": 0, "icmp-unreach": 3, "icmp-timxceed": 11, "icmp6-echo": 128, "icmp6-echoreply": 129,
}

func (p *parser) number() (uint32, error) {
	w := p.peek()
	if v, ok := numbers[w]; ok {
		p.at++
		return v, nil
	}
	v, err := strconv.ParseUint(w, 0, 32)
	if err != nil {
		return 0, p.fail("a number is wanted here")
	}
	p.at++
	return uint32(v), nil
}

// flags reads numbers joined by |, in parentheses or not.
func (p *parser) flags() (uint32, error) {
	parens := p.accept("(")
	v, err := p.number()
	for err == nil && p.accept("|") {
		var w uint32
		w, err = p.number()
		v |= w
	}
	if err == nil && parens && !p.accept(")") {
		err = p.fail("a closing parenthesis is missing")
	}
	return v, err
}

// comparison reads what follows a protocol's name when a bracket does.
func (p *parser) comparison(proto string) (matcher, error) {
	p.at++ // [
	off, err := p.number()
	if err != nil {
		return nil, err
	}
	size := uint32(1)
	if p.accept(":") {
		if size, err = p.number(); err != nil {
			return nil, err
		}
	}
	if size != 1 && size != 2 && size != 4 || off > wire.MaxFrame {
		return nil, p.fail("%s[%d:%d] is no field; the size is 1, 2 or 4", proto, off, size)
	}
	if !p.accept("]") {
		return nil, p.fail("a closing bracket is missing")
	}
	mask := ^uint32(0)
	if p.accept("&") {
		if mask, err = p.flags(); err != nil {
			return nil, err
		}
	}
	op := p.peek()
	var cmp func(a, b uint32) bool
	switch op {
	case "=", "==":
		cmp = func(a, b uint32) bool { return a == b }
	case "!=":
		cmp = func(a, b uint32) bool { return a != b }
	case "<":
		cmp = func(a, b uint32) bool { return a < b }
	case ">":
		cmp = func(a, b uint32) bool { return a > b }
	case "<=":
		cmp = func(a, b uint32) bool { return a <= b }
	case ">=":
		cmp = func(a, b uint32) bool { return a >= b }
	default:
		return nil, p.fail("a comparison is wanted here: =, !=, <, >, <= or >=")
	}
	p.at++
	want, err := p.flags()
	if err != nil {
		return nil, err
	}
	is := protos[proto]
	return func(k *packet) bool {
		at := k.l4
		switch {
		case !is(k):
			return false
		case proto == "ether":
			at = 0
		case proto == "ip", proto == "ip6", proto == "arp":
			at = k.l3
		case !k.first:
			return false
		}
		at += int(off)
		if at+int(size) > len(k.data) {
			return false
		}
		var v uint32
		for _, b := range k.data[at : at+int(size)] {
			v = v<<8 | uint32(b)
		}
		return cmp(v&mask, want)
	}, nil
}
