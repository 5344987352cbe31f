package tap

import (
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"patchbay/frame"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
)

// The layout of seccomp_notif and seccomp_notif_resp (linux/seccomp.h).
type (
	seccompNotif struct {
		id         uint64
		pid, flags uint32
		nr         int32
		arch       uint32
		ip         uint64
		args       [6]uint64
	}
	seccompResp struct {
		id    uint64
		val   int64
		err   int32
		flags uint32
	}
)

// sandboxed calls f in ns on a thread that a seccomp filter keeps, as a sandbox would: refuse says, for each ioctl by which a TAP is opened
// and its argument (of TUNSETIFF the flags), what the kernel is to answer; 0 lets it pass.
func sandboxed(t testing.TB, ns *testbed.NS, refuse func(cmd, arg uint64) unix.Errno, f func()) {
	t.Helper()
	cmds := []uint32{unix.TUNSETIFF, unix.TUNSETVNETHDRSZ, unix.TUNGETVNETHDRSZ, unix.TUNSETOFFLOAD, unix.TUNSETVNETLE}
	low := uint32(24) // of args[1] in seccomp_data
	if !hostLittleEndian() {
		low += 4
	}
	n := uint8(len(cmds))
	prog := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_IOCTL, Jf: n + 1},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: low},
	}
	for i, c := range cmds {
		prog = append(prog, unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: c, Jt: n - uint8(i)})
	}
	prog = append(prog,
		unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
		unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_USER_NOTIF})
	var stop atomic.Bool
	done, judged := make(chan error), make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the filter ends with the thread
		var err error
		defer func() { done <- err }()
		if err = unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			judged <- nil
			return
		}
		ns.Do(func() {
			fprog := unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
			fd, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_NEW_LISTENER, uintptr(unsafe.Pointer(&fprog)))
			if errno != 0 {
				err = fmt.Errorf("seccomp: %w", errno)
				judged <- nil
				return
			}
			go func() {
				defer unix.Close(int(fd))
				judged <- judge(int(fd), &stop, refuse)
			}()
			f()
		})
	}()
	err := <-done
	stop.Store(true)
	if jerr := <-judged; jerr != nil {
		t.Fatalf("seccomp notifications: %v", jerr)
	}
	if err != nil {
		testbed.Lacking(t, "no seccomp filter can be had here: %v", err)
	}
}

// judge answers what the filter asks until stop is set.
func judge(fd int, stop *atomic.Bool, refuse func(cmd, arg uint64) unix.Errno) error {
	for !stop.Load() {
		pfd := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if _, err := unix.Poll(pfd, 20); err != nil && err != unix.EINTR {
			return err
		}
		if pfd[0].Revents&unix.POLLIN == 0 {
			if pfd[0].Revents != 0 {
				return nil // the thread is gone
			}
			continue
		}
		var q seccompNotif
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SECCOMP_IOCTL_NOTIF_RECV, uintptr(unsafe.Pointer(&q))); errno != 0 {
			return errno
		}
		arg := q.args[2]
		if q.args[1] == unix.TUNSETIFF {
			var ifr [unix.IFNAMSIZ + 2]byte
			local := []unix.Iovec{{Base: &ifr[0], Len: uint64(len(ifr))}}
			if _, err := unix.ProcessVMReadv(os.Getpid(), local, []unix.RemoteIovec{{Base: uintptr(arg), Len: len(ifr)}}, 0); err != nil {
				return fmt.Errorf("read the request: %w", err)
			}
			arg = uint64(binary.NativeEndian.Uint16(ifr[unix.IFNAMSIZ:]))
		}
		a := seccompResp{id: q.id, flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE}
		if errno := refuse(q.args[1], arg); errno != 0 {
			a = seccompResp{id: q.id, err: -int32(errno)}
		}
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SECCOMP_IOCTL_NOTIF_SEND, uintptr(unsafe.Pointer(&a))); errno != 0 {
			return errno
		}
	}
	return nil
}

