package mmsg

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

func TestSockaddr(t *testing.T) {
	for _, c := range []struct {
		addr string
		v6   bool
		len  uint32
	}{
		{"192.0.2.1:4789", false, unix.SizeofSockaddrInet4},
		{"192.0.2.1:4789", true, unix.SizeofSockaddrInet6},
		{"[2001:db8::1]:8472", true, unix.SizeofSockaddrInet6},
	} {
		ap := netip.MustParseAddrPort(c.addr)
		var s Sockaddr
		for i := range s {
			s[i] = 0xee // what an earlier use left
		}
		if n := s.Put(ap, c.v6, 0); n != c.len {
			t.Errorf("%s: %d bytes", c.addr, n)
		}
		if got, ok := s.Get(); !ok || got != ap {
			t.Errorf("%s: read back as %v, %v", c.addr, got, ok)
		}
	}
	var s Sockaddr
	s.Put(netip.MustParseAddrPort("[fe80::1]:1"), true, 7)
	if binary.NativeEndian.Uint32(s[24:]) != 7 {
		t.Error("the scope is not where sin6_scope_id is")
	}
	if _, ok := (&Sockaddr{}).Get(); ok {
		t.Error("an address of no family is read")
	}
}

func pair(t testing.TB) (a, b int) {
	t.Helper()
	for _, fd := range []*int{&a, &b} {
		var err error
		if *fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(*fd) })
		if err := unix.Bind(*fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
			t.Fatal(err)
		}
	}
	return a, b
}

func TestSendAndRecv(t *testing.T) {
	a, b := pair(t)
	if err := unix.SetsockoptInt(b, unix.IPPROTO_IP, unix.IP_RECVTOS, 1); err != nil {
		t.Fatal(err)
	}
	sa, _ := unix.Getsockname(b)
	var name Sockaddr
	n := name.Put(netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(sa.(*unix.SockaddrInet4).Port)), false, 0)
	ms := make([]Msg, 3)
	iovs := make([]unix.Iovec, 6)
	var ctl Control
	binary.NativeEndian.PutUint32(ctl.Add(unix.IPPROTO_IP, unix.IP_TOS, 4), 3)
	for i := range ms {
		iovs[2*i], iovs[2*i+1] = Iovec([]byte{byte(i), 1}), Iovec([]byte{2, 3, 4}[:i])
		h := &ms[i].Hdr
		h.Name, h.Namelen, h.Iov = &name[0], n, &iovs[2*i]
		h.SetIovlen(2)
		ctl.Attach(h)
	}
	if n, errno := Send(a, ms); n != 3 || errno != 0 {
		t.Fatalf("sent %d: %v", n, errno)
	}
	var got [4]Msg
	var bufs [4][16]byte
	var ctls [4]Control
	for i := range got {
		iov := Iovec(bufs[i][:])
		h := &got[i].Hdr
		h.Iov = &iov
		h.SetIovlen(1)
		h.Control = &ctls[i].Bytes()[0]
		h.SetControllen(ControlLen)
	}
	if n, errno := Recv(b, got[:], 0); n != 3 || errno != 0 {
		t.Fatalf("received %d: %v", n, errno)
	}
	for i := range 3 {
		if int(got[i].N) != 2+i || bufs[i][0] != byte(i) {
			t.Errorf("message %d: %d bytes, %v", i, got[i].N, bufs[i])
		}
		level, typ, data, rest, ok := Next(ctls[i].Bytes()[:got[i].Hdr.Controllen])
		if !ok || level != unix.IPPROTO_IP || typ != unix.IP_TOS || data[0] != 3 || len(rest) != 0 {
			t.Errorf("message %d: control message %d %d %v, %d more, %v", i, level, typ, data, len(rest), ok)
		}
	}
	if _, errno := Recv(b, got[:], 0); errno != unix.EAGAIN {
		t.Errorf("an empty socket says %v", errno)
	}
}

func TestNextSurvivesNonsense(t *testing.T) {
	var c Control
	c.Add(1, 2, 4)
	c.Add(3, 4, 1)
	b := c.Bytes()[:c.n]
	if _, typ, data, rest, ok := Next(b); !ok || typ != 2 || len(data) != 4 || len(rest) != unix.CmsgSpace(1) {
		t.Errorf("first: %d %v %d %v", typ, data, len(rest), ok)
	}
	for n := range len(b) {
		for r := b[:n]; ; {
			_, _, _, rest, ok := Next(r)
			if !ok {
				break
			}
			if len(rest) >= len(r) {
				t.Fatal("makes no progress")
			}
			r = rest
		}
	}
	for _, l := range []uint64{0, 1, 15, 1 << 40, ^uint64(0)} {
		var c Control
		c.w[0] = l
		if _, _, _, _, ok := Next(c.Bytes()); ok {
			t.Errorf("a message of length %d is taken", l)
		}
	}
}
