package edge

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// command is COMMAND as a child. Its id is a valid target for as long as mu is held and done is false.
type command struct {
	started chan struct{}

	mu    sync.Mutex
	begun bool // start has been called: a signal in between finds COMMAND in a moment
	pid   int
	done  bool
}

func (c *command) starting() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.begun
}

func (c *command) running() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.pid != 0 && !c.done
}

// sameGroup reports whether COMMAND is still in the process group it was started in.
func (c *command) sameGroup() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pid == 0 || c.done {
		return false
	}
	g, err := unix.Getpgid(c.pid)
	return err == nil && g == unix.Getpgrp()
}

// signal reports whether there is, or was, a COMMAND to send s to.
func (c *command) signal(s syscall.Signal) bool {
	if c.starting() {
		<-c.started
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pid == 0 {
		return false
	}
	if !c.done {
		_ = syscall.Kill(c.pid, s)
	}
	return true
}

// start executes COMMAND as a child of the main thread.
func (e *edgeProc) start() error {
	c := e.command
	c.mu.Lock()
	c.begun = true
	c.mu.Unlock()
	defer close(c.started)
	argv, env := e.spec.Spec.Argv, e.spec.Spec.Env
	if d := e.spec.Spec.Dir; d != "" {
		if err := os.Chdir(d); err != nil {
			return explain(fmt.Sprintf("working directory %q", d), unwrapPath(err), "name a directory that exists and that you may enter")
		}
	}
	path, err := lookPath(argv[0], env)
	if err != nil {
		return err
	}
	// In a container that is joined COMMAND is who its commands are; only root has rights there.
	drop := e.spec.KeepID || e.spec.mode() == NetContainer && os.Geteuid() != 0
	var pid int
	if e.spec.Bypass {
		pid, err = e.startBypassed(drop, path, argv, env)
	} else {
		if drop {
			if err := dropCaps(); err != nil {
				return failed("give up capabilities: %w", err)
			}
		}
		pid, err = forkExec(e.spec.SigMask, path, argv, env)
		if errors.Is(err, unix.ENOEXEC) {
			pid, err = forkExec(e.spec.SigMask, shell, shellArgs(path, argv), env)
		}
	}
	var known *Error
	if errors.As(err, &known) {
		return known
	}
	if err != nil {
		return explainExec(argv[0], path, err)
	}
	c.mu.Lock()
	c.pid = pid
	c.mu.Unlock()
	return e.link.send(message{Kind: msgStarted, PID: pid})
}

// shell executes a script without #!, as execvp(3) has it.
const shell = "/bin/sh"

func shellArgs(path string, argv []string) []string {
	return append([]string{shell, path}, argv[1:]...)
}

// forkExec starts a child with a signal mask, bit n-1 for signal n: a child gets the mask of the thread that forks.
// Signals that this process ignores stay ignored, all others are at their default.
func forkExec(blocked uint64, path string, argv, env []string) (int, error) {
	var mask, old unix.Sigset_t
	mask.Val[0] = blocked
	_ = unix.PthreadSigmask(unix.SIG_SETMASK, &mask, &old)
	defer func() { _ = unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil) }()
	return syscall.ForkExec(path, argv, &syscall.ProcAttr{
		Env: env, Files: []uintptr{0, 1, 2},
		Sys: &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL},
	})
}

// attend waits for COMMAND and for the orphans this process inherits, and ends the container with COMMAND.
func (e *edgeProc) attend() error {
	for {
		pid, ws, ok := e.command.wait()
		switch {
		case !ok:
			return failed("COMMAND is no child of the edge process any more: this is a bug in patchbay")
		case pid != e.command.pid:
		case ws.Stopped():
			_ = e.link.send(message{Kind: msgStopped})
		case ws.Continued():
			_ = e.link.send(message{Kind: msgCont})
		default:
			m := message{Kind: msgExit}
			if ws.Signaled() {
				m.Signal = int(ws.Signal())
			} else {
				m.Code = ws.ExitStatus()
			}
			if !e.spec.PID {
				m.Left = killRest(e.command.reapAll)
			}
			return e.link.send(m)
		}
	}
}

