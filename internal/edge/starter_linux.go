package edge

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"patchbay/internal/bypass"
)

// With a bypass COMMAND is executed by a process of its own, the starter: this program a third time. It puts the filter and the Landlock domain on itself and executes COMMAND. The edge process stays outside of both,
// so that Landlock keeps COMMAND from tracing it (LSM hook ptrace_access_check: only processes of the tracer's own domain, or of one below it), from its memory, and from what its unfiltered threads could do.
//
//	starter ── listener ──▶ edge process ── listener ──▶ parent
//	        ◀─── go ahead ──
//	        ── error number, or the end of the socket when COMMAND is executed ──▶

// starterArg0 is how a re-executed patchbay knows that it is the starter.
const starterArg0 = "patchbay-edge-starter"

// starterFixed is how many of the starter's arguments come before COMMAND's: its name, the socket, the file with COMMAND's environment, the signal mask, the ignored signals, whether to give up capabilities, and COMMAND's path.
const starterFixed = 7

// What the starter says first.
const (
	starterListens = 'L' // and the cookie of its network namespace; the listener is attached
	starterFails   = 'E' // and why
)

// startBypassed starts COMMAND under a filter and hands its listener to the parent before COMMAND is executed.
func (e *edgeProc) startBypassed(drop bool, path string, argv, env []string) (pid int, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, failed("bypass: socketpair: %w", err)
	}
	mine, theirs := pair[0], pair[1]
	defer unix.Close(mine)
	envFD, err := memFile("patchbay-env", []byte(strings.Join(env, "\x00")), 0)
	if err != nil {
		unix.Close(theirs)
		return 0, failed("bypass: COMMAND's environment: %w", err)
	}
	_, err = unix.FcntlInt(uintptr(theirs), unix.F_SETFD, 0)
	if err == nil {
		args := append([]string{starterArg0, strconv.Itoa(theirs), strconv.Itoa(envFD), strconv.FormatUint(e.spec.SigMask, 10), strconv.FormatUint(e.spec.Ignored, 10), strconv.FormatBool(drop), path}, argv...)
		// What comes before COMMAND is there waits for it: all signals are blocked until then. Its environment is not for Go's runtime to read.
		pid, err = forkExec(^uint64(0), "/proc/self/exe", args, edgeEnv)
	}
	unix.Close(theirs)
	unix.Close(envFD)
	if errors.Is(err, unix.E2BIG) {
		return 0, err
	}
	if err != nil {
		return 0, failed("bypass: start the process that executes COMMAND: %w", err)
	}
	child := pid
	defer func() {
		if err != nil {
			// It has ended, or is about to: nobody has let it go on.
			_ = syscall.Kill(child, syscall.SIGKILL)
			_, _ = syscall.Wait4(child, nil, 0, nil)
		}
	}()
	buf := make([]byte, 1024)
	oob := make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := unix.Recvmsg(mine, buf, oob, unix.MSG_CMSG_CLOEXEC)
	fds := rights(oob[:oobn])
	defer closeAll(fds)
	switch {
	case err != nil:
		return 0, failed("bypass: the process that executes COMMAND: %w", err)
	case n > 0 && buf[0] == starterFails:
		return 0, failed("bypass: %s", buf[1:n])
	case n != 9 || buf[0] != starterListens || len(fds) != 1:
		return 0, failed("bypass: the process that executes COMMAND has ended: look for what kills processes of yours, such as a limit of memory")
	}
	if err := e.link.send(message{Kind: msgListener, Network: binary.NativeEndian.Uint64(buf[1:])}, fds...); err != nil {
		return 0, failed("bypass: %w", err)
	}
	if _, err := unix.Write(mine, []byte{1}); err != nil {
		return 0, failed("bypass: the process that executes COMMAND: %w", err)
	}
	switch n, err := unix.Read(mine, buf); {
	case err != nil:
		return 0, failed("bypass: the process that executes COMMAND: %w", err)
	case n == 4:
		return 0, syscall.Errno(binary.NativeEndian.Uint32(buf))
	}
	return pid, nil
}

// starter becomes COMMAND, or says why not. It does nothing but system calls once the filter is on: no goroutine, no poller.
func starter(args []string) {
	runtime.LockOSThread()
	sock, err1 := strconv.Atoi(args[1])
	envFD, err2 := strconv.Atoi(args[2])
	mask, err3 := strconv.ParseUint(args[3], 10, 64)
	ignored, err4 := strconv.ParseUint(args[4], 10, 64)
	drop, err5 := strconv.ParseBool(args[5])
	if errors.Join(err1, err2, err3, err4, err5) != nil {
		fmt.Fprintln(os.Stderr, "patchbay: it is started by `patchbay run --bypass` only")
		os.Exit(StatusFailed)
	}
	unix.CloseOnExec(sock)
	fail := func(err error) {
		_, _ = unix.Write(sock, append([]byte{starterFails}, err.Error()...))
		os.Exit(StatusFailed)
	}
	b, err := readMemFile(envFD)
	if err != nil {
		fail(fmt.Errorf("COMMAND's environment: %w", err))
	}
	var env []string
	if len(b) > 0 {
		env = strings.Split(string(b), "\x00")
	}
	// The thread that executes COMMAND becomes its first, whichever it is.
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		fail(fmt.Errorf("ask for a death signal: %w", err))
	}
	cookie, err := bypass.Network()
	if err != nil {
		fail(err)
	}
	listener, err := bypass.Install()
	if err != nil {
		fail(err)
	}
	if drop {
		if err := dropCaps(); err != nil {
			fail(fmt.Errorf("give up capabilities: %w", err))
		}
	}
	hello := binary.NativeEndian.AppendUint64([]byte{starterListens}, cookie)
	if err := unix.Sendmsg(sock, hello, unix.UnixRights(listener), nil, 0); err != nil {
		fail(err)
	}
	unix.Close(listener)
	var goAhead [1]byte
	if n, err := unix.Read(sock, goAhead[:]); n != 1 || err != nil {
		os.Exit(StatusFailed) // the edge process is gone
	}
	for s := syscall.Signal(1); s <= 64; s++ {
		if ignored&bit(s) != 0 { // the runtime has taken some for itself
			signal.Ignore(s)
		}
	}
	var set unix.Sigset_t
	set.Val[0] = mask
	_ = unix.PthreadSigmask(unix.SIG_SETMASK, &set, nil)
	path, argv := args[6], args[starterFixed:]
	err = syscall.Exec(path, argv, env)
	if errors.Is(err, unix.ENOEXEC) {
		err = syscall.Exec(shell, shellArgs(path, argv), env)
	}
	var no syscall.Errno
	if !errors.As(err, &no) {
		no = unix.EINVAL
	}
	_, _ = unix.Write(sock, binary.NativeEndian.AppendUint32(nil, uint32(no)))
	os.Exit(StatusFailed)
}
