package tap

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"patchbay/frame"
	"patchbay/internal/wire"
)

// packetBuf is how many bytes of frames are to wait in the socket. The kernel cuts it down to net.core.rmem_max.
const packetBuf = 4 << 20

// portName is the far end's name. It is alone in its namespace.
const portName = "port"

// openPacket makes a veth pair whose near end is the container's interface and whose far end sits alone in a network namespace of its
// own, in which there is nothing but a packet socket. The socket keeps that namespace, the namespace keeps the pair: closing the
// socket ends the interface, as closing a TAP would.
func openPacket(c OpenConfig, h *Handle) (*Handle, error) {
	if !hostLittleEndian() {
		return nil, fmt.Errorf("open %q over a packet socket: this machine is big-endian, which its virtio header does not provide for: use /dev/net/tun", c.Name)
	}
	if c.Persist {
		h.Notes = append(h.Notes, fmt.Sprintf("interface %q over a packet socket cannot persist: keep a duplicate of its descriptor", c.Name))
	}
	if c.Queues > 1 {
		h.Notes = append(h.Notes, fmt.Sprintf("interface %q over a packet socket has one queue, not %d", c.Name, c.Queues))
	}
	done := make(chan error)
	near, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %q over a packet socket: %w: mount /proc", c.Name, err)
	}
	defer unix.Close(near)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends, and what it unshared is left to the socket
		done <- makePacket(c, h, near)
	}()
	if err := <-done; err != nil {
		h.Close()
		return nil, explainPacket(c.Name, err)
	}
	return h, nil
}

// makePacket does the work on a thread that it moves into the far end's namespace. near is the container's.
func makePacket(c OpenConfig, h *Handle, near int) error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("make a network namespace: %w", err)
	}
	// The far end is a wire, no station: it may not ask for routers or report groups.
	v6err := writeSysctl("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1")
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("netlink: %w", err)
	}
	defer nl.Close()
	veth := &netlink.Veth{
		LinkAttrs:     netlink.LinkAttrs{Name: portName, MTU: MaxMTU, NumTxQueues: 1, NumRxQueues: 1},
		PeerName:      c.Name,
		PeerNamespace: netlink.NsFd(near),
	}
	if c.Name == "" {
		veth.PeerName = "veth%d"
	}
	if err := nl.LinkAdd(veth); err != nil {
		return fmt.Errorf("make a veth pair: %w", err)
	}
	port, err := nl.LinkByName(portName)
	if err != nil {
		return fmt.Errorf("find the far end: %w", err)
	}
	if v6err != nil && !errors.Is(v6err, os.ErrNotExist) {
		if err := nl.LinkSetIP6AddrGenMode(port, 1); err != nil { // IN6_ADDR_GEN_MODE_NONE
			h.Notes = append(h.Notes, fmt.Sprintf("interface %q: its far end may speak IPv6 by itself (%v)", c.Name, v6err))
		}
	}
	if err := nl.LinkSetUp(port); err != nil {
		return fmt.Errorf("bring the far end up: %w", err)
	}
	fd, err := packetSocket(port.Attrs().Index)
	if err != nil {
		return err
	}
	h.FDs = append(h.FDs, fd)
	if n, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF); err == nil && n < packetBuf {
		h.Notes = append(h.Notes, fmt.Sprintf("interface %q: at most %d KiB of frames can wait for the switch: raise net.core.rmem_max to %d if frames are lost under load", c.Name, n>>10, packetBuf))
	}
	h.Kind, h.VnetHdr, h.MTU = KindPacket, true, DefaultMTU
	h.Caps = frame.CapAll &^ c.Without
	if h.Caps&frame.CapUSO != 0 && !packetUSO(fd) {
		h.Caps &^= frame.CapUSO
	}
	return nearEnd(h, near, port.Attrs().ParentIndex)
}

// nearEnd reads the container's side: the name the kernel gave it, and its MAC.
func nearEnd(h *Handle, near, index int) error {
	if err := unix.Setns(near, unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("return to the container's namespace: %w", err)
	}
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("netlink: %w", err)
	}
	defer nl.Close()
	link, err := nl.LinkByIndex(index)
	if err != nil {
		return fmt.Errorf("find the near end: %w", err)
	}
	h.Name = link.Attrs().Name
	if hw := link.Attrs().HardwareAddr; len(hw) == 6 {
		h.MAC = wire.MAC(hw)
	}
	return nil
}

// packetSocket opens a socket on an interface of the thread's namespace that carries a virtio header in front of each frame.
func packetSocket(index int) (fd int, err error) {
	fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, fmt.Errorf("packet socket: %w", err)
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1); err != nil {
		return -1, fmt.Errorf("PACKET_VNET_HDR: %w", err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_AUXDATA, 1); err != nil {
		return -1, fmt.Errorf("PACKET_AUXDATA: %w", err)
	}
	// What follows is for speed: a kernel without it works.
	unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1)
	unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, 1)
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, packetBuf)
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, packetBuf)
	all := binary.NativeEndian.Uint16([]byte{0, unix.ETH_P_ALL})
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: index, Protocol: all}); err != nil {
		return -1, fmt.Errorf("bind the packet socket: %w", err)
	}
	return fd, nil
}

