package load

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// recvfrom and sendto are the plain system calls without the allocation of a Sockaddr per datagram. An address is kept as the kernel wrote it; the
// space of an IPv6 one holds either family.

func recvfrom(fd int, b []byte) (n int, from unix.RawSockaddrInet6, err error) {
	size := uint32(unsafe.Sizeof(from))
	r, _, e := unix.Syscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), 0,
		uintptr(unsafe.Pointer(&from)), uintptr(unsafe.Pointer(&size)))
	if e != 0 {
		return 0, from, e
	}
	return int(r), from, nil
}

func sendto(fd int, b []byte, to *unix.RawSockaddrInet6) error {
	size := unsafe.Sizeof(*to)
	if to.Family == unix.AF_INET {
		size = unix.SizeofSockaddrInet4
	}
	_, _, e := unix.Syscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), 0,
		uintptr(unsafe.Pointer(to)), size)
	if e != 0 {
		return e
	}
	return nil
}
