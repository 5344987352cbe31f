package edge

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/internal/netns"
	"patchbay/tap"
)

// Stdio are COMMAND's standard streams; a nil field is the caller's own.
type Stdio struct {
	In, Out, Err *os.File
}

// edgeCaps is what the edge process needs when it is not root in its user namespace: to mount and name the host, to configure the
// network, to open a packet socket, and to give capabilities up for COMMAND.
var edgeCaps = []uintptr{unix.CAP_SYS_ADMIN, unix.CAP_NET_ADMIN, unix.CAP_NET_RAW, unix.CAP_SETPCAP}

// Process is a container from the side of its parent. It is safe for concurrent use.
type Process struct {
	pid   int
	link  *link
	pidns bool
	grace time.Duration // killGrace

	// mark is the namespace by which the container's orphans are told from other children of this process, and markOf its kind: "user" where the user namespace is the container's
	// own, which none of it can leave; "mnt" where it is joined, and others may be in it.
	mark   *os.File
	markOf string

	devices []*tap.Handle
	notes   []string

	ready   chan struct{} // closed when the edge process is ready for Release
	started chan struct{} // closed when COMMAND has been executed
	ended   chan struct{} // closed when the edge process and all it started are gone

	mu       sync.Mutex
	released bool
	closed   bool
	reaped   bool
	command  int       // COMMAND's pid as the edge process sees it
	bypass   *Bypassed // nil until COMMAND's filter is on, when it was taken, and without one
	report   *message
	stops    *stopFollower
	status   Status
	err      error
}

// Start makes the container's namespaces and its edge process, and returns when the interfaces exist. COMMAND waits for Release. ctx
// bounds Start alone. On error nothing is left, and the error is an *Error.
//
// Without a PID namespace the calling process is a child subreaper for as long as the container lives, so that it inherits, and can end,
// what a killed edge process leaves behind.
func Start(ctx context.Context, spec Spec, std Stdio) (*Process, error) {
	return startWithin(ctx, spec, std, killGrace)
}

// startWithin is Start with another killGrace, which tests need not wait for.
func startWithin(ctx context.Context, spec Spec, std Stdio, grace time.Duration) (*Process, error) {
	if err := spec.check(); err != nil {
		return nil, failed("%w", err)
	}
	if spec.Env == nil {
		spec.Env = os.Environ()
	}
	w := wireSpec{Spec: spec, Ignored: ignoredAtStart()}
	// The runtime keeps the mask it was started with on every thread of its own.
	var mask unix.Sigset_t
	if err := unix.PthreadSigmask(unix.SIG_BLOCK, nil, &mask); err == nil {
		w.SigMask = uint64(mask.Val[0])
	}
	sp, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, failed("socketpair for the edge process: %w", err)
	}
	sock := os.NewFile(uintptr(sp[1]), "edge") // closes once, however often it is told to
	defer sock.Close()
	specFD, err := specFile(&w)
	if err != nil {
		unix.Close(sp[0])
		return nil, failed("description of the container: %w", err)
	}
	defer unix.Close(specFD)
	l, err := newLink(sp[0])
	if err != nil {
		return nil, failed("socketpair for the edge process: %w", err)
	}
	if !spec.PID {
		if err := subreaper.acquire(); err != nil {
			l.Close()
			return nil, failed("become a child subreaper: %w", err)
		}
	}
	p := &Process{
		link: l, pidns: spec.PID, grace: grace, markOf: "user",
		ready: make(chan struct{}), started: make(chan struct{}), ended: make(chan struct{}),
	}
	if spec.mode() == NetContainer {
		p.markOf = "mnt"
	}
	died := make(chan syscall.WaitStatus, 1)
	if err := p.spawn(&spec, std, sp[1], specFD, died); err != nil {
		p.sweep()
		l.Close()
		return nil, err
	}
	sock.Close()
	p.mark, _ = os.Open(fmt.Sprintf("/proc/%d/ns/%s", p.pid, p.markOf))
	stop := context.AfterFunc(ctx, func() { p.kill() })
	err = p.takeDevices(len(spec.Interfaces))
	if !stop() && ctx.Err() != nil {
		err = failed("%w before the container was there", ctx.Err())
	}
	if err != nil {
		p.kill()
		p.link.Close()
		ws := <-died
		p.sweep()
		if p.mark != nil {
			p.mark.Close()
		}
		closeDevices(p.devices)
		if errors.Is(err, io.EOF) {
			err = lost(ws)
		}
		var e *Error
		if !errors.As(err, &e) {
			err = failed("edge process: %w", err)
		}
		return nil, err
	}
	p.stops = newStopFollower(p)
	go p.run(died, spec.Bypass)
	return p, nil
}

