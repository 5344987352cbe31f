package tap

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"patchbay/internal/wire"
)

// DefaultMTU is the MTU of an interface unless asked for otherwise: bytes of IP packet. Superframes make a larger one pointless.
const DefaultMTU = 1500

// The MTUs Configure accepts: IPv4's least, and the most a TAP has.
const (
	MinMTU = 68
	MaxMTU = 65521
)

// IfConfig says how the container's side of an interface is to look. The zero value of each field but Name is a usable default.
type IfConfig struct {
	// Name of an interface that exists in the network namespace of the calling thread.
	Name string
	// Rename gives it this name first (the interface must be down). Empty: keep the name.
	Rename string
	// MAC to set; zero keeps the present one.
	MAC wire.MAC
	// MTU in bytes of IP packet; 0 means DefaultMTU. Below 1280 the kernel takes IPv6 off the interface.
	MTU int
	// TxQueueLen is how many frames wait for the switch before the kernel drops; 0 keeps the kernel's own.
	TxQueueLen int
	// GSOMaxSize is the longest superframe in bytes that the kernel is to make, its headers about; 0 keeps the kernel's own 65,536. A network whose superframes travel on in datagrams wants one
	// that fits them (tunnel.GSOMaxSize).
	GSOMaxSize int
	// Addrs are the addresses with their prefix length, IPv4 and IPv6. IPv6 ones skip duplicate address detection: IPAM has seen to it.
	Addrs []netip.Prefix
	// Routes are added in order, behind the addresses.
	Routes []Route
	// AcceptRA lets router advertisements configure the interface. By default they, and address autoconfiguration, are off.
	AcceptRA bool
	// KeepLoDown leaves the loopback interface as it is.
	KeepLoDown bool
}

// Route is one route through the interface being configured.
type Route struct {
	// Dst is the destination; 0.0.0.0/0 or ::/0 is the default route.
	Dst netip.Prefix `json:"dst"`
	// Via is the next hop; the zero Addr means that Dst is on the link.
	Via netip.Addr `json:"via,omitzero"`
	// OnLink takes Via as a neighbour although no address of the interface says so.
	OnLink bool `json:"onLink,omitempty"`
	// MTU of the route in bytes of IP packet; 0 is the interface's.
	MTU int `json:"mtu,omitempty"`
	// Metric is the priority; 0 is the kernel's default.
	Metric int `json:"metric,omitempty"`
}

// Configured is what Configure found and did.
type Configured struct {
	Name  string
	Index int
	MAC   wire.MAC
	MTU   int
	// Notes says, one line each, what could not be had but does not keep the interface from working: a read-only /proc/sys, no IPv6.
	Notes []string
}

// Configure sets up an interface of the calling thread's network namespace over netlink: name, MAC, MTU, addresses, routes, up, and the
// loopback up. It needs CAP_NET_ADMIN over the namespace. It may be called again on the same interface: addresses and routes that
// exist already are left alone. An error names the interface and the step; what was done before stays done.
func Configure(c IfConfig) (Configured, error) {
	// The netlink sockets and /proc/sys/net belong to the namespace of one thread.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return Configured{}, fmt.Errorf("configure %q: netlink: %w", c.Name, err)
	}
	defer nl.Close()
	out, err := configure(nl, c)
	if err != nil {
		if errors.Is(err, unix.EPERM) {
			return out, fmt.Errorf("configure %q: %w: needs CAP_NET_ADMIN over the network namespace; enter the user namespace that owns it first", c.Name, err)
		}
		return out, fmt.Errorf("configure %q: %w", c.Name, err)
	}
	return out, nil
}

