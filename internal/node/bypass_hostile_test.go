package node

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// handed is a socket of the host that is connected to nothing any more.
func handed(w bypassWorld) (int, error) {
	fd, err := tcpSocket(0)
	if err != nil {
		return -1, err
	}
	if err := unix.Connect(fd, address(w.echo)); err != nil {
		return -1, fmt.Errorf("connect: %w", err)
	}
	if got := from(fd); got != w.host {
		return -1, fmt.Errorf("from %s, not the host's %s", got, w.host)
	}
	unspec := [16]byte{}
	if _, _, no := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&unspec)), 16); no != 0 {
		return -1, fmt.Errorf("disconnect: %w", no)
	}
	return fd, nil
}

// hostile: a socket of the host is no way to where the network does not lead.
func hostile(w bypassWorld) error {
	fd, err := handed(w)
	if err != nil {
		return err
	}
	if err := unix.Listen(fd, 1); !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("listen: %w", err)
	}
	if err := unix.Connect(fd, address(w.hostLoopback)); !errors.Is(err, unix.EADDRNOTAVAIL) {
		return fmt.Errorf("connect to the host's loopback: %w", err)
	}
	if err := unix.Sendto(fd, []byte("x"), unix.MSG_FASTOPEN, address(w.hostLoopback)); !errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("connect by sending: %w", err)
	}
	if err := unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_ULP, "smc"); !errors.Is(err, unix.ENOPROTOOPT) {
		return fmt.Errorf("TCP_ULP: %w", err)
	}
	// The edge process has threads that no filter is on: nothing of it can be had.
	edgeProcess := os.Getppid()
	if name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", edgeProcess)); err != nil || string(name) != "patchbay-edge\n" {
		return fmt.Errorf("the parent is %q, %w", name, err)
	}
	if mem, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", edgeProcess), os.O_RDWR, 0); err == nil {
		mem.Close()
		return errors.New("the edge process's memory is open")
	}
	runtime.LockOSThread()
	if err := unix.PtraceSeize(edgeProcess); !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("trace the edge process: %w", err)
	}
	if p, err := unix.PidfdOpen(edgeProcess, 0); err != nil {
		return fmt.Errorf("pidfd: %w", err)
	} else if _, err := unix.PidfdGetfd(p, 2, 0); !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("take a descriptor of the edge process: %w", err)
	}
	var params [120]byte // struct io_uring_params
	if r, _, no := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&params)), 0); no != unix.ENOSYS {
		return fmt.Errorf("io_uring: %d, %w", r, no)
	}
	return nil
}

// hostileSwap: what a call meant when it was looked at is not what the kernel finds when it goes on: another socket, another address.
func hostileSwap(w bypassWorld) error {
	fd, err := handed(w)
	if err != nil {
		return err
	}
	u, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	mine, err := unix.Dup(u)
	if err != nil {
		return err
	}
	// Two forms of an address in one place: of a unix socket that nobody has, and of the host's loopback.
	var where [110]byte
	loopback := address(w.hostLoopback)
	inet := [16]byte{unix.AF_INET, 0, byte(loopback.Port >> 8), byte(loopback.Port), loopback.Addr[0], loopback.Addr[1], loopback.Addr[2], loopback.Addr[3]}
	unixName := [16]byte{unix.AF_UNIX, 0, '/', 'n', 'o'}
	var stop atomic.Bool
	var g sync.WaitGroup
	g.Go(func() {
		for i := 0; !stop.Load(); i++ {
			_ = unix.Dup3(fd, mine, 0)
			copy(where[:], inet[:])
			runtime.Gosched()
			copy(where[:], unixName[:])
			_ = unix.Dup3(u, mine, 0)
		}
	})
	outcomes := map[unix.Errno]int{}
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); {
		_, _, no := unix.Syscall(unix.SYS_CONNECT, uintptr(mine), uintptr(unsafe.Pointer(&where)), 16)
		outcomes[no]++
		_, _, _ = unix.Syscall(unix.SYS_LISTEN, uintptr(mine), 1, 0)
		if on, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); on != 0 || err != nil {
			stop.Store(true)
			g.Wait()
			return fmt.Errorf("it listens on the host: %w", err)
		}
	}
	stop.Store(true)
	g.Wait()
	if outcomes[0] > 0 || outcomes[unix.EACCES] == 0 {
		return fmt.Errorf("outcomes %v: want some that the kernel refused, and none that connected", outcomes)
	}
	return nil
}