// spawn starts the edge process from a thread that lives as long as it does, so that a death signal of the edge process means the
// death of this process and not that of a thread the runtime had no more use for.
func (p *Process) spawn(spec *Spec, std Stdio, sock, specFD int, died chan<- syscall.WaitStatus) error {
	uid, gid := os.Geteuid(), os.Getegid()
	inUID, inGID := 0, 0
	attr := &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWUTS,
	}
	if spec.mode() != NetHost {
		attr.Cloneflags |= unix.CLONE_NEWNET
	}
	if spec.PID {
		attr.Cloneflags |= unix.CLONE_NEWPID
	}
	if spec.KeepID {
		inUID, inGID = uid, gid
		attr.AmbientCaps = edgeCaps
	}
	attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: inUID, HostID: uid, Size: 1}}
	attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: inGID, HostID: gid, Size: 1}}
	files := childFiles(std, sock, specFD)
	argv := []string{edgeArg0, fmt.Sprint(sock), fmt.Sprint(specFD)}
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		// Signals are blocked in the edge process from its first instruction, as far as Go's runtime lets them be; see ownSignals.
		var all, old unix.Sigset_t
		for i := range all.Val {
			all.Val[i] = ^all.Val[i]
		}
		_ = unix.PthreadSigmask(unix.SIG_SETMASK, &all, &old)
		pid, err := p.fork(spec, argv, files, attr)
		_ = unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil)
		if err != nil {
			if spec.mode() == NetContainer {
				started <- failed("%w", err)
				return
			}
			started <- explainClone(spec, err)
			return
		}
		p.pid = pid
		started <- nil
		died <- p.await()
	}()
	return <-started
}

// fork starts the edge process in namespaces of its own, or in those of the container that is joined.
func (p *Process) fork(spec *Spec, argv []string, files []uintptr, attr *syscall.SysProcAttr) (int, error) {
	// One after the other: what one fork has open for a moment without close-on-exec, a child of another that is forked just then would keep.
	forking.Lock()
	defer forking.Unlock()
	if spec.mode() != NetContainer {
		return syscall.ForkExec("/proc/self/exe", argv, &syscall.ProcAttr{Env: edgeEnv, Files: files, Sys: attr})
	}
	fds := make([]int, len(files))
	for i, f := range files {
		fds[i] = int(f) // ^0 is -1, which is closed in both notations
	}
	return spec.Join.Start(netns.Command{Path: "/proc/self/exe", Args: argv, Env: edgeEnv, Files: fds, Guest: true})
}

var forking sync.Mutex

// edgeEnv keeps the edge process small: it allocates a megabyte or two in all and mostly sleeps.
var edgeEnv = []string{"GOGC=off", "GOMEMLIMIT=16MiB", "GOMAXPROCS=2", "GOTRACEBACK=none"}

// childFiles puts COMMAND's streams on 0, 1 and 2, keeps sock and specFD under their own numbers, and lets every other descriptor that this
// process would hand to a child be inherited under its own number too. A plain list behind the streams would replace what the user has
// opened there (3>file patchbay run …).
func childFiles(std Stdio, sock, specFD int) []uintptr {
	files := make([]uintptr, max(sock, specFD)+1)
	own := [3]*os.File{os.Stdin, os.Stdout, os.Stderr}
	for i, f := range []*os.File{std.In, std.Out, std.Err} {
		files[i] = uintptr(i)
		if f != nil && f != own[i] { // Fd would make a terminal blocking for everybody who has it
			files[i] = f.Fd()
		}
	}
	// Go's fork has descriptors without close-on-exec for a moment (uid_map). Taken for one to inherit, such a number would be another start's pipe by the time of its use.
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	for fd := 3; fd < len(files); fd++ {
		files[fd] = ^uintptr(0)
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		if fd == sock || fd == specFD || (err == nil && flags&unix.FD_CLOEXEC == 0) {
			files[fd] = uintptr(fd)
		}
	}
	return files
}