func configure(nl *netlink.Handle, c IfConfig) (out Configured, err error) {
	if c.MTU == 0 {
		c.MTU = DefaultMTU
	}
	if c.MTU < MinMTU || c.MTU > MaxMTU {
		return out, fmt.Errorf("MTU %d: use %d to %d", c.MTU, MinMTU, MaxMTU)
	}
	link, err := nl.LinkByName(c.Name)
	if err != nil {
		return out, fmt.Errorf("find the interface: %w", err)
	}
	if c.Rename != "" && c.Rename != c.Name {
		if err := nl.LinkSetName(link, c.Rename); err != nil {
			return out, fmt.Errorf("rename to %q: %w", c.Rename, err)
		}
		c.Name = c.Rename
	}
	out.Name, out.Index = c.Name, link.Attrs().Index
	if c.MAC != (wire.MAC{}) {
		if c.MAC.IsGroup() {
			return out, fmt.Errorf("MAC %v: a group address cannot be an interface's; clear the lowest bit of its first byte", c.MAC)
		}
		if err := nl.LinkSetHardwareAddr(link, net.HardwareAddr(c.MAC[:])); err != nil {
			return out, fmt.Errorf("set MAC %v: %w", c.MAC, err)
		}
	}
	if err := nl.LinkSetMTU(link, c.MTU); err != nil {
		return out, fmt.Errorf("set MTU %d: %w", c.MTU, err)
	}
	if c.TxQueueLen > 0 {
		if err := nl.LinkSetTxQLen(link, c.TxQueueLen); err != nil {
			return out, fmt.Errorf("set transmit queue length %d: %w", c.TxQueueLen, err)
		}
	}
	if c.GSOMaxSize > 0 {
		if err := nl.LinkSetGSOMaxSize(link, c.GSOMaxSize); err != nil {
			out.Notes = append(out.Notes, fmt.Sprintf("configure %q: set the longest superframe to %d bytes: %v: longer ones travel in two pieces", c.Name, c.GSOMaxSize, err))
		}
	}
	// Before the interface is up, or the kernel has already asked for a router and begun duplicate address detection.
	out.Notes = append(out.Notes, ipv6Sysctls(c)...)
	if err := addAddrs(nl, link, c); err != nil {
		return out, err
	}
	if !c.KeepLoDown {
		lo, err := nl.LinkByName("lo")
		if err == nil {
			err = nl.LinkSetUp(lo)
		}
		if err != nil {
			return out, fmt.Errorf("bring lo up: %w", err)
		}
	}
	if err := nl.LinkSetUp(link); err != nil {
		return out, fmt.Errorf("bring it up: %w", err)
	}
	if err := addRoutes(nl, link, c); err != nil {
		return out, err
	}
	if link, err = nl.LinkByIndex(out.Index); err != nil {
		return out, fmt.Errorf("read it back: %w", err)
	}
	out.Notes = append(out.Notes, awaitLocal(nl, c)...)
	out.MTU = link.Attrs().MTU
	if hw := link.Attrs().HardwareAddr; len(hw) == 6 {
		out.MAC = wire.MAC(hw)
	}
	return out, nil
}

func addAddrs(nl *netlink.Handle, link netlink.Link, c IfConfig) error {
	for _, p := range c.Addrs {
		if !p.IsValid() {
			return fmt.Errorf("address %v is not valid", p)
		}
		a := &netlink.Addr{IPNet: ipNet(p)}
		if p.Addr().Is6() {
			a.Flags = unix.IFA_F_NODAD
		}
		if err := nl.AddrAdd(link, a); err != nil && !errors.Is(err, unix.EEXIST) {
			if p.Addr().Is6() && c.MTU < 1280 {
				return fmt.Errorf("add address %v: %w: IPv6 needs an MTU of 1280 or more", p, err)
			}
			return fmt.Errorf("add address %v: %w", p, err)
		}
	}
	return nil
}

// localWait bounds awaitLocal. The kernel takes a millisecond or two, or some tens when it is busy.
const localWait = time.Second

