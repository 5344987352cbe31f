package load

import (
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// SetCongestion has a TCP socket use the named congestion control; "" leaves it as it is. It must come before connect(2) or listen(2): BBR, once it has begun on a socket, leaves its pacing behind
// even where another takes its place. Accepted sockets have their listener's. An error is EPERM for one that neither the kernel lets everybody use nor the caller may, without CAP_NET_ADMIN over
// the network namespace, and ENOENT for one that is not there.
func SetCongestion(fd int, name string) error {
	if name == "" {
		return nil
	}
	if err := unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, name); err != nil {
		return fmt.Errorf("congestion control %s: %w", name, err)
	}
	return nil
}

// Congestion is the congestion control of a TCP socket.
func Congestion(fd int) (string, error) {
	name, err := unix.GetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION)
	if err != nil {
		return "", fmt.Errorf("congestion control: %w", err)
	}
	return name, nil
}

// Control is SetCongestion for the field of this name in net.Dialer and net.ListenConfig. It leaves UDP alone.
func Control(name string) func(network, addr string, c syscall.RawConn) error {
	return func(network, _ string, c syscall.RawConn) error {
		if name == "" || network != "tcp4" && network != "tcp6" {
			return nil
		}
		var serr error
		if err := c.Control(func(fd uintptr) { serr = SetCongestion(int(fd), name) }); err != nil {
			return err
		}
		return serr
	}
}

// CongestionOf is the congestion control of a connection or listener of package net.
func CongestionOf(c syscall.Conn) (name string, err error) {
	rc, err := c.SyscallConn()
	if err != nil {
		return "", err
	}
	var gerr error
	if err := rc.Control(func(fd uintptr) { name, gerr = Congestion(int(fd)) }); err != nil {
		return "", err
	}
	return name, gerr
}
