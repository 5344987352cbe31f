package api

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/internal/testbed"
	"patchbay/tap"
)

func attachWeb(t *testing.T, s *started, life Lifetime) *Session {
	t.Helper()
	se, err := s.client.Attach(t.Context(), "lan", AttachmentSpec{Name: "web", Lifetime: life})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { se.Close() })
	return se
}

// up plugs the session's device: the write end of a pipe, of which the node has a duplicate.
func up(t *testing.T, se *Session) (r *os.File) {
	t.Helper()
	r, w := pipe(t)
	defer unix.Close(w)
	a, err := se.Up(Device{Info: tap.Info{Name: "eth0"}, PID: 42, FDs: []int{w}})
	if err != nil {
		t.Fatal(err)
	}
	if a.Name != "web" || a.State != StateUp || a.PID != 42 {
		t.Errorf("attachment: %+v", a)
	}
	return r
}

func TestSession(t *testing.T) {
	s := start(t, ServerConfig{})
	s.network(t, "lan")
	se := attachWeb(t, s, LifetimeSession)
	if p := se.Plan(); p.Name != "web" || p.Network != "lan" || p.Interface.Name != "eth0" || p.Interface.Kind != tap.KindAuto || string(p.Hosts) != "127.0.0.1 localhost\n" {
		t.Errorf("plan: %+v", p)
	}
	r := up(t, se)
	a := s.session(t, 0)
	if a.peer.PID != os.Getpid() || a.peer.UID != os.Getuid() {
		t.Errorf("peer: %+v", a.peer)
	}
	if len(a.device.FDs) != 1 || a.device.Info.Name != "eth0" {
		t.Fatalf("device: %+v", a.device)
	}
	fd := a.device.FDs[0]
	if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("the node's descriptor is not close-on-exec: %v, %v", flags, err)
	}
	if _, err := unix.Write(fd, []byte("frame")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 16)
	if n, err := r.Read(b); err != nil || string(b[:n]) != "frame" {
		t.Errorf("through the descriptor: %q, %v", b[:n], err)
	}
	a.is(t, 1, 0, 0)

	// Wait ends with its context, and can be called again.
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	if _, err := se.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("wait: %v", err)
	}
	cancel()
	if err := s.client.Detach(t.Context(), "lan", "web"); err != nil {
		t.Fatal(err)
	}
	if e, err := se.Wait(t.Context()); err != nil || e.Kind != EventDetached {
		t.Errorf("wait: %+v, %v", e, err)
	}
	if _, err := se.Wait(t.Context()); !errors.Is(err, ErrNoNode) {
		t.Errorf("wait after the end: %v", err)
	}
	a.is(t, 1, 0, 1)
}

// TestSessionTAP hands over what it is made for.
func TestSessionTAP(t *testing.T) {
	testbed.RequireTUN(t)
	s := start(t, ServerConfig{})
	s.network(t, "lan")
	ns := testbed.NewNS(t)
	var h *tap.Handle
	var err error
	ns.Do(func() { h, err = tap.Open(tap.OpenConfig{Name: "eth0", Queues: 4}) })
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	se := attachWeb(t, s, LifetimeNamespace)
	if _, err := se.Up(Device{Info: h.Info, FDs: h.FDs}); err != nil {
		t.Fatal(err)
	}
	d := s.session(t, 0).device
	if len(d.FDs) != len(h.FDs) || d.Info != h.Info {
		t.Errorf("device: %+v, want %+v with %d descriptors", d, h.Info, len(h.FDs))
	}
	for _, fd := range d.FDs {
		ifr, err := unix.NewIfreq("")
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.IoctlIfreq(fd, unix.TUNGETIFF, ifr); err != nil || ifr.Name() != "eth0" {
			t.Errorf("descriptor %d is of interface %q: %v", fd, ifr.Name(), err)
		}
	}
	se.Close()
	s.session(t, 0).is(t, 1, 0, 1)
}

