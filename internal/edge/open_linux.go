package edge

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"

	"golang.org/x/sys/unix"

	"patchbay/internal/netns"
	"patchbay/tap"
)

// maxEthN bounds the search for a free name.
const maxEthN = 1000

// OpenIn opens interfaces in a namespace that is there already and returns their descriptors, which are the caller's. It starts this program once more inside the target's
// user and network namespaces, where that one opens and configures the interfaces, hands them over and ends. An interface without a name becomes the first free ethN. A default route is
// left out, with a note, where the namespace has one. A new interface is not persistent: it vanishes with the descriptors, whatever becomes of the caller; whoever owns the interface in the
// end makes it so. On error nothing new is left in the namespace, and interfaces that were to be opened again are as they were; tap.ErrGone is in the chain when one of those is no more.
// It blocks for some 20 ms; when ctx ends it gives up.
func OpenIn(ctx context.Context, t *netns.Target, ifcs []Interface) (hs []*tap.Handle, notes []string, err error) {
	w := wireSpec{Spec: Spec{Net: NetPrivate, Interfaces: ifcs, Pause: true}, Task: taskOpen}
	for i := range ifcs {
		if q := ifcs[i].Queues; q < 0 || q > maxQueues {
			return nil, nil, fmt.Errorf("interface %q: %d queues: use 1 to %d", ifcs[i].Name, q, maxQueues)
		}
	}
	sp, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair for the edge process: %w", err)
	}
	l, err := newLink(sp[0])
	if err != nil {
		unix.Close(sp[1])
		return nil, nil, fmt.Errorf("socketpair for the edge process: %w", err)
	}
	defer l.Close()
	spec, err := specFile(&w)
	if err != nil {
		unix.Close(sp[1])
		return nil, nil, fmt.Errorf("description of the interfaces: %w", err)
	}
	pid, err := t.Start(netns.Command{
		Path: "/proc/self/exe", Args: []string{edgeArg0, "3", "4"}, Env: edgeEnv, Files: []int{0, 1, 2, sp[1], spec},
	})
	unix.Close(sp[1])
	unix.Close(spec)
	if err != nil {
		return nil, nil, err
	}
	// The container may stop the process inside, or hold a duplicate of its socket.
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		_ = syscall.Kill(pid, syscall.SIGKILL)
		l.Close()
	})
	p := &Process{link: l}
	err = p.takeDevices(len(ifcs))
	if !stop() {
		<-stopped
	}
	_ = syscall.Kill(pid, syscall.SIGKILL) // it has nothing left to do
	reapChild(pid)
	if err != nil {
		closeDevices(p.devices)
		switch {
		case ctx.Err() != nil:
			err = ctx.Err()
		case errors.Is(err, io.EOF):
			err = errors.New("the process inside ended without a word: look for who killed it")
		}
		return nil, nil, fmt.Errorf("%s: %w", t, err)
	}
	return p.devices, p.notes, nil
}

// reapChild waits for a child that is about to end.
func reapChild(pid int) {
	for {
		if _, err := syscall.Wait4(pid, nil, 0, nil); !errors.Is(err, syscall.EINTR) {
			return
		}
	}
}

// openInterfaces is what taskOpen does. None becomes persistent here, so that they vanish by themselves when anything fails, here or with the one who asked.
func (e *edgeProc) openInterfaces() error {
	for i := range e.spec.Interfaces {
		f := &e.spec.Interfaces[i]
		open := e.openNew
		if f.Reopen {
			open = e.openAgain
		}
		h, err := open(f)
		if err != nil {
			return err
		}
		e.handles = append(e.handles, h)
	}
	for i, h := range e.handles {
		if e.spec.Interfaces[i].Persist && h.Kind == tap.KindPacket {
			h.Notes = append(h.Notes, fmt.Sprintf("interface %q is a packet socket: it will not survive a restart of the node", h.Name))
		}
	}
	for _, h := range e.handles {
		if err := e.link.send(message{Kind: msgDevice, Device: &h.Info, Notes: h.Notes}, h.FDs...); err != nil {
			return err
		}
	}
	return e.link.send(message{Kind: msgDevice})
}

