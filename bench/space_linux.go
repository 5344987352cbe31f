package bench

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"patchbay/internal/netns"
)

// space is a network namespace of a topology.
type space struct {
	name string
	*netns.Handle
}

// newSpace makes a namespace with lo up, ready for many short connections, whose TCP sockets have that congestion control, or reno; see settleCongestion.
func newSpace(name, congestion string) (space, error) {
	h, err := netns.New()
	if err != nil {
		return space{}, err
	}
	s := space{name, h}
	err = h.Do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		_, err = settleCongestion(congestion)
		return errors.Join(err, netlink.LinkSetUp(lo), shortConnections())
	})
	if err != nil {
		h.Close()
		return space{}, fmt.Errorf("namespace %s: %w", name, err)
	}
	return s, nil
}

// start starts cmd in s.
func (s space) start(cmd *exec.Cmd) error { return s.Do(cmd.Start) }

// startOrdinary starts cmd in s as a user without capabilities over it, yet able to make user namespaces.
func (s space) startOrdinary(cmd *exec.Cmd) error {
	const uid = 1000
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: uid, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: uid, HostID: os.Getgid(), Size: 1}},
	}
	return s.start(cmd)
}

// run runs a program in s to its end; its output is in the error.
func (s space) run(stdin, name string, args ...string) error {
	cmd := exec.Command(name, args...)
	cmd.Stdin = strings.NewReader(stdin)
	return s.Do(func() error {
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(string(out)))
		}
		return nil
	})
}

// veth joins two namespaces by a pair of devices at MTU 1500, both up.
func veth(a space, aName string, b space, bName string) error {
	err := a.Do(func() error {
		la := netlink.NewLinkAttrs()
		la.Name = aName
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: la, PeerName: bName, PeerNamespace: netlink.NsFd(b.FD())})
	})
	if err != nil {
		return fmt.Errorf("veth %s in %s, %s in %s: %w", aName, a.name, bName, b.name, err)
	}
	return errors.Join(a.up(aName), b.up(bName))
}

func (s space) link(name string, f func(netlink.Link) error) error {
	err := s.Do(func() error {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		return f(l)
	})
	if err != nil {
		return fmt.Errorf("%s in %s: %w", name, s.name, err)
	}
	return nil
}

func (s space) up(name string) error { return s.link(name, netlink.LinkSetUp) }

func (s space) addr(name, prefix string) error {
	a, err := netlink.ParseAddr(prefix)
	if err != nil {
		return err
	}
	if a.IP.To4() == nil {
		a.Flags |= unix.IFA_F_NODAD // nobody else is there
	}
	return s.link(name, func(l netlink.Link) error { return netlink.AddrAdd(l, a) })
}

func (s space) defaultRoute(name, via string) error {
	return s.link(name, func(l netlink.Link) error {
		return netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: net.ParseIP(via)})
	})
}

// bridge makes a bridge of links of s.
func (s space) bridge(name string, ports ...string) error {
	err := s.Do(func() error {
		la := netlink.NewLinkAttrs()
		la.Name = name
		return netlink.LinkAdd(&netlink.Bridge{LinkAttrs: la})
	})
	if err != nil {
		return fmt.Errorf("bridge in %s: %w", s.name, err)
	}
	return s.link(name, func(br netlink.Link) error {
		for _, p := range ports {
			l, err := netlink.LinkByName(p)
			if err != nil {
				return err
			}
			if err := netlink.LinkSetMaster(l, br); err != nil {
				return err
			}
		}
		return netlink.LinkSetUp(br)
	})
}

// give moves a link of s to another namespace.
func (s space) give(name string, to space) error {
	return s.link(name, func(l netlink.Link) error { return netlink.LinkSetNsFd(l, to.FD()) })
}
