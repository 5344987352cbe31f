package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"patchbay/internal/api"
	"patchbay/internal/testbed"
	"patchbay/internal/testbed/probe"
)

// guest is a virtual machine that script/qemu-guest has made, and that does what it is told on its serial console.
type guest struct {
	t       *testing.T
	cmd     *exec.Cmd
	console io.WriteCloser
	lines   chan string // closed when it is gone
	stderr  *lockedBuffer
}

// startGuest boots one with the network that options of QEMU describe, and waits until DHCP has been asked.
func startGuest(t *testing.T, network ...string) *guest {
	t.Helper()
	qemu := testbed.Tool(t, "qemu-system-x86_64")
	dir, err := filepath.Abs("../../bin/guest")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "stamp")); err != nil {
		testbed.Lacking(t, "there is no guest: %v; `make test` makes it (script/qemu-guest)", err)
	}
	g := &guest{t: t, lines: make(chan string, 1000), stderr: &lockedBuffer{}}
	g.cmd = exec.Command(qemu, append([]string{
		"-accel", "tcg", "-m", "128", "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot",
		"-kernel", filepath.Join(dir, "vmlinuz"), "-initrd", filepath.Join(dir, "initrd"), "-append", "console=ttyS0 quiet loglevel=0 panic=-1",
	}, network...)...)
	g.cmd.Stderr = g.stderr
	if g.console, err = g.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := g.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := g.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(g.lines)
		for s := bufio.NewScanner(out); s.Scan(); {
			g.lines <- strings.TrimRight(s.Text(), "\r")
		}
	}()
	t.Cleanup(g.end)
	if said, ok := g.until("guest is up"); !ok {
		t.Fatalf("the guest does not come up: %s%s", said, g.stderr)
	}
	t.Logf("the guest is up after %v", time.Since(began).Round(100*time.Millisecond))
	return g
}

// end pulls the plug. Idempotent.
func (g *guest) end() {
	if g.cmd.ProcessState == nil {
		_ = g.cmd.Process.Kill() // Wait tells of nothing else
		for range g.lines {
		}
		_ = g.cmd.Wait()
	}
}

// until reads the console up to a line that begins with mark. It returns what came before, and then that line.
func (g *guest) until(mark string) (said string, ok bool) {
	late := time.After(time.Minute)
	for {
		select {
		case l, open := <-g.lines:
			if !open {
				return said, false
			}
			said += l + "\n"
			if strings.HasPrefix(l, mark) {
				return said, true
			}
		case <-late:
			return said, false
		}
	}
}

// do runs a line of shell in the guest and returns what it wrote.
func (g *guest) do(line string) string {
	g.t.Helper()
	if _, err := fmt.Fprintln(g.console, line); err != nil {
		g.t.Fatalf("guest: %v: %s", err, g.stderr)
	}
	said, ok := g.until("status ")
	said, status, _ := strings.Cut(said, "status ")
	if !ok || status != "0\n" {
		g.t.Fatalf("in the guest, %s: status %s: %s%s", line, status, said, g.stderr)
	}
	return said
}

// networkOptions is what `patchbay attach --stream` tells the user to start QEMU with.
func networkOptions(t *testing.T, said string) []string {
	t.Helper()
	_, options, ok := strings.Cut(said, "qemu-system-x86_64 … ")
	if !ok {
		t.Fatalf("attach does not say how to start a machine: %s", said)
	}
	return strings.Fields(options)
}

