package edge

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/internal/testbed"
)

var marks atomic.Int64

// family is a script that leaves all sorts of descendants behind: in the background, in another session, a daemon forked twice with the
// signals ignored, one that keeps forking. Each has mark in its command line.
func family(end string) (mark, script string) {
	mark = fmt.Sprintf("86400.%09d", os.Getpid()*1000+int(marks.Add(1)))
	return mark, strings.ReplaceAll(`sleep MARK & setsid sleep MARK & (setsid sh -c 'trap "" TERM HUP INT; sleep MARK & sleep MARK' &)
(setsid sh -c 'while :; do sh -c "sleep 0.01; : MARK"; done' >/dev/null 2>&1 &)
(unshare -Ur sleep MARK &) 2>/dev/null
while [ $(grep -cs '^sleep' /proc/[0-9]*/comm | grep -c ':1$') -lt 4 ]; do sleep 0.01; done; sleep 0.05
echo ready; `+end, "MARK", mark)
}

func gone4(t *testing.T, mark string, what string) {
	t.Helper()
	if !testbed.Wait(5*time.Second, func() bool { return len(processes(mark)) == 0 && len(edges()) == 0 }) {
		t.Errorf("%s: left behind: %v, edge processes %v", what, processes(mark), edges())
		for _, p := range append(processes(mark), edges()...) {
			syscall.Kill(p, syscall.SIGKILL)
		}
	}
}

// TestNothingStays: however the container ends, and whoever is killed, none of its processes stays.
func TestNothingStays(t *testing.T) {
	testbed.RequireTUN(t)
	testbed.Leaks(t)
	for _, pid := range []bool{false, true} {
		for _, c := range []struct {
			name string
			end  string // what COMMAND does last
			do   func(b *background)
			code int
		}{
			{"COMMAND ends", "exit 4", nil, 4},
			{"COMMAND is killed", "kill -KILL $$", nil, 137},
			{"SIGTERM", "exec sleep MARK", func(b *background) { b.cmd.Process.Signal(syscall.SIGTERM) }, 143},
			{"parent killed", "exec sleep MARK", func(b *background) { b.cmd.Process.Kill() }, -1},
			{"edge killed", "exec sleep MARK", func(b *background) { syscall.Kill(b.edge(), syscall.SIGKILL) }, 125},
			{"edge stopped, parent killed", "exec sleep MARK", func(b *background) {
				e := b.edge()
				syscall.Kill(e, syscall.SIGSTOP)
				b.cmd.Process.Kill()
				if !pid {
					testbed.Eventually(t, 5*time.Second, func() bool { state, _, _ := procStat(b.cmd.Process.Pid); return state == 'Z' })
					syscall.Kill(e, syscall.SIGCONT)
				}
			}, -1},
		} {
			t.Run(fmt.Sprintf("%s pid=%v", c.name, pid), func(t *testing.T) {
				mark, script := family(c.end)
				script = strings.ReplaceAll(script, "MARK", mark)
				b := start(t, run(t, Spec{PID: pid, Interfaces: []Interface{eth0()}, ResolvConf: []byte("x\n"), Argv: sh(script)}))
				b.expect("ready", 1)
				if c.do != nil {
					c.do(b)
				}
				if code := b.wait(); code != c.code {
					t.Errorf("status %d, want %d: %s", code, c.code, b.out.String())
				}
				gone4(t, mark, c.name)
			})
		}
	}
}

// TestBothKilled: parent and edge process at once. In a PID namespace nothing stays. Without one COMMAND itself dies, and what else it
// has started has nobody left to end it: that is the limit doc.go names.
func TestBothKilled(t *testing.T) {
	for _, pid := range []bool{false, true} {
		mark, script := family("exec sleep MARK")
		if !pid {
			mark = fmt.Sprintf("86400.%09d", os.Getpid()*1000+int(marks.Add(1)))
			script = "echo ready; exec sleep MARK"
		}
		script = strings.ReplaceAll(script, "MARK", mark)
		b := start(t, run(t, Spec{PID: pid, Net: NetNone, Argv: sh(script)}))
		b.expect("ready", 1)
		e := b.edge()
		syscall.Kill(b.cmd.Process.Pid, syscall.SIGSTOP) // so that neither can do anything about the other
		syscall.Kill(e, syscall.SIGSTOP)
		syscall.Kill(e, syscall.SIGKILL)
		syscall.Kill(b.cmd.Process.Pid, syscall.SIGKILL)
		b.wait()
		gone4(t, mark, fmt.Sprintf("PID %v", pid))
	}
}

