package tap

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// The reads and writes of frames keep the processor: telling the scheduler about a system call costs as much as a short one takes. One that
// blocked would stop the whole program, at the next garbage collection at the latest, so each of them says itself that it must not block
// (RWF_NOWAIT). O_NONBLOCK would not do: it belongs to the open file, not to our descriptor of it, and root in the container can clear
// it through the duplicate that its edge process keeps. Where the kernel does not know RWF_NOWAIT for a TAP the scheduler is told, and such a
// container holds up those that send to it, no more.

// noOffset has preadv2(2) and pwritev2(2) behave as readv and writev.
const noOffset = ^uintptr(0)

// takesNowait finds out by a write that is too short for a frame.
func takesNowait(fd int) bool {
	var b [1]byte
	iov := iovec(b[:])
	_, _, errno := unix.Syscall6(unix.SYS_PWRITEV2, uintptr(fd), uintptr(unsafe.Pointer(&iov)), 1, noOffset, noOffset, unix.RWF_NOWAIT)
	return errno == unix.EINVAL
}

func readFD(fd int, b []byte, nowait bool) (int, unix.Errno) {
	if !nowait {
		n, _, errno := unix.Syscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
		return int(n), errno
	}
	iov := iovec(b)
	n, _, errno := unix.RawSyscall6(unix.SYS_PREADV2, uintptr(fd), uintptr(unsafe.Pointer(&iov)), 1, noOffset, noOffset, unix.RWF_NOWAIT)
	return int(n), errno
}

func writevFD(fd int, iov []unix.Iovec, nowait bool) unix.Errno {
	if !nowait {
		_, _, errno := unix.Syscall(unix.SYS_WRITEV, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(iov))), uintptr(len(iov)))
		return errno
	}
	_, _, errno := unix.RawSyscall6(unix.SYS_PWRITEV2, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(iov))), uintptr(len(iov)), noOffset, noOffset, unix.RWF_NOWAIT)
	return errno
}
