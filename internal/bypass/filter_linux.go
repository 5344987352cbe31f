package bypass

import (
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"patchbay/internal/kernel"
)

// Install puts the calling thread, and what it executes or starts from now on, under a Supervisor: connect(2), listen(2) and the making of epoll instances stop until whoever holds the listener has answered, and no TCP socket connects but
// by his hand. It cannot be undone. The caller has locked itself to its thread, and hands the listener, which is closed on exec, on. A thread has one such listener at most, so that there is none inside a container that has one.
func Install() (listener int, err error) {
	if auditArch == 0 {
		return -1, fmt.Errorf("not made for %s yet; run without the bypass", runtime.GOARCH)
	}
	if err := restrict(); err != nil {
		return -1, err
	}
	prog, err := filter()
	if err != nil {
		return -1, err
	}
	fprog := unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
	fd, _, no := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_NEW_LISTENER, uintptr(unsafe.Pointer(&fprog)))
	runtime.KeepAlive(prog)
	switch no {
	case 0:
		return int(fd), nil
	case unix.EBUSY:
		return -1, errors.New("a seccomp listener is there already, and the kernel has one for a process; do not ask for a bypass inside a container that has it")
	}
	return -1, fmt.Errorf("seccomp: %w; a sandbox around patchbay refuses it: run without the bypass", no)
}

// restrict has the kernel refuse each connection of a TCP socket that the calling thread, or a child of it, makes by itself, whatever the address (landlock(7)).
func restrict() error {
	if err := kernel.Landlock().Err(); err != nil {
		return err
	}
	attr := unix.LandlockRulesetAttr{Handled_access_net: unix.LANDLOCK_ACCESS_NET_CONNECT_TCP}
	fd, _, no := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), unsafe.Offsetof(attr.Scoped), 0)
	if no != 0 {
		return fmt.Errorf("rules for Landlock (landlock_create_ruleset): %w; run without the bypass", no)
	}
	defer unix.Close(int(fd))
	_, _, no = unix.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, fd, 0, 0)
	if no == unix.EPERM { // without CAP_SYS_ADMIN in the user namespace: for those who never gain rights by executing a program
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return fmt.Errorf("no_new_privs for Landlock (PR_SET_NO_NEW_PRIVS): %w; run without the bypass", err)
		}
		_, _, no = unix.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, fd, 0, 0)
	}
	if no != 0 {
		return fmt.Errorf("domain of Landlock (landlock_restrict_self): %w; run without the bypass", no)
	}
	return nil
}

// x32 is the bit of call numbers of the x32 ABI, which has the architecture of x86-64 and numbers of its own.
const x32 = 0x40000000

// filter is the program: which calls stop, and which there are not. What would go past it, or past Landlock, is left out: programs of another architecture, io_uring, TCP_ULP, and connecting by sending (MSG_FASTOPEN), which
// Landlock's hook of connect(2) does not see.
func filter() ([]unix.SockFilter, error) {
	const (
		offNr, offArch = 0, 4
		offArgs        = 16 // the lower half of an argument comes first
		refuse         = unix.SECCOMP_RET_ERRNO
	)
	var p program
	p.add(bpf.LoadAbsolute{Off: offArch, Size: 4})
	p.unless(bpf.JumpEqual, auditArch, refuse|uint32(unix.ENOSYS))
	p.add(bpf.LoadAbsolute{Off: offNr, Size: 4})
	p.when(bpf.JumpBitsSet, x32, refuse|uint32(unix.ENOSYS))
	for _, nr := range append([]uint32{unix.SYS_CONNECT, unix.SYS_LISTEN}, epollCreate...) {
		p.when(bpf.JumpEqual, nr, unix.SECCOMP_RET_USER_NOTIF)
	}
	p.when(bpf.JumpEqual, unix.SYS_IO_URING_SETUP, refuse|uint32(unix.ENOSYS))
	// TCP_ULP makes other things of a TCP socket, such as one of AF_SMC, whose connect(2) Landlock does not know.
	p.add(bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.SYS_SETSOCKOPT, SkipFalse: 6})
	p.add(bpf.LoadAbsolute{Off: offArgs + 8*1, Size: 4})
	p.add(bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.IPPROTO_TCP, SkipFalse: 3})
	p.add(bpf.LoadAbsolute{Off: offArgs + 8*2, Size: 4})
	p.when(bpf.JumpEqual, unix.TCP_ULP, refuse|uint32(unix.ENOPROTOOPT))
	p.add(bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW})
	for _, send := range []struct{ nr, flags uint32 }{{unix.SYS_SENDTO, 3}, {unix.SYS_SENDMSG, 2}, {unix.SYS_SENDMMSG, 3}} {
		p.add(bpf.JumpIf{Cond: bpf.JumpEqual, Val: send.nr, SkipFalse: 4})
		p.add(bpf.LoadAbsolute{Off: offArgs + 8*send.flags, Size: 4})
		p.when(bpf.JumpBitsSet, unix.MSG_FASTOPEN, refuse|uint32(unix.EOPNOTSUPP))
		p.add(bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW})
	}
	p.add(bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW})
	raw, err := bpf.Assemble(p)
	if err != nil {
		return nil, err
	}
	out := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		out[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	return out, nil
}

// program is a classic BPF program under construction.
type program []bpf.Instruction

func (p *program) add(i bpf.Instruction) { *p = append(*p, i) }

// when returns action if what was loaded passes the test, unless if it does not.
func (p *program) when(test bpf.JumpTest, val, action uint32) {
	*p = append(*p, bpf.JumpIf{Cond: test, Val: val, SkipFalse: 1}, bpf.RetConstant{Val: action})
}

func (p *program) unless(test bpf.JumpTest, val, action uint32) {
	*p = append(*p, bpf.JumpIf{Cond: test, Val: val, SkipTrue: 1}, bpf.RetConstant{Val: action})
}
