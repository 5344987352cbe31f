package api

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"

	"patchbay/ipam"
	"patchbay/tap"
)

// Bounds of what may be asked for.
const (
	DefaultMTU = 1500       // what containers expect
	MinMTU     = 576        // bytes of IP packet: what every IPv4 host can receive (RFC 791)
	MinMTU6    = 1280       // with an IPv6 subnet (RFC 8200 §5)
	MaxMTU     = tap.MaxMTU // the most a TAP has
	MaxVNI     = 1<<24 - 1  // RFC 7348 §5
	MaxQueues  = 64         // of an attachment, and so descriptors of a Device
	MaxIfName  = 15         // bytes; Linux IFNAMSIZ less the zero
	MaxSnapLen = 256 << 10

	maxAliases   = 64
	maxPublishes = 256
	maxSpec      = 256 // bytes of a port specification
	maxResolvers = 16
	maxHostname  = 64 // bytes; Linux __NEW_UTS_LEN
	maxFilter    = 4096
	maxPath      = 4095 // bytes; Linux PATH_MAX less the zero
	maxSocket    = 107  // bytes of a unix socket's path; unix(7)
)

// Gateway is the name of the gateway's port on every network; no attachment has it.
const Gateway = "gateway"

// CheckName says whether s can name a network or an attachment: a DNS label (RFC 1123 §2.1), since that is how others find it. The error is an *Error of CodeInvalid.
func CheckName(s string) error {
	ok := len(s) > 0 && len(s) <= 63 && s[0] != '-' && s[len(s)-1] != '-'
	for i := 0; ok && i < len(s); i++ {
		c := s[i] | 0x20 // lower case, for letters
		ok = c >= 'a' && c <= 'z' || s[i] >= '0' && s[i] <= '9' || s[i] == '-'
	}
	if !ok {
		return Errorf(CodeInvalid, "use 1 to 63 letters, digits and hyphens, not starting or ending with a hyphen", "name %q is not a host name", abbreviate(s))
	}
	return nil
}

// abbreviate keeps an error on one line whatever was given.
func abbreviate(s string) string {
	const most = 70
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}

// ParseResolver reads what --dns and the configuration file take: ADDR or ADDR:PORT, with an IPv6 address before a port in brackets. The port is 53 if not given.
func ParseResolver(s string) (netip.AddrPort, error) {
	ap, err := netip.ParseAddrPort(s)
	if a, aerr := netip.ParseAddr(s); aerr == nil {
		ap, err = netip.AddrPortFrom(a, 53), nil
	}
	if err == nil {
		err = checkResolver(ap)
	}
	if err != nil {
		return netip.AddrPort{}, Errorf(CodeInvalid, "write ADDR or ADDR:PORT, such as 9.9.9.9 or [2620:fe::fe]:53", "resolver %q is not the address of one", abbreviate(s))
	}
	return ap, nil
}

func checkResolver(ap netip.AddrPort) error {
	if a := ap.Addr(); !a.IsValid() || a.IsUnspecified() || a.IsMulticast() || ap.Port() == 0 {
		return Errorf(CodeInvalid, "write ADDR:PORT of a resolver, such as 9.9.9.9:53", "resolver %q cannot be asked", ap)
	}
	return nil
}

// Validate checks what can be checked without a node. The error is an *Error of CodeInvalid.
func (s *NetworkSpec) Validate() error {
	if err := CheckName(s.Name); err != nil {
		return fmt.Errorf("network: %w", err)
	}
	if err := s.validate(); err != nil {
		return fmt.Errorf("network %q: %w", s.Name, err)
	}
	return nil
}

