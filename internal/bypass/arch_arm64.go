package bypass

import "golang.org/x/sys/unix"

const auditArch = unix.AUDIT_ARCH_AARCH64

// epollCreate are the calls that make an epoll instance.
var epollCreate = []uint32{unix.SYS_EPOLL_CREATE1}
