package kernel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"

	"golang.org/x/sys/unix"
)

// IPv6 opens a UDP socket on ::1.
func IPv6() Result {
	r := Result{Name: "ipv6", Need: "Linux 2.6"}
	fd, _, err := udpSocket(unix.AF_INET6)
	if err != nil {
		return fail(r, fmt.Sprintf("%v: containers reach IPv4 alone", err), "sudo sysctl -w net.ipv6.conf.all.disable_ipv6=0; see that the kernel was not started with ipv6.disable=1")
	}
	unix.Close(fd)
	return ok(r, "the host has IPv6 sockets")
}

// Ping opens an unprivileged ICMP socket of IP version 4 or 6.
func Ping(version int) Result {
	r := Result{Name: "ping4", Need: "Linux 3.0"}
	family, proto := unix.AF_INET, unix.IPPROTO_ICMP
	if version == 6 {
		r = Result{Name: "ping6", Need: "Linux 3.11"}
		family, proto = unix.AF_INET6, unix.IPPROTO_ICMPV6
	}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, proto)
	switch {
	case err == nil:
		unix.Close(fd)
		return ok(r, "containers can ping the world")
	case errors.Is(err, unix.EAFNOSUPPORT), errors.Is(err, unix.EPROTONOSUPPORT):
		return fail(r, fmt.Sprintf("ICMP socket: %v: containers cannot ping IPv%d", err, version), "none is needed where there is no IPv"+strconv.Itoa(version))
	}
	return fail(r, fmt.Sprintf("ICMP socket: %v: net.ipv4.ping_group_range is %q: containers cannot ping", err, readSysctl("net/ipv4/ping_group_range")),
		`sudo sysctl -w net.ipv4.ping_group_range="0 2147483647"`)
}

// LowPorts binds a port below 1024, as publishing port 80 would.
func LowPorts() Result {
	r := Result{Name: "low-ports", Need: "Linux 4.11"}
	// Some port below 1024 that nobody uses in practice. That it is in use means that it might be bound, too.
	err := bindTCP(1)
	if err == nil || errors.Is(err, unix.EADDRINUSE) {
		return ok(r, "every port can be published")
	}
	first := UnprivilegedPortStart()
	return fail(r, fmt.Sprintf("bind port 1: %v: ports below %d cannot be published", err, first), PortRemedy(80))
}

// UnprivilegedPortStart is the lowest port that anybody may bind.
func UnprivilegedPortStart() int {
	if n, err := strconv.Atoi(readSysctl("net/ipv4/ip_unprivileged_port_start")); err == nil {
		return n
	}
	return 1024
}

// PortRemedy is what makes a port below UnprivilegedPortStart bindable.
func PortRemedy(port int) string {
	return fmt.Sprintf("publish a port from %d on, or: sudo sysctl -w net.ipv4.ip_unprivileged_port_start=%d", UnprivilegedPortStart(), port)
}

func bindTCP(port int) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Bind(fd, &unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}})
}

// UDPSegment sends two datagrams with one UDP_SEGMENT call over loopback and receives both.
func UDPSegment() Result {
	r := Result{Name: "udp-segment", Need: "Linux 4.18"}
	if err := tryUDPSegment(false); err != nil {
		return fail(r, fmt.Sprintf("UDP_SEGMENT: %v: tunnels and UDP cost more CPU", err), "use Linux 4.18 or later; a sandbox kernel may lack it at any version")
	}
	return ok(r, "works over loopback")
}

// UDPGRO receives two datagrams in one read.
func UDPGRO() Result {
	r := Result{Name: "udp-gro", Need: "Linux 5.0"}
	if err := tryUDPSegment(true); err != nil {
		return fail(r, fmt.Sprintf("UDP_GRO: %v: tunnels and UDP cost more CPU", err), "use Linux 5.0 or later; a sandbox kernel may lack it at any version")
	}
	return ok(r, "works over loopback")
}

