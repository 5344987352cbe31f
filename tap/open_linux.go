package tap

import (
	"errors"
	"fmt"
	"io/fs"

	"golang.org/x/sys/unix"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// DevicePath is the clone device that every TAP comes from.
const DevicePath = "/dev/net/tun"

// MaxQueues bounds OpenConfig.Queues. Linux allows 256 to a device.
const MaxQueues = 64

// Kind is how an interface reaches the switch. As text it is "tap", "packet" or "auto".
type Kind uint8

const (
	// KindTAP is a TAP: fast, and needs /dev/net/tun.
	KindTAP Kind = iota
	// KindPacket is a veth pair whose far end is a packet socket: for machines where /dev/net/tun is absent or closed. It carries
	// the same superframes, has one queue, and ends with its last descriptor.
	KindPacket
	// KindAuto is for OpenConfig alone: a TAP, or where there is none to be had a packet socket.
	KindAuto
)

var kindText = [...]string{KindTAP: "tap", KindPacket: "packet", KindAuto: "auto"}

func (k Kind) String() string {
	if int(k) >= len(kindText) {
		return fmt.Sprintf("Kind(%d)", uint8(k))
	}
	return kindText[k]
}

// MarshalText writes what String says.
func (k Kind) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText reads what String writes.
func (k *Kind) UnmarshalText(b []byte) error {
	for i, s := range kindText {
		if s == string(b) {
			*k = Kind(i)
			return nil
		}
	}
	return fmt.Errorf("kind of interface %q: use tap, packet or auto", b)
}

// OpenConfig says which TAP to open. The zero value is a new single-queue TAP with a name of the kernel's choice and every offload the
// kernel has.
type OpenConfig struct {
	// Name of the interface, at most 15 bytes. Empty: the kernel picks tap0, tap1, … A persistent interface of that name that nobody
	// holds is taken over with its addresses.
	Name string
	// Kind is what to open.
	Kind Kind
	// Queues is how many file descriptors to open; 0 means 1, at most MaxQueues. A kernel without multi-queue yields 1.
	Queues int
	// Plain leaves out the virtio header and so every offload. It is what remains where the kernel or a sandbox refuses the header,
	// and the baseline of benchmarks.
	Plain bool
	// Without takes these capabilities away although the kernel has them. A packet socket then still yields such frames.
	Without frame.Caps
	// Persist lets the interface outlive its last descriptor, with its addresses and routes.
	Persist bool
	// New refuses an interface that is there already with EBUSY or EEXIST, also one that somebody makes at this moment: of a multi-queue one this would otherwise
	// become a further queue.
	New bool
}

// Info describes an opened device to whoever gets its descriptors. It travels beside them as JSON.
type Info struct {
	// Name of the interface in its namespace at the time it was opened. A namespace's owner may rename it later.
	Name string `json:"name"`
	// Kind of the descriptors: KindTAP or KindPacket.
	Kind Kind `json:"kind"`
	// MAC of the container's side.
	MAC wire.MAC `json:"mac"`
	// MTU of the container's side: bytes of IP packet.
	MTU int `json:"mtu"`
	// Caps is what may be written to the device unfinished, and what it may yield unfinished.
	Caps frame.Caps `json:"caps"`
	// VnetHdr: each frame has a virtio header of wire.VirtioNetHdrLen bytes in front.
	VnetHdr bool `json:"vnetHdr"`
}

// Handle is an opened TAP: the descriptors, one a queue, and what was negotiated. The descriptors are non-blocking and
// close-on-exec, and belong to whoever holds the Handle.
type Handle struct {
	Info
	FDs []int
	// Notes says, one line each, what was asked for and not had: a header refused, fewer queues.
	Notes []string
}

// Close closes the descriptors. A TAP that is not persistent ends with its last descriptor. Idempotent.
func (h *Handle) Close() error {
	var errs []error
	for _, fd := range h.FDs {
		if err := unix.Close(fd); err != nil {
			errs = append(errs, fmt.Errorf("close tap %q: %w", h.Name, err))
		}
	}
	h.FDs = nil
	return errors.Join(errs...)
}

// SetPersist says whether the interface outlives its last descriptor. It needs no privilege over the namespace.
func (h *Handle) SetPersist(on bool) error {
	if h.Kind == KindPacket || len(h.FDs) == 0 {
		return nil // a packet socket's pair never does
	}
	v := 0
	if on {
		v = 1
	}
	if err := unix.IoctlSetInt(h.FDs[0], unix.TUNSETPERSIST, v); err != nil {
		return fmt.Errorf("tap %q: TUNSETPERSIST: %w", h.Name, err)
	}
	return nil
}

// Open opens or creates a TAP in the network namespace of the calling thread, which must hold CAP_NET_ADMIN over it. The
// interface is left down; see Configure. Where the virtio header is refused it opens the TAP plain (Info.VnetHdr false, no Caps); the
// reason is in Handle.Notes. An error names the interface, the reason and the remedy.
func Open(c OpenConfig) (*Handle, error) {
	if c.Queues == 0 {
		c.Queues = 1
	}
	if c.Queues < 0 || c.Queues > MaxQueues {
		return nil, fmt.Errorf("open tap %q: %d queues asked for: use 1 to %d", c.Name, c.Queues, MaxQueues)
	}
	if len(c.Name) >= unix.IFNAMSIZ {
		return nil, fmt.Errorf("open tap %q: interface names have at most %d bytes", c.Name, unix.IFNAMSIZ-1)
	}
	h := &Handle{}
	switch c.Kind {
	case KindPacket:
		return openPacket(c, h)
	case KindAuto:
		if err := canOpenTUN(); err != nil {
			h.Notes = append(h.Notes, fmt.Sprintf("%v: using a packet socket", explainOpen(c.Name, err)))
			return openPacket(c, h)
		}
	}
	if c.Plain {
		return openPlain(c, h)
	}
	err := openVnet(c, h, c.Queues > 1)
	if err != nil && c.Queues > 1 && errors.Is(err, unix.EINVAL) {
		// An old kernel, or a persistent single-queue interface of that name.
		if err1 := openVnet(c, h, false); err1 == nil {
			h.Notes = append(h.Notes, fmt.Sprintf("tap %q: %d queues refused (%v): opened one", h.Name, c.Queues, err))
			return h, nil
		}
	}
	switch {
	case err == nil:
		return h, nil
	case errors.Is(err, errNoHeader), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOTTY), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOSYS):
		h.Notes = append(h.Notes, fmt.Sprintf("tap %q: virtio header refused (%v): opened without offloads", c.Name, err))
		return openPlain(c, h)
	}
	return nil, explainOpen(c.Name, err)
}

