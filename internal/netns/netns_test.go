package netns

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/internal/testbed"
)

func TestMain(m *testing.M) { testbed.Main(m) }

// goVersions are the releases of Go whose runtime was read against what target_linux.go says about it, separated by spaces.
const goVersions = "go1.26"

// TestGoVersion fails with a Go that nobody has looked at: read what target_linux.go says above its linknames against the new version's
// runtime/proc.go and syscall/exec_linux.go, and add the version to the constant.
func TestGoVersion(t *testing.T) {
	for v := range strings.FieldsSeq(goVersions) {
		if rest, ok := strings.CutPrefix(runtime.Version(), v); ok && (rest == "" || rest[0] < '0' || rest[0] > '9') {
			return
		}
	}
	t.Errorf("built with %s, of which nobody has checked what target_linux.go says about syscall.runtime_BeforeFork and its kin; looked at: %s", runtime.Version(), goVersions)
}

func mine(t *testing.T) string {
	t.Helper()
	s, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestNewAndDo(t *testing.T) {
	testbed.Require(t)
	testbed.Leaks(t)
	before := mine(t)
	h, err := New()
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	if mine(t) != before {
		t.Fatal("New moved the caller")
	}
	own, err := Current()
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	a, _ := h.ID()
	b, _ := own.ID()
	if a == b || a == (ID{}) {
		t.Errorf("IDs %v and %v", a, b)
	}
	var in, nested, back string
	sentinel := errors.New("its own error")
	if err := h.Do(func() error {
		in = mine(t)
		if err := own.Do(func() error { nested = mine(t); return nil }); err != nil {
			t.Error(err)
		}
		back = mine(t)
		return sentinel
	}); !errors.Is(err, sentinel) {
		t.Errorf("Do returned %v", err)
	}
	if in == before || nested != before || back != in || mine(t) != before {
		t.Errorf("before %s, in %s, nested %s, back %s, after %s", before, in, nested, back, mine(t))
	}
	func() {
		defer func() { _ = recover() }()
		_ = h.Do(func() error { panic("x") })
	}()
	if mine(t) != before {
		t.Error("a panic left the thread in the namespace")
	}
	// No thread of the process is left elsewhere.
	links, _ := filepath.Glob("/proc/self/task/*/ns/net")
	for _, l := range links {
		if s, err := os.Readlink(l); err == nil && s != before {
			t.Errorf("thread %s is in %s", l, s)
		}
	}
}

func TestDoInParallel(t *testing.T) {
	testbed.Require(t)
	var hs []*Handle
	for range 4 {
		h, err := New()
		if err != nil {
			t.Fatal(err)
		}
		defer h.Close()
		hs = append(hs, h)
	}
	done := make(chan error)
	for i := range 16 {
		go func() {
			h := hs[i%len(hs)]
			want, _ := h.ID()
			for range 50 {
				err := h.Do(func() error {
					runtime.Gosched()
					c, err := Current()
					if err != nil {
						return err
					}
					defer c.Close()
					if got, _ := c.ID(); got != want {
						return errors.New("in another namespace")
					}
					return nil
				})
				if err != nil {
					done <- err
					return
				}
			}
			done <- nil
		}()
	}
	for range 16 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func TestOpen(t *testing.T) {
	testbed.Leaks(t)
	ns := testbed.NewNS(t, "target")
	sleep := ns.Command("sleep", "100")
	if err := sleep.Start(); err != nil {
		t.Fatal(err)
	}
	dead := exec.Command("true")
	if err := dead.Start(); err != nil {
		t.Fatal(err)
	}
	testbed.Eventually(t, 2*time.Second, func() bool { // a zombie until it is waited for
		b, _ := os.ReadFile("/proc/" + strconv.Itoa(dead.Process.Pid) + "/stat")
		return bytes.Contains(b, []byte(") Z "))
	})
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	pid := strconv.Itoa(sleep.Process.Pid)
	for _, c := range []struct {
		ref  string
		want error
		text string
	}{
		{ns.Path(), nil, ""},
		{"/proc/" + strconv.Itoa(os.Getpid()) + "/ns/net", nil, ""},
		{strconv.Itoa(os.Getpid()), nil, ""},
		{pid, nil, ""},
		{"4194304", ErrNoProcess, "it has ended, or lives in another PID namespace"},
		{strconv.Itoa(dead.Process.Pid), ErrNoProcess, "it has ended and waits for its parent"},
		{"0", ErrNoProcess, "give the id of a running process"},
		{"-1", ErrNoProcess, "give the id of a running process"},
		{file, ErrNotNetNS, "it is an ordinary file: give /proc/PID/ns/net"},
		{fifo, ErrNotNetNS, "it is an ordinary file"},
		{"/", ErrNotNetNS, "ordinary file"},
		{"/proc/self/ns/uts", ErrNotNetNS, "it is a uts namespace"},
		{"/no/such", fs.ErrNotExist, "has its process ended?"},
		{"no-such-name", fs.ErrNotExist, "see `ip netns list`"},
		{"..", ErrNotNetNS, "one path element"},
		{"", ErrNotNetNS, "one path element"},
	} {
		h, err := Open(c.ref)
		if !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
			t.Errorf("Open(%q): %v, want %v", c.ref, err, c.want)
		} else if err != nil && (!strings.Contains(err.Error(), c.text) || strings.Contains(err.Error(), "\n")) {
			t.Errorf("Open(%q): %q, want %q", c.ref, err, c.text)
		}
		if h != nil {
			h.Close()
		}
	}
	// The same namespace, whichever way it is opened.
	byPath, err := OpenPath(ns.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer byPath.Close()
	byFD, err := FromFD(ns.FD())
	if err != nil {
		t.Fatal(err)
	}
	defer byFD.Close()
	a, _ := byPath.ID()
	b, _ := byFD.ID()
	if a != b {
		t.Errorf("%v by path, %v by descriptor", a, b)
	}
	testbed.Eventually(t, 2*time.Second, func() bool { // the command enters after it has started
		h, err := OpenPID(sleep.Process.Pid)
		if err != nil {
			return false
		}
		defer h.Close()
		c, _ := h.ID()
		return c == a
	})
	if _, err := FromFD(0); !errors.Is(err, ErrNotNetNS) {
		t.Errorf("FromFD(0): %v", err)
	}
	dead.Wait()
}

func TestOpenName(t *testing.T) {
	ip := testbed.Tool(t, "ip")
	unshare := testbed.Tool(t, "unshare")
	if os.Getenv("NETNS_TEST_NAME") != "" {
		h, err := Open(os.Getenv("NETNS_TEST_NAME"))
		if err != nil {
			t.Fatal(err)
		}
		defer h.Close()
		if err := h.Do(func() error { return nil }); err != nil {
			t.Error(err)
		}
		return
	}
	self, _ := os.Executable()
	cmd := exec.Command(unshare, "-m", "sh", "-c", `mount -t tmpfs t /run && `+ip+` netns add blue && exec "$@"`, "sh", self, "-test.run=^TestOpenName$")
	cmd.Env = append(os.Environ(), "NETNS_TEST_NAME=blue")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// TestNotYours: a namespace of somebody else's is refused with a reason.
func TestNotYours(t *testing.T) {
	testbed.Require(t)
	if ref := os.Getenv("NETNS_TEST_REF"); ref != "" {
		h, err := Open(ref)
		if err == nil {
			err = h.Do(func() error { return nil })
		}
		if !errors.Is(err, ErrNotPermitted) {
			t.Errorf("error %v", err)
		}
		if _, err := New(); !errors.Is(err, unix.EPERM) {
			t.Errorf("New: %v", err)
		}
		if tgt, err := OpenTarget(os.Getppid()); err == nil {
			_, err = tgt.Start(Command{Path: "/bin/true", Args: []string{"true"}})
			if !errors.Is(err, ErrNotPermitted) {
				t.Errorf("Target.Start: %v", err)
			}
			tgt.Close()
		} else if !errors.Is(err, ErrNotPermitted) {
			t.Errorf("OpenTarget: %v", err)
		}
		return
	}
	ns := testbed.NewNS(t)
	self, _ := os.Executable()
	for _, ref := range []string{ns.Path(), strconv.Itoa(os.Getpid())} {
		cmd := exec.Command(self, "-test.run=^TestNotYours$")
		cmd.Env = append(os.Environ(), "NETNS_TEST_REF="+ref)
		if out, err := testbed.AsOrdinaryUser(cmd).CombinedOutput(); err != nil {
			t.Errorf("%s: %v: %s", ref, err, out)
		}
	}
}

// TestTarget puts a process into a container that an ordinary user has made, as that user, whether it is root in there or not.
func TestTarget(t *testing.T) {
	testbed.Require(t)
	if p := os.Getenv("NETNS_TEST_PID"); p != "" {
		insideTarget(t, p)
		return
	}
	unshare := testbed.Tool(t, "unshare")
	self, _ := os.Executable()
	for _, as := range [][]string{{"-Urn"}, {"--map-current-user", "-n"}, {"-Urn", unshare, "-Ur"}, {"-Urn", unshare, "--map-current-user"}} {
		c := testbed.AsOrdinaryUser(exec.Command("sh", "-c", unshare+" "+strings.Join(as, " ")+` sleep 100 & pid=$!
while ! grep -q '^sleep$' /proc/$pid/comm; do :; done
NETNS_TEST_PID=$pid "$@"; code=$?; kill $pid; exit $code`, "sh", self, "-test.run=^TestTarget$", "-test.v"))
		if out, err := c.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("--- PASS")) {
			t.Errorf("%v: %v: %s", as, err, out)
		}
	}
}

func insideTarget(t *testing.T, ref string) {
	pid, err := strconv.Atoi(ref)
	if err != nil {
		t.Fatal(err)
	}
	tgt, err := OpenTarget(pid)
	if err != nil {
		t.Fatal(err)
	}
	defer tgt.Close()
	out, err := os.CreateTemp(t.TempDir(), "out")
	if err != nil {
		t.Fatal(err)
	}
	// The descriptors change places, and one is left out.
	extra, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	for range 20 { // beside garbage collections and other threads
		go func() { _ = make([]byte, 1<<20); runtime.GC() }()
	}
	id, err := tgt.Start(Command{
		Path:  "/bin/sh",
		Args:  []string{"sh", "-c", `readlink /proc/self/ns/net; readlink /proc/self/ns/user; ip link set lo mtu 1234 && cat /sys/class/net/lo/mtu >/dev/null; ip -o link show lo; grep CapEff /proc/self/status; readlink /proc/self/fd/3 || echo none; readlink /proc/self/fd/4; exit 6`},
		Env:   []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"},
		Files: []int{int(extra.Fd()), int(out.Fd()), int(out.Fd()), -1, int(extra.Fd())},
	})
	if err != nil {
		t.Fatal(err)
	}
	runtime.KeepAlive(extra)
	var ws syscall.WaitStatus
	if _, err := syscall.Wait4(id, &ws, 0, nil); err != nil || ws.ExitStatus() != 6 {
		t.Errorf("wait: %v, status %d", err, ws.ExitStatus())
	}
	b, _ := os.ReadFile(out.Name())
	netNS, _ := os.Readlink("/proc/" + ref + "/ns/net")
	// That of the network, which the process may be below.
	f, err := os.Open("/proc/" + ref + "/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	owner, err := ownerOf(f)
	if err != nil {
		t.Fatal(err)
	}
	defer owner.Close()
	userNS, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(int(owner.Fd())))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), "CapEff:\t")
	if caps, _ := strconv.ParseUint(strings.SplitN(rest, "\n", 2)[0], 16, 64); caps&(1<<unix.CAP_NET_ADMIN) == 0 || caps&(1<<unix.CAP_NET_RAW) == 0 {
		t.Errorf("capabilities %x", caps)
	}
	if !strings.HasPrefix(string(b), netNS+"\n"+userNS+"\n") || !strings.Contains(string(b), "mtu 1234") || !strings.HasSuffix(string(b), "none\n/dev/null\n") {
		t.Errorf("output:\n%s\nwant %s and %s", b, netNS, userNS)
	}
	h, err := tgt.Net()
	if err != nil {
		t.Fatal(err)
	}
	h.Close()
	if _, err := tgt.Start(Command{Path: "/no/such", Args: []string{"x"}}); !errors.Is(err, unix.ENOENT) || !strings.HasPrefix(err.Error(), "execute /no/such: ") {
		t.Errorf("error %v", err)
	}
	if _, err := OpenTarget(4194304); !errors.Is(err, ErrNoProcess) {
		t.Errorf("error %v", err)
	}
}
