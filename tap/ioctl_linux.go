package tap

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// offloadSteps are the TUNSETOFFLOAD arguments in the order they are tried: the kernel refuses the whole word when it does not know one
// bit, so each step gives up what came last into the kernel (USO in 6.2), and then what some sandboxes leave out.
var offloadSteps = [...]struct {
	arg  int
	caps frame.Caps
}{
	{unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6 | unix.TUN_F_TSO_ECN | unix.TUN_F_USO4 | unix.TUN_F_USO6, frame.CapAll},
	{unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6 | unix.TUN_F_TSO_ECN, frame.CapAll &^ frame.CapUSO},
	{unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6, frame.CapCsum | frame.CapTSO4 | frame.CapTSO6},
	{unix.TUN_F_CSUM | unix.TUN_F_TSO4, frame.CapCsum | frame.CapTSO4},
	{unix.TUN_F_CSUM, frame.CapCsum},
}

// setOffload asks for every offload in want that the kernel takes and says which those are.
func setOffload(fd int, want frame.Caps) frame.Caps {
	for _, s := range offloadSteps {
		if s.caps&^want != 0 {
			continue
		}
		if unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, s.arg) == nil {
			return s.caps
		}
	}
	_ = unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, 0) // nothing to do about a refusal: no offload is what remains anyway
	return 0
}

// setVnetHdr fixes the layout of the virtio header: 10 bytes, little-endian. A kernel that does not know TUNSETVNETLE uses the host's
// order, which is the same thing on most machines.
func setVnetHdr(fd int) error {
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, wire.VirtioNetHdrLen); err != nil {
		if n, gerr := unix.IoctlGetUint32(fd, unix.TUNGETVNETHDRSZ); gerr != nil || n != wire.VirtioNetHdrLen {
			return fmt.Errorf("%d bytes: %w", wire.VirtioNetHdrLen, err)
		}
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETLE, 1); err != nil && !hostLittleEndian() {
		return fmt.Errorf("little-endian: %w", err)
	}
	return nil
}

func hostLittleEndian() bool {
	x := uint16(1)
	return *(*byte)(unsafe.Pointer(&x)) == 1
}

// setIff attaches fd to the interface name (empty: the kernel picks one) and returns its name.
func setIff(fd int, name string, flags uint16) (string, error) {
	ifr, err := newIfreq(name)
	if err != nil {
		return "", err
	}
	ifr.SetUint16(flags)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		return "", err
	}
	return ifr.Name(), nil
}

// newIfreq is unix.NewIfreq that also takes the empty name.
func newIfreq(name string) (*unix.Ifreq, error) {
	if name == "" {
		name = "tap%d"
	}
	return unix.NewIfreq(name)
}

// getIff asks the device behind fd what it is: its name and its IFF_ flags. It needs no privilege and no namespace.
func getIff(fd int) (name string, flags uint16, err error) {
	ifr, err := unix.NewIfreq("x")
	if err != nil {
		return "", 0, err
	}
	if err := unix.IoctlIfreq(fd, unix.TUNGETIFF, ifr); err != nil {
		return "", 0, err
	}
	return ifr.Name(), ifr.Uint16(), nil
}

// hwAddr reads the interface's MAC through the TAP itself, so that it works from any namespace.
func hwAddr(fd int) (wire.MAC, error) {
	// struct ifreq: 16 bytes of name, then a sockaddr: family, then the address.
	var ifr [40]byte
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCGIFHWADDR, uintptr(unsafe.Pointer(&ifr)))
	runtime.KeepAlive(&ifr)
	if errno != 0 {
		return wire.MAC{}, errno
	}
	return wire.MAC(ifr[18:24]), nil
}
