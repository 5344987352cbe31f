package edge

import (
	"context"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/internal/testbed"
)

// What a hostile COMMAND does to its edge process.
const (
	shutSocket = "shut"  // stops it and ends its link to the parent, whose end it then is deaf to
	keepSocket = "keep"  // takes a duplicate of its socket and kills it
	floodLink  = "flood" // the same, and goes on sending in its name
)

// turnOnEdge is that COMMAND, root in the edge process's user namespace. mark is for the test to find the process.
func turnOnEdge(what, mark string) {
	edge := os.Getppid()
	die := func(step string, err error) {
		fmt.Printf("failed %s: %v (%s)\n", step, err, mark)
		os.Exit(9)
	}
	pidfd, err := unix.PidfdOpen(edge, 0)
	if err != nil {
		die("pidfd_open", err)
	}
	// Its socket is the one of this type.
	dup := -1
	for fd := 3; fd < 100 && dup < 0; fd++ {
		d, err := unix.PidfdGetfd(pidfd, fd, 0)
		if err != nil {
			continue
		}
		if typ, err := unix.GetsockoptInt(d, unix.SOL_SOCKET, unix.SO_TYPE); err == nil && typ == unix.SOCK_SEQPACKET {
			dup = d
			break
		}
		unix.Close(d)
	}
	if dup < 0 {
		die("find the socket", unix.ENOENT)
	}
	switch what {
	case shutSocket:
		if err := syscall.Kill(edge, syscall.SIGSTOP); err != nil {
			die("stop", err)
		}
		for {
			if state, _, ok := procStat(edge); ok && state == 'T' {
				break
			}
			time.Sleep(time.Millisecond)
		}
		if err := unix.Shutdown(dup, unix.SHUT_RDWR); err != nil {
			die("shutdown", err)
		}
	case keepSocket, floodLink:
		// Otherwise the kernel kills it along with the edge process.
		if err := unix.Prctl(unix.PR_SET_PDEATHSIG, 0, 0, 0, 0); err != nil {
			die("prctl", err)
		}
		if err := syscall.Kill(edge, syscall.SIGKILL); err != nil {
			die("kill", err)
		}
		for what == floodLink {
			_, _ = unix.Write(dup, []byte(`{"Kind":"ready"}`))
		}
	}
	fmt.Println("done")
	for {
		time.Sleep(time.Hour)
	}
}

// TestCommandTurnsOnEdge: root in the container may do what it likes to the edge process; the parent sees an end of it all the same, and
// nothing stays.
func TestCommandTurnsOnEdge(t *testing.T) {
	testbed.Require(t)
	testbed.Leaks(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ what, want string }{
		{shutSocket, "closed its socket and was still there 300ms later"},
		{keepSocket, "was killed by signal 9"},
		{floodLink, "was killed by signal 9"},
	} {
		t.Run(c.what, func(t *testing.T) {
			mark := fmt.Sprintf("hostile.%09d", os.Getpid()*1000+int(marks.Add(1)))
			out := captured(t)
			argv := []string{testbed.Tool(t, "bash"), "-c", "exec -a " + hostileArg0 + " " + self + " " + c.what + " " + mark}
			p, err := startWithin(context.Background(), Spec{Net: NetNone, Argv: argv}, Stdio{Out: out}, 300*time.Millisecond)
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			if err := p.Release(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() {
				_, err := p.Wait()
				ended <- err
			}()
			select {
			case err := <-ended:
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Errorf("Wait: %v, want %q; COMMAND wrote %q", err, c.want, content(t, out))
				}
			case <-time.After(8 * time.Second):
				t.Fatalf("Wait does not return; COMMAND wrote %q", content(t, out))
			}
			gone4(t, mark, c.what)
		})
	}
}
