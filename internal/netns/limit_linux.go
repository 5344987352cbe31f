package netns

import (
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// startLimit is the limit of open files that this process was started with, or nil if it has that still or nobody knows. Go's runtime raises the soft limit to one below the hard
// one, gives the old one back to whatever package syscall starts, and tells it to nobody (syscall/rlimit.go). So this looks at such a child, which ptrace(2) stops before its
// first instruction.
func startLimit() *unix.Rlimit {
	var now, then unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &now); err != nil || now.Cur != now.Max-1 {
		return nil
	}
	runtime.LockOSThread() // the tracer is a thread, and the child's mask is that thread's
	defer runtime.UnlockOSThread()
	var trap, old unix.Sigset_t
	trap.Val[0] = 1 << (unix.SIGTRAP - 1)
	_ = unix.PthreadSigmask(unix.SIG_UNBLOCK, &trap, &old)
	pid, err := syscall.ForkExec("/proc/self/exe", []string{"patchbay", "version"}, &syscall.ProcAttr{Sys: &syscall.SysProcAttr{Ptrace: true, Pdeathsig: syscall.SIGKILL}})
	_ = unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil)
	if err != nil {
		return nil // a sandbox without ptrace: COMMAND has the higher limit
	}
	err = unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &then)
	_ = syscall.Kill(pid, syscall.SIGKILL)
	for {
		var ws syscall.WaitStatus
		if _, werr := syscall.Wait4(pid, &ws, 0, nil); (werr == nil && !ws.Stopped()) || (werr != nil && werr != syscall.EINTR) {
			break
		}
	}
	if err != nil || then.Max != now.Max {
		return nil
	}
	return &then
}
