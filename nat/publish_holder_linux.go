package nat

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/user"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// bindError words the error of a host port that could not be opened: the port, the reason and the remedy.
func (p *Published) bindError(b *binding, err error) error {
	what := fmt.Sprintf("publish %s: host port %d/%s", p.spec, b.host.Port(), p.spec.Proto)
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return fmt.Errorf("%s is in use by %s; stop it or take another host port (%w)", what, portHolder(p.spec.Proto, b), err)
	case errors.Is(err, unix.EACCES):
		return fmt.Errorf("%s is reserved for root; take one of %d or above, or have root run: sysctl net.ipv4.ip_unprivileged_port_start=%d (%w)",
			what, unprivilegedPortStart(), b.host.Port(), err)
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return fmt.Errorf("%s: %s is not an address of this host; take one that `ip address` shows, or leave it out (%w)", what, b.host.Addr(), err)
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE):
		return fmt.Errorf("%s: no file descriptor is left; raise the limit (ulimit -n, LimitNOFILE=) or publish fewer ports (%w)", what, err)
	case errors.Is(err, unix.EAFNOSUPPORT):
		return fmt.Errorf("%s: this host has no IPv6; publish on an IPv4 address (%w)", what, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// unprivilegedPortStart is the lowest port that an ordinary user may bind here.
func unprivilegedPortStart() int {
	b, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start")
	if n, err2 := strconv.Atoi(strings.TrimSpace(string(b))); err == nil && err2 == nil {
		return n
	}
	return 1024
}

// portHolder says who holds the port that b wants, as far as this user may know. It reads /proc and costs some milliseconds.
func portHolder(proto string, b *binding) string {
	for _, file := range []string{proto, proto + "6"} {
		inode, uid, ok := findSocket("/proc/thread-self/net/"+file, proto, b)
		if !ok {
			continue
		}
		if pid, comm, ok := findInode(inode); ok {
			if pid == os.Getpid() {
				return fmt.Sprintf("this patchbay itself (pid %d)", pid)
			}
			return fmt.Sprintf("%s (pid %d)", comm, pid)
		}
		if uid == strconv.Itoa(os.Getuid()) {
			return "a process of yours that cannot be named because it hides its descriptors or runs in another container"
		}
		name := "uid " + uid
		if u, err := user.LookupId(uid); err == nil {
			name = "user " + u.Username
		}
		return fmt.Sprintf("a process of %s, which only that user and root can name", name)
	}
	return "a socket that /proc/net does not show"
}

// findSocket looks in a file such as /proc/net/tcp6 for the socket that keeps b from being bound.
func findSocket(file, proto string, b *binding) (inode, uid string, ok bool) {
	f, err := os.Open(file)
	if err != nil {
		return "", "", false
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		// sl local_address rem_address st tx:rx tr:tm retrnsmt uid timeout inode …
		w := strings.Fields(sc.Text())
		if len(w) < 10 || proto == TCP && w[3] != "0A" {
			continue
		}
		local, valid := parseProcAddr(w[1])
		if !valid || local.Port() != b.host.Port() || !overlap(local.Addr(), b) {
			continue
		}
		return w[9], w[7], true
	}
	return "", "", false
}

// overlap reports whether a socket bound to a keeps b from being bound. An IPv6 wildcard may or may not be for IPv4 too, which /proc
// does not say; it is taken to be.
func overlap(a netip.Addr, b *binding) bool {
	want := b.host.Addr().Unmap().WithZone("")
	return b.dual || a.Unmap() == want || a.IsUnspecified() && (a.Is6() || want.Is4()) || want.IsUnspecified() && want.Is4() == a.Unmap().Is4()
}

// parseProcAddr reads "0100007F:1F90": words of an address in the byte order of the machine, and the port.
func parseProcAddr(s string) (netip.AddrPort, bool) {
	ip, port, ok := strings.Cut(s, ":")
	n, err := strconv.ParseUint(port, 16, 16)
	if !ok || err != nil || len(ip) != 8 && len(ip) != 32 {
		return netip.AddrPort{}, false
	}
	var b []byte
	for i := 0; i < len(ip); i += 8 {
		w, err := strconv.ParseUint(ip[i:i+8], 16, 32)
		if err != nil {
			return netip.AddrPort{}, false
		}
		b = binary.NativeEndian.AppendUint32(b, uint32(w))
	}
	a, _ := netip.AddrFromSlice(b)
	return netip.AddrPortFrom(a, uint16(n)), true
}

// findInode looks for the process that has socket inode open, among those this user may look into.
func findInode(inode string) (pid int, comm string, ok bool) {
	want := "socket:[" + inode + "]"
	procs, err := os.ReadDir("/proc")
	if err != nil {
		return 0, "", false
	}
	for _, p := range procs {
		pid, err := strconv.Atoi(p.Name())
		if err != nil {
			continue
		}
		dir := "/proc/" + p.Name() + "/fd"
		d, err := os.Open(dir)
		if err != nil {
			continue
		}
		names, _ := d.Readdirnames(-1)
		d.Close()
		for _, n := range names {
			if l, err := os.Readlink(dir + "/" + n); err == nil && l == want {
				c, _ := os.ReadFile("/proc/" + p.Name() + "/comm")
				return pid, strings.TrimSpace(string(c)), true
			}
		}
	}
	return 0, "", false
}