func (s *NetworkSpec) validate() error {
	six := false
	for i, p := range s.Subnets {
		if _, err := ipam.ParseSubnet(p.String()); err != nil {
			return Errorf(CodeInvalid, "give an IPv4 subnet of /8 to /30, an IPv6 subnet of /16 to /126, or none for a free one", "%w", err)
		}
		for _, q := range s.Subnets[:i] {
			if p.Overlaps(q) {
				return Errorf(CodeInvalid, "give at most one IPv4 and one IPv6 subnet", "subnets %s and %s overlap", q, p)
			}
			if p.Addr().Is4() == q.Addr().Is4() {
				return Errorf(CodeInvalid, "give at most one IPv4 and one IPv6 subnet", "subnets %s and %s are of the same IP version", q, p)
			}
		}
		six = six || p.Addr().Is6()
	}
	for i, g := range s.Gateways {
		if _, err := ipam.ParseIP(g.String(), s.Subnets...); err != nil {
			return Errorf(CodeInvalid, "give an address inside one of the network's subnets, or none for the first of each", "gateway: %w", err)
		}
		for _, h := range s.Gateways[:i] {
			if g.Is4() == h.Is4() {
				return Errorf(CodeInvalid, "give one gateway a subnet", "gateways %s and %s are on the same subnet", h, g)
			}
		}
	}
	if err := s.checkTunnel(); err != nil {
		return err
	}
	switch {
	case s.MTU != 0 && (s.MTU < MinMTU || s.MTU > MaxMTU):
		return Errorf(CodeInvalid, fmt.Sprintf("take one from %d to %d, or from %d with IPv6", MinMTU, MaxMTU, MinMTU6), "MTU %d is out of range", s.MTU)
	case s.MTU != 0 && s.MTU < MinMTU6 && six:
		return Errorf(CodeInvalid, fmt.Sprintf("take at least %d, or an IPv4 subnet alone", MinMTU6), "MTU %d is too small for IPv6", s.MTU)
	case s.VNI > MaxVNI:
		return Errorf(CodeInvalid, fmt.Sprintf("take one from 1 to %d", MaxVNI), "VNI %d is out of range", s.VNI)
	case len(s.DNS) > maxResolvers:
		return Errorf(CodeInvalid, fmt.Sprintf("give at most %d", maxResolvers), "%d resolvers are too many", len(s.DNS))
	case s.Internal && (len(s.DNS) > 0 || s.HostLoopback || s.LinkLocal):
		return Errorf(CodeInvalid, "leave out dns, hostLoopback and linkLocal, or internal", "an internal network reaches no resolver, no host and no link-local address")
	}
	for _, ap := range s.DNS {
		if err := checkResolver(ap); err != nil {
			return err
		}
	}
	return nil
}

// checkTunnel looks at what is for peers on other hosts.
func (s *NetworkSpec) checkTunnel() error {
	for i, r := range s.IPRanges {
		if !r.IsValid() || r != r.Masked() {
			return Errorf(CodeInvalid, "write ADDR/LENGTH without bits behind the length, such as 10.9.0.64/26", "range %s of addresses is none", r)
		}
		if !slices.ContainsFunc(s.Subnets, func(p netip.Prefix) bool { return p.Overlaps(r) && r.Bits() >= p.Bits() }) {
			return Errorf(CodeInvalid, "give the subnet too, and a part of it that this node alone hands out", "range %s of addresses is in no subnet that was given", r)
		}
		for _, q := range s.IPRanges[:i] {
			if q.Addr().Is4() == r.Addr().Is4() {
				return Errorf(CodeInvalid, "give at most one IPv4 and one IPv6 range", "ranges %s and %s are of the same IP version", q, r)
			}
		}
	}
	for _, p := range s.Subnets {
		if len(s.IPRanges) > 0 && s.VNI != 0 && !slices.ContainsFunc(s.IPRanges, p.Overlaps) {
			return Errorf(CodeInvalid, "give one of it too, since other nodes hand addresses out as well", "subnet %s has no range, and another one has", p)
		}
	}
	if err := s.Wire.check(); err != nil {
		return err
	}
	if s.Group != "" {
		if _, _, err := ParseGroup(s.Group); err != nil {
			return err
		}
		if s.Seal {
			return Errorf(CodeInvalid, "leave one of them out", "a sealed network has no kernel among its peers, and so no use for a group")
		}
	}
	what := ""
	switch {
	case s.VNI != 0:
	case s.Wire != "":
		what = "a wire"
	case s.Seal:
		what = "seal"
	case s.Port != 0:
		what = "a port"
	case s.Group != "":
		what = "a group"
	}
	if what != "" {
		return Errorf(CodeInvalid, "give it a VNI too, its number on all its nodes", "%s is for a network on several hosts", what)
	}
	return nil
}

