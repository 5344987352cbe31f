package netns

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Target is a network namespace with the user namespace that owns it, into which Start puts a process.
type Target struct {
	pid       int    // 0 when it was opened by its path
	name      string // for errors
	user, net *os.File
	home, uts *os.File // the process's own user and UTS namespace; nil when it was opened by its path
}

// OpenTarget opens the namespaces of the process pid. They stay open when the process ends.
func OpenTarget(pid int) (*Target, error) {
	what := fmt.Sprintf("namespaces of process %d", pid)
	if pid <= 0 {
		return nil, fmt.Errorf("%s: %w: give the id of a running process", what, ErrNoProcess)
	}
	t := &Target{pid: pid, name: fmt.Sprintf("process %d", pid)}
	for _, ns := range []struct {
		name string
		file **os.File
	}{{"user", &t.home}, {"net", &t.net}, {"uts", &t.uts}} {
		f, err := os.Open(fmt.Sprintf("/proc/%d/ns/%s", pid, ns.name))
		if err != nil {
			t.Close()
			return nil, explainPID(what, pid, err)
		}
		*ns.file = f
	}
	// The process may be in a user namespace below the one that its network belongs to. An owner that is above the caller's cannot be opened; Start then says what is wrong.
	var err error
	if t.user, err = ownerOf(t.net); err != nil {
		t.user = t.home
	}
	return t, nil
}

// ownerOf opens the user namespace that a namespace belongs to.
func ownerOf(ns *os.File) (*os.File, error) {
	fd, err := unix.IoctlRetInt(int(ns.Fd()), unix.NS_GET_USERNS)
	if err != nil {
		return nil, err
	}
	unix.CloseOnExec(fd)
	return os.NewFile(uintptr(fd), "user namespace of "+ns.Name()), nil
}

// OpenTargetPath opens the namespace that `ip netns` knows by the name, or that is at the path where ref has a slash, with the user namespace that owns it. They stay open when the path is no more.
func OpenTargetPath(ref string) (*Target, error) {
	open := OpenPath
	if !strings.Contains(ref, "/") {
		open = OpenName
	}
	h, err := open(ref)
	if err != nil {
		return nil, err
	}
	t := &Target{name: "network namespace " + ref, net: os.NewFile(uintptr(h.fd), ref)}
	if t.user, err = ownerOf(t.net); err != nil {
		t.Close()
		if errors.Is(err, unix.EPERM) {
			return nil, fmt.Errorf("%s: %w: %w: it belongs to a user namespace that is not below yours; open it as the user it belongs to", t.name, ErrNotPermitted, err)
		}
		return nil, fmt.Errorf("%s: its user namespace: %w", t.name, err)
	}
	return t, nil
}

// isOwn reports whether ns, of the type that /proc/self/ns calls by name, is the caller's own.
func isOwn(ns *os.File, name string) bool {
	var mine, theirs unix.Stat_t
	return unix.Stat("/proc/self/ns/"+name, &mine) == nil && unix.Fstat(int(ns.Fd()), &theirs) == nil && mine.Dev == theirs.Dev && mine.Ino == theirs.Ino
}

// String is what the target was opened by, for errors.
func (t *Target) String() string { return t.name }

// PID is the process it was opened by, or 0.
func (t *Target) PID() int { return t.pid }

// Net is the target's network namespace, as a Handle of its own.
func (t *Target) Net() (*Handle, error) { return FromFD(int(t.net.Fd())) }

