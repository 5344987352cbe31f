package testbed

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// OrdinaryUID is the user and group id that AsOrdinaryUser's commands see themselves run with.
const OrdinaryUID = 1000

// AsOrdinaryUser makes cmd run in a user namespace of its own, as uid 1000 without any capability: over the host namespace it has the rights of an
// ordinary user of a machine, yet can make user namespaces. Files it creates belong to the tests' user. It returns cmd. For a command of
// NS.Command, unshare(1) of util-linux is needed.
func AsOrdinaryUser(cmd *exec.Cmd) *exec.Cmd {
	for _, e := range cmd.Env {
		if strings.HasPrefix(e, envExecNS+"=") {
			return ordinaryInNS(cmd)
		}
	}
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	a := cmd.SysProcAttr
	a.Cloneflags |= unix.CLONE_NEWUSER
	a.UidMappings = []syscall.SysProcIDMap{{ContainerID: OrdinaryUID, HostID: os.Geteuid(), Size: 1}}
	a.GidMappings = []syscall.SysProcIDMap{{ContainerID: OrdinaryUID, HostID: os.Getegid(), Size: 1}}
	return cmd
}

// ordinaryInNS puts unshare between entering the namespace, which takes a capability, and the command, which has none.
func ordinaryInNS(cmd *exec.Cmd) *exec.Cmd {
	u := findTool("unshare")
	if u == "" {
		cmd.Err = errors.New("unshare: not found; install util-linux")
		return cmd
	}
	id := fmt.Sprint(OrdinaryUID)
	// cmd.Args: this binary, the command's path, its arguments from 0.
	cmd.Args = append([]string{cmd.Args[0], u, "unshare", "--user", "--map-user=" + id, "--map-group=" + id, "--", cmd.Args[1]}, cmd.Args[3:]...)
	return cmd
}

// Login is an ordinary user, as AsOrdinaryUser's commands are, with one user namespace for all that he starts: so he owns the namespaces that his programs make, as a
// user of a machine does, and may enter them from another program of his.
type Login struct {
	holder *exec.Cmd
	uid    int      // as the tests see it
	in     []string // the command that enters
}

// NewLogin logs a user in until the test ends.
func NewLogin(t testing.TB) *Login {
	t.Helper()
	Require(t)
	l := &Login{uid: os.Geteuid()}
	l.start(t, AsOrdinaryUser(exec.Command(Tool(t, "sleep"), "1000000")))
	l.in = []string{Tool(t, "nsenter"), fmt.Sprintf("--user=/proc/%d/ns/user", l.holder.Process.Pid), "--preserve-credentials", "--"}
	return l
}

// start starts the process that holds the user's namespace until the test ends.
func (l *Login) start(t testing.TB, holder *exec.Cmd) {
	t.Helper()
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	l.holder = holder
	t.Cleanup(func() {
		_ = holder.Process.Kill() // Wait tells of nothing else
		_ = holder.Wait()
	})
}

var userCount atomic.Int64

// NewUser is NewLogin for one of several users, each of whom sees himself with a uid of his own. distinct tells whether they are different ones to the kernel too, which takes a bed that
// root has made.
func NewUser(t testing.TB) (l *Login, distinct bool) {
	t.Helper()
	Require(t)
	i := int(userCount.Add(1)-1) % users
	cmd := exec.Command(Tool(t, "sleep"), "1000000")
	id := syscall.SysProcIDMap{ContainerID: OrdinaryUID + 1 + i, HostID: os.Geteuid(), Size: 1}
	gid := syscall.SysProcIDMap{ContainerID: id.ContainerID, HostID: os.Getegid(), Size: 1}
	l = &Login{uid: os.Geteuid()}
	if b, err := os.ReadFile("/proc/self/uid_map"); err == nil && strings.Contains(strings.Join(strings.Fields(string(b)), " "), fmt.Sprint(firstUser, " ")) {
		distinct = true
		id.HostID, gid.HostID, l.uid = firstUser+i, firstUser+i, firstUser+i
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWUSER, UidMappings: []syscall.SysProcIDMap{id}, GidMappings: []syscall.SysProcIDMap{gid},
		Credential: &syscall.Credential{Uid: uint32(id.ContainerID), Gid: uint32(id.ContainerID), NoSetGroups: true},
	}
	l.start(t, cmd)
	l.in = []string{Tool(t, "nsenter"), fmt.Sprintf("--user=/proc/%d/ns/user", cmd.Process.Pid)}
	if distinct {
		l.in = append(l.in, fmt.Sprintf("--setuid=%d", id.ContainerID), fmt.Sprintf("--setgid=%d", id.ContainerID), "--")
	} else { // whom the kernel takes for the tests' user is that one in there already
		l.in = append(l.in, "--preserve-credentials", "--")
	}
	return l, distinct
}