// ParseGroup reads a multicast group and the interface on which it is: ADDR%IFACE. The error is an *Error of CodeInvalid.
func ParseGroup(s string) (group netip.Addr, iface string, err error) {
	addr, iface, _ := strings.Cut(s, "%")
	group, err = netip.ParseAddr(addr)
	if err != nil || !group.IsMulticast() || iface == "" || len(iface) > 15 || strings.ContainsAny(iface, "/ \t\n") {
		return group, iface, Errorf(CodeInvalid, "write ADDR%IFACE, such as 239.1.1.1%eth0 or ff05::100%eth0", "group %q is none", abbreviate(s))
	}
	return group.Unmap(), iface, nil
}

// Validate checks what can be checked without a node. The error is an *Error of CodeInvalid.
func (s *AttachmentSpec) Validate() error {
	for _, check := range []func() error{s.checkNames, s.checkAddrs, s.checkLimits, s.checkPlace} {
		if err := check(); err != nil {
			if s.Name == "" {
				return fmt.Errorf("attachment: %w", err)
			}
			return fmt.Errorf("attachment %q: %w", abbreviate(s.Name), err)
		}
	}
	return nil
}

func (s *AttachmentSpec) checkNames() error {
	names := append([]string(nil), s.Aliases...)
	if len(names) > maxAliases {
		return Errorf(CodeInvalid, fmt.Sprintf("give at most %d", maxAliases), "%d aliases are too many", len(names))
	}
	if s.Name != "" {
		names = append(names, s.Name)
	}
	seen := make(map[string]bool, len(names))
	for _, n := range names {
		if err := CheckName(n); err != nil {
			return err
		}
		n = strings.ToLower(n)
		if n == Gateway {
			return Errorf(CodeInvalid, "choose another", "name %q is the gateway's", n)
		}
		if seen[n] {
			return Errorf(CodeInvalid, "leave it out once", "name %q is given twice", n)
		}
		seen[n] = true
	}
	if s.Hostname == "" {
		return nil
	}
	if len(s.Hostname) > maxHostname {
		return Errorf(CodeInvalid, fmt.Sprintf("use at most %d bytes", maxHostname), "host name %q is too long", abbreviate(s.Hostname))
	}
	for label := range strings.SplitSeq(s.Hostname, ".") {
		if err := CheckName(label); err != nil {
			return fmt.Errorf("host name %q: %w", s.Hostname, err)
		}
	}
	return nil
}

func (s *AttachmentSpec) checkAddrs() error {
	for i, a := range s.Addrs {
		if !a.IsValid() || a.Zone() != "" || a.Is4In6() || a.IsUnspecified() || a.IsMulticast() || a.IsLoopback() || a.IsLinkLocalUnicast() {
			return Errorf(CodeInvalid, "give one of the network's subnets, such as 10.88.0.5", "address %q is no container's", a)
		}
		for _, b := range s.Addrs[:i] {
			if a.Is4() == b.Is4() {
				return Errorf(CodeInvalid, "give at most one IPv4 and one IPv6 address", "addresses %s and %s are of the same IP version", b, a)
			}
		}
	}
	if s.MAC.IsGroup() {
		return Errorf(CodeInvalid, "give one whose first byte is even, such as 02:00:5e:10:00:01", "MAC %s is a group address", s.MAC)
	}
	return nil
}

func (s *AttachmentSpec) checkLimits() error {
	if s.Rate < 0 || s.StormLimit < 0 || s.MACLimit < 0 {
		return Errorf(CodeInvalid, "give a positive number, or 0 for the default", "a limit is negative (rate %d, stormLimit %d, macLimit %d)", s.Rate, s.StormLimit, s.MACLimit)
	}
	if s.Queues < 0 || s.Queues > MaxQueues {
		return Errorf(CodeInvalid, fmt.Sprintf("take 1 to %d", MaxQueues), "%d queues", s.Queues)
	}
	if len(s.Publish) > maxPublishes {
		return Errorf(CodeInvalid, fmt.Sprintf("give at most %d; one may be a range of ports", maxPublishes), "%d published ports are too many", len(s.Publish))
	}
	for _, p := range s.Publish {
		if err := (&PublishSpec{Spec: p}).Validate(); err != nil {
			return err
		}
	}
	return nil
}

