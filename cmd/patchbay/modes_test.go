package main

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"

	"patchbay/internal/netns"
	"patchbay/internal/testbed"
	"patchbay/internal/testbed/probe"
)

// tryRun makes the attempts in a container that `patchbay run FLAGS…` of the daemon's user starts.
func (d *daemonProc) tryRun(binary string, flags []string, list ...probe.Attempt) []probe.Outcome {
	d.t.Helper()
	cmd := d.command(append(append([]string{"run"}, flags...), "--", binary)...)
	cmd.Env = append(cmd.Env, probe.TryEnv(list...))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		d.t.Fatalf("patchbay run %v: %v: %s", flags, err, &stderr)
	}
	return probe.Outcomes(d.t, out)
}

// serveRun starts a container that serves on the addresses, and waits until it does.
func (d *daemonProc) serveRun(binary, name string, flags []string, addrs ...string) *running {
	d.t.Helper()
	// The probe serves until its input ends.
	argv := []string{"--", "sh", "-c", `sleep 1000000 | ` + fmt.Sprintf("%s=%s %s", strings.SplitN(probe.ServeEnv(), "=", 2)[0], shellQuote(strings.SplitN(probe.ServeEnv(addrs...), "=", 2)[1]), binary)}
	r := d.background(name, append(flags, argv...)...)
	if !testbed.Wait(20e9, func() bool { return strings.Contains(r.out.String(), "serving\n") }) {
		d.t.Fatalf("%s does not serve: %s%s", name, r.out, r.stderr)
	}
	return r
}

func shellQuote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// TestModes makes the same attempts in every mode that a container can have: the reachability that people know from other tools.
//
//	           ┌ [web] server on 80, and on its lo 8081; published as 8080
//	default ───┤
//	           └ the one that tries, in some modes         [host] ── eth0 [external: server on 7]
//	lab ────── [db] server on 90                             lo: server on 127.0.0.1:7007
func TestModes(t *testing.T) {
	testbed.Leaks(t)
	testbed.RequirePing(t)
	ext := testbed.NewExternal(t, "external")
	serve(t, ext, net.JoinHostPort(ext.Addr4.String(), "7"), net.JoinHostPort(ext.Addr6.String(), "7"))
	serve(t, nil, "127.0.0.1:7007")
	d := startDaemonWithLogin(t)
	bin := probe.Binary(t)
	d.do("network", "create", "lab", "--subnet", "10.66.0.0/24", "--subnet", "fd66::/64")
	d.serveRun(bin, "web", []string{"--network", "default", "-p", "8080:80"}, ":80", "127.0.0.1:8081")
	d.serveRun(bin, "db", []string{"--network", "lab"}, ":90")
	nw, err := d.client().Network(t.Context(), "default")
	if err != nil {
		t.Fatal(err)
	}
	web, db := stationOf(d.inspect("default", "web")), stationOf(d.inspect("lab", "db"))
	at := func(network, host, port string) probe.Attempt {
		return probe.Attempt{Net: network, Addr: net.JoinHostPort(host, port)}
	}
	probes := []struct {
		what string
		probe.Attempt
	}{
		{"the container's own loopback", probe.Attempt{Net: "ping", Addr: "127.0.0.1"}},
		{"the host's loopback", at("tcp", "127.0.0.1", "7007")},
		{"the loopback of web", at("tcp", "localhost", "8081")},
		{"the gateway", probe.Attempt{Net: "ping", Addr: nw.Gateways[0].String()}},
		{"the gateway over IPv6", probe.Attempt{Net: "ping", Addr: nw.Gateways[1].String()}},
		{"web by name", at("tcp", "web", "80")},
		{"web by its name in full", at("udp", "web.default.patchbay.internal", "80")},
		{"web by address", at("tcp", web.ip4.String(), "80")},
		{"web by IPv6 address", at("udp", web.ip6.String(), "80")},
		{"db by name", at("tcp", "db.lab.patchbay.internal", "90")},
		{"db by address", at("tcp", db.ip4.String(), "90")},
		{"outside", at("tcp", ext.Addr4.String(), "7")},
		{"outside over IPv6", at("udp", ext.Addr6.String(), "7")},
		{"outside by ping", probe.Attempt{Net: "ping", Addr: ext.Addr4.String()}},
		{"the published port of web", at("tcp", ext.HostAddr4.String(), "8080")},
	}
	var list []probe.Attempt
	for _, p := range probes {
		list = append(list, p.Attempt)
	}
	for _, m := range []struct {
		mode  string
		flags []string
		// One letter a probe, in their order: y reached, n not.
		want string
	}{
		{"none", []string{"--net", "none"}, "ynnnnnnnnnnnnnn"},
		{"private, a network of its own", []string{"--subnet", "10.99.0.0/24", "--subnet", "fd99::/64"}, "ynnnnnnnnnnyyyy"},
		{"private, the default network", nil, "ynnyyyyyynnyyyy"},
		{"private, by name", []string{"--network", "default"}, "ynnyyyyyynnyyyy"},
		{"another network", []string{"--network", "lab"}, "ynnnnnnnnyyyyyy"},
		{"two networks", []string{"--network", "default", "--network", "lab"}, "ynnyyyyyyyyyyyy"},
		{"host", []string{"--net", "host"}, "yynnnnnnnnnyyyy"},
		{"container", []string{"--net", "container:web"}, "ynyyyyyyynnyyyy"},
	} {
		t.Run(m.mode, func(t *testing.T) {
			if len(m.want) != len(probes) {
				t.Fatalf("%d letters for %d probes", len(m.want), len(probes))
			}
			for i, o := range d.tryRun(bin, m.flags, list...) {
				if o.OK() != (m.want[i] == 'y') {
					t.Errorf("%s: %v, want %c", probes[i].what, o, m.want[i])
				}
			}
		})
	}
	t.Run("the published port from the host", func(t *testing.T) {
		for _, addr := range []string{"127.0.0.1:8080", "[::1]:8080", net.JoinHostPort(ext.HostAddr4.String(), "8080")} {
			if o := probe.Try(probe.Attempt{Net: "tcp", Addr: addr}); !o.OK() {
				t.Error(o)
			}
		}
	})
}

