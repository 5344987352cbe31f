package main

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"

	"patchbay/internal/testbed"
	"patchbay/internal/testbed/probe"
)

// patchbay is the binary as an ordinary user of the test's host starts it.
func patchbay(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	testbed.RequireTUN(t)
	return testbed.AsOrdinaryUser(exec.Command(testbed.Build(t), args...))
}

// try runs the attempts in one container started with the flags, and returns what became of them.
func try(t *testing.T, flags []string, list ...probe.Attempt) []probe.Outcome {
	t.Helper()
	cmd := patchbay(t, append(append([]string{"run"}, flags...), "--", probe.Binary(t))...)
	cmd.Env = append(os.Environ(), probe.TryEnv(list...))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("patchbay run %v: %v: %s", flags, err, &stderr)
	}
	if stderr.Len() > 0 {
		t.Errorf("patchbay run %v wrote to standard error: %s", flags, &stderr)
	}
	return probe.Outcomes(t, out)
}

func serve(t *testing.T, in probe.Listener, addrs ...string) {
	t.Helper()
	s, err := probe.Serve(t.Context(), in, addrs...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
}

func hostOf(addr string) string {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return addr
	}
	return host
}

// want says what an attempt must come to: the address the server saw ("" for any), or the error.
type want struct {
	net, addr string
	from, err string
}

func check(t *testing.T, flags []string, wants []want) {
	t.Helper()
	list := make([]probe.Attempt, len(wants))
	for i, w := range wants {
		list[i] = probe.Attempt{Net: w.net, Addr: w.addr}
	}
	for i, o := range try(t, flags, list...) {
		w := wants[i]
		switch {
		case w.err == "" && !o.OK():
			t.Errorf("%v: want an answer", o)
		case w.err == "" && w.from != "" && hostOf(o.Said) != w.from:
			t.Errorf("%v: want it to be seen as %s", o, w.from)
		case w.err != "" && !strings.Contains("|"+w.err+"|", "|"+o.Err+"|"):
			t.Errorf("%v: want %s", o, w.err)
		}
	}
}