func tryUDPSegment(gro bool) error {
	const size = 100
	rx, addr, err := udpSocket(unix.AF_INET)
	if err != nil {
		return err
	}
	defer unix.Close(rx)
	tx, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(tx)
	if err := unix.SetsockoptTimeval(rx, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 1}); err != nil {
		return err
	}
	if gro {
		if err := unix.SetsockoptInt(rx, unix.IPPROTO_UDP, unix.UDP_GRO, 1); err != nil {
			return err
		}
	}
	if err := unix.SetsockoptInt(tx, unix.IPPROTO_UDP, unix.UDP_SEGMENT, size); err != nil {
		return err
	}
	data := append(bytes.Repeat([]byte{1}, size), bytes.Repeat([]byte{2}, size)...)
	if err := unix.Sendto(tx, data, 0, addr); err != nil {
		return err
	}
	buf, oob := make([]byte, 4*size), make([]byte, 64)
	if gro {
		n, oobn, _, _, err := unix.Recvmsg(rx, buf, oob, 0)
		if err != nil {
			return err
		}
		if got := groSize(oob[:oobn]); !bytes.Equal(buf[:n], data) || got != size {
			return fmt.Errorf("sent 2 datagrams of %d bytes, read %d bytes with a segment size of %d", size, n, got)
		}
		return nil
	}
	for i := range 2 {
		n, _, err := unix.Recvfrom(rx, buf, 0)
		if err != nil {
			return fmt.Errorf("datagram %d: %w", i+1, err)
		}
		if !bytes.Equal(buf[:n], data[i*size:(i+1)*size]) {
			return fmt.Errorf("datagram %d is not what was sent", i+1)
		}
	}
	return nil
}

// UDPMaxSegments is how many datagrams the kernel takes in one UDP_SEGMENT call: 64, or more where it says so over loopback (128 from Linux 6.10 on).
// It is 0 where UDPSegment fails.
func UDPMaxSegments() int {
	if !UDPSegment().OK {
		return 0
	}
	rx, addr, err := udpSocket(unix.AF_INET)
	if err != nil {
		return 64
	}
	defer unix.Close(rx)
	if err := unix.SetsockoptInt(rx, unix.IPPROTO_UDP, unix.UDP_SEGMENT, 1); err != nil {
		return 64
	}
	if err := unix.Sendto(rx, make([]byte, 128), unix.MSG_DONTWAIT, addr); err != nil {
		return 64
	}
	return 128
}

// groSize is the segment size in the control message of UDP_GRO, or 0.
func groSize(oob []byte) int {
	ms, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return 0
	}
	for _, m := range ms {
		if m.Header.Level == unix.IPPROTO_UDP && m.Header.Type == unix.UDP_GRO && len(m.Data) >= 4 {
			return int(binary.NativeEndian.Uint32(m.Data))
		}
	}
	return 0
}

// udpSocket is a UDP socket bound to a free port of the loopback address.
func udpSocket(family int) (fd int, addr unix.Sockaddr, err error) {
	if fd, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return -1, nil, err
	}
	addr = &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}
	if family == unix.AF_INET6 {
		addr = &unix.SockaddrInet6{Addr: [16]byte{15: 1}}
	}
	if err = unix.Bind(fd, addr); err == nil {
		addr, err = unix.Getsockname(fd)
	}
	if err != nil {
		unix.Close(fd)
		return -1, nil, err
	}
	return fd, addr, nil
}

// Splice moves bytes from a socket to a pipe without copying them through this process.
func Splice() Result {
	r := Result{Name: "splice", Need: "Linux 2.6.31"}
	if err := trySplice(); err != nil {
		return fail(r, fmt.Sprintf("splice: %v: joined host connections cost more CPU", err), "a sandbox kernel lacks it: run outside of it")
	}
	return ok(r, "works between a socket and a pipe")
}

func trySplice() error {
	sock, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(sock[0])
	defer unix.Close(sock[1])
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return err
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	want := []byte("splice")
	if _, err := unix.Write(sock[0], want); err != nil {
		return err
	}
	n, err := unix.Splice(sock[1], nil, pipe[1], nil, len(want), unix.SPLICE_F_NONBLOCK)
	if err != nil {
		return err
	}
	got := make([]byte, len(want)+1)
	m, err := unix.Read(pipe[0], got)
	if err != nil {
		return err
	}
	if int64(m) != n || !bytes.Equal(got[:m], want) {
		return fmt.Errorf("moved %d bytes, read %q", n, got[:m])
	}
	return nil
}