// A virtual machine is a port too. What it is told by DHCP and RA is what the node says it has; it reaches and is reached as containers are.
//
//	[web] eth0 ── tap ────┐ httpd on 80
//	                      default ── daemon ── [host: 127.0.0.1:8080 is vm1's 80] ── [external: a page on 8000]
//	[vm1] eth0 ── QEMU ───┘ httpd on 80
func TestQEMU(t *testing.T) {
	testbed.Leaks(t)
	busybox := testbed.Tool(t, "busybox")
	ext := testbed.NewExternal(t, "external")
	for _, a := range []netip.Addr{ext.Addr4, ext.Addr6} {
		l, err := ext.Listen("tcp", net.JoinHostPort(a.String(), "8000"))
		if err != nil {
			t.Fatal(err)
		}
		s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, "you are", hostOf(r.RemoteAddr)) })}
		go s.Serve(l)
		t.Cleanup(func() { s.Close() })
	}
	page := t.TempDir()
	if err := os.WriteFile(filepath.Join(page, "index.html"), []byte("I am web\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	d := startDaemon(t)
	d.background("web", "--network", "default", "--", busybox, "httpd", "-f", "-p", "80", "-h", page)
	web := stationOf(d.inspect("default", "web"))
	nw, err := d.client().Network(t.Context(), "default")
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(d.dir, "vm.sock")
	options := networkOptions(t, d.do("attach", "default", "--stream", socket, "--name", "vm1", "--alias", "machine", "-p", "8080:80"))
	help, err := exec.Command(testbed.Tool(t, "qemu-system-x86_64"), "-help").Output()
	if err != nil {
		t.Fatal(err)
	}
	_, ofStream, _ := strings.Cut(string(help), "-netdev stream,")
	ofStream, _, _ = strings.Cut(ofStream, "-netdev dgram,")
	reconnects := strings.Contains(ofStream, "reconnect=") // since QEMU 8.0
	if reconnects {
		options[1] += ",reconnect=1"
	}

	vm := startGuest(t, options...)
	works := func() api.Attachment {
		t.Helper()
		at := d.inspect("default", "vm1")
		if at.State != api.StateUp || len(at.Addrs) != 2 {
			t.Fatalf("vm1 is %+v", at)
		}
		if mac := strings.TrimSpace(vm.do("cat /sys/class/net/eth0/address")); mac != at.MAC.String() {
			t.Errorf("the guest's MAC is %s, the node's %s", mac, at.MAC)
		}
		if mtu := strings.TrimSpace(vm.do("cat /sys/class/net/eth0/mtu")); mtu != fmt.Sprint(nw.MTU) {
			t.Errorf("the guest's MTU is %s, want %d", mtu, nw.MTU)
		}
		want4, want6 := at.Addrs[0].String()+"/", at.Addrs[1].String()+"/"
		if got := vm.do("ip -4 addr show dev eth0 scope global; cat /tmp/udhcpc"); !strings.Contains(got, want4) {
			t.Fatalf("DHCP gave it %s; the node says %v", got, at.Addrs)
		}
		got := vm.do(`n=0; until ip -6 addr show dev eth0 scope global | grep -v tentative | grep inet6 || [ $n -gt 100 ]; do sleep .1; n=$((n+1)); done`)
		if !strings.Contains(got, want6) || strings.Count(got, "inet6") != 1 {
			t.Fatalf("RA gave it %s; the node says %v", got, at.Addrs)
		}
		vm.do("ping -c 1 -W 10 " + nw.Gateways[0].String())
		vm.do("ping6 -c 1 -W 10 " + nw.Gateways[1].String())
		vm.do("ping -c 1 -W 10 web")
		for _, c := range []struct{ host, want string }{
			{"web", "I am web\n"}, {"web.default.patchbay.internal", "I am web\n"}, {"[" + web.ip6.String() + "]", "I am web\n"},
			{ext.Addr4.String() + ":8000", "you are " + ext.HostAddr4.String() + "\n"}, {"[" + ext.Addr6.String() + "]:8000", "you are " + ext.HostAddr6.String() + "\n"},
		} {
			if got := vm.do("wget -qO- http://" + c.host + "/"); got != c.want {
				t.Errorf("from the guest, %s says %q, want %q", c.host, got, c.want)
			}
		}
		vm.do(`echo "I am vm1" >/www/index.html; pidof httpd || httpd -p 80 -h /www`)
		if o := probe.Try(probe.Attempt{Net: "http", Addr: "127.0.0.1:8080"}); o.Said != "I am vm1\n" {
			t.Errorf("its published port: %v", o)
		}
		list := []probe.Attempt{{Net: "http", Addr: "vm1"}, {Net: "http", Addr: "machine"}, {Net: "http", Addr: "[" + at.Addrs[1].String() + "]"}}
		for _, o := range d.tryRun(probe.Binary(t), []string{"--network", "default"}, list...) {
			if o.Said != "I am vm1\n" {
				t.Errorf("from a container: %v", o)
			}
		}
		if drops := d.do("drops", "default"); strings.Contains(drops, "spoof") {
			t.Errorf("the guest's own frames were dropped:\n%s", drops)
		}
		return at
	}
	before := works()

	// Another daemon takes over: the machine's connection too, which QEMU would not make again.
	d.takeOver()
	testbed.Eventually(t, 20*time.Second, func() bool { return d.up("web") && d.up("vm1") })
	if after := works(); fmt.Sprint(after.Addrs, after.MAC) != fmt.Sprint(before.Addrs, before.MAC) {
		t.Errorf("before the takeover vm1 was %+v\nand after it %+v", before, after)
	}

	d.end(syscall.SIGKILL)
	d.start()
	if !reconnects {
		vm.end()
		vm = startGuest(t, options...)
	}
	testbed.Eventually(t, 20*time.Second, func() bool { return d.up("web") && d.up("vm1") })
	if after := works(); fmt.Sprint(after.Addrs, after.MAC, after.Aliases, after.Publish) != fmt.Sprint(before.Addrs, before.MAC, before.Aliases, before.Publish) {
		t.Errorf("before the daemon was killed vm1 was %+v\nand after it %+v", before, after)
	}
	d.do("detach", "vm1")
	if _, err := os.Lstat(socket); !os.IsNotExist(err) {
		t.Errorf("the socket is still there: %v", err)
	}
}