func TestSessionFail(t *testing.T) {
	s := start(t, ServerConfig{})
	s.network(t, "lan")
	se := attachWeb(t, s, LifetimeSession)
	if err := se.Fail("no /dev/net/tun"); err != nil {
		t.Error(err)
	}
	s.session(t, 0).is(t, 0, 1, 0)

	s.plugErr = Errorf(CodeConflict, "detach it", "port is taken")
	se = attachWeb(t, s, LifetimeSession)
	_, w := pipe(t)
	defer unix.Close(w)
	if _, err := se.Up(Device{FDs: []int{w}}); CodeOf(err) != CodeConflict || err.Error() != "port is taken; detach it" {
		t.Errorf("up: %v", err)
	}
	s.session(t, 1).is(t, 1, 1, 0) // an Abort after Plug does nothing
}

// TestClientDies is a client that vanishes at each step.
func TestClientDies(t *testing.T) {
	s := start(t, ServerConfig{})
	s.network(t, "lan")
	attachWeb(t, s, LifetimeSession).Close()
	s.session(t, 0).is(t, 0, 1, 0)

	se := attachWeb(t, s, LifetimeSession) // in the middle of a line, with a descriptor
	_, w := pipe(t)
	if _, _, err := se.conn.WriteMsgUnix([]byte(`{"info":`), unix.UnixRights(w), nil); err != nil {
		t.Fatal(err)
	}
	unix.Close(w)
	se.Close()
	s.session(t, 1).is(t, 0, 1, 0)

	se = attachWeb(t, s, LifetimeSession)
	r := up(t, se)
	se.Close()
	s.session(t, 2).is(t, 1, 0, 1)
	closeAll(s.session(t, 2).device.FDs)
	s.session(t, 2).plugged = false
	if _, err := r.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("somebody still holds a descriptor: %v", err)
	}

	// While the node is still thinking about it.
	s.mu.Lock()
	s.slow = make(chan struct{})
	s.mu.Unlock()
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		s.slowed(t)
		cancel()
	}()
	if _, err := s.client.Attach(ctx, "lan", AttachmentSpec{Name: "web", Lifetime: LifetimeSession}); !errors.Is(err, context.Canceled) {
		t.Errorf("attach: %v", err)
	}
	close(s.slow)
	s.session(t, 3).is(t, 0, 1, 0)
}

// TestServerDies is a node that ends at each step: a client sees it, and nothing that is up is left.
func TestServerDies(t *testing.T) {
	s := start(t, ServerConfig{})
	s.network(t, "lan")
	waiting := attachWeb(t, s, LifetimeSession)
	running := attachWeb(t, s, LifetimeSession)
	up(t, running)
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}
	s.session(t, 0).is(t, 0, 1, 0)
	s.session(t, 1).is(t, 1, 0, 0) // it waits for its client at the next node
	_, w := pipe(t)
	defer unix.Close(w)
	if _, err := waiting.Up(Device{FDs: []int{w}}); CodeOf(err) != CodeUnavailable {
		t.Errorf("up: %v", err)
	}
	if _, err := running.Wait(t.Context()); !errors.Is(err, ErrNoNode) {
		t.Errorf("wait: %v", err)
	}
	// It comes back at the next one.
	l, err := Listen(s.path)
	if err != nil {
		t.Fatal(err)
	}
	next := startOn(t, l, newFake(), ServerConfig{})
	next.network(t, "lan")
	if _, err := next.client.Resume(t.Context(), "lan", "web"); CodeOf(err) != CodeNotFound {
		t.Errorf("resume of what the node does not know: %v", err)
	}
	next.attachments["lan/web"] = Attachment{Network: "lan", Name: "web"}
	se, err := next.client.Resume(t.Context(), "lan", "web")
	if err != nil {
		t.Fatal(err)
	}
	up(t, se)
	se.Close()
	next.session(t, 0).is(t, 1, 0, 1)
}

// TestEndsTogether: when client and node end at once, the attachment waits for the next node all the same, whose business it is to find that the client has gone.
func TestEndsTogether(t *testing.T) {
	s := NewServer(ServerConfig{Backend: newFake()})
	ending := make(chan struct{})
	close(ending)
	for range 50 {
		a, b := socketpair(t)
		b.Close()
		att := &fakeAttaching{detached: make(chan struct{})}
		(&serverSession{s: s, conn: a, a: att, ending: ending}).watch()
		if att.leaves != 0 {
			t.Fatal("the attachment was left")
		}
	}
}