// TestCloseEndsContainer, and more of what a parent may do with a Process.
func TestCloseEndsContainer(t *testing.T) {
	testbed.Require(t)
	testbed.Leaks(t)
	for _, pid := range []bool{false, true} {
		for _, released := range []bool{false, true} {
			mark, script := family("exec sleep MARK")
			out := captured(t)
			p, err := Start(context.Background(), Spec{PID: pid, Net: NetNone, Argv: sh(strings.ReplaceAll(script, "MARK", mark))}, Stdio{Out: out})
			if err != nil {
				t.Fatal(err)
			}
			if released {
				if err := p.Release(); err != nil {
					t.Fatal(err)
				}
				if err := p.Release(); err != nil {
					t.Errorf("a second Release: %v", err)
				}
				testbed.Eventually(t, 5*time.Second, func() bool { return strings.Contains(content(t, out), "ready") })
			}
			if err := p.Close(); err != nil {
				t.Error(err)
			}
			if left := processes(mark); len(left) > 0 {
				t.Errorf("PID %v: left when Close returned: %v", pid, left)
			}
			if st, err := p.Wait(); err != nil || st.Signal != syscall.SIGKILL {
				t.Errorf("%v, %v", st, err)
			}
			if err := p.Close(); err != nil {
				t.Errorf("a second Close: %v", err)
			}
			if err := p.Signal(syscall.SIGTERM); err != nil {
				t.Errorf("Signal after the end: %v", err)
			}
			gone4(t, mark, "Close")
		}
	}
}

// TestSignalBeforeRelease ends a container whose COMMAND never was.
func TestSignalBeforeRelease(t *testing.T) {
	testbed.Require(t)
	for _, pid := range []bool{false, true} {
		p, err := Start(context.Background(), Spec{PID: pid, Net: NetNone, Argv: []string{"true"}}, Stdio{})
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Signal(syscall.SIGINT); err != nil {
			t.Error(err)
		}
		if st, err := p.Wait(); err != nil || st.ExitCode() != 130 || st.String() != "killed by signal 2 (interrupt)" {
			t.Errorf("PID %v: %v, %v", pid, st, err)
		}
		if err := p.Release(); err != nil {
			t.Errorf("Release after the end: %v", err)
		}
		p.Close()
	}
}

// TestEdgeProcessMaySayReadyOnce: root in the container may trace the edge process and send what it likes to the parent, as often as it likes.
func TestEdgeProcessMaySayReadyOnce(t *testing.T) {
	sp, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	parent, err := newLink(sp[0])
	if err != nil {
		t.Fatal(err)
	}
	defer parent.Close()
	forger, err := newLink(sp[1])
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		defer forger.Close()
		for range 1000 {
			if err := forger.send(message{Kind: msgReady, Notes: []string{"note"}}); err != nil {
				t.Error(err)
			}
		}
	}()
	p := &Process{link: parent, ready: make(chan struct{}), started: make(chan struct{})}
	p.follow(false)
	if notes := p.Notes(); len(notes) != 1 {
		t.Errorf("%d notes were kept, want those of the first message", len(notes))
	}
}

func TestReleaseTellsWhyNot(t *testing.T) {
	testbed.Require(t)
	p, err := Start(context.Background(), Spec{Net: NetNone, Argv: []string{"/no/such"}}, Stdio{})
	if err != nil {
		t.Fatal(err)
	}
	err = p.Release()
	var e *Error
	if !errors.As(err, &e) || e.Status != StatusNotFound || !errors.Is(err, unix.ENOENT) {
		t.Errorf("error %v", err)
	}
	if _, werr := p.Wait(); !errors.Is(werr, err) {
		t.Errorf("Wait: %v", werr)
	}
	p.Close()
}

// TestNoMountOrNamespaceStays counts them on the host side.
func TestNoMountOrNamespaceStays(t *testing.T) {
	testbed.RequireTUN(t)
	count := func() (mounts string, links int) {
		b, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil {
			t.Fatal(err)
		}
		l, _ := os.ReadDir("/sys/class/net")
		return string(b), len(l)
	}
	m0, l0 := count()
	for range 5 {
		if code, out := finish(t, run(t, Spec{Interfaces: []Interface{eth0()}, ResolvConf: []byte("x"), Argv: sh("mount -t tmpfs t /mnt && exit 3")})); code != 3 {
			t.Fatalf("status %d: %s", code, out)
		}
	}
	if m1, l1 := count(); m1 != m0 || l1 != l0 {
		t.Errorf("mounts and links before:\n%s%d\nafter:\n%s%d", m0, l0, m1, l1)
	}
	// A namespace that somebody still held would count against this limit.
	testbed.Sysctl(t, testbed.Host(t), "user/max_net_namespaces", "3")
	for range 12 {
		var out string
		if !testbed.Wait(3*time.Second, func() bool { // the kernel gives network namespaces back a little later
			var code int
			code, out = finish(t, run(t, Spec{Net: NetNone, Argv: []string{"true"}}))
			return code == 0
		}) {
			t.Fatalf("no namespace left: %s", out)
		}
	}
}
