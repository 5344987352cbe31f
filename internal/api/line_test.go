package api

import (
	"errors"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// socketpair is a connection's two ends.
func socketpair(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		ends[i] = c.(*net.UnixConn)
		t.Cleanup(func() { c.Close() })
	}
	return ends[0], ends[1]
}

// TestLongLine: one that takes many reads arrives whole, with its descriptors.
func TestLongLine(t *testing.T) {
	a, b := socketpair(t)
	want := Device{Notes: []string{strings.Repeat("x", MaxBody-200)}, PID: 7}
	sent := make(chan error, 1)
	go func() { sent <- sendLine(a, want, 0, 1, 2) }()
	var got Device
	fds, err := recvLine(b, &got)
	if err != nil || len(fds) != 3 || got.PID != 7 || got.Notes[0] != want.Notes[0] {
		t.Errorf("%d descriptors, %d bytes, %v", len(fds), len(got.Notes), err)
	}
	closeAll(fds)
	if err := <-sent; err != nil {
		t.Error(err)
	}
	want.Notes[0] = strings.Repeat("x", MaxBody)
	if err := sendLine(a, want); err == nil || !strings.Contains(err.Error(), "at most 262144") {
		t.Errorf("too long: %v", err)
	}
}

// TestSessionLines: the client's reader keeps the beginning of a line when its context ends, and takes lines that come together one by one.
func TestSessionLines(t *testing.T) {
	// The client's side of a session is made by Client.session; the node's is played here.
	path := t.TempDir() + "/s"
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conns := make(chan *net.UnixConn, 1)
	go func() {
		c, err := l.AcceptUnix()
		if err != nil {
			close(conns)
			return
		}
		buf := make([]byte, 4096)
		_, _ = c.Read(buf)
		_, _ = c.Write([]byte("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: " + upgrade + "\r\n\r\n{\"name\":\"web\"}\n{\"kind\":\"det"))
		conns <- c
	}()
	se, err := NewClient(path).Attach(t.Context(), "lan", AttachmentSpec{Lifetime: LifetimeSession})
	if err != nil {
		t.Fatal(err)
	}
	defer se.Close()
	c := <-conns
	defer c.Close()
	if se.Plan().Name != "web" {
		t.Errorf("plan: %+v", se.Plan())
	}
	ctx, cancel := timeout(t, 20*time.Millisecond)
	defer cancel()
	if _, err := se.Wait(ctx); err == nil {
		t.Error("half a line is an event")
	}
	wrote := make(chan error, 1)
	go func() { // it is more than the socket holds
		_, err := c.Write([]byte("ached\"}\n{\"kind\":\"new\"}\nnonsense\n" + strings.Repeat("x", MaxBody)))
		wrote <- err
	}()
	defer func() {
		if err := <-wrote; err != nil {
			t.Error(err)
		}
	}()
	for _, kind := range []EventKind{EventDetached, "new"} {
		if e, err := se.Wait(t.Context()); err != nil || e.Kind != kind {
			t.Errorf("%+v, %v; want %s", e, err, kind)
		}
	}
	var e *Error
	if _, err := se.Wait(t.Context()); !errors.As(err, &e) || e.Code != CodeInternal {
		t.Errorf("nonsense: %v", err)
	}
	if _, err := se.Wait(t.Context()); err == nil || !strings.Contains(err.Error(), "a line longer than 262144 bytes") {
		t.Errorf("an endless line: %v", err)
	}
}

// FuzzDevice: what a client says in a session is a Device or an error, and on error no descriptor stays open.
func FuzzDevice(f *testing.F) {
	f.Add([]byte(`{"info":{"name":"eth0","kind":"tap","mac":"02:00:00:00:00:01","mtu":1500,"caps":31,"vnetHdr":true},"pid":7}`+"\n"), uint8(1), uint16(10))
	f.Add([]byte("{}\n{}\n"), uint8(0), uint16(3))
	f.Add([]byte(`{"identity":{"netDev":4,"netIno":18446744073709551615}}`+"\n"), uint8(2), uint16(0))
	f.Add([]byte("{\"error\":\"x\"}\n"), uint8(70), uint16(1))
	f.Add([]byte("{\"info\":"), uint8(1), uint16(1))
	f.Fuzz(func(t *testing.T, data []byte, fds uint8, cut uint16) {
		if len(data) == 0 {
			return
		}
		a, b := socketpair(t)
		p := make([]int, 2)
		if err := unix.Pipe2(p, unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
			t.Fatal(err)
		}
		defer unix.Close(p[0])
		var oob []byte
		if fds > 0 {
			l := make([]int, min(int(fds), 253))
			for i := range l {
				l[i] = p[1]
			}
			oob = unix.UnixRights(l...)
		}
		at := int(cut) % len(data)
		go func() { // the writes may be more than the socket holds
			defer a.Close()
			if at > 0 {
				if _, err := a.Write(data[:at]); err != nil {
					return
				}
			}
			if n, _, err := a.WriteMsgUnix(data[at:], oob, nil); err == nil && at+n < len(data) {
				_, _ = a.Write(data[at+n:])
			}
		}()
		var d Device
		got, err := recvLine(b, &d)
		if err != nil && got != nil || len(got) > MaxQueues {
			t.Errorf("%d descriptors with error %v", len(got), err)
		}
		closeAll(got)
		b.Close()
		for { // the writer's end
			if _, err := a.Write(nil); errors.Is(err, net.ErrClosed) {
				break
			}
			time.Sleep(100 * time.Microsecond)
		}
		unix.Close(p[1])
		if n, err := unix.Read(p[0], make([]byte, 1)); n != 0 || err != nil {
			t.Errorf("somebody still holds a descriptor: %d, %v", n, err)
		}
	})
}
