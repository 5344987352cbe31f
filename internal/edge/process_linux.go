package edge

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"patchbay/tap"
)

// killGrace is how long the edge process has to clear up before it is killed itself.
const killGrace = 10 * time.Second

// lastWords bounds reading what an edge process wrote before it died: somebody in the container may hold a duplicate of its socket and go on writing.
const lastWords = time.Second

// Devices are the interfaces of the Spec, in its order: descriptors, negotiated offloads, MAC and MTU. They belong to the caller, who
// closes them, or hands them to tap.New, which does. The edge process keeps duplicates, so the interface stays without them for as long as it lives.
func (p *Process) Devices() []*tap.Handle { return p.devices }

// Bypassed is what a Supervisor of COMMAND's connections needs.
type Bypassed struct {
	// Listener is what bypass.Install returned for COMMAND.
	Listener *os.File
	// Network is the container's network namespace, by its cookie.
	Network uint64
}

// TakeBypass is for once, when Release has returned nil and Spec.Bypass asked for it; else, and when COMMAND has ended already, it returns nil. The listener is then the caller's. Until somebody answers, COMMAND waits in its first connect(2).
func (p *Process) TakeBypass() *Bypassed {
	p.mu.Lock()
	defer p.mu.Unlock()
	b := p.bypass
	p.bypass = nil
	return b
}

// Notes says, one line each, what was asked for and not had but does not keep the container from working.
// The list is complete when Release has returned.
func (p *Process) Notes() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.notes)
}

// PID is the edge process's id. Its /proc/PID/ns are the container's namespaces.
func (p *Process) PID() int { return p.pid }

// Release lets COMMAND start, and returns when it has been executed, or with the *Error that says why it could not be. It blocks for as
// long as the container's files are being set up and COMMAND is being executed. A second call does nothing.
func (p *Process) Release() error {
	select {
	case <-p.ready:
	case <-p.ended:
		return p.startError()
	}
	p.mu.Lock()
	first := !p.released
	p.released = true
	p.mu.Unlock()
	if !first {
		return nil
	}
	if err := p.link.send(message{Kind: msgRelease}); err != nil && !gone(err) {
		return failed("edge process: %w", err)
	}
	select {
	case <-p.started:
		return nil
	case <-p.ended:
		return p.startError()
	}
}

// startError is why COMMAND did not start. A signal that came before it is no error: Wait reports it.
func (p *Process) startError() error {
	select {
	case <-p.started: // it did, and was quick
		return nil
	default:
	}
	_, err := p.Wait()
	return err
}

// Signal sends COMMAND s, whatever process group it is in. Before COMMAND has started, a signal that would end it ends the container. It is
// no error if COMMAND is gone already.
func (p *Process) Signal(s syscall.Signal) error {
	if err := p.link.send(message{Kind: msgKill, Signal: int(s)}); err != nil && !gone(err) {
		return fmt.Errorf("signal %v: %w", s, err)
	}
	return nil
}

// Detach has the edge process close its descriptors of an interface, so that the interface vanishes when everybody else has closed theirs. An unknown name is no error.
func (p *Process) Detach(ifname string) error {
	if err := p.link.send(message{Kind: msgDetach, Name: ifname}); err != nil && !gone(err) {
		return fmt.Errorf("interface %q: %w", ifname, err)
	}
	return nil
}

// Wait blocks until COMMAND has ended and nothing of the container is left, and returns how COMMAND ended. The error is an *Error: COMMAND
// could not be started, or the edge process was lost. It may be called several times and from several goroutines.
func (p *Process) Wait() (Status, error) {
	<-p.ended
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.status, p.err
}

// Close ends the container, COMMAND and all its descendants, with SIGKILL, and returns when nothing is left of it. Devices stay
// open. Wait then says that
// COMMAND was killed. Idempotent.
func (p *Process) Close() error {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	_ = p.link.Close() // the edge process sees its parent gone and clears up
	select {
	case <-p.ended:
		return nil
	case <-time.After(p.grace):
	}
	p.kill()
	select {
	case <-p.ended:
		return nil
	case <-time.After(p.grace):
		return fmt.Errorf("edge process %d does not end although it was killed: it hangs inside the kernel", p.pid)
	}
}

// kill ends the edge process, unless it has been reaped and its id may be another's.
func (p *Process) kill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.reaped {
		_ = syscall.Kill(p.pid, syscall.SIGKILL)
	}
}

// await reaps the edge process when it has ended. It blocks its thread for as long as that takes.
func (p *Process) await() (ws syscall.WaitStatus) {
	for errors.Is(unix.Waitid(unix.P_PID, p.pid, nil, unix.WEXITED|unix.WNOWAIT, nil), unix.EINTR) {
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		if _, err := syscall.Wait4(p.pid, &ws, 0, nil); !errors.Is(err, syscall.EINTR) {
			p.reaped = true
			return ws
		}
	}
}