// specFile writes the Spec into a file in memory, which has no bound on its size as a message would.
func specFile(w *wireSpec) (int, error) {
	b, err := w.encode()
	if err != nil {
		return -1, err
	}
	return memFile("patchbay-spec", b, unix.MFD_CLOEXEC)
}

// memFile makes a file in memory.
func memFile(name string, b []byte, flags int) (int, error) {
	fd, err := unix.MemfdCreate(name, flags)
	if err != nil {
		return -1, err
	}
	for off := 0; off < len(b); {
		n, err := unix.Pwrite(fd, b[off:], int64(off))
		if err != nil {
			unix.Close(fd)
			return -1, err
		}
		off += n
	}
	return fd, nil
}

// readMemFile reads what memFile wrote, and closes it.
func readMemFile(fd int) ([]byte, error) {
	f := os.NewFile(uintptr(fd), "memory")
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	b := make([]byte, fi.Size())
	if _, err := f.ReadAt(b, 0); err != nil {
		return nil, err
	}
	return b, nil
}

// takeDevices receives n opened interfaces, or the edge process's reason why there are none.
func (p *Process) takeDevices(n int) error {
	buf := make([]byte, maxMessage)
	for {
		m, fds, err := p.link.recv(buf, true)
		if err != nil {
			return err
		}
		switch m.Kind {
		case msgDevice:
			p.notes = append(p.notes, m.Notes...)
			if m.Device == nil { // the network needs no device, or has them all
				closeAll(fds)
				if len(p.devices) != n {
					return failed("edge process: %d of %d interfaces came", len(p.devices), n)
				}
				return nil
			}
			if len(fds) == 0 || len(p.devices) == n {
				closeAll(fds)
				return failed("edge process: interface %q without a descriptor, or one too many", m.Device.Name)
			}
			p.devices = append(p.devices, &tap.Handle{Info: *m.Device, FDs: fds, Notes: m.Notes})
		case msgFail:
			closeAll(fds)
			return m.failure()
		default:
			closeAll(fds)
			return failed("edge process: message %q out of order", m.Kind)
		}
	}
}

func closeDevices(ds []*tap.Handle) {
	for _, d := range ds {
		_ = d.Close()
	}
}

// failure turns a msgFail into an *Error whose chain has the edge's errno, or tap.ErrGone.
func (m *message) failure() *Error {
	err := errors.New(m.Err)
	switch {
	case m.Gone:
		err = &remoteError{text: m.Err, cause: tap.ErrGone}
	case m.Errno != 0:
		err = &remoteError{text: m.Err, cause: syscall.Errno(m.Errno)}
	}
	code := m.Code
	if code != StatusNotExecutable && code != StatusNotFound {
		code = StatusFailed
	}
	return &Error{Status: code, Err: err}
}

type remoteError struct {
	text  string
	cause error
}

func (e *remoteError) Error() string { return e.text }
func (e *remoteError) Unwrap() error { return e.cause }

// lost says how an edge process ended that did not say so itself.
func lost(ws syscall.WaitStatus) *Error {
	if ws.Signaled() {
		return failed("the edge process was killed by signal %d (%v), and the container with it: look for who sent it, or for the OOM killer in the kernel log",
			int(ws.Signal()), ws.Signal())
	}
	return failed("the edge process ended without a word (status %d), and the container with it: this is a bug in patchbay", ws.ExitStatus())
}

// ignoredAtStart is the set of signals that were ignored when this process started, as nohup and a shell's & arrange it. Go's runtime
// remembers SIGHUP, SIGINT and those it does not handle; for the others it has installed its own handler before any Go code runs. Where
// SIGINT is ignored SIGQUIT is taken to be so too, since shells ignore the two together.
func ignoredAtStart() (set uint64) {
	for _, s := range []syscall.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU} {
		if signal.Ignored(s) {
			set |= bit(s)
		}
	}
	if set&bit(unix.SIGINT) != 0 {
		set |= bit(unix.SIGQUIT)
	}
	return set
}

func bit(s syscall.Signal) uint64 { return 1 << (uint(s) - 1) }
