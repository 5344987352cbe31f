package bench

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The contenders of scenario tunnel. Those that have an interface of their own have the near and the far end on it, in the namespaces that play the two hosts; the others in a container on
// each host.

// Bytes that a tunnel takes of the underlay's MTU.
const (
	vxlanTakes     = 50
	wireguardTakes = 80 // with IPv6 outside, as its own tools count
	nebulaTakes    = 28 + 16 + 16
)

// underlayMTU is the MTU between the hosts.
func (s *site) underlayMTU() int { return cmp.Or(s.under.mtu, 1500) }

// end is one side of a tunnel: its host, its addresses outside and inside, and those of the other side.
type end struct {
	name                   string // at most 8 bytes, for devices
	host, container        space
	outer, inner           string
	otherOuter, otherInner string
}

func (s *site) ends() [2]end {
	return [2]end{
		{host: s.host, outer: uplinkAddr, inner: nearAddr, otherOuter: serverAddr, otherInner: farAddr, name: "near", container: s.client},
		{host: s.peer, outer: serverAddr, inner: farAddr, otherOuter: uplinkAddr, otherInner: nearAddr, name: "far", container: s.server},
	}
}

// openUnderlay makes the two hosts and what is between them.
func (s *site) openUnderlay() (err error) {
	if s.peer, err = s.space("peer"); err != nil {
		return err
	}
	if s.under.loss > 0 {
		err = s.lossyWire()
	} else {
		err = veth(s.host, "up0", s.peer, "up0")
	}
	if err != nil {
		return err
	}
	for _, e := range s.ends() {
		if err := e.host.addr("up0", e.outer+"/24"); err != nil {
			return err
		}
		if err := e.host.link("up0", func(l netlink.Link) error { return netlink.LinkSetMTU(l, s.underlayMTU()) }); err != nil {
			return err
		}
	}
	return nil
}

// lossyWire joins the two hosts over a bridge in a namespace of its own, which drops. Nobody's packet socket sees a packet before that.
func (s *site) lossyWire() error {
	nft, err := find("nft")
	if err != nil {
		return fmt.Errorf("%w: what drops packets here; install package nftables", err)
	}
	between, err := s.space("between")
	if err != nil {
		return err
	}
	for i, host := range []space{s.host, s.peer} {
		if err := veth(host, "up0", between, fmt.Sprintf("p%d", i)); err != nil {
			return err
		}
		if err := host.link("up0", noGSO); err != nil {
			return err
		}
	}
	if err := between.bridge("br0", "p0", "p1"); err != nil {
		return err
	}
	rules := fmt.Sprintf("table bridge bench {\nchain between {\ntype filter hook forward priority 0;\nether type ip numgen random mod 1000 < %d drop\n}\n}\n", s.under.loss)
	return between.run(rules, nft, "-f", "-")
}

// onDevices addresses the two ends' devices, which are there and named by name, and starts the far side and the agent.
func (s *site) onDevices(mtu int, name func(end) string) error {
	for _, e := range s.ends() {
		dev := name(e)
		set := e.host.link(dev, func(l netlink.Link) error { return netlink.LinkSetMTU(l, mtu) })
		if err := errors.Join(set, e.host.addr(dev, e.inner+"/24"), e.host.up(dev)); err != nil {
			return err
		}
	}
	if err := s.serve(s.peer, asRoot, farAddr); err != nil {
		return err
	}
	return s.startAgent(s.host)
}

