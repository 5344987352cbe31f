package offload

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { testbed.Main(m) }

// Between two kernels, everything is cut and joined by us: a frame that is wrong is dropped by the kernel that gets it, and the
// transfer does not end.
//
//	netns a                                                          netns b
//	sockets — TAP ── Validate ── Segmenter ──┬────────────────────── TAP — sockets
//	                                         └─ Coalescer ───────────┘
//
// The TAPs take all offloads, so the kernels send superframes and partial checksums.
func TestAgainstKernel(t *testing.T) {
	testbed.RequireTUN(t)
	for _, mode := range []string{"cut", "cut and joined"} {
		t.Run(mode, func(t *testing.T) {
			a, b := testbed.NewNS(t), testbed.NewNS(t)
			l := link{join: mode != "cut"}
			ta, tb := openTAP(t, a), openTAP(t, b)
			testbed.Up(t, a, "t0")
			testbed.Up(t, b, "t0")
			testbed.AddAddrs(t, a, "t0", netip.MustParsePrefix("10.77.0.1/24"), netip.MustParsePrefix("fd77::1/64"))
			testbed.AddAddrs(t, b, "t0", netip.MustParsePrefix("10.77.0.2/24"), netip.MustParsePrefix("fd77::2/64"))
			go l.relay(t, ta, tb)
			go l.relay(t, tb, ta)
			for _, addr := range []string{"10.77.0.2", "fd77::2"} {
				transferTCP(t, a, b, addr)
				transferUDP(t, a, b, addr)
			}
			if l.super.Load() < 100 || l.uso.Load() == 0 || l.partial.Load() == 0 {
				t.Errorf("the kernel sent %d TCP superframes, %d of UDP and %d partial checksums: too few to show anything", l.super.Load(), l.uso.Load(), l.partial.Load())
			}
			if (l.joined.Load() > 0) != l.join {
				t.Errorf("%d frames were joined", l.joined.Load())
			}
		})
	}
}

// A container may have tunnels of its own (a container engine, Kubernetes). Linux 6.17 and later leave the checksum of what is in the
// tunnel to be finished, far behind the outer headers, and complete the outer one.
func TestAgainstKernelTunnel(t *testing.T) {
	testbed.RequireTUN(t)
	ip := testbed.Tool(t, "ip")
	for _, join := range []bool{false, true} {
		t.Run(fmt.Sprintf("join=%v", join), func(t *testing.T) {
			l := link{join: join}
			var tap [2]*os.File
			ns := [2]*testbed.NS{testbed.NewNS(t), testbed.NewNS(t)}
			for i, n := range ns {
				tap[i] = openTAP(t, n)
				testbed.Up(t, n, "t0")
				testbed.AddAddrs(t, n, "t0", netip.MustParsePrefix(fmt.Sprintf("10.77.0.%d/24", i+1)))
				add := fmt.Sprintf("link add vx0 type vxlan id 7 local 10.77.0.%d remote 10.77.0.%d dstport 4789 udpcsum", i+1, 2-i)
				if out, err := n.Command(ip, strings.Fields(add)...).CombinedOutput(); err != nil {
					testbed.Lacking(t, "ip %s: %v: %s", add, err, out)
				}
				testbed.Up(t, n, "vx0")
				testbed.AddAddrs(t, n, "vx0", netip.MustParsePrefix(fmt.Sprintf("10.78.0.%d/24", i+1)))
			}
			go l.relay(t, tap[0], tap[1])
			go l.relay(t, tap[1], tap[0])
			transferTCP(t, ns[0], ns[1], "10.78.0.2")
			t.Logf("%d unfinished checksums, %d of them deep", l.partial.Load(), l.deep.Load())
		})
	}
}

type link struct {
	join                              bool
	super, uso, partial, joined, deep atomic.Int64
}

