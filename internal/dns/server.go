package dns

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"patchbay/frame"

	"github.com/miekg/dns"
)

// Network is what the resolver needs of a gateway; stack.Network has it.
type Network interface {
	Send(fs []frame.Frame)
	MTU() int
}

// Config configures a Server. Network is required for queries by UDP; the zero value of every other field is its documented default.
type Config struct {
	Network Network

	// Local answers about the network's own names alone; any other question is refused. For networks that have no way out.
	Local bool
	// Others are the resolvers of the further networks that the client of an address is on. What this one's zone does not have is looked up in theirs before anybody
	// outside is asked: a container asks one resolver and is to find its neighbors on all its networks. It is called for such queries alone, from any goroutine, and must not block.
	// Default: none.
	Others func(client netip.Addr) []*Server
	// Upstreams are asked instead of the host's resolvers; port 0 means 53. Default: what ResolvConf lists.
	Upstreams []netip.AddrPort
	// ResolvConf is the host's file. Default /etc/resolv.conf.
	ResolvConf string
	// CheckEvery is how often that file is looked at, at most. Default 1 s.
	CheckEvery time.Duration
	// TTL of the answers about containers, in whole seconds. Default 5 s.
	TTL time.Duration
	// Timeout of a forwarded query: then SERVFAIL. Default 10 s, which is how long libc waits with two attempts.
	Timeout time.Duration
	// Delay before the next resolver is asked as well. Default 400 ms.
	Delay time.Duration
	// MaxQueries waiting for a resolver, in all and of one client address. Default 512 and 128.
	MaxQueries, MaxClientQueries int
	// MaxConns of TCP, in all and of one client address. Default 256 and 32.
	MaxConns, MaxClientConns int
	// ConnIdle is how long a TCP connection may be without a query, and a query or answer take to cross. Default 10 s.
	ConnIdle time.Duration
	// Dial connects to a resolver. Default: net.Dialer's, from a random port.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
	// Drops counts what is not answered. Default: counters of its own.
	Drops *frame.DropCounters
	// Logger gets state changes. Default: none.
	Logger *slog.Logger
}

// Server is the resolver of one network. It is safe for concurrent use.
type Server struct {
	c       Config
	ctx     context.Context // ends with Close
	cancel  context.CancelFunc
	zone    atomic.Pointer[zone]
	ups     *upstreams
	queries *limiter
	conns   *limiter
	turn    atomic.Uint32
	scratch sync.Pool // *[]byte for outgoing frames

	asks sync.WaitGroup // resolvers being asked; each is started by a query in progress

	asked, local, forwarded, failed atomic.Uint64

	mu   sync.Mutex
	open map[net.Conn]struct{} // nil after Close
}

