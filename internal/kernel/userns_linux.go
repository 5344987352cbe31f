package kernel

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// noSuchFile is executed by the child of UserNS. /proc/self has no such entry and nobody can make one.
const noSuchFile = "/proc/self/patchbay-probe-ends-here"

// UserNS makes a user namespace and, with the rights it gives, the others that `patchbay run` needs.
func UserNS() Result {
	r := Result{Name: "user-namespaces", Need: "Linux 3.8", Required: true}
	err := tryUserNS()
	if err == nil {
		return ok(r, "an ordinary user can make user, network, mount and UTS namespaces")
	}
	detail, remedy := explainUserNS(err, readSysctl)
	return fail(r, detail, remedy)
}

// tryUserNS is nil when a child in a new user namespace could make the other namespaces with the rights it has there. A single clone with all
// flags would not do: under AppArmor's restriction it succeeds, and yields a namespace in which its root may do nothing.
func tryUserNS() error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	attr := &syscall.ProcAttr{
		Files: []uintptr{null.Fd(), null.Fd(), null.Fd()},
		Sys: &syscall.SysProcAttr{
			Cloneflags:   unix.CLONE_NEWUSER,
			Unshareflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWUTS,
			UidMappings:  []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}},
			GidMappings:  []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}},
		},
	}
	pid, err := syscall.ForkExec(noSuchFile, []string{noSuchFile}, attr)
	if err == nil {
		// Impossible; but a child must not be left behind.
		var ws syscall.WaitStatus
		_ = syscall.Kill(pid, syscall.SIGKILL)
		_, _ = syscall.Wait4(pid, &ws, 0, nil)
		return nil
	}
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// explainUserNS finds the setting that is behind a failure.
func explainUserNS(err error, sysctl func(string) string) (detail, remedy string) {
	detail = fmt.Sprintf("cannot make a user namespace with rights over its network (%v)", err)
	switch {
	case sysctl("user/max_user_namespaces") == "0":
		return detail + ": user.max_user_namespaces is 0", "sudo sysctl -w user.max_user_namespaces=15000"
	case sysctl("kernel/unprivileged_userns_clone") == "0":
		return detail + ": kernel.unprivileged_userns_clone is 0", "sudo sysctl -w kernel.unprivileged_userns_clone=1"
	case sysctl("kernel/apparmor_restrict_unprivileged_userns") == "1":
		return detail + ": AppArmor restricts user namespaces to programs with a profile that allows them",
			"sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, or install an AppArmor profile for patchbay with `userns,`"
	case errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EUSERS):
		return detail + ": too many namespaces exist, or too deep", "end some, or raise user.max_user_namespaces and user.max_net_namespaces"
	case errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS):
		return detail, "use a kernel with CONFIG_USER_NS and CONFIG_NET_NS"
	}
	return detail, "a sandbox forbids it (seccomp, or a container engine): allow clone and unshare with CLONE_NEWUSER there, for example --security-opt seccomp=unconfined"
}

// readSysctl is the trimmed value of a file under /proc/sys, or "".
func readSysctl(name string) string {
	b, err := os.ReadFile("/proc/sys/" + name)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