// Own gives a file or directory to the user.
func (l *Login) Own(t testing.TB, path string) {
	t.Helper()
	if err := os.Chown(path, l.uid, l.uid); err != nil && l.uid != os.Geteuid() {
		t.Fatal(err)
	}
}

// In is NS.Command as the user: the namespace is a host on which he is an ordinary one.
func (l *Login) In(n *NS, name string, args ...string) *exec.Cmd {
	return n.Command(l.in[0], append(append(append([]string{}, l.in[1:]...), name), args...)...)
}

// As makes cmd run as the user. It returns cmd, whose process it becomes.
func (l *Login) As(cmd *exec.Cmd) *exec.Cmd {
	if cmd.Err == nil {
		cmd.Args = append(append([]string{}, l.in...), append([]string{cmd.Path}, cmd.Args[1:]...)...)
		cmd.Path = l.in[0]
	}
	return cmd
}

// Tool is the path of a program that a test needs. Where it is not installed, t skips, or fails when REQUIRE_NETNS=1.
func Tool(t testing.TB, name string) string {
	t.Helper()
	p := findTool(name)
	if p == "" {
		Lacking(t, "%s is not installed; `make test` installs what the tests need", name)
	}
	return p
}

func findTool(name string) string {
	if p, err := exec.LookPath(name); err == nil {
		if abs, err := filepath.Abs(p); err == nil {
			return abs
		}
	}
	for _, d := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/local/bin", "/usr/bin", "/bin"} {
		p := filepath.Join(d, name)
		if fi, err := os.Stat(p); err == nil && !fi.IsDir() && fi.Mode()&0o111 != 0 {
			return p
		}
	}
	return ""
}

// Build is the path of the patchbay binary, built once per test binary by the user and with the environment that go test was called
// with. PATCHBAY_BIN names a ready one instead.
func Build(t testing.TB) string {
	t.Helper()
	if p := os.Getenv("PATCHBAY_BIN"); p != "" {
		return p
	}
	return BuildPackage(t, "cmd/patchbay")
}

// BuildPackage builds any main package of this module, named by its path below the module's root, with further flags of go build.
func BuildPackage(t testing.TB, pkg string, flags ...string) string {
	t.Helper()
	var r buildReply
	if bed.control != nil {
		r = bed.control.build(pkg, flags)
	} else {
		r = goBuild(t.TempDir(), pkg, flags)
	}
	if r.Err != "" {
		t.Fatal(r.Err)
	}
	return r.Path
}

// Eventually calls f until it is true, at first at once and then at growing intervals of 1 to 50 ms, and fails t when d has gone by.
func Eventually(t testing.TB, d time.Duration, f func() bool) {
	t.Helper()
	if !Wait(d, f) {
		t.Fatalf("not true after %v", d)
	}
}

// Wait is Eventually for those who want to say more when it fails: it reports whether f became true within d.
func Wait(d time.Duration, f func() bool) bool {
	end, step := time.Now().Add(d), time.Millisecond
	for {
		if f() {
			return true
		}
		if time.Now().After(end) {
			return false
		}
		time.Sleep(step)
		step = min(2*step, 50*time.Millisecond)
	}
}

// BindFile puts content in the place of an existing file, such as /etc/resolv.conf, for this process and those it starts, until the
// test ends. The returned path is where the content can be changed later; replace it in place, since a bind mount follows the inode.
func BindFile(t testing.TB, target, content string) string {
	t.Helper()
	Require(t)
	real, err := filepath.EvalSymlinks(target)
	if err != nil {
		t.Fatal(err)
	}
	f := filepath.Join(t.TempDir(), filepath.Base(target))
	if err := os.WriteFile(f, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(f, real, "", unix.MS_BIND, ""); err != nil {
		t.Fatalf("bind %s: %v", target, err)
	}
	t.Cleanup(func() { _ = unix.Unmount(real, unix.MNT_DETACH) })
	return f
}