// New makes a resolver that knows no containers yet. It reads the host's resolv.conf; that the file is missing is no error. The error is
// one line that names the setting.
func New(c Config) (*Server, error) {
	for _, u := range c.Upstreams {
		if a := u.Addr(); !a.IsValid() || a.IsUnspecified() || a.IsMulticast() {
			return nil, fmt.Errorf("resolver %s: no address to ask: give one such as 192.0.2.53 with --dns", a)
		}
	}
	c.ResolvConf = cmp.Or(c.ResolvConf, HostFile)
	c.CheckEvery = cmp.Or(c.CheckEvery, time.Second)
	c.TTL = cmp.Or(c.TTL, 5*time.Second)
	c.Timeout = cmp.Or(c.Timeout, 10*time.Second)
	c.Delay = cmp.Or(c.Delay, 400*time.Millisecond)
	c.MaxQueries = cmp.Or(c.MaxQueries, 512)
	c.MaxClientQueries = cmp.Or(c.MaxClientQueries, 128)
	c.MaxConns = cmp.Or(c.MaxConns, 256)
	c.MaxClientConns = cmp.Or(c.MaxClientConns, 32)
	c.ConnIdle = cmp.Or(c.ConnIdle, 10*time.Second)
	if c.Dial == nil {
		c.Dial = new(net.Dialer).DialContext
	}
	if c.Drops == nil {
		c.Drops = new(frame.DropCounters)
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Server{c: c, queries: newLimiter(c.MaxQueries, c.MaxClientQueries), conns: newLimiter(c.MaxConns, c.MaxClientConns), open: map[net.Conn]struct{}{}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.ups = newUpstreams(c.Upstreams, c.ResolvConf, c.CheckEvery, c.Logger)
	s.SetZone(&Zone{})
	return s, nil
}

// SetZone replaces what the resolver answers by itself. Queries that are being answered see the old zone or the new one, whole.
func (s *Server) SetZone(z *Zone) { s.zone.Store(compile(z)) }

// Close ends every query and connection in progress and returns when their goroutines have. Queries that come later are dropped.
// Idempotent.
func (s *Server) Close() error {
	s.cancel()
	s.queries.close()
	s.conns.close()
	s.mu.Lock()
	open := s.open
	s.open = nil
	s.mu.Unlock()
	for c := range open {
		c.Close()
	}
	s.queries.idle.Wait()
	s.conns.idle.Wait()
	s.asks.Wait()
	return nil
}

// Stats is what a Server did so far.
type Stats struct {
	Queries   uint64 // came in, well-formed or not
	Local     uint64 // answered without asking anybody
	Forwarded uint64 // asked outside
	Failed    uint64 // of these, without a good answer
	Waiting   int    // for a resolver, now
	Conns     int    // of TCP, now
}

// Stats is a snapshot.
func (s *Server) Stats() Stats {
	return Stats{
		Queries: s.asked.Load(), Local: s.local.Load(), Forwarded: s.forwarded.Load(), Failed: s.failed.Load(),
		Waiting: s.queries.inUse(), Conns: s.conns.inUse(),
	}
}

// verdict is what is to be done with a query.
type verdict struct {
	answer []byte   // to send at once
	q      *dns.Msg // the parsed query, when it is to be forwarded
	limit  *dns.Msg // the parsed query, for the size of the answer
	drop   bool     // it is no query at all
}

// judge looks at a query of the client's and answers it if that takes nobody outside.
func (s *Server) judge(client netip.Addr, b []byte) verdict {
	s.asked.Add(1)
	if len(b) < headerLen || b[2]&flagQR != 0 {
		return verdict{drop: true} // never answer an answer: two servers could go on forever
	}
	plausible := len(b) <= maxQuery && count(b, 4) == 1 && count(b, 6)+count(b, 8) == 0 && count(b, 10) <= maxExtra
	if !plausible {
		b = b[:headerLen] // ten thousand questions, each a pointer to one long name, would take the parser 40 ms
	}
	q := new(dns.Msg)
	err := q.Unpack(b)
	code := -1
	switch {
	case q.Opcode != dns.OpcodeQuery:
		code = dns.RcodeNotImplemented
	case err != nil, !plausible, len(q.Question) != 1, len(q.Answer)+len(q.Ns) > 0:
		code = dns.RcodeFormatError
	case q.Question[0].Qclass != dns.ClassINET:
		code = dns.RcodeRefused
	case q.Question[0].Qtype == dns.TypeAXFR, q.Question[0].Qtype == dns.TypeIXFR:
		code = dns.RcodeRefused
	}
	var m *dns.Msg
	switch opt := q.IsEdns0(); {
	case code >= 0:
		if len(q.Question) > 1 || err != nil {
			q.Question, q.Extra = nil, nil
		}
		m = reply(q, code)
	case opt != nil && opt.Version() != 0:
		m = reply(q, dns.RcodeBadVers)
	default:
		m = s.answer(client, q)
		if m == nil && s.c.Local {
			m = reply(q, dns.RcodeRefused)
		}
	}
	if m == nil {
		return verdict{q: q, limit: q}
	}
	s.local.Add(1)
	out, err := m.Pack()
	if err != nil {
		return verdict{drop: true}
	}
	return verdict{answer: out, limit: q}
}

// answer is what the zone knows, or for want of that the zones of the client's further networks. It is nil when somebody outside is to be asked.
func (s *Server) answer(client netip.Addr, q *dns.Msg) *dns.Msg {
	turn := s.turn.Add(1)
	m := s.zone.Load().answer(q, s.c.TTL, turn)
	if s.c.Others == nil || m != nil && m.Rcode == dns.RcodeSuccess {
		return m
	}
	for _, o := range s.c.Others(client) {
		switch other := o.zone.Load().answer(q, s.c.TTL, turn); {
		case other == nil:
		case other.Rcode == dns.RcodeSuccess:
			return other
		case m == nil: // a reverse name of that network's
			m = other
		}
	}
	return m
}