// openNew makes an interface that was not there.
func (e *edgeProc) openNew(f *Interface) (*tap.Handle, error) {
	h, err := openFree(f)
	if err != nil {
		return nil, err
	}
	out, err := configureBeside(h, f)
	if err != nil {
		_ = h.Close()
		return nil, err
	}
	h.Notes = append(h.Notes, out...)
	return h, nil
}

// configureBeside configures an interface in a namespace that may have others: one default route is enough. It returns notes.
func configureBeside(h *tap.Handle, f *Interface) (notes []string, err error) {
	c := f.ifConfig()
	kept := c.Routes[:0]
	for _, r := range c.Routes {
		if r.Dst.Bits() == 0 {
			has, err := tap.HasDefaultRoute(r.Dst.Addr().Is6())
			if err != nil {
				return nil, fmt.Errorf("interface %q: %w", f.Name, err)
			}
			if has {
				notes = append(notes, fmt.Sprintf("interface %q: the namespace has a default route already, so none goes through %s", f.Name, r.Via))
				continue
			}
		}
		kept = append(kept, r)
	}
	c.Routes = kept
	out, err := h.Configure(c)
	return append(out.Notes, notes...), err
}

// openFree opens the interface under its name, or the first free one if it has none.
func openFree(f *Interface) (*tap.Handle, error) {
	named := f.Name != ""
	for i := 0; ; i++ {
		if !named {
			f.Name = fmt.Sprintf("eth%d", i)
		}
		again := !named && i < maxEthN
		if exists(f.Name) {
			if again {
				continue
			}
			return nil, fmt.Errorf("interface %q: it is there already; choose another with --ifname: %w", f.Name, unix.EEXIST)
		}
		h, err := tap.Open(tap.OpenConfig{Name: f.Name, Kind: f.Kind, Queues: f.Queues, Plain: f.ForcePlain, New: true})
		// Somebody else may have been faster.
		if taken := errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EEXIST); taken && again {
			continue
		} else if taken {
			err = fmt.Errorf("interface %q: it is there already; choose another with --ifname: %w", f.Name, unix.EEXIST)
		}
		return h, err
	}
}

// exists reports whether the namespace has an interface of that name.
func exists(name string) bool {
	_, err := net.InterfaceByName(name)
	return err == nil
}

// openAgain takes over the interface that an earlier node left. Its addresses and routes are its own.
func (e *edgeProc) openAgain(f *Interface) (*tap.Handle, error) {
	ifc, err := net.InterfaceByName(f.Name)
	if err != nil {
		return nil, fmt.Errorf("interface %q: %w", f.Name, tap.ErrGone)
	}
	if ifc.HardwareAddr.String() != f.MAC.String() {
		return nil, fmt.Errorf("interface %q has MAC %s and not %s, so it is another one: %w", f.Name, ifc.HardwareAddr, f.MAC, tap.ErrGone)
	}
	if !isTAP(f.Name) {
		return nil, fmt.Errorf("interface %q has the MAC %s and is no TAP, so it is another one: %w", f.Name, f.MAC, tap.ErrGone)
	}
	h, err := tap.Open(tap.OpenConfig{Name: f.Name, Queues: f.Queues, Plain: f.ForcePlain, Persist: true})
	if err != nil {
		return nil, err
	}
	h.MTU = ifc.MTU
	return h, nil
}

// isTAP reports whether an interface is a TAP, or cannot be asked.
func isTAP(name string) bool {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return true
	}
	defer unix.Close(fd)
	d, err := unix.IoctlGetEthtoolDrvinfo(fd, name)
	return err != nil || unix.ByteSliceToString(d.Driver[:]) == "tun" && unix.ByteSliceToString(d.Bus_info[:]) == "tap"
}
