package edge

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"patchbay/tap"
)

// edgeArg0 is how a re-executed patchbay knows that it is the edge process, and what ps shows.
const edgeArg0 = "patchbay-edge"

// edgeProc is the edge process. Its main goroutine is bound to the main thread, which starts COMMAND and waits for it: COMMAND's death
// signal means the death of that thread.
type edgeProc struct {
	link    *link
	spec    wireSpec
	own     *ownSignals
	release chan struct{}
	command *command
	mu      sync.Mutex
	handles []*tap.Handle // kept, so that the carrier stays up whoever holds the other descriptors
	notes   []string
}

// Main is called first thing in main, and in TestMain of a test that calls Start. It returns at once, unless this process was started by
// Start as an edge process, or by one to become COMMAND; then it never returns.
func Main() {
	if len(os.Args) > starterFixed && os.Args[0] == starterArg0 {
		starter(os.Args)
	}
	if len(os.Args) != 3 || os.Args[0] != edgeArg0 {
		return
	}
	sock, err1 := strconv.Atoi(os.Args[1])
	specFD, err2 := strconv.Atoi(os.Args[2])
	if err1 != nil || err2 != nil {
		return
	}
	runtime.LockOSThread()
	name := [16]byte{}
	copy(name[:15], edgeArg0)
	_ = unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(&name)), 0, 0, 0)
	unix.CloseOnExec(sock)
	unix.CloseOnExec(specFD)
	l, err := newLink(sock)
	if err != nil {
		fmt.Fprintf(os.Stderr, "patchbay: edge process: descriptor %d: %v; it is started by `patchbay run` only\n", sock, err)
		os.Exit(StatusFailed)
	}
	e := &edgeProc{link: l, release: make(chan struct{})}
	if err := e.run(specFD); err != nil {
		e.fail(err)
	}
	os.Exit(0)
}

// fail tells the parent why there is no COMMAND.
func (e *edgeProc) fail(err error) {
	m := message{Kind: msgFail, Code: StatusFailed, Err: err.Error(), Gone: errors.Is(err, tap.ErrGone)}
	var x *Error
	if errors.As(err, &x) {
		m.Code = x.Status
	}
	var no syscall.Errno
	if errors.As(err, &no) {
		m.Errno = int(no)
	}
	_ = e.link.send(m)
}

// run is the whole life of the edge process in order.
func (e *edgeProc) run(specFD int) error {
	if err := e.readSpec(specFD); err != nil {
		return failed("description of the container: %w", err)
	}
	if e.spec.Task == taskOpen {
		return e.openInterfaces()
	}
	if err := e.adopt(); err != nil {
		return err
	}
	var err error
	if e.own, err = newOwnSignals(e.spec.Ignored); err != nil {
		return failed("signalfd: %w", err)
	}
	e.command = &command{started: make(chan struct{})}
	go e.listen()
	if err := privateMounts(); err != nil {
		return err
	}
	if err := e.network(); err != nil {
		return err
	}
	if err := e.furnish(); err != nil {
		return err
	}
	if err := e.link.send(message{Kind: msgReady, Notes: e.notes}); err != nil {
		return err
	}
	<-e.release
	if e.spec.Pause {
		return e.pause()
	}
	if err := e.start(); err != nil {
		return err
	}
	return e.attend()
}

func (e *edgeProc) readSpec(fd int) error {
	b, err := readMemFile(fd)
	if err != nil {
		return err
	}
	return e.spec.decode(b)
}

// adopt arranges that nothing of the container outlives this process, and that this process does not outlive its parent.
func (e *edgeProc) adopt() error {
	if e.spec.PID {
		// The kernel ends a PID namespace with its first process. If the parent is gone already, listen sees the end of the socket.
		if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
			return failed("ask for a death signal: %w", err)
		}
		return nil
	}
	// Without one this process must live on for a moment to end the others: it notices its parent's end by the socket alone.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return failed("become a child subreaper: %w", err)
	}
	return nil
}

// listen follows the parent. When the parent is gone the container ends.
func (e *edgeProc) listen() {
	buf := make([]byte, maxMessage)
	released := false
	for {
		m, _, err := e.link.recv(buf, false)
		if err != nil {
			break
		}
		switch m.Kind {
		case msgRelease:
			if !released {
				released = true
				close(e.release)
			}
		case msgDetach:
			e.letGo(m.Name)
		case msgSignal:
			e.relay(syscall.Signal(m.Signal))
		case msgKill:
			e.deliver(syscall.Signal(m.Signal))
		}
	}
	e.end()
}

// letGo closes this process's descriptors of an interface.
func (e *edgeProc) letGo(name string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, h := range e.handles {
		if h.Name == name {
			_ = h.Close() // it reports nothing that anybody could mend
		}
	}
}

// pause is the life of a container without a COMMAND: it ends with a signal that would end a COMMAND (see deliver), or with the parent.
func (e *edgeProc) pause() error {
	if err := e.link.send(message{Kind: msgStarted}); err != nil {
		return err
	}
	select {}
}

// relay handles a signal that the parent got. If this process, which is in the same process group, has it too, then it was sent to the
// group and COMMAND has it as well, unless COMMAND has left the group.
func (e *edgeProc) relay(s syscall.Signal) {
	grouped, terminal := e.own.had(s)
	if grouped && e.command.running() && (terminal || e.command.sameGroup()) {
		return
	}
	e.deliver(s)
}

// deliver sends COMMAND a signal. If there is no COMMAND yet, a signal that would end it ends the container.
func (e *edgeProc) deliver(s syscall.Signal) {
	if e.command.signal(s) {
		return
	}
	switch s {
	case unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGKILL, unix.SIGALRM, unix.SIGUSR1, unix.SIGUSR2:
		if e.spec.Ignored&bit(s) == 0 && !e.command.starting() {
			_ = e.link.send(message{Kind: msgExit, Signal: int(s)})
			e.end()
		}
	}
}

// end ends everything at once, from any goroutine.
func (e *edgeProc) end() {
	if !e.spec.PID {
		killRest(func() { e.command.reapAll() })
	}
	os.Exit(0)
}
