package main

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/internal/api"
	"patchbay/internal/testbed"
)

// space is a network namespace of a user, with a process in it, as `unshare -Urn` makes it.
type space struct {
	t   *testing.T
	cmd *exec.Cmd
	pid int
}

// newSpace has a user make one, with `unshare FLAGS…` (-Urn).
func newSpace(t *testing.T, login *testbed.Login, flags ...string) *space {
	t.Helper()
	if len(flags) == 0 {
		flags = []string{"-Urn"}
	}
	s := &space{t: t, cmd: login.As(exec.Command(testbed.Tool(t, "unshare"), append(flags, testbed.Tool(t, "sleep"), "1000000")...))}
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s.pid = s.cmd.Process.Pid
	t.Cleanup(s.end)
	mine, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	testbed.Eventually(t, 10*time.Second, func() bool {
		theirs, err := os.Readlink(s.path())
		name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", s.pid))
		return err == nil && theirs != mine && string(name) == "sleep\n"
	})
	return s
}

// path is where its network namespace is.
func (s *space) path() string { return fmt.Sprintf("/proc/%d/ns/net", s.pid) }

// end ends its process, and so the namespace. Idempotent.
func (s *space) end() {
	if s.cmd.ProcessState == nil {
		_ = s.cmd.Process.Kill() // Wait tells of nothing else
		_ = s.cmd.Wait()
	}
}

// command is one in the namespace, as its root.
func (s *space) command(name string, args ...string) *exec.Cmd {
	s.t.Helper()
	return exec.Command(testbed.Tool(s.t, "nsenter"), append([]string{"-t", fmt.Sprint(s.pid), "-U", "-n", "--preserve-credentials", "--", testbed.Tool(s.t, name)}, args...)...)
}

