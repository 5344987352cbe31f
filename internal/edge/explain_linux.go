package edge

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"patchbay/internal/kernel"
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

// cloneRemedy asks package kernel, which tries again and looks for the setting behind it.
func cloneRemedy(err error) string {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "mount /proc, which holds this program as /proc/self/exe"
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOMEM):
		return "memory or the number of processes is used up: see ulimit -u"
	}
	r := kernel.UserNS()
	switch {
	case r.OK && errors.Is(err, unix.EINVAL):
		return "the kernel lacks CONFIG_PID_NS"
	case r.OK:
		return "a limit on namespaces is reached: raise the sysctls user.max_net_namespaces and user.max_pid_namespaces"
	case errors.Is(err, unix.EPERM):
		return r.Remedy + "; in a chroot: leave it"
	}
	return r.Remedy
}

// setupRemedy is for what should be allowed inside an own user namespace and is not.
func setupRemedy(err error, otherwise string) string {
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		if sysctl("kernel/apparmor_restrict_unprivileged_userns") == "1" {
			return "AppArmor restricts user namespaces: sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, or install a profile for patchbay with `userns,`"
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
