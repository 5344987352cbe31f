package tap

import (
	"net"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"patchbay/internal/testbed"
)

// sendUDPSegments sends n datagrams of size bytes with one send: UDP_SEGMENT. Datagram i is filled with byte(i).
func sendUDPSegments(t testing.TB, ns *testbed.NS, addr string, n, size int) {
	t.Helper()
	c, err := ns.DialContext(t.Context(), "udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	rc, err := c.(syscall.Conn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var serr error
	if err := rc.Control(func(fd uintptr) { serr = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, size) }); err != nil || serr != nil {
		t.Fatal(err, serr)
	}
	b := make([]byte, n*size)
	for i := range b {
		b[i] = byte(i / size)
	}
	if _, err := c.(*net.UDPConn).Write(b); err != nil {
		t.Fatal(err)
	}
}