// packetRoom is what a record from a packet socket may need in front of its frame: a VLAN tag that the kernel has taken out.
const packetRoom = wire.VLANTagLen

// auxControl is room for one control message with a struct tpacket_auxdata.
type auxControl struct {
	hdr unix.Cmsghdr
	aux unix.TpacketAuxdata
	_   [16]byte
}

// readPacket reads one record into b: virtio header, packetRoom bytes, frame. rec is the record with the tag, if there was one, back in its
// place, and without the room if there was none.
func readPacket(fd int, b []byte) (rec []byte, errno unix.Errno) {
	const hdrLen = wire.VirtioNetHdrLen
	iov := [2]unix.Iovec{iovec(b[packetRoom : packetRoom+hdrLen]), iovec(b[packetRoom+hdrLen:])}
	var ctl auxControl
	msg := unix.Msghdr{Iov: &iov[0], Control: (*byte)(unsafe.Pointer(&ctl))}
	msg.SetIovlen(len(iov))
	msg.SetControllen(int(unsafe.Sizeof(ctl)))
	r, _, errno := unix.RawSyscall(unix.SYS_RECVMSG, uintptr(fd), uintptr(unsafe.Pointer(&msg)), unix.MSG_DONTWAIT)
	if errno != 0 {
		return nil, errno
	}
	n := int(r)
	if msg.Controllen == 0 || ctl.hdr.Level != unix.SOL_PACKET || ctl.hdr.Type != unix.PACKET_AUXDATA ||
		ctl.aux.Status&unix.TP_STATUS_VLAN_VALID == 0 || n < hdrLen+wire.EthernetLen {
		return b[packetRoom : packetRoom+n], 0
	}
	// The virtio header and the addresses move down to make room for the tag.
	copy(b, b[packetRoom:packetRoom+hdrLen+12])
	tag := b[hdrLen+12:]
	tpid := ctl.aux.Vlan_tpid
	if ctl.aux.Status&unix.TP_STATUS_VLAN_TPID_VALID == 0 {
		tpid = wire.EtherTypeVLAN
	}
	binary.BigEndian.PutUint16(tag, tpid)
	binary.BigEndian.PutUint16(tag[2:], ctl.aux.Vlan_tci)
	if b[0]&wire.VirtioNeedsCsum != 0 {
		start := b[6:8] // csum_start counts from the frame's beginning
		binary.LittleEndian.PutUint16(start, binary.LittleEndian.Uint16(start)+wire.VLANTagLen)
	}
	return b[:packetRoom+n], 0
}

// packetUSO finds out whether the kernel takes UDP superframes from a packet socket (Linux 6.2) by sending one. The near end is down,
// so that it goes nowhere: what tells is whether the kernel refuses the header.
func packetUSO(fd int) bool {
	const l4, payload, size = wire.EthernetLen + wire.IPv4Len, 200, 100
	b := make([]byte, wire.VirtioNetHdrLen+l4+wire.UDPLen+payload)
	hdr := wire.VirtioNetHdr{
		Flags: wire.VirtioNeedsCsum, GSOType: wire.GSOUDPL4, GSOSize: size, HdrLen: l4 + wire.UDPLen,
		CsumStart: l4, CsumOffset: wire.UDPChecksumOff,
	}
	hdr.Encode(b)
	f := b[wire.VirtioNetHdrLen:]
	wire.PutEthernet(f, wire.MAC{2}, wire.MAC{2}, wire.EtherTypeIPv4)
	f[wire.EthernetLen] = 0x45
	binary.BigEndian.PutUint16(f[wire.EthernetLen+2:], uint16(len(f)-wire.EthernetLen))
	f[wire.EthernetLen+9] = wire.ProtoUDP
	binary.BigEndian.PutUint16(f[l4+4:], wire.UDPLen+payload)
	_, err := unix.Write(fd, b)
	return !errors.Is(err, unix.EINVAL)
}

// explainPacket adds the remedy to an error of openPacket.
func explainPacket(name string, err error) error {
	remedy := ""
	switch {
	case errors.Is(err, unix.EPERM):
		remedy = ": needs CAP_SYS_ADMIN, CAP_NET_ADMIN and CAP_NET_RAW over the network namespace; enter the user namespace that owns it first"
	case errors.Is(err, unix.EEXIST):
		remedy = ": an interface of that name exists; delete it or choose another name"
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOTSUP):
		remedy = ": the kernel has no veth driver; load it (modprobe veth), or give access to " + DevicePath
	case errors.Is(err, unix.EAFNOSUPPORT):
		remedy = ": the kernel has no packet sockets; give access to " + DevicePath
	}
	return fmt.Errorf("open %q over a packet socket: %w%s", name, err, remedy)
}
