package kernel

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// landlockNet is the first version of Landlock that knows TCP.
const landlockNet = 4

// Landlock refuses a container's programs the connections that they are not to make by themselves.
func Landlock() Result {
	r := Result{Name: "landlock", Need: "Linux 6.7"}
	version, _, no := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	switch {
	case no != 0:
		return fail(r, fmt.Sprintf("landlock: %v: no run --bypass", no), "boot with landlock in the kernel's list of security modules (lsm=landlock,…), or run outside of the sandbox that refuses it")
	case version < landlockNet:
		return fail(r, fmt.Sprintf("version %d knows no TCP: no run --bypass", version), "use Linux 6.7 or newer")
	}
	return ok(r, fmt.Sprintf("version %d: run --bypass works", version))
}
