package edge

import (
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// How a signal that the parent got is matched with one that this process got. The kernel signals the members of a process group one after
// the other without a pause, so this process has it at the latest a moment after the parent had it; the parent's word may be late.
const (
	groupWait  = 10 * time.Millisecond // for this process's own signal, behind the parent's word
	groupKeep  = time.Second           // for the parent's word, behind the own signal
	groupBurst = 20 * time.Millisecond // in which several words mean the same: the parent's signals do not merge as ours do
)

// ownSignals is what this process was sent itself. Those that end a Go program are caught, since the runtime never blocks them; all
// others are blocked and wait in a signalfd.
type ownSignals struct {
	mu   sync.Mutex
	fd   int
	seen [65]struct {
		n        int // not yet matched
		at       time.Time
		terminal bool // the kernel sent it, for a key
	}
}

func newOwnSignals(ignored uint64) (*ownSignals, error) {
	var set unix.Sigset_t
	for i := range set.Val {
		set.Val[i] = ^set.Val[i]
	}
	// Children are waited for; the runtime needs its own.
	for _, s := range []syscall.Signal{unix.SIGCHLD, unix.SIGURG, unix.SIGPROF, unix.SIGPIPE} {
		set.Val[0] &^= bit(s)
	}
	fd, err := unix.Signalfd(-1, &set, unix.SFD_CLOEXEC|unix.SFD_NONBLOCK)
	if err != nil {
		return nil, err
	}
	o := &ownSignals{fd: fd}
	for s := syscall.Signal(1); s <= 64; s++ {
		if ignored&bit(s) != 0 && !signal.Ignored(s) {
			signal.Ignore(s)
		}
	}
	ch := make(chan os.Signal, 64)
	for _, s := range []syscall.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM} {
		if ignored&bit(s) == 0 {
			signal.Notify(ch, s)
		}
	}
	go func() {
		for s := range ch {
			o.mu.Lock()
			// There is no telling who sent it. These two rarely come from anything but a key when they come to the group.
			o.note(s.(syscall.Signal), s == unix.SIGINT || s == unix.SIGQUIT)
			o.mu.Unlock()
		}
	}()
	return o, nil
}

// drain takes in what is pending. mu is held.
func (o *ownSignals) drain() {
	var si unix.SignalfdSiginfo
	b := (*[unsafe.Sizeof(si)]byte)(unsafe.Pointer(&si))[:]
	for {
		n, err := unix.Read(o.fd, b)
		if err != nil || n != len(b) {
			return
		}
		o.note(syscall.Signal(si.Signo), si.Code > 0)
	}
}

// note records one signal. mu is held.
func (o *ownSignals) note(s syscall.Signal, terminal bool) {
	if s < 1 || int(s) >= len(o.seen) {
		return
	}
	x := &o.seen[s]
	if time.Since(x.at) > groupKeep {
		x.n = 0
	}
	x.n++
	x.at, x.terminal = time.Now(), terminal
}

// had reports whether this process got s along with the parent, and whether it came from the terminal.
func (o *ownSignals) had(s syscall.Signal) (grouped, terminal bool) {
	for end := time.Now().Add(groupWait); ; time.Sleep(time.Millisecond) {
		if grouped, terminal = o.match(s); grouped || time.Now().After(end) {
			return grouped, terminal
		}
	}
}

func (o *ownSignals) match(s syscall.Signal) (grouped, terminal bool) {
	if s < 1 || int(s) >= len(o.seen) {
		return false, false
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.drain()
	x := &o.seen[s]
	age := time.Since(x.at)
	if (x.n > 0 && age < groupKeep) || (!x.at.IsZero() && age < groupBurst) {
		x.n = max(x.n-1, 0)
		return true, x.terminal
	}
	return false, false
}
