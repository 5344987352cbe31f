package edge

import (
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"patchbay/internal/testbed"
)

// A container is handed the descriptors that this process was started with and no other: not one that a start beside it has open for a moment without close-on-exec, as Go's fork has uid_map. Its number would be that of
// the fork's own pipe by the time of the exec, and Start would wait for as long as the container lives.
func TestInheritsOnlyWhatWasInherited(t *testing.T) {
	testbed.Require(t)
	const sock, spec = 60, 61
	want := childFiles(Stdio{}, sock, spec)
	var stop atomic.Bool
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop.Store(true)
	for range 2 {
		wg.Go(func() {
			id := []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}
			gid := []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
			for !stop.Load() {
				pid, err := syscall.ForkExec("/bin/true", []string{"true"}, &syscall.ProcAttr{Sys: &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER, UidMappings: id, GidMappings: gid}})
				if err != nil {
					t.Error(err)
					return
				}
				_, _ = syscall.Wait4(pid, nil, 0, nil)
			}
		})
	}
	for range 1000 {
		if got := childFiles(Stdio{}, sock, spec); !slices.Equal(got, want) {
			t.Fatalf("%v, want %v", got, want)
		}
	}
}