// run follows the edge process to its end, which is the end of the link, or its death, whichever comes first. COMMAND can part the two: it may
// stop the edge process and shut its socket down, or hold a duplicate of the socket and kill the edge process.
func (p *Process) run(died <-chan syscall.WaitStatus, bypass bool) {
	silent := make(chan struct{})
	go func() {
		p.follow(bypass)
		close(silent)
	}()
	var ws syscall.WaitStatus
	hung := false
	select {
	case <-silent:
		_ = p.link.Close()
		select {
		case ws = <-died:
		case <-time.After(p.grace):
			hung = true
			p.kill()
			ws = <-died
		}
	case ws = <-died:
		_ = p.link.c.SetReadDeadline(time.Now().Add(lastWords))
		<-silent
		_ = p.link.Close()
	}
	p.sweep()
	p.stops.stop()
	if p.mark != nil {
		_ = p.mark.Close()
	}
	p.mu.Lock()
	if p.bypass != nil {
		_ = p.bypass.Listener.Close()
		p.bypass = nil
	}
	switch r := p.report; {
	case r == nil && p.closed:
		p.status = Status{Signal: syscall.SIGKILL}
	case r == nil && hung:
		p.err = failed("the edge process closed its socket and was still there %v later, so it was killed, and the container with it: look for what in the container has tampered with it", p.grace)
	case r == nil:
		p.err = lost(ws)
	case r.Kind == msgFail:
		p.err = r.failure()
	default:
		p.status = Status{Code: r.Code & 0xff, Signal: syscall.Signal(r.Signal & 0x7f), Left: r.Left}
	}
	p.mu.Unlock()
	close(p.ended)
}

// follow reads what the edge process has to say until it is gone. A descriptor is taken once, where a bypass was asked for: its listener, before COMMAND exists.
func (p *Process) follow(bypass bool) {
	buf := make([]byte, maxMessage)
	ready := false
	for {
		m, fds, err := p.link.recv(buf, bypass)
		if err != nil {
			return
		}
		if m.Kind == msgListener && bypass && len(fds) > 0 {
			p.mu.Lock()
			p.bypass = &Bypassed{Listener: os.NewFile(uintptr(fds[0]), "seccomp"), Network: m.Network}
			p.mu.Unlock()
			bypass, fds = false, fds[1:]
		}
		closeAll(fds)
		switch m.Kind {
		case msgReady:
			if ready {
				continue // from here on COMMAND may be speaking through a traced edge process: the notes do not grow for as long as it likes
			}
			ready = true
			p.mu.Lock()
			p.notes = append(p.notes, m.Notes...)
			p.mu.Unlock()
			closeOnce(p.ready)
		case msgStarted:
			bypass = false
			p.mu.Lock()
			p.command = m.PID
			p.mu.Unlock()
			closeOnce(p.started)
		case msgStopped:
			p.stops.stopped()
		case msgCont:
			p.stops.continued()
		case msgExit, msgFail:
			p.mu.Lock()
			if p.report == nil {
				p.report = &m
			}
			p.mu.Unlock()
		}
	}
}

// closeOnce closes a channel that only the calling goroutine ever closes.
func closeOnce(c chan struct{}) {
	select {
	case <-c:
	default:
		close(c)
	}
}

// sweep ends what a killed edge process left to this process, its subreaper. In a PID namespace the kernel has done so.
func (p *Process) sweep() {
	if p.pidns {
		return
	}
	defer subreaper.release()
	if p.mark == nil {
		return
	}
	deadline := time.Now().Add(killGrace)
	var before []int
	for time.Now().Before(deadline) {
		kids := children(os.Getpid())
		orphans, dying := ownOrphans(kids, int(p.mark.Fd()), p.markOf)
		// One that has ended since its parent was listed leaves its own children to this process: they show the next time.
		if len(orphans) == 0 && !dying && slices.Equal(kids, before) {
			return
		}
		before = kids
		if dying {
			time.Sleep(time.Millisecond)
		}
		for _, o := range orphans {
			killTree(o)
		}
		for _, o := range orphans {
			reap(o, deadline)
		}
	}
}

// reap waits for a killed child. It does not wait without end: a process may hang inside the kernel.
func reap(pid int, deadline time.Time) {
	for d := 50 * time.Microsecond; ; d = min(2*d, 10*time.Millisecond) {
		n, err := syscall.Wait4(pid, nil, syscall.WNOHANG, nil)
		if n == pid || (err != nil && !errors.Is(err, syscall.EINTR)) || time.Now().After(deadline) {
			return
		}
		time.Sleep(d)
	}
}

func gone(err error) bool {
	return errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.ENOTCONN) || isClosed(err)
}

// subreaper counts the containers that need this process to be a child subreaper. There is one such flag in a process, whence the global.
var subreaper reaperFlag

type reaperFlag struct {
	mu     sync.Mutex
	n      int
	before int32
}

func (r *reaperFlag) acquire() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.n == 0 {
		if err := unix.Prctl(unix.PR_GET_CHILD_SUBREAPER, uintptr(unsafe.Pointer(&r.before)), 0, 0, 0); err != nil {
			return err
		}
		if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
			return err
		}
	}
	r.n++
	return nil
}

func (r *reaperFlag) release() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.n--; r.n == 0 {
		_ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, uintptr(r.before), 0, 0, 0)
	}
}
