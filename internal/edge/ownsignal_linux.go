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
	groupWait   = 5 * time.Millisecond   // between two looks for this process's own signal, behind the parent's word
	groupKeep   = time.Second            // for the parent's word, behind the own signal
	groupBurst  = 20 * time.Millisecond  // in which several words mean the same: the parent's signals do not merge as ours do
	barrierWait = 500 * time.Millisecond // for the runtime to hand over a signal; bounds a look on a machine that hardly runs
)

// barrierSignal is one that nobody sends this process but itself. Its number is above those of the signals that are caught, and the kernel and
// the runtime both deliver the lowest first: what was pending before it has been handed over when it comes.
const barrierSignal = unix.SIGXFSZ

// ownSignals is what this process was sent itself. Those that end a Go program are caught, since the runtime never blocks them; all
// others are blocked and wait in a signalfd.
type ownSignals struct {
	fd       *os.File
	barriers chan struct{}

	mu   sync.Mutex
	seen [65]sighting
}

type sighting struct {
	n        int // not yet matched
	at       time.Time
	terminal bool // the kernel sent it, for a key
}

func newOwnSignals(ignored uint64) (*ownSignals, error) {
	var set unix.Sigset_t
	for i := range set.Val {
		set.Val[i] = ^set.Val[i]
	}
	// Children are waited for; the runtime needs its own.
	for _, s := range []syscall.Signal{unix.SIGCHLD, unix.SIGURG, unix.SIGPROF, unix.SIGPIPE, barrierSignal} {
		set.Val[0] &^= bit(s)
	}
	fd, err := unix.Signalfd(-1, &set, unix.SFD_CLOEXEC|unix.SFD_NONBLOCK)
	if err != nil {
		return nil, err
	}
	o := &ownSignals{fd: os.NewFile(uintptr(fd), "signalfd"), barriers: make(chan struct{}, 1)}
	for s := syscall.Signal(1); s <= 64; s++ {
		if ignored&bit(s) != 0 && !signal.Ignored(s) {
			signal.Ignore(s)
		}
	}
	ch := make(chan os.Signal, 64)
	for _, s := range []syscall.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, barrierSignal} {
		if ignored&bit(s) == 0 {
			signal.Notify(ch, s)
		}
	}
	rc, err := o.fd.SyscallConn()
	if err != nil {
		return nil, err
	}
	go o.catch(ch)
	// At once, not only when asked: a pending SIGCONT is lost when SIGTSTP comes, and the other way round.
	go func() { _ = rc.Read(func(uintptr) bool { o.drain(); return false }) }()
	return o, nil
}

func (o *ownSignals) catch(ch <-chan os.Signal) {
	for s := range ch {
		if s == barrierSignal {
			select {
			case o.barriers <- struct{}{}:
			default:
			}
			continue
		}
		// There is no telling who sent it. These two rarely come from anything but a key when they come to the group.
		o.mu.Lock()
		o.note(s.(syscall.Signal), s == unix.SIGINT || s == unix.SIGQUIT)
		o.mu.Unlock()
	}
}

// drain takes in what waits in the signalfd.
func (o *ownSignals) drain() {
	rc, err := o.fd.SyscallConn()
	if err != nil {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	_ = rc.Control(func(fd uintptr) {
		var si unix.SignalfdSiginfo
		b := (*[unsafe.Sizeof(si)]byte)(unsafe.Pointer(&si))[:]
		for {
			if n, err := unix.Read(int(fd), b); err != nil || n != len(b) {
				return
			}
			o.note(syscall.Signal(si.Signo), si.Code > 0)
		}
	})
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

// had reports whether this process got s along with the parent, and whether it came from the terminal. It takes groupWait to say no.
func (o *ownSignals) had(s syscall.Signal) (grouped, terminal bool) {
	if s < 1 || int(s) >= len(o.seen) {
		return false, false
	}
	for look := range 3 {
		if look > 0 {
			o.barrier()
		}
		o.drain()
		if grouped, terminal = o.match(s); grouped {
			return grouped, terminal
		}
		if look == 1 {
			time.Sleep(groupWait)
		}
	}
	return false, false
}

// barrier returns when the signals that this process had before are noted.
func (o *ownSignals) barrier() {
	select {
	case <-o.barriers:
	default:
	}
	_ = syscall.Kill(os.Getpid(), barrierSignal)
	select {
	case <-o.barriers:
	case <-time.After(barrierWait):
	}
}

func (o *ownSignals) match(s syscall.Signal) (grouped, terminal bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	x := &o.seen[s]
	age := time.Since(x.at)
	if (x.n > 0 && age < groupKeep) || (!x.at.IsZero() && age < groupBurst) {
		x.n = max(x.n-1, 0)
		return true, x.terminal
	}
	// Each of these takes the other off this process's queue, before it could be seen.
	var other syscall.Signal
	switch s {
	case unix.SIGCONT:
		other = unix.SIGTSTP
	case unix.SIGTSTP:
		other = unix.SIGCONT
	default:
		return false, false
	}
	y := &o.seen[other]
	return !y.at.IsZero() && time.Since(y.at) < groupKeep, y.terminal
}
