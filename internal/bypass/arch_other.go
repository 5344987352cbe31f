//go:build !amd64 && !arm64

package bypass

// auditArch 0 is no architecture: Install refuses. Another needs its AUDIT_ARCH, its calls that make epoll instances, and a look at what else it has beside the usual calls.
const auditArch = 0

var epollCreate []uint32