// errNoHeader is an interface that could be had, but not with the header this package writes. A sandbox may say so with EPERM, which
// of TUNSETIFF would mean that the interface cannot be had at all.
var errNoHeader = errors.New("virtio header")

// canOpenTUN is nil when the clone device can be opened and is what it should be.
func canOpenTUN() error {
	fd, err := unix.Open(DevicePath, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: DevicePath, Err: err}
	}
	defer unix.Close(fd)
	if _, err := unix.IoctlGetUint32(fd, unix.TUNGETFEATURES); err != nil {
		return fmt.Errorf("TUNGETFEATURES: %w", err)
	}
	return nil
}

// openVnet opens c.Queues descriptors with a virtio header (one, unless multi) and fills in h. On error nothing stays open.
func openVnet(c OpenConfig, h *Handle, multi bool) (err error) {
	defer func() {
		if err != nil {
			h.Close()
		}
	}()
	flags, n := uint16(unix.IFF_TAP|unix.IFF_NO_PI|unix.IFF_VNET_HDR), 1
	if multi {
		flags |= unix.IFF_MULTI_QUEUE
		n = c.Queues
	}
	name := c.Name
	for range n {
		fd, err := unix.Open(DevicePath, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			return &fs.PathError{Op: "open", Path: DevicePath, Err: err}
		}
		h.FDs = append(h.FDs, fd)
		first := flags
		if c.New && len(h.FDs) == 1 {
			first |= unix.IFF_TUN_EXCL
		}
		if name, err = setIff(fd, name, first); err != nil {
			return fmt.Errorf("TUNSETIFF: %w", err)
		}
		if err := setVnetHdr(fd); err != nil {
			return fmt.Errorf("%w: %w", errNoHeader, err)
		}
	}
	h.Name, h.VnetHdr = name, true
	h.Caps = setOffload(h.FDs[0], frame.CapAll&^c.Without)
	return finishOpen(c, h)
}

// finishOpen sets what both ways of opening share.
func finishOpen(c OpenConfig, h *Handle) (err error) {
	persist := 0
	if c.Persist {
		persist = 1
	}
	if err := unix.IoctlSetInt(h.FDs[0], unix.TUNSETPERSIST, persist); err != nil {
		return fmt.Errorf("TUNSETPERSIST: %w", err)
	}
	if h.MAC, err = hwAddr(h.FDs[0]); err != nil {
		return fmt.Errorf("SIOCGIFHWADDR: %w", err)
	}
	h.MTU = DefaultMTU
	return nil
}

// explainOpen adds the remedy to an error of Open.
func explainOpen(name string, err error) error {
	remedy := ""
	switch {
	case errors.Is(err, fs.ErrNotExist):
		remedy = ": load the driver (modprobe tun), or give the sandbox the device (--device " + DevicePath + ")"
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		remedy = ": the kernel has no tun driver; load it (modprobe tun)"
	case errors.Is(err, unix.EACCES):
		remedy = ": let users open it (chmod 0666 " + DevicePath + ", or a udev rule)"
	case errors.Is(err, unix.EPERM):
		remedy = ": needs CAP_NET_ADMIN over the network namespace; enter the user namespace that owns it first"
	case errors.Is(err, unix.EBUSY):
		remedy = ": another process holds the interface; stop it or choose another name"
	case errors.Is(err, unix.EINVAL):
		remedy = ": an interface of that name exists and is no TAP, or one with another number of queues; delete it or choose another name"
	}
	return fmt.Errorf("open tap %q: %w%s", name, err, remedy)
}