// do runs a command in the namespace and returns what it wrote.
func (s *space) do(name string, args ...string) string {
	s.t.Helper()
	out, err := s.command(name, args...).CombinedOutput()
	if err != nil {
		s.t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// links is what interfaces it has.
func (s *space) links() string {
	s.t.Helper()
	return s.do("ip", "-br", "link")
}

// refused runs `patchbay ARGS…` that must fail with one line that has every word, and leave nothing (which is looked at where the daemon answers this user).
func (d *daemonProc) refused(args []string, words ...string) {
	d.t.Helper()
	if d.host == nil {
		before := d.there()
		defer func() {
			if after := d.there(); after != before {
				d.t.Errorf("patchbay %s failed and left something:\n%s", strings.Join(args, " "), after)
			}
		}()
	}
	out, err := d.command(args...).CombinedOutput()
	if exitCode(err) != 125 || strings.Count(string(out), "\n") != 1 {
		d.t.Errorf("patchbay %s: status %d, want 125 and one line: %s", strings.Join(args, " "), exitCode(err), out)
	}
	for _, w := range words {
		if !strings.Contains(string(out), w) {
			d.t.Errorf("patchbay %s: the error lacks %q: %s", strings.Join(args, " "), w, out)
		}
	}
}

// there is every network, attachment and published port, without what changes by itself.
func (d *daemonProc) there() string {
	d.t.Helper()
	var b strings.Builder
	ns, err := d.client().Networks(d.t.Context())
	if err != nil {
		d.t.Fatal(err)
	}
	for _, n := range ns {
		fmt.Fprintln(&b, "network", n.Name, n.Subnets, n.VNI)
	}
	as, err := d.client().Attachments(d.t.Context(), "")
	if err != nil {
		d.t.Fatal(err)
	}
	for _, a := range as {
		if a.State == api.StateLeaving {
			continue // of a command before
		}
		fmt.Fprintln(&b, "attachment", a.Network, a.Name, a.State, a.Addrs, a.MAC, a.IfName, len(a.Publish))
	}
	return b.String() + d.do("publish", "ls")
}

// gone waits until no attachment has the name.
func (d *daemonProc) gone(name string) {
	d.t.Helper()
	if !testbed.Wait(10*time.Second, func() bool {
		as, err := d.client().Attachments(d.t.Context(), "")
		if err != nil {
			return false
		}
		for _, a := range as {
			if a.Name == name {
				return false
			}
		}
		return true
	}) {
		d.t.Fatalf("attachment %q does not end by itself: %s", name, d.do("ps"))
	}
}

// What a user can do to namespaces of his that run already.
//
//	[one] eth0 ── tap ┐
//	                  default ── daemon ── lab
//	[two] eth0 ── tap ┘                      │
//	[two] eth1 ── tap ───────────────────────┘
func TestAttach(t *testing.T) {
	testbed.Leaks(t)
	login := testbed.NewLogin(t)
	d := startDaemonOf(t, login)
	one, two := newSpace(t, login), newSpace(t, login)
	d.do("network", "create", "lab", "--subnet", "10.66.0.0/24")
	d.do("network", "create", "third", "--subnet", "10.67.0.0/24")
	said := d.do("attach", "default", "--pid", fmt.Sprint(one.pid), "--name", "one", "--alias", "uno")
	if !strings.Contains(said, "one on default: eth0 ") {
		t.Errorf("attach says %q", said)
	}
	d.do("attach", "default", "--netns", two.path(), "--name", "two")
	a1, a2 := d.inspect("default", "one"), d.inspect("default", "two")
	one.do("ping", "-n", "-c1", "-W5", a2.Addrs[0].String())
	two.do("ping", "-n", "-c1", "-W5", a1.Addrs[1].String())
	if r := one.do("ip", "route", "show", "default"); !strings.Contains(r, "dev eth0") {
		t.Errorf("default route %q", r)
	}
	if a1.PID != one.pid || a2.NetNS != two.path() || a1.IfName != "eth0" || a1.State != api.StateUp {
		t.Errorf("one %+v\ntwo %+v", a1, a2)
	}

	t.Run("further interfaces", func(t *testing.T) {
		routes := two.do("ip", "route", "show", "default")
		for i, network := range []string{"lab", "third"} {
			out, err := d.command("attach", "--pid", fmt.Sprint(two.pid), network, "--name", "two").CombinedOutput()
			if err != nil || !strings.Contains(string(out), "note: ") || !strings.Contains(string(out), "default route") || !strings.Contains(string(out), fmt.Sprintf("eth%d", i+1)) {
				t.Errorf("interface %d: %v: %s", i+1, err, out)
			}
		}
		if now := two.do("ip", "route", "show", "default"); now != routes {
			t.Errorf("default route was %q and is %q", routes, now)
		}
		if n := d.inspect("lab", "two").Notes; len(n) == 0 {
			t.Error("the note is not kept")
		}
		two.do("ping", "-n", "-c1", "-W5", "10.66.0.1")
		two.do("ping", "-n", "-c1", "-W5", "10.67.0.1")
	})
	t.Run("detach", func(t *testing.T) {
		addr := d.inspect("lab", "two").Addrs[0]
		d.do("detach", "lab/two")
		if l := two.links(); strings.Contains(l, "eth1") || !strings.Contains(l, "eth0") || !strings.Contains(l, "eth2") {
			t.Errorf("after the detach:\n%s", l)
		}
		// Name, address and the interface's name are free.
		d.do("attach", "lab", "--pid", fmt.Sprint(one.pid), "--name", "two", "--ip", addr.String(), "--ifname", "wan0")
		if l := one.links(); !strings.Contains(l, "wan0") {
			t.Errorf("--ifname wan0:\n%s", l)
		}
		d.refused([]string{"detach", "nobody"}, "nobody")
	})
	t.Run("the namespace ends", func(t *testing.T) {
		s := newSpace(t, login)
		d.do("attach", "default", "--pid", fmt.Sprint(s.pid), "--name", "brief", "-p", "8088:80")
		d.do("attach", "lab", "--netns", s.path(), "--name", "brief")
		addr := d.inspect("default", "brief").Addrs[0]
		s.end()
		began := time.Now()
		d.gone("brief")
		t.Logf("gone %v after its last process", time.Since(began).Round(time.Millisecond))
		d.do("attach", "default", "--pid", fmt.Sprint(one.pid), "--name", "brief", "--ip", addr.String(), "-p", "8088:80", "--ifname", "eth7")
		d.do("detach", "default/brief")
	})
	t.Run("another process stays in the namespace", func(t *testing.T) {
		s := newSpace(t, login)
		d.do("attach", "default", "--pid", fmt.Sprint(s.pid), "--name", "heir")
		other := s.command("sleep", "1000000")
		if err := other.Start(); err != nil {
			t.Fatal(err)
		}
		mark := fmt.Sprintf("/proc/%d/ns/net", other.Process.Pid)
		want, err := os.Readlink(s.path())
		if err != nil {
			t.Fatal(err)
		}
		testbed.Eventually(t, 10*time.Second, func() bool { now, _ := os.Readlink(mark); return now == want })
		s.end()
		time.Sleep(2500 * time.Millisecond)
		if !d.up("heir") {
			t.Error("the attachment ended though its namespace has a process")
		}
		if err := other.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = other.Wait()
		d.gone("heir")
	})
	t.Run("user namespaces", func(t *testing.T) {
		// Its user is not root in there, or it is in a user namespace below its network's.
		plain, nested := newSpace(t, login, "--map-current-user", "-n"), newSpace(t, login, "-Urn", testbed.Tool(t, "unshare"), "-U")
		for name, s := range map[string]*space{"plain": plain, "nested": nested} {
			for i, device := range []string{"tap", "packet"} {
				said := d.do("attach", "default", "--pid", fmt.Sprint(s.pid), "--name", name+device, "--device", device)
				if want := fmt.Sprintf("eth%d", i); !strings.Contains(said, want) || !d.up(name+device) {
					t.Errorf("%s, %s: %s", name, device, said)
				}
			}
		}
		d.do("detach", "plaintap", "plainpacket", "nestedtap", "nestedpacket")
		// The host name of who made no UTS namespace is the host's.
		host, err := os.Hostname()
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range []*space{one, plain} {
			if got := d.do("run", "--net", fmt.Sprintf("container:%d", s.pid), "--", "sh", "-c", "uname -n; readlink /proc/self/ns/net"); !strings.HasPrefix(got, host+"\nnet:") {
				t.Errorf("a command in there says %q", got)
			}
		}
	})
	t.Run("refusals", func(t *testing.T) {
		dead := newSpace(t, login)
		dead.end()
		file := filepath.Join(d.dir, "file")
		if err := os.WriteFile(file, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		pid := fmt.Sprint(one.pid)
		for _, c := range []struct {
			args  []string
			words []string
		}{
			{[]string{"--pid", fmt.Sprint(dead.pid)}, []string{fmt.Sprint(dead.pid), "no such process"}},
			{[]string{"--pid", "1"}, []string{"process 1", "not permitted"}},
			{[]string{"--pid", fmt.Sprint(os.Getpid())}, []string{fmt.Sprint(os.Getpid()), "not permitted"}},
			{[]string{"--pid", "0"}, []string{"0"}},
			{[]string{"--pid", "-1"}, []string{"-1"}},
			{[]string{"--netns", file}, []string{file, "network namespace"}},
			{[]string{"--netns", d.dir}, []string{d.dir, "network namespace"}},
			{[]string{"--netns", filepath.Join(d.dir, "none")}, []string{"none", "no such file"}},
			{[]string{"--netns", "no-such-name"}, []string{"no-such-name"}},
			{[]string{"--netns", ""}, []string{"--netns"}},
			{[]string{"--netns", "/proc/self/ns/user"}, []string{"/proc/self/ns/user", "user namespace"}},
			{[]string{"--pid", pid, "--ifname", "eth0"}, []string{"eth0", "--ifname"}},
			{[]string{"--pid", pid, "--ifname", "lo"}, []string{"lo", "--ifname"}},
			{[]string{"--pid", pid, "--ifname", "sixteencharacter"}, []string{"sixteencharacter", "15"}},
			{[]string{"--pid", pid, "--ifname", "a/b"}, []string{"a/b"}},
			{[]string{"--pid", pid, "--ip", "192.0.2.1"}, []string{"192.0.2.1"}},
			{[]string{"--pid", pid, "--name", "one"}, []string{"one", "taken"}},
			{[]string{"--pid", pid, "--netns", one.path()}, []string{"--pid"}},
			{[]string{}, []string{"--pid", "--netns"}},
		} {
			links := one.links()
			d.refused(append([]string{"attach", "default"}, c.args...), c.words...)
			if now := one.links(); now != links {
				t.Errorf("%v: left in the namespace:\n%s", c.args, now)
			}
		}
		d.refused([]string{"attach", "nowhere", "--pid", pid}, "nowhere")
	})
}

// TestAttachedNamespacesSurviveACrash kills the daemon under a connection between two attached namespaces.
//
//	[srv] eth0 ── tap ┐
//	                  daemon, killed and started again
//	[cli] eth0 ── tap ┘
func TestAttachedNamespacesSurviveACrash(t *testing.T) {
	testbed.Leaks(t)
	iperf3 := testbed.Tool(t, "iperf3")
	login := testbed.NewLogin(t)
	d := startDaemonOf(t, login)
	srv, cli, gone := newSpace(t, login), newSpace(t, login), newSpace(t, login)
	for name, s := range map[string]*space{"srv": srv, "cli": cli, "gone": gone} {
		args := []string{"attach", "default", "--pid", fmt.Sprint(s.pid), "--name", name}
		if name == "gone" {
			args = append(args, "-p", "8081:80")
		}
		d.do(args...)
	}
	freed := d.inspect("default", "gone").Addrs[0]
	before := d.inspect("default", "srv")
	inside := srv.do("ip", "-o", "addr", "show", "dev", "eth0")
	server := srv.command(iperf3, "-s")
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = server.Process.Kill(); _ = server.Wait() })
	client := cli.command(iperf3, "-c", before.Addrs[0].String(), "-t", "6", "-i", "0.1", "-J", "--connect-timeout", "5000")
	out := &lockedBuffer{}
	client.Stdout, client.Stderr = out, out
	testbed.Eventually(t, 10*time.Second, func() bool { return strings.Contains(srv.do("ss", "-Htln"), ":5201") })
	if err := client.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(3 * time.Second)
	late := lateness()
	d.end(syscall.SIGKILL)
	gone.end()
	d.start()
	if err := client.Wait(); err != nil {
		t.Fatalf("the connection did not survive: %v: %s", err, out)
	}
	longest, last := gap(t, []byte(out.String()))
	t.Logf("longest time without a byte %.1f s; %.0f MB in the last second", longest, last/1e6)
	if bound := 1 + 10*late().Seconds(); longest > bound || last == 0 {
		t.Errorf("gap %.1f s, want at most %.1f", longest, bound)
	}
	after := d.inspect("default", "srv")
	if fmt.Sprint(before.Addrs, before.MAC, before.IfName, before.PID) != fmt.Sprint(after.Addrs, after.MAC, after.IfName, after.PID) || after.State != api.StateUp {
		t.Errorf("before %+v\nafter  %+v", before, after)
	}
	if now := srv.do("ip", "-o", "addr", "show", "dev", "eth0"); now != inside {
		t.Errorf("eth0 was\n%s and is\n%s", inside, now)
	}
	d.gone("gone")
	d.do("attach", "default", "--pid", fmt.Sprint(cli.pid), "--name", "gone", "--ip", freed.String(), "-p", "8081:80", "--ifname", "eth5")
	// The interface of an attachment that came back goes with a detach, as that of any other.
	d.do("detach", "srv")
	if l := srv.links(); strings.Contains(l, "eth0") {
		t.Errorf("after the detach:\n%s", l)
	}
}

// TestAnotherNamespaceIsNotTakenOver holds that a daemon that starts leaves alone what has the path, or the pid, of a namespace that ended while it was down.
func TestAnotherNamespaceIsNotTakenOver(t *testing.T) {
	testbed.Leaks(t)
	login := testbed.NewLogin(t)
	d := startDaemonOf(t, login)
	first, second := newSpace(t, login), newSpace(t, login)
	file := filepath.Join(d.dir, "ns")
	if err := os.Symlink(first.path(), file); err != nil {
		t.Fatal(err)
	}
	d.do("attach", "default", "--netns", file, "--name", "byname")
	d.do("attach", "default", "--pid", fmt.Sprint(first.pid), "--name", "bypid")
	addr := d.inspect("default", "byname").Addrs[0]
	d.end(syscall.SIGKILL)
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(second.path(), file); err != nil {
		t.Fatal(err)
	}
	first.end()
	// The kernel gives the pid to the next process when it is told to.
	reused := reusePID(t, login, first.pid)
	links := []string{second.links(), reused.links()}
	d.start()
	d.gone("byname")
	d.gone("bypid")
	if now := []string{second.links(), reused.links()}; strings.Join(now, "") != strings.Join(links, "") {
		t.Errorf("another namespace was touched:\n%v", now)
	}
	d.do("attach", "default", "--netns", file, "--name", "byname", "--ip", addr.String())
	if got := d.inspect("default", "byname").Addrs; !netip.MustParseAddr(got[0].String()).IsValid() || got[0] != addr {
		t.Errorf("addresses %v, want %v", got, addr)
	}
}

// reusePID is a namespace of a process that has the id that another one had.
func reusePID(t *testing.T, login *testbed.Login, pid int) *space {
	t.Helper()
	for range 20 {
		if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(fmt.Sprint(pid-1)), 0); err != nil {
			testbed.Lacking(t, "the kernel cannot be told which pid is next: %v", err)
		}
		s := newSpace(t, login)
		if s.pid == pid {
			return s
		}
		s.end()
	}
	t.Fatalf("pid %d is not given again", pid)
	return nil
}