// kernelVXLAN is the baseline. What its devices send is never cut into MTU-sized packets, since a veth takes superframes.
func (s *site) kernelVXLAN() error {
	for _, e := range s.ends() {
		err := e.host.Do(func() error {
			la := netlink.NewLinkAttrs()
			la.Name = "vx0"
			return netlink.LinkAdd(&netlink.Vxlan{
				LinkAttrs: la, VxlanId: 9, Port: 4789, SrcAddr: net.ParseIP(e.outer), Group: net.ParseIP(e.otherOuter), UDPCSum: true, Learning: true,
			})
		})
		if err != nil {
			return fmt.Errorf("vxlan device: %w", err)
		}
	}
	for _, e := range s.ends() {
		err := e.host.link("vx0", func(l netlink.Link) error {
			for _, to := range s.silentPeers() {
				// As `bridge fdb append 00:00:00:00:00:00 dev vx0 dst ADDR`.
				err := netlink.NeighAppend(&netlink.Neigh{
					LinkIndex: l.Attrs().Index, Family: unix.AF_BRIDGE, State: netlink.NUD_PERMANENT, Flags: netlink.NTF_SELF, IP: net.ParseIP(to), HardwareAddr: make(net.HardwareAddr, 6),
				})
				if err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return s.onDevices(s.underlayMTU()-vxlanTakes, func(end) string { return "vx0" })
}

// patchbayTunnel is a daemon on each host, and a container on each daemon's network. options are those of `network create`.
func (s *site) patchbayTunnel(options ...string) error {
	psk := filepath.Join(s.dir, "psk")
	if err := os.WriteFile(psk, []byte(strings.Repeat("0123456789abcdef", 4)+"\n"), 0o600); err != nil {
		return err
	}
	const network = "bench"
	at := func(e end, command string, args ...string) []string {
		line := append([]string{self}, strings.Fields(command)...)
		return append(append(line, "--socket", filepath.Join(s.dir, e.name, "node.sock")), args...)
	}
	for _, e := range s.ends() {
		dir := filepath.Join(s.dir, e.name)
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
		daemon := at(e, "daemon", "--state-dir", filepath.Join(dir, "state"), "--listen", e.outer+":4789")
		if strings.Contains(strings.Join(options, " "), "--seal") {
			daemon = append(daemon, "--psk-file", psk)
		}
		cmd := exec.Command(daemon[0], daemon[1:]...)
		if err := s.launch(e.host, cmd, asOrdinary); err != nil {
			return err
		}
		lines := [][]string{
			at(e, "network create", append([]string{network, "--vni", "9", "--subnet", "198.18.2.0/24", "--gateway", "198.18.2.254"}, options...)...),
			at(e, "peer add", network, e.otherOuter),
		}
		for _, to := range s.silentPeers() {
			lines = append(lines, at(e, "peer add", network, to))
		}
		for _, line := range lines {
			if err := s.command(e.host, line); err != nil {
				return err
			}
		}
	}
	ends := s.ends()
	if err := s.serve(s.peer, asOrdinary, farAddr, at(ends[1], "run", "--network", network, "--name", "far", "--ip", farAddr, "--")...); err != nil {
		return err
	}
	agent, err := s.agentRole()
	if err != nil {
		return err
	}
	return s.launchAgent(s.host, asOrdinary, append(at(ends[0], "run", "--network", network, "--name", "near", "--ip", nearAddr, "--"), agent...)...)
}

// silentPeers are addresses on the underlay that nobody has.
func (s *site) silentPeers() (out []string) {
	for i := range s.under.peers {
		out = append(out, fmt.Sprintf("198.18.0.%d", 10+i))
	}
	return out
}

// command runs a client of a daemon that may still be starting.
func (s *site) command(sp space, line []string) error {
	ctx, cancel := context.WithTimeout(context.Background(), reachTime)
	defer cancel()
	for {
		var out bytes.Buffer
		cmd := exec.CommandContext(ctx, line[0], line[1:]...)
		cmd.Stdout, cmd.Stderr = &out, &out
		err := sp.startOrdinary(cmd)
		if err == nil {
			err = cmd.Wait()
		}
		if err == nil {
			return nil
		}
		if ctx.Err() != nil || !strings.Contains(out.String(), "node.sock") {
			return s.why(fmt.Errorf("%s: %w: %s", strings.Join(line[1:], " "), err, strings.TrimSpace(out.String())))
		}
		time.Sleep(20 * time.Millisecond)
	}
}
