package kernel

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"patchbay/internal/testbed"
)

// Environment variables that make this test binary do one thing and end.
const (
	envInside = "KERNEL_TEST_INSIDE" // call Inside
	envAll    = "KERNEL_TEST_ALL"    // print All as JSON
	envTUN    = "KERNEL_TEST_TUN"    // print what tun says of this path
)

func TestMain(m *testing.M) {
	switch {
	case os.Getenv(envInside) != "":
		if err := Inside(os.Stdout); err != nil {
			os.Exit(1)
		}
	case os.Getenv(envAll) != "":
		json.NewEncoder(os.Stdout).Encode(All(Config{Child: child}))
	case os.Getenv(envTUN) != "":
		json.NewEncoder(os.Stdout).Encode(tun(os.Getenv(envTUN)))
	default:
		testbed.Main(m)
	}
}

func child() *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), envInside+"=1", envAll+"=")
	return cmd
}

func byName(t *testing.T, rs []Result) map[string]Result {
	t.Helper()
	m := map[string]Result{}
	for _, r := range rs {
		if _, dup := m[r.Name]; dup || r.Name == "" || r.Need == "" || r.Detail == "" {
			t.Errorf("two results of one name, or an incomplete one: %+v", r)
		}
		if r.OK != (r.Remedy == "") {
			t.Errorf("a failure has a remedy and a success has none: %+v", r)
		}
		if (r.Err() == nil) != r.OK || strings.Contains(r.Detail+r.Remedy, "\n") {
			t.Errorf("Err of %+v is %v", r, r.Err())
		}
		m[r.Name] = r
	}
	return m
}

// This kernel has everything, and the tests may use it: whatever fails here is a probe that lies, or a feature that was lost.
func TestAllInside(t *testing.T) {
	testbed.Leaks(t)
	testbed.RequireTUN(t)
	testbed.RequirePing(t)
	ns := testbed.NewNS(t)
	links := func() string {
		b, err := os.ReadFile("/proc/thread-self/net/dev")
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	ns.Do(func() {
		before := links()
		for _, r := range byName(t, All(Config{})) {
			if !r.OK {
				t.Errorf("%+v", r)
			}
		}
		if n := strings.Count(links(), "\n"); n != strings.Count(before, "\n") {
			t.Errorf("interfaces before:\n%s\nafter:\n%s", before, links())
		}
	})
}

// As an ordinary user: the TAP features are probed in a child, and ports below 1024 are refused.
func TestAllAsOrdinaryUser(t *testing.T) {
	testbed.Leaks(t)
	testbed.RequireTUN(t)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	run := func(env ...string) map[string]Result {
		cmd := exec.Command(exe)
		cmd.Env = append(append(os.Environ(), envAll+"=1"), env...)
		out, err := testbed.AsOrdinaryUser(cmd).Output()
		var rs []Result
		if jerr := json.Unmarshal(out, &rs); err != nil || jerr != nil {
			t.Fatalf("%v %v: %s", err, jerr, out)
		}
		return byName(t, rs)
	}
	rs := run()
	for _, name := range []string{"user-namespaces", "tun", "tap", "tap-vnet-hdr", "tap-checksum", "tap-tso", "tap-uso", "tap-multi-queue", "packet-device", "udp-segment", "udp-gro", "splice", "landlock", "ipv6"} {
		if r, found := rs[name]; !found || !r.OK {
			t.Errorf("%s: %+v", name, r)
		}
	}
	if r := rs["low-ports"]; r.OK || !strings.Contains(r.Remedy, "ip_unprivileged_port_start") {
		t.Errorf("an ordinary user publishes port 1: %+v", r)
	}
}

// The limit on user namespaces is a setting of each user namespace, so that it can be exhausted for real.
func TestUserNSForbidden(t *testing.T) {
	testbed.Require(t)
	const path = "/proc/sys/user/max_user_namespaces"
	old, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("0"), 0); err != nil {
		t.Fatal(err)
	}
	defer os.WriteFile(path, old, 0)
	r := UserNS()
	if r.OK || !strings.Contains(r.Remedy, "sysctl -w user.max_user_namespaces") {
		t.Errorf("%+v", r)
	}
	if err := r.Err(); err == nil || !strings.Contains(err.Error(), "max_user_namespaces is 0") {
		t.Errorf("Err: %v", err)
	}
}

