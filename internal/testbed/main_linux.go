package testbed

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Environment between the stages. stageInside stays set for the children of a test, so that a test binary started by a test does
// not build a second bed.
const (
	envStage  = "PATCHBAY_TESTBED"
	envDir    = "PATCHBAY_TESTBED_DIR"
	envPIDNS  = "PATCHBAY_TESTBED_PIDNS"
	envNoTUN  = "PATCHBAY_TESTBED_NOTUN"
	envNoPing = "PATCHBAY_TESTBED_NOPING"
	envBind   = "PATCHBAY_TESTBED_BIND"
	envExecNS = "PATCHBAY_TESTBED_EXECNS"

	stageDrop   = "drop"
	stageUser   = "user"
	stageInit   = "init"
	stageInside = "inside"
)

// nobody is the ordinary user that root becomes; controlFD is where a stage finds the socket to outer.
const (
	nobody    = 65534
	controlFD = 3
)

// bed is what this process knows about the place it runs in.
var bed struct {
	missing string // why there are no namespaces, or ""
	noTUN   string // why no TUN device can be opened, or ""
	noPing  string // why ping sockets are closed, or ""
	fuzzing bool
	control *control
	dir     string
}

// Main runs the tests of m inside a fresh set of namespaces, as the package's documentation says, and exits with their
// status. It is called by TestMain and does not return.
func Main(m *testing.M) {
	if p := os.Getenv(envExecNS); p != "" {
		execIn(p)
	}
	switch os.Getenv(envStage) {
	case "":
		os.Exit(outer(m))
	case stageDrop:
		dropStage()
	case stageUser:
		relay()
	case stageInit:
		initStage()
	case stageInside:
		bed.noTUN, bed.noPing, bed.dir = os.Getenv(envNoTUN), os.Getenv(envNoPing), os.Getenv(envDir)
		// The socket is there in the process that init started; a test binary run by a test has none.
		if unix.SetNonblock(controlFD, false) == nil && os.Getenv(envPIDNS) != "" {
			bed.control = newControl(controlFD)
			_ = os.Unsetenv(envPIDNS)
		}
		os.Exit(m.Run())
	}
	panic("testbed: unknown stage " + os.Getenv(envStage))
}

// outer is the process that go test started.
func outer(m *testing.M) int {
	if fuzzing() {
		bed.fuzzing, bed.missing = true, "a fuzzing run has no namespaces"
		return m.Run()
	}
	o, err := newOuter()
	if err != nil {
		bed.missing = err.Error()
		return m.Run()
	}
	defer o.cleanup()
	// Without a PID namespace only where its /proc cannot be mounted, as in a container that masks parts of it.
	for _, pidns := range []bool{true, false} {
		code, reason := o.run(pidns)
		if reason == "" {
			return code
		}
		bed.missing = reason
	}
	return m.Run()
}

// fuzzing reports whether the go tool asked for fuzzing, as its coordinator or as a worker.
func fuzzing() bool {
	for _, a := range os.Args[1:] {
		a = "-" + strings.TrimLeft(a, "-")
		if a == "-test.fuzzworker" || strings.HasPrefix(a, "-test.fuzzworker=") {
			return true
		}
		if v, ok := strings.CutPrefix(a, "-test.fuzz="); ok && v != "" {
			return true
		}
	}
	return false
}

// dropStage is root in a mount namespace of its own. It gives the place a TUN device that anybody may open and becomes nobody.
func dropStage() {
	runtime.LockOSThread()
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		giveUp("cannot make mounts private: %v", err)
	}
	publicTUN()
	if b := os.Getenv(envBind); b != "" {
		from, to, _ := strings.Cut(b, "\x1f")
		if err := unix.Mount(from, to, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			giveUp("cannot bind %s where an ordinary user can read it: %v", from, err)
		}
		wd := filepath.Join(to, os.Getenv("PWD"))
		if rel, err := filepath.Rel(from, os.Getenv("PWD")); err == nil {
			wd = filepath.Join(to, rel)
		}
		if err := os.Chdir(wd); err != nil {
			giveUp("%v", err)
		}
		_ = os.Setenv("PWD", wd)
	}
	// The change of uid clears what SysProcAttr.Pdeathsig has set; init asks for its own.
	if code, err := startInit(os.Getenv(envPIDNS) == "1", true, os.NewFile(controlFD, "control"), self(), os.Args, os.Environ()); err == nil {
		os.Exit(code)
	}
	// A root that is itself inside a user namespace may not know the uids; then there is one user, or it stays what it is.
	if syscall.Setgroups(nil) == nil && syscall.Setresgid(nobody, nobody, nobody) == nil {
		if err := syscall.Setresuid(nobody, nobody, nobody); err != nil {
			giveUp("cannot become uid %d: %v", nobody, err)
		}
	}
	// The change of uid has cleared what SysProcAttr.Pdeathsig had set.
	_ = unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0)
	_ = os.Setenv(envStage, stageUser)
	giveUp("exec: %v", syscall.Exec(self(), os.Args, os.Environ()))
}

// publicTUN puts a tmpfs over /dev/net with a node that an ordinary user may open. Failures are found by the probe in init.
func publicTUN() {
	const node = "/dev/net/tun"
	if fi, err := os.Stat(node); err == nil && fi.Mode().Perm() == 0o666 {
		return
	}
	if unix.Mount("tmpfs", "/dev/net", "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "mode=0755,size=64k") != nil {
		return
	}
	if unix.Mknod(node, unix.S_IFCHR|0o666, int(unix.Mkdev(10, 200))) != nil {
		_ = unix.Unmount("/dev/net", unix.MNT_DETACH)
		return
	}
	_ = os.Chmod(node, 0o666)
}