// checkPlace looks at where the attachment's far end is to be.
func (s *AttachmentSpec) checkPlace() error {
	if s.Device != "" {
		var k tap.Kind
		if err := k.UnmarshalText([]byte(s.Device)); err != nil {
			return Errorf(CodeInvalid, "use auto, tap or packet", "device %q is not known", abbreviate(s.Device))
		}
	}
	if err := checkIfName(s.IfName); err != nil {
		return err
	}
	if s.PID < 0 {
		return Errorf(CodeInvalid, "give that of a living process", "pid %d is none", s.PID)
	}
	if err := checkPath("netns", s.NetNS, maxPath); err != nil {
		return err
	}
	if err := checkPath("stream", s.Stream, maxSocket); err != nil {
		return err
	}
	switch s.Lifetime {
	case LifetimeSession, LifetimeNamespace:
		if s.Stream != "" {
			return Errorf(CodeInvalid, "leave it out, or use lifetime stream", "a stream socket has no meaning with lifetime %s", s.Lifetime)
		}
	case LifetimeStream:
		switch {
		case s.Stream == "":
			return Errorf(CodeInvalid, "give the path of the unix socket to listen on", "lifetime stream without a stream socket")
		case s.PID != 0 || s.NetNS != "" || s.IfName != "" || s.Queues > 1 || s.Device != "" && s.Device != tap.KindAuto.String():
			return Errorf(CodeInvalid, "leave out pid, netns, ifname, queues and device", "a virtual machine has no namespace and no interface of ours")
		}
	case "":
		return Errorf(CodeInvalid, "use session, namespace or stream", "no lifetime is given")
	default:
		return Errorf(CodeInvalid, "use session, namespace or stream", "lifetime %q is not known", abbreviate(string(s.Lifetime)))
	}
	return nil
}

// checkIfName is stricter than the kernel (net/core/dev.c, dev_valid_name), which takes any byte but a few and reads % as a pattern.
func checkIfName(s string) error {
	bad := len(s) > MaxIfName || s == "." || s == ".."
	for _, c := range []byte(s) {
		bad = bad || c <= ' ' || c >= 0x7f || strings.IndexByte("/:%", c) >= 0
	}
	if bad {
		return Errorf(CodeInvalid, fmt.Sprintf("use at most %d letters, digits, dots and hyphens, such as eth0", MaxIfName), "interface name %q is none that Linux takes", abbreviate(s))
	}
	return nil
}

func checkPath(what, s string, most int) error {
	switch {
	case s == "":
		return nil
	case len(s) > most:
		return Errorf(CodeInvalid, "choose a shorter one", "%s path %q of %d bytes is longer than %d", what, abbreviate(s), len(s), most)
	case !filepath.IsAbs(s), strings.IndexByte(s, 0) >= 0:
		return Errorf(CodeInvalid, "give an absolute path", "%s path %q means nothing to another process", what, abbreviate(s))
	}
	return nil
}

// Validate checks what can be checked without a node, which parses Spec. The error is an *Error of CodeInvalid.
func (s *PublishSpec) Validate() error {
	bad := s.Spec == "" || len(s.Spec) > maxSpec
	for _, c := range []byte(s.Spec) {
		bad = bad || c <= ' ' || c >= 0x7f
	}
	if bad {
		return Errorf(CodeInvalid, "write [HOSTIP:]HOSTPORT[-END]:PORT[-END][/tcp|/udp], such as 8080:80", "publish %q is no port specification", abbreviate(s.Spec))
	}
	return nil
}

// Validate checks what can be checked without a node, which compiles Filter. The error is an *Error of CodeInvalid.
func (s *CaptureSpec) Validate() error {
	if s.Attachment != "" {
		if err := CheckName(s.Attachment); err != nil {
			return fmt.Errorf("capture: %w", err)
		}
	}
	switch {
	case len(s.Filter) > maxFilter, strings.IndexByte(s.Filter, 0) >= 0:
		return Errorf(CodeInvalid, fmt.Sprintf("use at most %d bytes", maxFilter), "capture: filter %q is no tcpdump expression", abbreviate(s.Filter))
	case s.SnapLen < 0 || s.SnapLen > MaxSnapLen:
		return Errorf(CodeInvalid, fmt.Sprintf("take 1 to %d, or 0 for all", MaxSnapLen), "capture: %d bytes of each frame", s.SnapLen)
	case s.Count < 0:
		return Errorf(CodeInvalid, "give a positive number, or 0 for no end", "capture: %d frames", s.Count)
	}
	return nil
}