// Settings of other distributions, which this kernel does not have.
func TestExplainUserNS(t *testing.T) {
	for _, c := range []struct {
		err          error
		file, value  string
		detail, cure string
	}{
		{unix.EPERM, "kernel/apparmor_restrict_unprivileged_userns", "1", "AppArmor", "apparmor_restrict_unprivileged_userns=0"},
		{unix.EPERM, "kernel/unprivileged_userns_clone", "0", "unprivileged_userns_clone is 0", "unprivileged_userns_clone=1"},
		{unix.ENOSPC, "user/max_user_namespaces", "0", "is 0", "max_user_namespaces=15000"},
		{unix.ENOSPC, "user/max_user_namespaces", "100", "too many", "raise user.max_user_namespaces"},
		{unix.EPERM, "", "", "not permitted", "seccomp"},
		{unix.EINVAL, "", "", "invalid", "CONFIG_USER_NS"},
	} {
		detail, cure := explainUserNS(c.err, func(name string) string {
			if name == c.file {
				return c.value
			}
			return ""
		})
		if !strings.Contains(detail, c.detail) || !strings.Contains(cure, c.cure) {
			t.Errorf("%v with %s=%s: %q, %q", c.err, c.file, c.value, detail, cure)
		}
	}
}

func TestTUNFailures(t *testing.T) {
	testbed.Require(t)
	dir := t.TempDir()
	closed := filepath.Join(dir, "closed")
	if err := os.WriteFile(closed, nil, 0o000); err != nil {
		t.Fatal(err)
	}
	for path, cure := range map[string]string{
		filepath.Join(dir, "absent"): "modprobe tun",
		os.DevNull:                   "mknod",
	} {
		if r := tun(path); r.OK || !strings.Contains(r.Remedy, cure) {
			t.Errorf("%s: %+v", path, r)
		}
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// The tests' root opens what it likes; an ordinary user does not.
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), envTUN+"="+closed)
	out, err := testbed.AsOrdinaryUser(cmd).Output()
	var r Result
	if jerr := json.Unmarshal(out, &r); err != nil || jerr != nil {
		t.Fatalf("%v %v: %s", err, jerr, out)
	}
	if r.OK || !strings.Contains(r.Remedy, "chmod") {
		t.Errorf("%+v", r)
	}
}

func TestPingForbidden(t *testing.T) {
	testbed.Require(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // the thread ends with its namespace, in which the kernel forbids ping sockets by default
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		for _, v := range []int{4, 6} {
			if r := Ping(v); r.OK || !strings.Contains(r.Remedy, "ping_group_range") {
				t.Errorf("IPv%d: %+v", v, r)
			}
		}
	}()
	<-done
}

func TestIPv6Off(t *testing.T) {
	ns := testbed.NewNS(t)
	testbed.Sysctl(t, ns, "net/ipv6/conf/all/disable_ipv6", "1")
	ns.Do(func() {
		if r := IPv6(); r.OK || !strings.Contains(r.Remedy, "disable_ipv6") {
			t.Errorf("%+v", r)
		}
	})
}

func TestUnprivilegedPortStart(t *testing.T) {
	ns := testbed.NewNS(t)
	testbed.Sysctl(t, ns, "net/ipv4/ip_unprivileged_port_start", "80")
	ns.Do(func() {
		if n := UnprivilegedPortStart(); n != 80 {
			t.Errorf("%d, want 80", n)
		}
	})
}

// Without /dev/net/tun everything about a TAP fails with the remedy for the device, and what stands in for it is still tried.
func TestInsideWithoutTUN(t *testing.T) {
	ns := testbed.NewNS(t)
	testbed.BindFile(t, TUNPath, "")
	ns.Do(func() {
		for name, r := range byName(t, All(Config{})) {
			switch {
			case name == "tun" || strings.HasPrefix(name, "tap"):
				if r.OK || !strings.Contains(r.Remedy, "mknod") {
					t.Errorf("%+v", r)
				}
			case !r.OK && name != "low-ports":
				t.Errorf("%+v", r)
			}
		}
	})
}