// relay is the ordinary user: it starts init and ends as init ends.
func relay() {
	code, err := startInit(os.Getenv(envPIDNS) == "1", false, os.NewFile(controlFD, "control"), self(), os.Args, os.Environ())
	if err != nil {
		giveUp("%v", err)
	}
	os.Exit(code)
}

// users is how many further ordinary users there are inside where root has made the bed, from the uid firstUser inside and hostUser outside.
const (
	users     = 8
	firstUser = 2001
	hostUser  = 60001
)

// startInit starts this binary as init in new namespaces and waits for it. many, which takes root, gives it further users. An error says why there can be none.
func startInit(pidns, many bool, ctl *os.File, exe string, args, env []string) (int, error) {
	runtime.LockOSThread() // Pdeathsig means the thread
	defer runtime.UnlockOSThread()
	cmd := exec.Command(exe)
	cmd.Args = args
	cmd.Env = setenv(env, envStage, stageInit)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{ctl}
	flags := uintptr(unix.CLONE_NEWUSER | unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWUTS)
	if pidns {
		flags |= unix.CLONE_NEWPID
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  flags,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}},
		Pdeathsig:   syscall.SIGKILL,
	}
	if many {
		ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: nobody, Size: 1}, {ContainerID: firstUser, HostID: hostUser, Size: users}}
		cmd.SysProcAttr.UidMappings, cmd.SysProcAttr.GidMappings, cmd.SysProcAttr.GidMappingsEnableSetgroups = ids, ids, true
		cmd.SysProcAttr.Credential = &syscall.Credential{}
	}
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("cannot create user and network namespaces: %w (see sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone and kernel.apparmor_restrict_unprivileged_userns)", err)
	}
	stop := forwardSignals(cmd.Process.Pid)
	defer stop()
	return exitCode(cmd.Wait())
}

// initStage is root inside, and PID 1 where there is a PID namespace.
func initStage() {
	// Private, so that no mount of a test travels anywhere.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		giveUp("cannot make mounts private in a user namespace: %v (see sysctl kernel.apparmor_restrict_unprivileged_userns)", err)
	}
	if os.Getpid() == 1 {
		if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
			giveUp("cannot mount /proc: %v", err)
		}
	}
	if err := unix.Sethostname([]byte("testbed")); err != nil {
		giveUp("cannot set the host name: %v", err)
	}
	if err := loopbackUp(); err != nil {
		giveUp("cannot bring lo up: %v", err)
	}
	if err := openPing(); err != nil {
		_ = os.Setenv(envNoPing, err.Error())
	}
	if err := probeTUN(); err != nil {
		_ = os.Setenv(envNoTUN, err.Error())
	}
	_ = os.Setenv(envStage, stageInside)
	pid, err := syscall.ForkExec(self(), os.Args, &syscall.ProcAttr{Env: os.Environ(), Files: []uintptr{0, 1, 2, controlFD}})
	if err != nil {
		giveUp("cannot start the tests: %v", err)
	}
	forwardSignals(pid)
	for {
		var ws syscall.WaitStatus
		p, err := syscall.Wait4(-1, &ws, 0, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil:
			fmt.Fprintln(os.Stderr, "testbed: wait:", err)
			os.Exit(2)
		case p == pid && ws.Exited():
			os.Exit(ws.ExitStatus())
		case p == pid && ws.Signaled():
			fmt.Fprintln(os.Stderr, "testbed: the test process was killed:", ws.Signal())
			os.Exit(128 + int(ws.Signal()))
		}
	}
}

func loopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

// openPing allows ping sockets to the one group that exists inside.
func openPing() error {
	return os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte("0 0"), 0)
}

func probeTUN() error {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("cannot open /dev/net/tun: %w", err)
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("probe%d")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		return fmt.Errorf("cannot create a TAP device: %w", err)
	}
	return nil
}

// forwardSignals hands the signals that go test and terminals send to pid, until stop is called.
func forwardSignals(pid int) (stop func()) {
	ch := make(chan os.Signal, 8)
	signal.Notify(ch, syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT, syscall.SIGHUP)
	go func() {
		for s := range ch {
			_ = syscall.Kill(pid, s.(syscall.Signal))
		}
	}()
	return func() { signal.Stop(ch); close(ch) }
}

func exitCode(err error) (int, error) {
	var ee *exec.ExitError
	switch {
	case err == nil:
		return 0, nil
	case errors.As(err, &ee):
		if ws := ee.Sys().(syscall.WaitStatus); ws.Signaled() {
			return 128 + int(ws.Signal()), nil
		}
		return ee.ExitCode(), nil
	}
	return 0, err
}

// giveUp tells outer why a stage could not be set up, and ends this process.
func giveUp(format string, args ...any) {
	newControl(controlFD).giveUp(fmt.Sprintf(format, args...))
	os.Exit(125)
}

// self is the path of the running binary, which every stage can execute.
func self() string {
	p, err := os.Executable()
	if err != nil {
		return "/proc/self/exe"
	}
	return p
}

func setenv(env []string, key, val string) []string {
	out := make([]string, 0, len(env)+1)
	for _, e := range env {
		if !strings.HasPrefix(e, key+"=") {
			out = append(out, e)
		}
	}
	if val == "" {
		return out
	}
	return append(out, key+"="+val)
}
