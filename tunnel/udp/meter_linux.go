package udp

import (
	"net/netip"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// meter asks the kernel for path MTUs. It takes connected sockets: the kernel tells a socket the MTU of the one path it is connected to. They are opened
// with the Socket, so that they are in its network namespace whoever asks, and never send anything.
type meter struct {
	mu       sync.Mutex
	fd4, fd6 int // -1 where there is none
}

func (m *meter) open(s *Socket, host netip.Addr) (err error) {
	// From the address that datagrams leave from: policy routing may look at it.
	from4, from6 := host, host
	if s.dual {
		from4 = netip.IPv4Unspecified()
	}
	if !s.v6 || s.dual {
		if m.fd4, err = openMeter(unix.AF_INET, from4); err != nil {
			return err
		}
	}
	if s.v6 {
		m.fd6, err = openMeter(unix.AF_INET6, from6)
	}
	return err
}

func openMeter(domain int, from netip.Addr) (int, error) {
	fd, err := unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_UDP)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 0)
	if err := bind(fd, netip.AddrPortFrom(from, 0)); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// ask connects anew each time, since a connected socket goes on with the route it has found first.
func (m *meter) ask(p *Path) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	fd, level, opt := m.fd6, unix.IPPROTO_IPV6, unix.IPV6_MTU
	a := p.remote.Addr()
	var sa unix.Sockaddr = &unix.SockaddrInet6{Port: int(p.remote.Port()), Addr: a.As16(), ZoneId: p.scope}
	if a.Is4() {
		fd, level, opt = m.fd4, unix.IPPROTO_IP, unix.IP_MTU
		sa = &unix.SockaddrInet4{Port: int(p.remote.Port()), Addr: a.As4()}
	}
	if fd < 0 {
		return 0, ErrClosed
	}
	if err := unix.Connect(fd, sa); err != nil {
		return 0, err
	}
	return unix.GetsockoptInt(fd, level, opt)
}

func (m *meter) close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, fd := range []*int{&m.fd4, &m.fd6} {
		if *fd >= 0 {
			unix.Close(*fd)
			*fd = -1
		}
	}
}
