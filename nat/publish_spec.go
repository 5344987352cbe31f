package nat

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// Protocols that can be published.
const (
	TCP = "tcp"
	UDP = "udp"
)

// Spec says which host ports go to which container ports. Count consecutive host ports from HostPort on go to as many container ports
// from Port on, or all to Port.
type Spec struct {
	Host     netip.Addr // where to listen; the zero Addr means every IPv4 and IPv6 address of the host
	HostPort uint16     // first, never 0
	Port     uint16     // first of the container, never 0
	Count    int        // 1 to 65535
	Single   bool       // all host ports go to Port; false when Count is 1
	Proto    string     // TCP or UDP
}

// String is the spec as ParseSpec takes it, always with the protocol.
func (s Spec) String() string {
	var b strings.Builder
	if s.Host.IsValid() {
		if s.Host.Is4() {
			b.WriteString(s.Host.String())
		} else {
			b.WriteString("[" + s.Host.String() + "]")
		}
		b.WriteByte(':')
	}
	b.WriteString(portRange(s.HostPort, s.Count) + ":" + portRange(s.Port, s.ports()) + "/" + s.Proto)
	return b.String()
}

// ports is how many ports of the container there are.
func (s Spec) ports() int {
	if s.Single {
		return 1
	}
	return s.Count
}

func portRange(first uint16, count int) string {
	if count == 1 {
		return strconv.Itoa(int(first))
	}
	return fmt.Sprintf("%d-%d", first, int(first)+count-1)
}

// ParseSpec reads "[HOSTIP:]HOSTPORT[-END]:PORT[-END][/tcp|/udp]". Ranges are of the same length, or there is one PORT for all. An IPv6 HOSTIP stands in brackets. Without a protocol it is TCP. The error is
// one line that says what is wrong and how it is written right.
func ParseSpec(text string) (Spec, error) {
	fail := func(format string, args ...any) (Spec, error) {
		return Spec{}, fmt.Errorf("publish %q: %s", clip(text), fmt.Sprintf(format, args...))
	}
	s := Spec{Proto: TCP}
	rest := text
	if i := strings.LastIndexByte(rest, '/'); i >= 0 {
		switch p := strings.ToLower(rest[i+1:]); p {
		case TCP, UDP:
			s.Proto = p
		default:
			return fail("protocol %q is not known; write /tcp or /udp", clip(rest[i+1:]))
		}
		rest = rest[:i]
	}
	if strings.HasPrefix(rest, "[") {
		i := strings.Index(rest, "]:")
		if i < 0 {
			return fail("an IPv6 address is written [ADDR]:HOSTPORT:PORT")
		}
		a, err := netip.ParseAddr(rest[1:i])
		if err != nil || !a.Is6() {
			return fail("%q is not an IPv6 address; brackets hold one, as in [::1]:8080:80", clip(rest[1:i]))
		}
		s.Host, rest = a, rest[i+2:]
	}
	parts := strings.Split(rest, ":")
	switch {
	case len(parts) == 3 && !s.Host.IsValid():
		a, err := netip.ParseAddr(parts[0])
		if err != nil {
			return fail("%q is not an IP address; write a number such as 127.0.0.1, or leave it out to listen on every address", clip(parts[0]))
		}
		s.Host, parts = a, parts[1:]
	case len(parts) == 1:
		return fail("it needs two ports; write HOSTPORT:PORT, as in 8080:80")
	case len(parts) > 2:
		return fail("too many colons; write [HOSTIP:]HOSTPORT:PORT, with an IPv6 address in brackets")
	}
	if s.Host.Is4In6() {
		s.Host = s.Host.Unmap() // loses a zone, which IPv4 does not have
	}
	if s.Host.IsMulticast() || s.Host == v4Broadcast {
		return fail("%s is not an address to listen on; take one of the host's", s.Host)
	}
	host, nHost, err := parsePorts(parts[0])
	if err != nil {
		return fail("host %v", err)
	}
	port, n, err := parsePorts(parts[1])
	if err != nil {
		return fail("container %v", err)
	}
	if nHost != n && n != 1 {
		return fail("%d host ports for %d container ports; give ranges of the same length, or one container port for all", nHost, n)
	}
	s.HostPort, s.Port, s.Count, s.Single = host, port, nHost, n == 1 && nHost > 1
	return s, nil
}

// parsePorts reads "PORT" or "FIRST-LAST".
func parsePorts(text string) (first uint16, count int, err error) {
	a, b, isRange := strings.Cut(text, "-")
	if first, err = parsePort(a); err != nil {
		return 0, 0, err
	}
	if !isRange {
		return first, 1, nil
	}
	last, err := parsePort(b)
	if err != nil {
		return 0, 0, err
	}
	if last < first {
		return 0, 0, fmt.Errorf("ports %s run backwards; write the lower port first", text)
	}
	return first, int(last-first) + 1, nil
}

func parsePort(text string) (uint16, error) {
	if text == "" {
		return 0, fmt.Errorf("port is empty; write a number from 1 to 65535")
	}
	for _, c := range []byte(text) {
		if c < '0' || c > '9' {
			return 0, fmt.Errorf("port %q is not a number; write one from 1 to 65535", clip(text))
		}
	}
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("port %s is out of range; take one from 1 to 65535", clip(text))
	}
	return uint16(n), nil
}

// clip keeps what a person typed from filling the screen.
func clip(s string) string {
	if len(s) > 80 {
		return s[:77] + "..."
	}
	return s
}
