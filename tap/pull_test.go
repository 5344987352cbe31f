package tap

import (
	"errors"
	"net"
	"testing"

	"golang.org/x/sys/unix"

	"patchbay/frame"
	"patchbay/internal/testbed"
)

// countSink counts frames.
type countSink struct{ frames int }

func (s *countSink) Forward(fs []frame.Frame) { s.frames += len(fs) }

// A Puller hands on what is there without blocking, keeps others off its queue, and tells when the interface is gone.
func TestPuller(t *testing.T) {
	testbed.RequireTUN(t)
	ns := testbed.NewNS(t, "container")
	var h *Handle
	var err error
	ns.Do(func() {
		if h, err = Open(OpenConfig{Name: "eth0"}); err == nil {
			_, err = h.Configure(IfConfig{})
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	d, err := New(Config{Info: h.Info, FDs: h.FDs})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	sink := new(countSink)
	p, err := d.Pull(0, sink)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if _, err := d.Pull(0, sink); err == nil {
		t.Error("a second Pull had the queue too")
	}
	if err := d.Serve(t.Context(), 0, sink); err == nil {
		t.Error("Serve had the queue too")
	}
	for range 3 {
		if err := p.Step(); err != nil { // whatever IPv6 said when the link came up, or nothing: Step returns
			t.Fatal(err)
		}
	}
	before := sink.frames
	ns.Do(func() {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
		if err != nil {
			t.Error(err)
			return
		}
		defer unix.Close(fd)
		ifc, err := net.InterfaceByName("eth0")
		if err != nil {
			t.Error(err)
			return
		}
		frame := make([]byte, 64)
		copy(frame, []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 0x88, 0xb5})
		if err := unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: ifc.Index, Halen: 6}); err != nil {
			t.Error(err)
		}
	})
	pfd := []unix.PollFd{{Fd: int32(p.FD()), Events: unix.POLLIN}}
	if n, err := unix.Poll(pfd, 2000); n != 1 || err != nil {
		t.Fatalf("poll: %d, %v", n, err)
	}
	if err := p.Step(); err != nil || sink.frames == before {
		t.Errorf("Step: %d frames after %d, %v", sink.frames, before, err)
	}
	if out, err := ns.Command(testbed.Tool(t, "ip"), "link", "del", "eth0").CombinedOutput(); err != nil {
		t.Fatalf("ip link del: %v: %s", err, out)
	}
	if err := p.Step(); !errors.Is(err, ErrGone) {
		t.Errorf("Step on an interface that is gone: %v, want ErrGone", err)
	}
}