func (l *link) relay(t *testing.T, from, to *os.File) {
	buf := make([]byte, wire.VirtioNetHdrLen+wire.MaxFrame)
	hdr := make([]byte, wire.VirtioNetHdrLen)
	var s Segmenter
	var c Coalescer
	var store []byte
	var fs []frame.Frame
	send := func(h wire.VirtioNetHdr, vec [][]byte) {
		h.Encode(hdr)
		vec[0] = hdr
		sc, err := to.SyscallConn()
		if err != nil {
			return
		}
		_ = sc.Write(func(fd uintptr) bool {
			if _, err = unix.Writev(int(fd), vec); err != nil && !errors.Is(err, unix.EIO) {
				t.Errorf("the kernel refuses a frame with %+v: %v", h, err)
			}
			return true
		})
	}
	vec := make([][]byte, 0, 300)
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		f := frame.Frame{Data: buf[wire.VirtioNetHdrLen:n]}
		f.Hdr.Decode(buf)
		raw := f.Hdr
		if !f.Hdr.Validate(f.Data) {
			t.Errorf("a frame of the kernel's is refused: %+v, %x", raw, f.Data[:min(len(f.Data), 100)])
			continue
		}
		switch {
		case f.Hdr.GSO() == wire.GSOUDPL4:
			l.uso.Add(1)
		case f.Superframe():
			l.super.Add(1)
		case f.Hdr.Flags&wire.VirtioNeedsCsum != 0:
			l.partial.Add(1)
			if f.Hdr.CsumStart > 60 {
				l.deep.Add(1)
			}
		}
		count, ok := s.Reset(&f)
		if !ok {
			t.Errorf("Segmenter refuses %+v", f.Hdr)
			continue
		}
		if !l.join {
			head := make([]byte, s.HeadLen())
			for range count {
				send(wire.VirtioNetHdr{}, append(vec[:0], nil, head, s.Next(head)))
			}
			continue
		}
		store, fs = store[:0], fs[:0]
		if need := count * s.MaxLen(); cap(store) < need {
			store = make([]byte, 0, need)
		}
		for range count {
			at := len(store)
			store = s.Append(store)
			fs = append(fs, frame.Frame{Data: store[at:]})
		}
		for i := range c.Coalesce(fs, frame.CapAll) {
			h, v := c.Gather(i, append(vec[:0], nil))
			if h.GSOType != wire.GSONone {
				l.joined.Add(1)
			}
			send(h, v)
		}
	}
}

func openTAP(t *testing.T, ns *testbed.NS) *os.File {
	var f *os.File
	ns.Do(func() {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		ifr, _ := unix.NewIfreq("t0")
		ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
			t.Fatal(err)
		}
		if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, wire.VirtioNetHdrLen); err != nil {
			t.Fatal(err)
		}
		const tso = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6 | unix.TUN_F_TSO_ECN
		if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, tso|unix.TUN_F_USO4|unix.TUN_F_USO6); err != nil {
			testbed.Lacking(t, "TUN_F_USO4 is refused (%v): Linux 6.2 has it", err)
		}
		f = os.NewFile(uintptr(fd), "t0")
	})
	t.Cleanup(func() { f.Close() })
	return f
}

func transferTCP(t *testing.T, a, b *testbed.NS, addr string) {
	t.Helper()
	ln, err := b.Listen("tcp", net.JoinHostPort(addr, "7000"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	const total = 20 << 20
	got := make(chan string, 1)
	go func() {
		c, err := ln.Accept()
		if err != nil {
			got <- err.Error()
			return
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(30 * time.Second))
		h := sha256.New()
		n, err := io.Copy(h, c)
		got <- fmt.Sprintf("%d bytes, %v, %x", n, err, h.Sum(nil))
	}()
	c, err := a.DialContext(t.Context(), "tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	h := sha256.New()
	src := rand.NewChaCha8([32]byte{1})
	if _, err := io.CopyBuffer(struct{ io.Writer }{io.MultiWriter(c, h)}, io.LimitReader(src, total), make([]byte, 60000)); err != nil {
		t.Fatal(err)
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if want, have := fmt.Sprintf("%d bytes, <nil>, %x", total, h.Sum(nil)), <-got; have != want {
		t.Errorf("TCP to %s: received %s, sent %s", addr, have, want)
	}
}

// transferUDP sends datagrams by UDP_SEGMENT and expects each of them on the other side, with its boundaries.
func transferUDP(t *testing.T, a, b *testbed.NS, addr string) {
	t.Helper()
	pc, err := b.ListenPacket("udp", net.JoinHostPort(addr, "7001"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = pc.Close() }()
	c, err := a.DialContext(t.Context(), "udp", pc.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, size := range []int{1, 13, 1000, 1400} {
		raw, err := c.(syscall.Conn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		var set error
		err = raw.Control(func(fd uintptr) { set = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, size) })
		if err = errors.Join(err, set); err != nil {
			t.Fatal(err)
		}
		const count = 20
		payload := make([]byte, size*count+size/2) // the last is shorter, unless size is 1
		_, _ = rand.NewChaCha8([32]byte{byte(size)}).Read(payload)
		if _, err := c.Write(payload); err != nil {
			t.Fatal(err)
		}
		_ = pc.SetReadDeadline(time.Now().Add(10 * time.Second))
		buf := make([]byte, 2000)
		for off := 0; off < len(payload); {
			n, _, err := pc.ReadFrom(buf)
			if err != nil {
				t.Fatalf("UDP to %s by %d: after %d of %d bytes: %v", addr, size, off, len(payload), err)
			}
			if want := payload[off:min(off+size, len(payload))]; !bytes.Equal(buf[:n], want) {
				t.Fatalf("UDP to %s by %d: datagram of %d bytes at %d is wrong", addr, size, n, off)
			}
			off += n
		}
	}
}
