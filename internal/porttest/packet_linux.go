package porttest

import (
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/frame"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
)

// PacketReader makes a Harness.Read of an interface in a namespace, such as the container's end of a TAP: what arrives there, superframes as
// they are, read through a packet socket. What the interface sends is left out. It ends with t.
func PacketReader(t testing.TB, ns *testbed.NS, link string) func(wait time.Duration) []frame.Frame {
	t.Helper()
	fd := -1
	var err error
	ns.Do(func() { fd, err = packetSocket(link) })
	if err != nil {
		t.Fatalf("packet socket on %s: %v", link, err)
	}
	r := &packetReader{fd: fd, wake: make(chan struct{}, 1), stop: make(chan struct{})}
	var wg sync.WaitGroup
	wg.Go(r.run)
	t.Cleanup(func() { close(r.stop); wg.Wait(); unix.Close(fd) })
	return r.read
}

func packetSocket(link string) (int, error) {
	const all = unix.ETH_P_ALL>>8 | unix.ETH_P_ALL<<8&0xff00 // network order
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, err
	}
	for _, opt := range []int{unix.PACKET_VNET_HDR, unix.PACKET_IGNORE_OUTGOING} {
		if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, opt, 1); err != nil {
			unix.Close(fd)
			return -1, err
		}
	}
	// As much as an ordinary user gets.
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 32<<20)
	ifr, err := unix.NewIfreq(link)
	if err == nil {
		err = unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, ifr)
	}
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: int(ifr.Uint32())})
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// maxBacklog is how many bytes a packetReader keeps for read. What comes when there are so many is thrown away, and costs no allocation.
const maxBacklog = 8 << 20

// packetReader empties the socket all the time, since its buffer is small.
type packetReader struct {
	fd   int
	wake chan struct{}
	stop chan struct{}

	mu      sync.Mutex
	got     []frame.Frame
	backlog int
}

func (r *packetReader) run() {
	buf := make([]byte, wire.VirtioNetHdrLen+wire.MaxFrame)
	poll := []unix.PollFd{{Fd: int32(r.fd), Events: unix.POLLIN}}
	for {
		select {
		case <-r.stop:
			return
		default:
		}
		n, err := unix.Read(r.fd, buf)
		if err != nil {
			_, _ = unix.Poll(poll, 20)
			continue
		}
		if n < wire.VirtioNetHdrLen {
			continue
		}
		r.keep(buf[:n])
		select {
		case r.wake <- struct{}{}:
		default:
		}
	}
}

func (r *packetReader) keep(b []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.backlog >= maxBacklog {
		return
	}
	var f frame.Frame
	f.Hdr.Decode(b)
	f.Data = append([]byte(nil), b[wire.VirtioNetHdrLen:]...)
	r.got = append(r.got, f)
	r.backlog += len(f.Data)
}

func (r *packetReader) read(wait time.Duration) []frame.Frame {
	deadline := time.After(wait)
	for {
		r.mu.Lock()
		got := r.got
		r.got, r.backlog = nil, 0
		r.mu.Unlock()
		if len(got) > 0 {
			return got
		}
		select {
		case <-r.wake:
		case <-deadline:
			return nil
		}
	}
}