// wait blocks until a child changes and returns the change. COMMAND's id stays its own until done says otherwise.
func (c *command) wait() (pid int, ws syscall.WaitStatus, ok bool) {
	for {
		err := unix.Waitid(unix.P_ALL, 0, nil, unix.WEXITED|unix.WSTOPPED|unix.WCONTINUED|unix.WNOWAIT, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return 0, 0, false
		}
		c.mu.Lock()
		pid, err := syscall.Wait4(-1, &ws, syscall.WNOHANG|syscall.WUNTRACED|unix.WCONTINUED, nil)
		if err == nil && pid == c.pid && (ws.Exited() || ws.Signaled()) {
			c.done = true
		}
		c.mu.Unlock()
		if err == nil && pid > 0 {
			return pid, ws, true
		}
	}
}

// reapAll takes in every child that has ended.
func (c *command) reapAll() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil)
		if err != nil || pid <= 0 {
			return
		}
		if pid == c.pid {
			c.done = true
		}
	}
}

// killRest kills every descendant of this process, which is their subreaper, and returns those that would not die.
func killRest(reapAll func()) (left []int) {
	self := os.Getpid()
	deadline := time.Now().Add(killGrace / 2)
	for d := 50 * time.Microsecond; ; d = min(2*d, 5*time.Millisecond) {
		reapAll()
		left = children(self)
		if len(left) == 0 || time.Now().After(deadline) {
			return left
		}
		for _, c := range left {
			killTree(c)
		}
		time.Sleep(d)
	}
}

// lookPath finds COMMAND as shells do: by itself if it has a slash, otherwise in PATH.
func lookPath(name string, env []string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	path := "/bin:/usr/bin"
	for _, v := range env {
		if p, ok := strings.CutPrefix(v, "PATH="); ok {
			path = p
			break
		}
	}
	var denied string
	for dir := range strings.SplitSeq(path, ":") {
		if dir == "" {
			dir = "."
		}
		f := dir + "/" + name
		fi, err := os.Stat(f)
		if err != nil || fi.IsDir() {
			continue // a directory of PATH that may not be searched is one that is not there, as shells have it
		}
		if unix.Faccessat(unix.AT_FDCWD, f, unix.X_OK, unix.AT_EACCESS) == nil {
			return f, nil
		}
		if denied == "" {
			denied = f
		}
	}
	if denied != "" {
		return "", &Error{Status: StatusNotExecutable, Err: fmt.Errorf("%q: %w; make %s executable (chmod +x)", name, unix.EACCES, denied)}
	}
	return "", &Error{Status: StatusNotFound, Err: fmt.Errorf("%q: command not found in PATH; install it, or give its path", name)}
}

// explainExec says why a program that is there, or was named by its path, could not be executed.
func explainExec(name, path string, err error) *Error {
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		if _, serr := os.Stat(path); serr == nil {
			return &Error{Status: StatusNotFound, Err: fmt.Errorf("%q: %w; the interpreter that it names in its first line, or its dynamic loader, is missing", name, err)}
		}
		return &Error{Status: StatusNotFound, Err: fmt.Errorf("%q: %w; check the path, which is looked up in the container's working directory", name, err)}
	case errors.Is(err, unix.EACCES):
		if fi, serr := os.Stat(path); serr == nil && fi.IsDir() {
			return &Error{Status: StatusNotExecutable, Err: fmt.Errorf("%q: it is a directory; name a program", name)}
		}
		return &Error{Status: StatusNotExecutable, Err: fmt.Errorf("%q: %w; make it executable (chmod +x), on a file system without noexec", name, err)}
	case errors.Is(err, unix.E2BIG):
		return &Error{Status: StatusNotExecutable, Err: fmt.Errorf("%q: %w; pass fewer or shorter arguments and variables", name, err)}
	}
	return &Error{Status: StatusNotExecutable, Err: fmt.Errorf("%q: %w; is it a program for this machine?", name, err)}
}

// dropCaps takes from the calling thread every way by which a program it executes could have capabilities.
func dropCaps() error {
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return err
	}
	for c := uintptr(0); c < 64; c++ {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil {
			if errors.Is(err, unix.EINVAL) {
				break // above the last one the kernel knows
			}
			return err
		}
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return err
	}
	data[0].Inheritable, data[1].Inheritable = 0, 0
	return unix.Capset(&hdr, &data[0])
}

func unwrapPath(err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}