// TestContainerMode holds that two commands in one network have one address, one localhost and one set of ports, and that a pod is as good: several commands in a namespace that
// outlives each of them.
func TestContainerMode(t *testing.T) {
	testbed.Leaks(t)
	d := startDaemonWithLogin(t)
	bin := probe.Binary(t)
	d.serveRun(bin, "first", []string{"-p", "8080:80"}, ":80", "127.0.0.1:81")
	pid := d.inspect("default", "first").PID
	addr := d.inspect("default", "first").Addrs[0]
	same := func(cmd string) {
		t.Helper()
		inside, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid))
		if err != nil {
			t.Fatal(err)
		}
		for _, ref := range []string{"first", "default/first", fmt.Sprint(pid)} {
			if got := strings.TrimSpace(d.do("run", "--net", "container:"+ref, "--", "readlink", "/proc/self/ns/net")); got != inside {
				t.Errorf("%s: container:%s is in %s, want %s", cmd, ref, got, inside)
			}
		}
	}
	same("run")
	if got := d.do("run", "--net", "container:first", "--", "ip", "-br", "addr", "show", "dev", "eth0"); !strings.Contains(got, addr.String()) {
		t.Errorf("the second has %s, want %s", got, addr)
	}
	// What the second serves on its localhost the first one has.
	second := d.command("run", "--net", "container:first", "--", bin)
	second.Env = append(second.Env, probe.ServeEnv("127.0.0.1:82"))
	in, err := second.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out := &lockedBuffer{}
	second.Stdout, second.Stderr = out, out
	if err := second.Start(); err != nil {
		t.Fatal(err)
	}
	if !testbed.Wait(20e9, func() bool { return strings.Contains(out.String(), "serving\n") }) {
		t.Errorf("the second does not serve: %s", out)
	}
	h, err := netns.OpenPID(pid)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	var o probe.Outcome
	if err := h.Do(func() error { o = probe.Try(probe.Attempt{Net: "tcp", Addr: "127.0.0.1:82"}); return nil }); err != nil || !o.OK() {
		t.Errorf("from the first: %v, %v", o, err)
	}
	// The port is taken for both.
	taken := d.command("run", "--net", "container:first", "--", bin)
	taken.Env = append(taken.Env, probe.ServeEnv("127.0.0.1:82"))
	if b, err := taken.Output(); err == nil || !strings.Contains(string(b), "address already in use") {
		t.Errorf("a third on the same port: %v: %s", err, b)
	}
	in.Close()
	if err := second.Wait(); err != nil {
		t.Errorf("the second: %v: %s", err, out)
	}
	// The first one goes on when the second has ended.
	if o := d.tryRun(bin, nil, probe.Attempt{Net: "tcp", Addr: "first:80"})[0]; !o.OK() {
		t.Error(o)
	}
	d.refused([]string{"run", "--net", "container:nobody", "--", "true"}, "nobody")
	d.refused([]string{"run", "--net", "container:999999", "--", "true"}, "999999")
	d.refused([]string{"run", "--net", "container:first", "-p", "8090:80", "--", "true"}, "--publish")
}