// Close gives the descriptors back. Idempotent.
func (t *Target) Close() error {
	var errs []error
	for _, f := range []*os.File{t.user, t.net, t.home, t.uts} {
		if f != nil {
			if err := f.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// Command is what Target.Start executes.
type Command struct {
	Path  string   // as execve(2) takes it, looked up in the caller's mount namespace; "/proc/self/exe" is this program
	Args  []string // with Args[0]
	Env   []string
	Files []int // become descriptors 0, 1, 2, … of the new process; -1 is closed. Others are inherited unless close-on-exec.
	// Guest puts it into the process's user and UTS namespace, and into a mount namespace of its own, with the limit of open files that the caller was started with: a
	// command that lives in a container, and not one that only works on its network. Where the UTS namespace is the caller's own it gets a copy. The target must have
	// been opened by a process id.
	Guest bool
}

// The steps of the child, for its error.
const (
	stepUser = 1 + iota
	stepNet
	stepUTS
	stepUnshare
	stepCaps
	stepFiles
	stepExec
)

// Start executes a program inside the target's user and network namespaces, with CAP_SYS_ADMIN, CAP_NET_ADMIN, CAP_NET_RAW and CAP_SETPCAP over them
// whatever user it is there, and in the caller's other namespaces. It returns the id of a child, which the caller waits for. The
// calling user must own the target's user namespace, as the one who started the container does.
func (t *Target) Start(c Command) (pid int, err error) {
	argv0, err := unix.BytePtrFromString(c.Path)
	if err != nil {
		return 0, err
	}
	argv, err := syscall.SlicePtrFromStrings(c.Args)
	if err != nil {
		return 0, err
	}
	envv, err := syscall.SlicePtrFromStrings(c.Env)
	if err != nil {
		return 0, err
	}
	p := child{argv0: argv0, argv: &argv[0], envv: &envv[0], user: -1, net: int(t.net.Fd()), uts: -1, files: append([]int(nil), c.Files...)}
	user := t.user
	if c.Guest {
		if t.uts == nil {
			return 0, fmt.Errorf("%s: it was named by no process, so nobody lives in it: name a process of the container", t.name)
		}
		user, p.unshare, p.nofile = t.home, unix.CLONE_NEWNS, startLimit()
		if isOwn(t.uts, "uts") {
			p.unshare |= unix.CLONE_NEWUTS // it is no part of the container, whose root may not change it
		} else {
			p.uts = int(t.uts.Fd())
		}
	}
	if !isOwn(user, "user") {
		p.user = int(user.Fd())
	}
	for _, fd := range p.files {
		p.above = max(p.above, fd+1, len(p.files))
	}
	var pipe [2]int
	syscall.ForkLock.Lock()
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		syscall.ForkLock.Unlock()
		return 0, fmt.Errorf("pipe: %w", err)
	}
	p.pipe = pipe[1]
	id, errno := forkInto(&p)
	syscall.ForkLock.Unlock()
	runtime.KeepAlive(t)
	runtime.KeepAlive(argv)
	runtime.KeepAlive(envv)
	unix.Close(pipe[1])
	r := os.NewFile(uintptr(pipe[0]), "pipe")
	defer r.Close()
	if errno != 0 {
		return 0, fmt.Errorf("fork: %w", errno)
	}
	var word [2]uint32
	if _, err := io.ReadFull(r, (*[8]byte)(unsafe.Pointer(&word))[:]); err != nil {
		return id, nil // the pipe was closed by execve
	}
	for {
		if _, err := unix.Wait4(id, nil, 0, nil); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	return 0, t.explain(word[0], syscall.Errno(word[1]), c.Path)
}

func (t *Target) explain(step uint32, err syscall.Errno, path string) error {
	switch step {
	case stepUser:
		if err == unix.EPERM {
			return fmt.Errorf("enter the user namespace of %s: %w: %w: only the user who made it may; run as that user", t.name, ErrNotPermitted, err)
		}
		return fmt.Errorf("enter the user namespace of %s: %w", t.name, err)
	case stepNet:
		if err == unix.EPERM {
			return fmt.Errorf("enter the network namespace of %s: %w: %w: it belongs to another user namespace than the process is in; name a process of the container that made it",
				t.name, ErrNotPermitted, err)
		}
		return fmt.Errorf("enter the network namespace of %s: %w", t.name, err)
	case stepUTS:
		return fmt.Errorf("enter the UTS namespace of %s: %w", t.name, err)
	case stepUnshare:
		return fmt.Errorf("make a mount namespace inside %s: %w", t.name, err)
	case stepCaps:
		return fmt.Errorf("keep rights in the user namespace of %s: %w", t.name, err)
	case stepFiles:
		return fmt.Errorf("pass descriptors to %s: %w", path, err)
	}
	return fmt.Errorf("execute %s: %w", path, err)
}

// child is all that the forked process needs, made before the fork: it may not allocate.
type child struct {
	argv0      *byte
	argv, envv **byte
	user, net  int
	uts        int     // -1: stay
	unshare    uintptr // CLONE_NEW… of namespaces to make
	files      []int
	above      int // higher than any descriptor in files, and than any it becomes
	pipe       int
	report     [2]uint32
	caps       unix.CapUserHeader
	data       [2]unix.CapUserData
	nofile     *unix.Rlimit // nil: leave it
}

// A Go without one of these names fails to link, and TestGoVersion fails on one that nobody has looked at. What was checked in the versions that
// test names (runtime/proc.go, syscall/exec_linux.go):
//
//   - the three take no arguments and are called around clone as forkInto does: BeforeFork, then AfterFork in the parent, failed or not,
//     and AfterForkInChild first of all in the child; the caller holds syscall.ForkLock.
//   - BeforeFork blocks all signals and spoils the stack guard, so that a stack that wants to grow crashes instead; AfterFork undoes both.
//   - AfterForkInChild clears the signal handlers and restores the mask, and nothing else. It was written for a child that shares the
//     parent's memory (CLONE_VM); forkInto's has a copy, in which it writes as well.
//   - syscall.RawSyscall and RawSyscall6 are nosplit, and neither instrumented nor known to the scheduler.

//go:linkname runtimeBeforeFork syscall.runtime_BeforeFork
func runtimeBeforeFork()

//go:linkname runtimeAfterFork syscall.runtime_AfterFork
func runtimeAfterFork()

//go:linkname runtimeAfterForkInChild syscall.runtime_AfterForkInChild
func runtimeAfterForkInChild()

// forkInto forks. The child has one thread, as entering a user namespace demands, and shares no memory with this process. Between the fork and
// execve it makes system calls only: no allocation, no growing of the stack, no lock.
//
//go:noinline
//go:norace
//go:nocheckptr
func forkInto(p *child) (pid int, errno syscall.Errno) {
	var (
		r1   uintptr
		err1 syscall.Errno
		i    int
		c    uintptr
	)
	p.caps.Version = unix.LINUX_CAPABILITY_VERSION_3
	runtimeBeforeFork()
	r1, _, err1 = syscall.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if err1 != 0 || r1 != 0 {
		runtimeAfterFork()
		return int(r1), err1
	}
	runtimeAfterForkInChild()
	if p.user >= 0 {
		p.report[0] = stepUser
		if _, _, err1 = syscall.RawSyscall(unix.SYS_SETNS, uintptr(p.user), unix.CLONE_NEWUSER, 0); err1 != 0 {
			goto fail
		}
	}
	p.report[0] = stepNet
	if _, _, err1 = syscall.RawSyscall(unix.SYS_SETNS, uintptr(p.net), unix.CLONE_NEWNET, 0); err1 != 0 {
		goto fail
	}
	if p.uts >= 0 {
		p.report[0] = stepUTS
		if _, _, err1 = syscall.RawSyscall(unix.SYS_SETNS, uintptr(p.uts), unix.CLONE_NEWUTS, 0); err1 != 0 {
			goto fail
		}
	}
	if p.unshare != 0 {
		p.report[0] = stepUnshare
		if _, _, err1 = syscall.RawSyscall(unix.SYS_UNSHARE, p.unshare, 0, 0); err1 != 0 {
			goto fail
		}
	}
	if p.user >= 0 {
		// execve takes the capabilities away from whoever is not root in there.
		p.report[0] = stepCaps
		if _, _, err1 = syscall.RawSyscall(unix.SYS_CAPGET, uintptr(unsafe.Pointer(&p.caps)), uintptr(unsafe.Pointer(&p.data[0])), 0); err1 != 0 {
			goto fail
		}
		p.data[0].Inheritable |= 1<<unix.CAP_SYS_ADMIN | 1<<unix.CAP_NET_ADMIN | 1<<unix.CAP_NET_RAW | 1<<unix.CAP_SETPCAP
		if _, _, err1 = syscall.RawSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&p.caps)), uintptr(unsafe.Pointer(&p.data[0])), 0); err1 != 0 {
			goto fail
		}
		for c = 0; c < 32; c++ {
			if p.data[0].Inheritable&(1<<c) == 0 {
				continue
			}
			if _, _, err1 = syscall.RawSyscall6(unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, c, 0, 0, 0); err1 != 0 {
				goto fail
			}
		}
	}
	p.report[0] = stepFiles
	// First out of the way of the numbers they are to get, then onto them.
	if r1, _, err1 = syscall.RawSyscall(unix.SYS_FCNTL, uintptr(p.pipe), unix.F_DUPFD_CLOEXEC, uintptr(p.above)); err1 != 0 {
		goto fail
	}
	p.pipe = int(r1)
	for i = 0; i < len(p.files); i++ {
		if p.files[i] < 0 {
			continue
		}
		if r1, _, err1 = syscall.RawSyscall(unix.SYS_FCNTL, uintptr(p.files[i]), unix.F_DUPFD_CLOEXEC, uintptr(p.above)); err1 != 0 {
			goto fail
		}
		p.files[i] = int(r1)
	}
	for i = 0; i < len(p.files); i++ {
		if p.files[i] < 0 {
			_, _, _ = syscall.RawSyscall(unix.SYS_CLOSE, uintptr(i), 0, 0)
			continue
		}
		if _, _, err1 = syscall.RawSyscall(unix.SYS_DUP3, uintptr(p.files[i]), uintptr(i), 0); err1 != 0 {
			goto fail
		}
	}
	if p.nofile != nil { // as package syscall does, without minding whether it works
		_, _, _ = syscall.RawSyscall6(unix.SYS_PRLIMIT64, 0, unix.RLIMIT_NOFILE, uintptr(unsafe.Pointer(p.nofile)), 0, 0, 0)
	}
	p.report[0] = stepExec
	_, _, err1 = syscall.RawSyscall(unix.SYS_EXECVE, uintptr(unsafe.Pointer(p.argv0)), uintptr(unsafe.Pointer(p.argv)), uintptr(unsafe.Pointer(p.envv)))
fail:
	p.report[1] = uint32(err1)
	_, _, _ = syscall.RawSyscall(unix.SYS_WRITE, uintptr(p.pipe), uintptr(unsafe.Pointer(&p.report)), unsafe.Sizeof(p.report))
	for {
		_, _, _ = syscall.RawSyscall(unix.SYS_EXIT, 125, 0, 0)
	}
}