// TestAttachNamed attaches namespaces that `ip netns` has made, as root does: by name, with and without processes in them.
func TestAttachNamed(t *testing.T) {
	testbed.Leaks(t)
	testbed.RequireTUN(t)
	ip := testbed.Tool(t, "ip")
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=755"); err != nil {
		testbed.Lacking(t, "cannot mount a /run for ip netns: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount("/run", unix.MNT_DETACH) })
	run := func(args ...string) string {
		t.Helper()
		out, err := exec.Command(ip, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("ip %s: %v: %s", strings.Join(args, " "), err, out)
		}
		return string(out)
	}
	d := (&daemonProc{t: t, plain: true}).begin()
	for _, name := range []string{"blue", "green"} {
		run("netns", "add", name)
		d.do("attach", "default", "--netns", name, "--name", name)
	}
	green := d.inspect("default", "green")
	run("netns", "exec", "blue", "ping", "-n", "-c1", "-W5", green.Addrs[0].String())
	if green.NetNS != "/run/netns/green" {
		t.Errorf("green is at %q", green.NetNS)
	}
	// A namespace that has a name needs no process, also over a crash.
	d.end(syscall.SIGKILL)
	d.start()
	testbed.Eventually(t, 10*time.Second, func() bool { return d.up("blue") && d.up("green") })
	run("netns", "exec", "blue", "ping", "-n", "-c1", "-W5", green.Addrs[0].String())
	// Without its name it lives on while a process is in it.
	stays := exec.Command(ip, "netns", "exec", "green", testbed.Tool(t, "sleep"), "1000000")
	if err := stays.Start(); err != nil {
		t.Fatal(err)
	}
	end := func() {
		if stays.ProcessState == nil {
			_ = stays.Process.Kill() // Wait tells of nothing else
			_ = stays.Wait()
		}
	}
	t.Cleanup(end)
	testbed.Eventually(t, 10*time.Second, func() bool {
		return strings.TrimSpace(run("netns", "pids", "green")) == fmt.Sprint(stays.Process.Pid)
	})
	run("netns", "delete", "blue")
	run("netns", "delete", "green")
	d.gone("blue")
	if !d.up("green") {
		t.Error("green is gone although a process is in it")
	}
	end()
	d.gone("green")
	// A new one of that name is another one.
	run("netns", "add", "blue")
	t.Cleanup(func() { run("netns", "delete", "blue") })
	d.do("attach", "default", "--netns", "blue", "--name", "blue")
	d.do("detach", "blue")
	d.refused([]string{"attach", "default", "--netns", "green"}, "green", "ip netns")
}