// awaitLocal waits until the kernel accepts packets for the IPv6 addresses. It installs their local routes from a work queue, after the address
// is there and the link is up; until then an answer, or a question for the link-layer address, is dropped, and the first connection waits a
// second for the retransmission. There is no call to wait with, and notifications may be lost, so it looks. It returns a note when it gave up.
func awaitLocal(nl *netlink.Handle, c IfConfig) []string {
	deadline := time.Now().Add(localWait)
	for _, p := range c.Addrs {
		if !p.Addr().Is6() {
			continue
		}
		for {
			r, err := nl.RouteGet(p.Addr().AsSlice())
			if err == nil && len(r) > 0 && r[0].Type == unix.RTN_LOCAL {
				break
			}
			if time.Now().After(deadline) {
				return []string{fmt.Sprintf("configure %q: the kernel does not accept packets for %v yet", c.Name, p.Addr())}
			}
			time.Sleep(200 * time.Microsecond)
		}
	}
	return nil
}

func addRoutes(nl *netlink.Handle, link netlink.Link, c IfConfig) error {
	for _, r := range c.Routes {
		nr := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(r.Dst.Masked()), MTU: r.MTU, Priority: r.Metric}
		if r.Via.IsValid() {
			nr.Gw = r.Via.AsSlice()
			if r.OnLink {
				nr.SetFlag(netlink.FLAG_ONLINK)
			}
		} else if r.Dst.Addr().Is4() {
			nr.Scope = netlink.SCOPE_LINK
		}
		if err := nl.RouteAdd(nr); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add route %v via %v: %w", r.Dst, r.Via, err)
		}
	}
	return nil
}

// ipv6Sysctls keeps surprises away: no router advertisement and no autoconfiguration changes what was asked for, and the link-local address
// is usable at once instead of after a second of duplicate address detection. It returns a note for what it could not do.
func ipv6Sysctls(c IfConfig) []string {
	dir := filepath.Join("/proc/sys/net/ipv6/conf", c.Name)
	if _, err := os.Stat(dir); err != nil {
		return []string{fmt.Sprintf("configure %q: no IPv6 settings (%v): IPv6 is off in this kernel, or /proc is not mounted", c.Name, err)}
	}
	set := [...][2]string{{"accept_ra", "0"}, {"autoconf", "0"}, {"router_solicitations", "0"}, {"dad_transmits", "0"}, {"accept_dad", "0"}, {"accept_redirects", "0"}}
	list := set[:]
	if c.AcceptRA {
		list = [][2]string{{"accept_ra", "2"}, {"dad_transmits", "0"}}
	}
	var notes []string
	for _, s := range list {
		if err := writeSysctl(filepath.Join(dir, s[0]), s[1]); err != nil {
			notes = append(notes, fmt.Sprintf("configure %q: %v: mount /proc/sys read-write, or set it from outside, or router advertisements may change the interface", c.Name, err))
		}
	}
	return notes
}

// writeSysctl writes v unless it is what the file says already, so that a read-only /proc/sys with the right values is no fault.
func writeSysctl(path, v string) error {
	if b, err := os.ReadFile(path); err == nil && string(b) == v+"\n" {
		return nil
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(v)
	return errors.Join(err, f.Close())
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// Configure is Configure for the handle's interface; it keeps Info up to date.
func (h *Handle) Configure(c IfConfig) (Configured, error) {
	c.Name = h.Name
	out, err := Configure(c)
	if out.Name != "" {
		h.Name = out.Name
	}
	if err == nil {
		h.MAC, h.MTU = out.MAC, out.MTU
	}
	return out, err
}

// HasDefaultRoute reports whether the calling thread's network namespace has a default route of the IP version.
func HasDefaultRoute(v6 bool) (bool, error) {
	family := netlink.FAMILY_V4
	if v6 {
		family = netlink.FAMILY_V6
	}
	rs, err := netlink.RouteList(nil, family)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return false, fmt.Errorf("list routes: %w", err)
	}
	for _, r := range rs {
		if r.Type != unix.RTN_UNICAST {
			continue
		}
		if r.Dst == nil {
			return true, nil
		}
		if ones, _ := r.Dst.Mask.Size(); ones == 0 {
			return true, nil
		}
	}
	return false, nil
}