// The container's view outwards.
//
//	[container] eth0 ── patchbay ── [host] ext ── eth0 [external: server on 7, also 169.254.169.254]
//	                                  lo: server on 127.0.0.1 and ::1
func TestReachabilityOut(t *testing.T) {
	testbed.Leaks(t)
	testbed.RequirePing(t)
	ext := testbed.NewExternal(t, "external")
	metadata := netip.MustParseAddr("169.254.169.254")
	testbed.AddAddrs(t, ext.NS, "lo", netip.PrefixFrom(metadata, 32))
	testbed.AddRoute(t, testbed.Host(t), netip.PrefixFrom(metadata, 32), ext.Addr4)
	ap := func(a netip.Addr, port string) string { return net.JoinHostPort(a.String(), port) }
	serve(t, ext, ap(ext.Addr4, "7"), ap(ext.Addr6, "7"), ap(metadata, "7"))
	serve(t, nil, "127.0.0.1:7007", "[::1]:7007")

	const host4, host6 = "host.patchbay.internal:7007", "host.patchbay.internal:7007"
	common := []want{
		{net: "tcp", addr: ap(ext.Addr4, "7"), from: ext.HostAddr4.String()},
		{net: "tcp", addr: ap(ext.Addr6, "7"), from: ext.HostAddr6.String()},
		{net: "udp", addr: ap(ext.Addr4, "7"), from: ext.HostAddr4.String()},
		{net: "udp", addr: ap(ext.Addr6, "7"), from: ext.HostAddr6.String()},
		{net: "ping", addr: ext.Addr4.String()},
		{net: "ping", addr: ext.Addr6.String()},
		// Refused stays refused, unreachable stays unreachable.
		{net: "tcp", addr: ap(ext.Addr4, "9"), err: "ECONNREFUSED"},
		{net: "tcp", addr: ap(ext.Addr6, "9"), err: "ECONNREFUSED"},
		{net: "udp", addr: ap(ext.Addr4, "9"), err: "ECONNREFUSED"},
		{net: "udp", addr: ap(ext.Addr6, "9"), err: "ECONNREFUSED"},
		{net: "tcp", addr: "203.0.113.1:7", err: "ENETUNREACH|EHOSTUNREACH"},
		{net: "tcp", addr: "[2001:db8:ffff::1]:7", err: "ENETUNREACH|EHOSTUNREACH"},
		// Linux keeps an ICMP net or host unreachable from a UDP socket that did not ask for it (IP_RECVERR).
		{net: "udp", addr: "203.0.113.1:7", err: "ENETUNREACH|EHOSTUNREACH|timeout"},
		{net: "ping", addr: "203.0.113.1", err: "unreachable|silence"},
		// An address of the host's link that nobody has: nothing answers for it.
		{net: "ping", addr: netip.AddrFrom4([4]byte{198, 18, ext.Addr4.As4()[2], 77}).String(), err: "unreachable|silence"},
		// The container's own loopback is its own.
		{net: "tcp", addr: "127.0.0.1:7007", err: "ECONNREFUSED"},
		{net: "tcp", addr: "[::1]:7007", err: "ECONNREFUSED"},
		// The gateway has no service there.
		{net: "tcp", addr: "gateway.patchbay.internal:7007", err: "ECONNREFUSED"},
		{net: "ping", addr: "gateway.patchbay.internal"},
	}
	t.Run("default", func(t *testing.T) {
		check(t, nil, append(common,
			want{net: "tcp", addr: host4, err: "ECONNREFUSED"},
			want{net: "udp", addr: host4, err: "ECONNREFUSED|EACCES|EHOSTUNREACH"},
			want{net: "ping", addr: "host.patchbay.internal", err: "unreachable|silence"},
			want{net: "tcp", addr: "169.254.169.254:7", err: "ECONNREFUSED|EACCES|EHOSTUNREACH"},
			want{net: "udp", addr: "169.254.169.254:7", err: "ECONNREFUSED|EACCES|EHOSTUNREACH"},
			want{net: "ping", addr: "169.254.169.254", err: "unreachable|silence"},
		))
	})
	t.Run("host-loopback", func(t *testing.T) {
		check(t, []string{"--host-loopback"}, append(common,
			want{net: "tcp4", addr: host4, from: "127.0.0.1"},
			want{net: "tcp6", addr: host6, from: "::1"},
			want{net: "udp4", addr: host4, from: "127.0.0.1"},
			want{net: "udp6", addr: host6, from: "::1"},
			want{net: "ping", addr: "host.patchbay.internal"},
			want{net: "tcp", addr: "169.254.169.254:7", err: "ECONNREFUSED|EACCES|EHOSTUNREACH"},
		))
	})
	// On sockets of the host, and no difference to be seen in what is reached.
	t.Run("bypass", func(t *testing.T) {
		check(t, []string{"--bypass", "--host-loopback"}, append(common,
			want{net: "tcp4", addr: host4, from: "127.0.0.1"},
			want{net: "tcp6", addr: host6, from: "::1"},
			want{net: "tcp", addr: "169.254.169.254:7", err: "ECONNREFUSED|EACCES|EHOSTUNREACH"},
		))
		check(t, []string{"--bypass"}, []want{
			{net: "tcp", addr: host4, err: "ECONNREFUSED"},
			{net: "tcp", addr: "169.254.169.254:7", err: "ECONNREFUSED|EACCES|EHOSTUNREACH"},
		})
	})
	t.Run("link-local", func(t *testing.T) {
		check(t, []string{"--link-local"}, append(common,
			want{net: "tcp", addr: "169.254.169.254:7", from: ext.HostAddr4.String()},
			want{net: "udp", addr: "169.254.169.254:7", from: ext.HostAddr4.String()},
			want{net: "ping", addr: "169.254.169.254"},
			want{net: "tcp", addr: host4, err: "ECONNREFUSED"},
		))
	})
}

