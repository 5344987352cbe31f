package edge

import (
	"os"
	"os/signal"
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// stopDelay is how long a stopped COMMAND is given to be continued before the parent stops as well. A terminal's Ctrl-Z or `fg` goes
// to the whole process group in one system call, so a few milliseconds would do.
const stopDelay = 30 * time.Millisecond

// relayed are the signals that mean something to COMMAND when somebody sends them to the parent.
func relayed() (out []os.Signal) {
	for s := syscall.Signal(1); s <= 64; s++ {
		switch s {
		case unix.SIGKILL, unix.SIGSTOP: // cannot be caught
		case unix.SIGCHLD, unix.SIGPIPE, unix.SIGURG, unix.SIGPROF: // about this process, or its runtime
		case unix.SIGILL, unix.SIGTRAP, unix.SIGABRT, unix.SIGBUS, unix.SIGFPE, unix.SIGSEGV, unix.SIGSTKFLT, unix.SIGSYS: // faults of this process
		case unix.SIGTTIN, unix.SIGTTOU: // stop the whole group, this process with it
		case unix.SIGXCPU, unix.SIGXFSZ: // limits of this process
		case 32, 33, 34: // C libraries keep them to themselves
		default:
			out = append(out, s)
		}
	}
	return out
}

// ForwardSignals passes the signals that are sent to this process on to COMMAND until stop is called, except those that were ignored when
// this process started. What a terminal or a shell sends to the whole process group reaches COMMAND by itself, and is not passed on
// a second time: the edge process, which is in the same group, has seen it too. A stop from the terminal stops this process like COMMAND.
//
// Call it before Release, once at a time in a process.
func (p *Process) ForwardSignals() (stop func()) {
	var sigs []os.Signal
	ignored := ignoredAtStart()
	for _, s := range relayed() {
		switch {
		case ignored&bit(s.(syscall.Signal)) == 0:
			sigs = append(sigs, s)
		case !signal.Ignored(s):
			signal.Ignore(s)
		}
	}
	ch := make(chan os.Signal, 64)
	signal.Notify(ch, sigs...)
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-done:
				return
			case s := <-ch:
				sig := s.(syscall.Signal)
				_ = p.link.send(message{Kind: msgSignal, Signal: int(sig)})
				if sig == unix.SIGTSTP {
					stopSelf(ch)
				}
			}
		}
	})
	return sync.OnceFunc(func() {
		signal.Stop(ch)
		close(done)
		wg.Wait()
	})
}

// stopSelf stops this process as if it had never caught SIGTSTP, and returns when it is continued. In an orphaned process group the kernel
// ignores it.
func stopSelf(ch chan os.Signal) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	signal.Reset(unix.SIGTSTP)
	// To this thread, so that it is over when the call returns; another thread might take it when the handler is back in place.
	_ = unix.Tgkill(os.Getpid(), unix.Gettid(), unix.SIGTSTP)
	signal.Notify(ch, unix.SIGTSTP)
}

// stopFollower stops this process when COMMAND has stopped itself, as `less` and shells do, so that the shell in front of both gets its
// terminal back.
type stopFollower struct {
	p  *Process
	mu sync.Mutex
	t  *time.Timer
}

func newStopFollower(p *Process) *stopFollower { return &stopFollower{p: p} }

func (f *stopFollower) stopped() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.t != nil {
		f.t.Stop()
	}
	f.t = time.AfterFunc(stopDelay, f.fire)
}

func (f *stopFollower) continued() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.t != nil {
		f.t.Stop()
		f.t = nil
	}
}

func (f *stopFollower) stop() { f.continued() }

// fire stops this process if COMMAND is still stopped: the news of its going on may be behind that of its stopping. Only the
// foreground job of a terminal is stopped; any other has no shell that waits for the terminal, or for whoever would continue it.
func (f *stopFollower) fire() {
	if !f.p.commandStopped() || !foreground() {
		return
	}
	_ = syscall.Kill(os.Getpid(), syscall.SIGSTOP)
}

// commandStopped looks for COMMAND among the edge process's children, since a PID namespace gives it another id.
func (p *Process) commandStopped() bool {
	for _, c := range children(p.pid) {
		if state, _, ok := procStat(c); ok && state == 'T' {
			return true
		}
	}
	return false
}

// foreground reports whether this process is in the foreground group of its terminal.
func foreground() bool {
	fd, err := unix.Open("/dev/tty", unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	pgrp, err := unix.IoctlGetUint32(fd, unix.TIOCGPGRP)
	return err == nil && int(pgrp) == unix.Getpgrp()
}
