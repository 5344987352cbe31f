package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"patchbay/internal/api"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
)

// fakeMachine is a connection as QEMU makes it.
type fakeMachine struct {
	t *testing.T
	net.Conn
}

func plugMachine(t *testing.T, socket string) *fakeMachine {
	t.Helper()
	c, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return &fakeMachine{t: t, Conn: c}
}

// send sends a broadcast from mac.
func (m *fakeMachine) send(mac wire.MAC) {
	m.t.Helper()
	b := make([]byte, 4+60)
	binary.BigEndian.PutUint32(b, 60)
	wire.PutEthernet(b[4:], wire.MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, mac, 0x88b5)
	if _, err := m.Write(b); err != nil {
		m.t.Fatal(err)
	}
}

// closed reports whether the node closes the connection.
func (m *fakeMachine) closed() bool {
	m.t.Helper()
	if err := m.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		m.t.Fatal(err)
	}
	_, err := io.Copy(io.Discard, m)
	return !errors.Is(err, os.ErrDeadlineExceeded)
}

// shows waits until vm is plugged with mac, or waits for a machine where mac is zero.
func (d *daemonProc) shows(mac wire.MAC) (at api.Attachment) {
	d.t.Helper()
	if !testbed.Wait(10*time.Second, func() bool {
		at = d.inspect("default", "vm")
		return at.State == api.StateUp && at.MAC == mac || at.State == api.StateWaiting && mac.IsZero()
	}) {
		d.t.Fatalf("vm is %+v, want it with MAC %s", at, mac)
	}
	return at
}

// The socket of a virtual machine, and who may have it. The machines are made by hand; TestQEMU has a real one.
//
//	[machine after machine] ── vm.sock ── daemon ── default
func TestStream(t *testing.T) {
	testbed.Leaks(t)
	one, two := wire.MAC{0x52, 0x54, 0, 0, 0, 1}, wire.MAC{0x52, 0x54, 0, 0, 0, 2}
	d := startDaemon(t)
	socket := filepath.Join(d.dir, "vm.sock")
	attach := func(args ...string) {
		t.Helper()
		d.do(append([]string{"attach", "default", "--stream", socket, "--name", "vm"}, args...)...)
	}
	attach("--ip", "10.88.0.9")
	own := func(at api.Attachment, mac wire.MAC) {
		t.Helper()
		b := at.Addrs[1].As16()
		id := wire.LinkLocal(mac).As16()
		copy(b[8:], id[8:])
		if want := []netip.Addr{netip.MustParseAddr("10.88.0.9"), netip.AddrFrom16(b)}; fmt.Sprint(at.Addrs) != fmt.Sprint(want) {
			t.Errorf("addresses %v, want %v", at.Addrs, want)
		}
	}

	// Whoever says nothing keeps nobody out, and whoever has said something is not put out.
	silent := plugMachine(t, socket)
	first := plugMachine(t, socket)
	if !silent.closed() {
		t.Error("a connection that says nothing stays, though a machine waits")
	}
	first.send(one)
	at := d.shows(one)
	own(at, one)
	second := plugMachine(t, socket)
	if !second.closed() {
		t.Error("a second machine is neither served nor refused")
	}
	if now := d.shows(one); now.Port != at.Port {
		t.Errorf("the first machine was on port %d and is on %d", at.Port, now.Port)
	}
	testbed.Eventually(t, 5*time.Second, func() bool { return strings.Contains(d.stderr.String(), "second virtual machine is refused") })

	// The next one may come before the end of the last was seen, and may be another.
	for i := range 20 {
		first.Close()
		first = plugMachine(t, socket)
		mac := []wire.MAC{two, one}[i%2]
		first.send(mac)
		own(d.shows(mac), mac)
	}
	first.Close()
	d.shows(wire.MAC{})

	// What makes no sense ends its own connection alone.
	for name, b := range map[string][]byte{"framing": {0, 0, 0, 1}, "a group's address": append([]byte{0, 0, 0, 14}, []byte("\xff\xff\xff\xff\xff\xff\x01\x00\x00\x00\x00\x01\x08\x00")...)} {
		bad := plugMachine(t, socket)
		if _, err := bad.Write(b); err != nil {
			t.Fatal(err)
		}
		if !bad.closed() {
			t.Errorf("%s: the connection stays", name)
		}
	}

	// What is promised while no machine is there is on disk too.
	d.do("publish", "add", "vm", "8090:80")
	d.end(syscall.SIGKILL)
	d.start()
	if at := d.shows(wire.MAC{}); len(at.Publish) != 1 {
		t.Errorf("published ports after the daemon was killed: %+v", at.Publish)
	}
	first = plugMachine(t, socket)
	first.send(two)
	own(d.shows(two), two)

	// A takeover that fails leaves the machine where it was, one that works hands it on, with its connection. Nobody notices.
	heard := func() bool { // whether what a container broadcasts arrives
		before := d.inspect("default", "vm").Traffic
		first.send(two)
		return testbed.Wait(5*time.Second, func() bool { return d.inspect("default", "vm").Traffic.RxFrames > before.RxFrames })
	}
	successor, err := d.client().TakeOver(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for machines, end := 0, false; !end; {
		p, fds, err := successor.Next()
		if err != nil {
			t.Fatal(err)
		}
		for _, fd := range fds {
			syscall.Close(fd)
		}
		if p.Kind == api.PartMachine {
			machines++
		}
		if end = p.Kind == api.PartEnd; end && machines != 1 {
			t.Errorf("%d machines are handed over, want 1", machines)
		}
	}
	successor.Close()
	testbed.Eventually(t, 10*time.Second, func() bool { return strings.Contains(d.stderr.String(), "nobody took over") })
	if d.shows(two); !heard() {
		t.Error("after a takeover that failed the machine is not heard")
	}
	for i := range 2 {
		old := d.cmd
		d.launch("--takeover")
		if err := old.Wait(); err != nil {
			t.Fatalf("takeover %d: the old daemon: %v: %s", i, err, d.stderr)
		}
		own(d.shows(two), two)
		if !heard() {
			t.Fatalf("takeover %d: the machine is not heard", i)
		}
	}
	if second := plugMachine(t, socket); !second.closed() {
		t.Error("after a takeover a second machine is not refused")
	}

	// A detach takes the socket with it, and ends the machine's connection.
	d.do("detach", "vm")
	if !first.closed() {
		t.Error("the connection outlives the attachment")
	}
	if _, err := os.Lstat(socket); !os.IsNotExist(err) {
		t.Errorf("the socket is still there: %v", err)
	}

	// But not one that is somebody else's by now; and a MAC that was asked for is held.
	attach("--mac", one.String())
	stranger := plugMachine(t, socket)
	stranger.send(two)
	at = d.shows(one)
	testbed.Eventually(t, 5*time.Second, func() bool {
		stranger.send(two)
		return strings.Contains(d.do("drops", "default"), "spoof")
	})
	if err := os.Remove(socket); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	d.do("detach", "vm")
	if _, err := os.Lstat(socket); err != nil {
		t.Errorf("somebody else's socket is gone: %v", err)
	}
}
