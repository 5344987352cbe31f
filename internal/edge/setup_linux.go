package edge

import (
	"errors"
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"patchbay/tap"
)

// privateMounts cuts the mount namespace off from the host's: nothing mounted here shows there, and nothing mounted there shows here.
func privateMounts() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return explain("make the container's mounts private", err, "user namespaces come without rights here: look for a security module's message in the kernel log")
	}
	return nil
}

// network brings the container's network into being and hands its descriptors to the parent.
func (e *edgeProc) network() error {
	switch e.spec.mode() {
	case NetContainer: // it has one
	case NetNone:
		if err := loopbackUp(); err != nil {
			return explain("bring lo up", err, "user namespaces come without rights here: look for a security module's message in the kernel log")
		}
	case NetPrivate:
		if len(e.spec.Interfaces) == 0 {
			if err := loopbackUp(); err != nil {
				return explain("bring lo up", err, "user namespaces come without rights here: look for a security module's message in the kernel log")
			}
		}
		for i := range e.spec.Interfaces {
			if err := e.addInterface(&e.spec.Interfaces[i]); err != nil {
				return &Error{Status: StatusFailed, Err: err}
			}
		}
	}
	return e.link.send(message{Kind: msgDevice}) // that is all of them
}

func (e *edgeProc) addInterface(f *Interface) error {
	h, err := tap.Open(tap.OpenConfig{Name: f.Name, Kind: f.Kind, Queues: f.Queues, Plain: f.ForcePlain})
	if err != nil {
		return err
	}
	out, err := h.Configure(f.ifConfig())
	if err != nil {
		return err
	}
	e.mu.Lock()
	e.handles = append(e.handles, h)
	e.mu.Unlock()
	return e.link.send(message{Kind: msgDevice, Device: &h.Info, Notes: append(h.Notes, out.Notes...)}, h.FDs...)
}

// ifConfig is how the interface is to be configured.
func (f *Interface) ifConfig() tap.IfConfig {
	c := tap.IfConfig{MAC: f.MAC, MTU: f.MTU, GSOMaxSize: f.GSOMaxSize, TxQueueLen: f.TxQueueLen, Addrs: f.Addrs, AcceptRA: f.AcceptRA}
	if f.Gateway4.IsValid() {
		c.Routes = append(c.Routes, defaultRoute(f, netip.PrefixFrom(netip.IPv4Unspecified(), 0), f.Gateway4))
	}
	if f.Gateway6.IsValid() {
		c.Routes = append(c.Routes, defaultRoute(f, netip.PrefixFrom(netip.IPv6Unspecified(), 0), f.Gateway6))
	}
	c.Routes = append(c.Routes, f.Routes...)
	return c
}

// defaultRoute reaches its gateway on the link even where no prefix of the interface holds it, as with a /32.
func defaultRoute(f *Interface, dst netip.Prefix, via netip.Addr) tap.Route {
	r := tap.Route{Dst: dst, Via: via, OnLink: true}
	for _, a := range f.Addrs {
		if a.Contains(via) {
			r.OnLink = false
		}
	}
	if via.IsLinkLocalUnicast() {
		r.OnLink = false
	}
	return r
}

// loopbackUp needs no netlink.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		if fd, err = unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, ifr); err != nil {
		return err
	}
	ifr.SetUint16(ifr.Uint16() | unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
}

// furnish sets up everything else the container sees: host name, /proc, /sys, resolv.conf, hosts.
func (e *edgeProc) furnish() error {
	if h := e.spec.Hostname; h != "" {
		if err := unix.Sethostname([]byte(h)); err != nil {
			return explain(fmt.Sprintf("set the host name %q", h), err, "choose another, or none")
		}
	}
	if e.spec.PID {
		// Over the old one, whose numbers would be those of another PID namespace.
		if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
			return explain("mount /proc for the PID namespace", err,
				"parts of the present /proc are covered, as in a container, so the kernel allows no fresh one: run without --pid")
		}
	}
	if e.spec.mode() != NetHost {
		if err := privateSysfs(); err != nil {
			e.notes = append(e.notes, fmt.Sprintf("/sys/class/net shows the host's interfaces: %v", err))
		}
	}
	return e.files()
}

// privateSysfs lets /sys show the container's interfaces. Only the two directories that belong to a network namespace are replaced, so that
// cgroups and whatever else is mounted below /sys stay.
func privateSysfs() error {
	return withScratch(func(dir string) error {
		err := unix.Mount("sysfs", dir, "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
		if errors.Is(err, unix.EPERM) {
			err = unix.Mount("sysfs", dir, "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC|unix.MS_RDONLY, "")
		}
		if err != nil {
			return fmt.Errorf("mount sysfs: %w", err)
		}
		for _, d := range []string{"/class/net", "/devices/virtual/net"} {
			if err := unix.Mount(dir+d, "/sys"+d, "", unix.MS_BIND, ""); err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("bind /sys%s: %w", d, err)
			}
		}
		return nil
	})
}

// withScratch calls f with a directory on which f mounts something. The mount is detached when f returns; what f has bound out of it stays.
// Nobody but this process sees the directory covered meanwhile.
func withScratch(f func(dir string) error) error {
	for _, dir := range []string{"/tmp", "/run", "/var", "/mnt"} {
		if fi, err := os.Stat(dir); err != nil || !fi.IsDir() {
			continue
		}
		var before, after unix.Stat_t
		_ = unix.Stat(dir, &before)
		err := f(dir)
		if _ = unix.Stat(dir, &after); before.Dev != after.Dev {
			if uerr := unix.Unmount(dir, unix.MNT_DETACH); uerr != nil && err == nil {
				err = fmt.Errorf("unmount %s: %w", dir, uerr)
			}
		}
		return err
	}
	return errors.New("none of /tmp, /run, /var and /mnt is a directory to mount on")
}