// TestHostileSession sends what no client of ours would. The reservation is undone, no descriptor stays open (start checks), and the error says why.
func TestHostileSession(t *testing.T) {
	fds := func(n int) []int {
		l := make([]int, n)
		for i := range l {
			l[i] = int(os.Stderr.Fd())
		}
		return l
	}
	for name, c := range map[string]struct {
		data string
		fds  int
		want string
	}{
		"no JSON":             {"hello\n", 1, "not JSON at byte 1"},
		"no object":           {"[]\n", 1, "a array where an object is due"},
		"unknown field":       {`{"info":{},"shoe":1}` + "\n", 1, `unknown field "shoe"`},
		"wrong type":          {`{"pid":"x"}` + "\n", 1, `field "pid": a string does not fit`},
		"no descriptor":       {"{}\n", 0, "no descriptors came with it"},
		"two lines":           {"{}\n{}\n", 1, "more than one line"},
		"two values":          {"{} {}\n", 1, "something follows the JSON value"},
		"too many":            {"{}\n", MaxQueues + 1, "more than 64 descriptors"},
		"far too many":        {"{}\n", 253, "more than 64 descriptors"},
		"endless line":        {strings.Repeat(" ", MaxBody), 1, "line longer than 262144 bytes"},
		"negative pid":        {`{"pid":-1}` + "\n", 1, "pid -1"},
		"error with a device": {`{"error":"x"}` + "\n", 3, "the client has no device: x"},
		"empty line":          {"\n", 1, "it is empty"},
	} {
		t.Run(name, func(t *testing.T) {
			s := start(t, ServerConfig{})
			s.network(t, "lan")
			se := attachWeb(t, s, LifetimeSession)
			var oob []byte
			if c.fds > 0 {
				oob = unix.UnixRights(fds(c.fds)...)
			}
			n, _, err := se.conn.WriteMsgUnix([]byte(c.data), oob, nil)
			if err == nil {
				_, err = se.conn.Write([]byte(c.data)[n:])
			}
			if err != nil && !isGone(err) {
				t.Fatal(err)
			}
			e, err := se.event()
			if err != nil || e.Kind != EventError || !strings.Contains(e.Error.Error(), c.want) || e.Error.Code != CodeInvalid {
				t.Errorf("answer: %+v, %v", e.Error, err)
			}
			s.session(t, 0).is(t, 0, 1, 0)
		})
	}
}

// TestSilentClient takes longer than it may.
func TestSilentClient(t *testing.T) {
	s := start(t, ServerConfig{DeviceTimeout: 50 * time.Millisecond})
	s.network(t, "lan")
	se := attachWeb(t, s, LifetimeSession)
	if e, err := se.event(); err != nil || e.Kind != EventError || !strings.Contains(e.Error.Message, "did not come within 50ms") {
		t.Errorf("answer: %+v, %v", e, err)
	}
	s.session(t, 0).is(t, 0, 1, 0)
}

// TestEarlyClient speaks before the plan.
func TestEarlyClient(t *testing.T) {
	s := start(t, ServerConfig{})
	s.network(t, "lan")
	c, err := net.Dial("unix", s.path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	body := `{"name":"web","lifetime":"session"}`
	fmt.Fprintf(c, "POST /v1/networks/lan/attachments HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: %s\r\nContent-Length: %d\r\n\r\n%s{}\n", upgrade, len(body), body)
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var r refusal
	if err := json.NewDecoder(resp.Body).Decode(&r); err != nil || resp.StatusCode != http.StatusBadRequest || r.Error.Code != CodeInvalid {
		t.Errorf("%s: %+v, %v", resp.Status, r.Error, err)
	}
	s.session(t, 0).is(t, 0, 1, 0)
}

// TestSessionClose unblocks whoever waits.
func TestSessionClose(t *testing.T) {
	s := start(t, ServerConfig{})
	s.network(t, "lan")
	se := attachWeb(t, s, LifetimeSession)
	up(t, se)
	waited := make(chan error, 1)
	go func() {
		_, err := se.Wait(context.Background())
		waited <- err
	}()
	time.Sleep(10 * time.Millisecond)
	se.Close()
	se.Close()
	select {
	case err := <-waited:
		if !errors.Is(err, net.ErrClosed) {
			t.Errorf("wait: %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Error("Wait does not end")
	}
}
