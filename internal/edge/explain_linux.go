package edge

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

func isClosed(err error) bool { return errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrClosed) }

// explainClone says why the namespaces could not be made.
func explainClone(spec *Spec, err error) *Error {
	what := "create user, mount and UTS namespaces"
	switch {
	case spec.PID && spec.mode() != NetHost:
		what = "create user, network, PID, mount and UTS namespaces"
	case spec.mode() != NetHost:
		what = "create user, network, mount and UTS namespaces"
	case spec.PID:
		what = "create user, PID, mount and UTS namespaces"
	}
	return failed("%s: %w; %s", what, err, cloneRemedy(err))
}

func cloneRemedy(err error) string {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "mount /proc, which holds this program as /proc/self/exe"
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EUSERS):
		if s := sysctl("user/max_user_namespaces"); s == "0" {
			return "user namespaces are switched off: set the sysctl user.max_user_namespaces above 0"
		}
		return "a limit on namespaces is reached: raise the sysctls user.max_user_namespaces and user.max_net_namespaces, or nest less deeply (32 levels)"
	case errors.Is(err, unix.EINVAL):
		return "the kernel lacks one of CONFIG_USER_NS, CONFIG_NET_NS, CONFIG_PID_NS, CONFIG_UTS_NS"
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOMEM):
		return "memory or the number of processes is used up: see ulimit -u"
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		switch {
		case sysctl("kernel/unprivileged_userns_clone") == "0":
			return "set the sysctl kernel.unprivileged_userns_clone to 1"
		case sysctl("kernel/apparmor_restrict_unprivileged_userns") == "1":
			return "AppArmor restricts user namespaces: set the sysctl kernel.apparmor_restrict_unprivileged_userns to 0, or give patchbay a profile with `userns,`"
		}
		return "user namespaces are refused: in a chroot leave it; in a container allow unshare and clone (seccomp), or see the host's security module"
	}
	return "run `patchbay doctor`"
}

// setupRemedy is for what should be allowed inside an own user namespace and is not.
func setupRemedy(err error, otherwise string) string {
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		if sysctl("kernel/apparmor_restrict_unprivileged_userns") == "1" {
			return cloneRemedy(unix.EPERM)
		}
	}
	return otherwise
}

func sysctl(name string) string {
	b, err := os.ReadFile("/proc/sys/" + name)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// explain puts object, reason and remedy into one line.
func explain(what string, err error, remedy string) *Error {
	return &Error{Status: StatusFailed, Err: fmt.Errorf("%s: %w; %s", what, err, setupRemedy(err, remedy))}
}