// background starts a container that serves, and waits until it does.
func background(t *testing.T, flags []string, addrs ...string) {
	t.Helper()
	cmd := patchbay(t, append(append([]string{"run"}, flags...), "--", probe.Binary(t))...)
	cmd.Env = append(os.Environ(), probe.ServeEnv(addrs...))
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("patchbay run %v: %v: %s", flags, err, &stderr)
		}
	})
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil || line != "serving\n" {
		rest, _ := io.ReadAll(stdout)
		t.Fatalf("container said %q%s, %v: %s", line, rest, err, &stderr)
	}
}

// The world's view of a published port.
//
//	[external] eth0 ── ext [host] ── patchbay ── eth0 [container: server on 8080 and 9000-9003]
func TestReachabilityPublished(t *testing.T) {
	testbed.Leaks(t)
	ext := testbed.NewExternal(t, "external")
	background(t, []string{"--name", "web", "--subnet", "10.77.0.0/24", "--subnet", "fd77::/64", "--ip", "10.77.0.9",
		"-p", "8080:8080", "-p", "8080:8080/udp", "-p", "7000-7003:9000-9003", "-p", "127.0.0.1:7100:8080/udp"},
		":8080", ":9000", ":9001", ":9002", ":9003")

	from := func(in *testbed.NS, network, addr string) probe.Outcome {
		t.Helper()
		o := probe.Outcome{}
		in.Do(func() { o = probe.Try(probe.Attempt{Net: network, Addr: addr}) })
		return o
	}
	for _, network := range []string{"tcp", "udp"} {
		for _, c := range []struct {
			label string
			in    *testbed.NS
			addr  netip.Addr
			seen  string
		}{
			{"external v4", ext.NS, ext.HostAddr4, ext.Addr4.String()},
			{"external v6", ext.NS, ext.HostAddr6, ext.Addr6.String()},
			{"host-local v4", testbed.Host(t), netip.MustParseAddr("127.0.0.1"), "10.77.0.1"},
			{"host-local v6", testbed.Host(t), netip.MustParseAddr("::1"), "fd77::1"},
			{"host's own address", testbed.Host(t), ext.HostAddr4, "10.77.0.1"},
		} {
			o := from(c.in, network, net.JoinHostPort(c.addr.String(), "8080"))
			if !o.OK() || hostOf(o.Said) != c.seen {
				t.Errorf("%s: %v: want the container to see %s", c.label, o, c.seen)
			}
		}
	}
	for _, port := range []string{"7000", "7003"} {
		if o := from(ext.NS, "tcp", net.JoinHostPort(ext.HostAddr4.String(), port)); !o.OK() {
			t.Errorf("range: %v", o)
		}
	}
	if o := from(testbed.Host(t), "udp", "127.0.0.1:7100"); !o.OK() {
		t.Errorf("host address: %v", o)
	}
	if o := from(ext.NS, "udp", net.JoinHostPort(ext.HostAddr4.String(), "7100")); o.OK() {
		t.Errorf("published on 127.0.0.1 alone, yet: %v", o)
	}

	// The port is taken: the error names the holder.
	out, err := patchbay(t, "run", "-p", "8080:80", "--", "true").CombinedOutput()
	if exitCode(err) != 125 || !strings.Contains(string(out), "8080") || !strings.Contains(string(out), "patchbay") || strings.Count(string(out), "\n") != 1 {
		t.Errorf("second publish of 8080: %v: %s", err, out)
	}
}

func exitCode(err error) int {
	if err == nil {
		return 0
	}
	var ee *exec.ExitError
	if errors.As(err, &ee) {
		return ee.ExitCode()
	}
	return -1
}