// TestOpenRefused: what a kernel or a sandbox refuses costs offloads and nothing else.
func TestOpenRefused(t *testing.T) {
	testbed.Leaks(t)
	testbed.RequireTUN(t)
	probe := open(t, testbed.NewNS(t), OpenConfig{}, IfConfig{})
	all := probe.Caps()
	probe.Close()
	const (
		header  = "virtio header refused"
		offload = unix.TUN_F_USO4 | unix.TUN_F_USO6
	)
	for _, c := range []struct {
		name   string
		queues int
		cmds   []uint64 // refused
		bits   uint64   // of the argument, one of which it takes; 0: whatever it is
		errno  unix.Errno
		vnet   bool
		caps   frame.Caps
		note   string
	}{
		{name: "IFF_VNET_HDR", cmds: []uint64{unix.TUNSETIFF}, bits: unix.IFF_VNET_HDR, errno: unix.EINVAL, note: header},
		{name: "IFF_VNET_HDR, two queues", queues: 2, cmds: []uint64{unix.TUNSETIFF}, bits: unix.IFF_VNET_HDR, errno: unix.EINVAL, note: header},
		{name: "size of the header", cmds: []uint64{unix.TUNSETVNETHDRSZ}, errno: unix.EINVAL, vnet: true, caps: all}, // it is 10 bytes anyway
		{name: "size of the header, unknown", cmds: []uint64{unix.TUNSETVNETHDRSZ, unix.TUNGETVNETHDRSZ}, errno: unix.EINVAL, note: header},
		{name: "size of the header, not permitted", cmds: []uint64{unix.TUNSETVNETHDRSZ, unix.TUNGETVNETHDRSZ}, errno: unix.EPERM, note: header},
		{name: "size of the header, no such call", queues: 2, cmds: []uint64{unix.TUNSETVNETHDRSZ, unix.TUNGETVNETHDRSZ}, errno: unix.ENOSYS, note: header},
		{name: "byte order", cmds: []uint64{unix.TUNSETVNETLE}, errno: unix.ENOTTY, vnet: hostLittleEndian(), caps: all},
		{name: "offloads", cmds: []uint64{unix.TUNSETOFFLOAD}, errno: unix.EPERM, vnet: true},
		{name: "USO", cmds: []uint64{unix.TUNSETOFFLOAD}, bits: offload, errno: unix.EINVAL, vnet: true, caps: all &^ frame.CapUSO},
		{name: "TSO with ECN", cmds: []uint64{unix.TUNSETOFFLOAD}, bits: unix.TUN_F_TSO_ECN, errno: unix.EINVAL, vnet: true, caps: all &^ (frame.CapUSO | frame.CapECN)},
		{name: "TSO", cmds: []uint64{unix.TUNSETOFFLOAD}, bits: unix.TUN_F_TSO4, errno: unix.EINVAL, vnet: true, caps: frame.CapCsum},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := &pair{a: testbed.NewNS(t, "a"), b: testbed.NewNS(t, "b")}
			refused := 0
			var h *Handle
			var err error
			sandboxed(t, p.a, func(cmd, arg uint64) unix.Errno {
				for _, r := range c.cmds {
					if r == cmd && (c.bits == 0 || arg&c.bits != 0) {
						refused++
						return c.errno
					}
				}
				return 0
			}, func() {
				if h, err = Open(OpenConfig{Name: "eth0", Queues: c.queues}); err == nil {
					if _, err = h.Configure(IfConfig{MAC: wire.MAC{2, 0, 0, 0, 0, 1}, Addrs: prefixes("10.1.0.1/24", "fd01::1/64")}); err != nil {
						h.Close()
					}
				}
			})
			if err != nil {
				t.Fatal(err)
			}
			notes := strings.Join(h.Notes, "\n")
			if refused == 0 || h.VnetHdr != c.vnet || h.Caps != c.caps || len(h.FDs) != max(c.queues, 1) {
				t.Errorf("%d calls refused, header %v, Caps %b, %d queues; want some, %v, %b, %d", refused, h.VnetHdr, h.Caps, len(h.FDs), c.vnet, c.caps, max(c.queues, 1))
			}
			if c.note == "" && notes != "" || !strings.Contains(notes, c.note) || c.note != "" && !strings.Contains(notes, c.errno.Error()) {
				t.Errorf("notes %q, want %q and %q", notes, c.note, c.errno)
			}
			if p.da, err = New(Config{Info: h.Info, FDs: h.FDs}); err != nil {
				h.Close()
				t.Fatal(err)
			}
			t.Cleanup(func() { p.da.Close() })
			p.plug(t, OpenConfig{}, 1500, Config{})
			p.exchange(t, 1500, 2<<20)
			if got, want := p.ab.supers.Load() > 0, c.caps&frame.CapTSO4 != 0; got != want {
				t.Errorf("superframes crossed: %v, want %v", got, want)
			}
			if got, want := p.ab.csum.Load() > 0, c.caps != 0; got != want {
				t.Errorf("unfinished checksums crossed: %v, want %v", got, want)
			}
		})
	}
}
