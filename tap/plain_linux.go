package tap

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/songgao/water"
	"golang.org/x/sys/unix"
)

// openPlain opens a TAP without a virtio header through songgao/water.
func openPlain(c OpenConfig, h *Handle) (*Handle, error) {
	hold, err := tryPlain(c)
	if err != nil {
		return nil, explainOpen(c.Name, err)
	}
	defer unix.Close(hold)
	err = openWaters(c, h)
	if c.Queues > 1 && errors.Is(err, unix.EINVAL) {
		c.Queues = 1
		if err1 := openWaters(c, h); err1 == nil {
			h.Notes = append(h.Notes, fmt.Sprintf("tap %q: several queues refused (%v): opened one", h.Name, err))
			err = nil
		}
	}
	if err != nil {
		return nil, explainOpen(c.Name, err)
	}
	// The interface may be a persistent one whose last owner negotiated offloads.
	_ = unix.IoctlSetInt(h.FDs[0], unix.TUNSETOFFLOAD, 0)
	if err := finishOpen(c, h); err != nil {
		h.Close()
		return nil, explainOpen(c.Name, err)
	}
	return h, nil
}

// tryPlain finds out whether the interface can be had at all: water leaks its descriptor when it cannot. What it returns is for the caller to close when water is
// done: with several queues, which anybody may join, it holds a new name meanwhile; a single queue is nobody else's anyway.
func tryPlain(c OpenConfig) (hold int, err error) {
	hold = -1
	fd, err := unix.Open(DevicePath, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return hold, &fs.PathError{Op: "open", Path: DevicePath, Err: err}
	}
	flags := uint16(unix.IFF_TAP | unix.IFF_NO_PI)
	if c.New {
		flags |= unix.IFF_TUN_EXCL
		if c.Queues > 1 && c.Name != "" {
			if _, err = setIff(fd, c.Name, flags|unix.IFF_MULTI_QUEUE); err == nil {
				return fd, nil
			}
		}
	}
	if _, err = setIff(fd, c.Name, flags); errors.Is(err, unix.EINVAL) && c.Queues > 1 {
		_, err = setIff(fd, c.Name, flags|unix.IFF_MULTI_QUEUE)
	}
	unix.Close(fd)
	if err != nil {
		return hold, fmt.Errorf("TUNSETIFF: %w", err)
	}
	return hold, nil
}

// openWaters opens all queues; on error nothing stays open.
func openWaters(c OpenConfig, h *Handle) error {
	h.Name = c.Name
	for range c.Queues {
		if err := openWater(c, h); err != nil {
			h.Close()
			return err
		}
	}
	return nil
}

// openWater adds one queue to h.
func openWater(c OpenConfig, h *Handle) error {
	ifce, err := water.New(water.Config{
		DeviceType: water.TAP,
		PlatformSpecificParams: water.PlatformSpecificParams{
			Name:       h.Name,
			Persist:    c.Persist,
			MultiQueue: c.Queues > 1,
		},
	})
	if err != nil {
		return err
	}
	h.Name = ifce.Name()
	// water wraps the descriptor in an os.File, and so puts it on the runtime's poller. We want neither: keep a duplicate.
	defer ifce.Close()
	f, ok := ifce.ReadWriteCloser.(*os.File)
	if !ok {
		return fmt.Errorf("songgao/water yields a %T, not an *os.File", ifce.ReadWriteCloser)
	}
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	fd, derr := -1, error(nil)
	if err := rc.Control(func(p uintptr) { fd, derr = unix.FcntlInt(p, unix.F_DUPFD_CLOEXEC, 3) }); err != nil {
		return err
	}
	if derr != nil {
		return fmt.Errorf("duplicate descriptor: %w", derr)
	}
	h.FDs = append(h.FDs, fd)
	return nil
}
