package edge

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/frame"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
	"patchbay/tap"
)

// captured is a COMMAND's standard output.
func captured(t *testing.T) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func content(t *testing.T, f *os.File) string {
	t.Helper()
	b, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func eth0() Interface {
	return Interface{
		Name: "eth0", MAC: wire.MAC{2, 0, 0, 0, 0, 7}, MTU: 1400,
		Addrs:    []netip.Prefix{netip.MustParsePrefix("10.7.0.2/24"), netip.MustParsePrefix("fd07::2/64")},
		Gateway4: netip.MustParseAddr("10.7.0.1"), Gateway6: netip.MustParseAddr("fd07::1"),
		Routes: []tap.Route{{Dst: netip.MustParsePrefix("192.0.2.0/24"), Via: netip.MustParseAddr("10.7.0.9")}},
	}
}

// sink hands over the frames it is given.
type sink chan []byte

func (s sink) Forward(fs []frame.Frame) {
	for _, f := range fs {
		select {
		case s <- bytes.Clone(f.Data):
		default:
		}
	}
}

// TestPrivateNetwork is the whole way: interface as asked for, seen from inside; frames at the parent's end.
func TestPrivateNetwork(t *testing.T) {
	testbed.RequireTUN(t)
	testbed.Leaks(t)
	for _, keep := range []bool{false, true} {
		out := captured(t)
		script := `ip -o link; ip -o addr; ip route; ip -6 route; ls /sys/class/net; cat /sys/class/net/eth0/mtu
cat /proc/sys/net/ipv6/conf/eth0/accept_ra; ls -d /sys/fs/cgroup; bash -c "echo >/dev/udp/10.7.0.1/9; sleep 0.1"; cat /sys/class/net/eth0/carrier`
		p, err := Start(context.Background(), Spec{KeepID: keep, Interfaces: []Interface{eth0()}, Argv: sh(script)}, Stdio{Out: out, Err: out})
		if err != nil {
			t.Fatal(err)
		}
		ds := p.Devices()
		if len(ds) != 1 || len(ds[0].FDs) != 1 {
			t.Fatalf("devices: %+v", ds)
		}
		d := ds[0]
		if d.Name != "eth0" || d.MAC != eth0().MAC || d.MTU != 1400 || !d.VnetHdr || d.Caps&frame.CapTSO4 == 0 {
			t.Errorf("device: %+v", d.Info)
		}
		if fl, err := unix.FcntlInt(uintptr(d.FDs[0]), unix.F_GETFD, 0); err != nil || fl&unix.FD_CLOEXEC == 0 {
			t.Errorf("the descriptor is not close-on-exec: %v", err)
		}
		dev, err := tap.New(tap.Config{Info: d.Info, FDs: d.FDs})
		if err != nil {
			t.Fatal(err)
		}
		s := make(sink, 1000)
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() { dev.Serve(ctx, 0, s); close(done) }()
		if err := p.Release(); err != nil {
			t.Fatal(err)
		}
		st, err := p.Wait()
		if err != nil || st.ExitCode() != 0 {
			t.Fatalf("%v, %v: %s", st, err, content(t, out))
		}
		text := content(t, out)
		for _, want := range []string{
			"link/ether 02:00:00:00:00:07", "mtu 1400", "10.7.0.2/24", "fd07::2/64", "default via 10.7.0.1 dev eth0", "default via fd07::1 dev eth0",
			"192.0.2.0/24 via 10.7.0.9", "eth0\nlo\n1400\n0\n/sys/fs/cgroup\n1\n",
		} {
			if !strings.Contains(text, want) {
				t.Errorf("keep %v: no %q in:\n%s", keep, want, text)
			}
		}
		if regexp.MustCompile("fd07::2/64.*tentative").MatchString(text) || strings.Contains(text, "lo: <LOOPBACK> ") {
			t.Errorf("addresses or lo not usable at once:\n%s", text)
		}
		arp := false
		for len(s) > 0 {
			f := <-s
			arp = arp || (len(f) > 14 && f[12] == 8 && f[13] == 6 && bytes.Equal(f[6:12], d.MAC[:]))
		}
		if !arp {
			t.Error("the container's ARP request did not come out at the parent's end")
		}
		for _, n := range p.Notes() {
			t.Errorf("note: %s", n)
		}
		cancel()
		<-done
		dev.Close()
		p.Close()
	}
}

// TestQueuesAndPlain: several interfaces, several queues, and one without offloads.
func TestQueuesAndPlain(t *testing.T) {
	testbed.RequireTUN(t)
	testbed.Leaks(t)
	out := captured(t)
	p, err := Start(context.Background(), Spec{
		Interfaces: []Interface{{Name: "eth0", Queues: 3}, {Name: "eth1", ForcePlain: true}},
		Argv:       []string{"ls", "/sys/class/net"},
	}, Stdio{Out: out})
	if err != nil {
		t.Fatal(err)
	}
	ds := p.Devices()
	if len(ds) != 2 || len(ds[0].FDs) != 3 || len(ds[1].FDs) != 1 || !ds[0].VnetHdr || ds[1].VnetHdr {
		t.Errorf("devices %+v %+v", ds[0], ds[1])
	}
	if err := p.Release(); err != nil {
		t.Fatal(err)
	}
	if st, err := p.Wait(); err != nil || st.Code != 0 || content(t, out) != "eth0\neth1\nlo\n" {
		t.Errorf("%v, %v: %s", st, err, content(t, out))
	}
	closeDevices(ds)
}

// TestCarrierStays: the parent may close its descriptors, as a node that restarts does; the edge process's keep the carrier.
func TestCarrierStays(t *testing.T) {
	testbed.RequireTUN(t)
	testbed.Leaks(t)
	out := captured(t)
	p, err := Start(context.Background(), Spec{Interfaces: []Interface{eth0()}, Argv: sh("cat; cat /sys/class/net/eth0/carrier; ip -o -4 addr show eth0")},
		Stdio{In: closedPipe(t), Out: out})
	if err != nil {
		t.Fatal(err)
	}
	closeDevices(p.Devices())
	if err := p.Release(); err != nil {
		t.Fatal(err)
	}
	if st, err := p.Wait(); err != nil || st.Code != 0 {
		t.Errorf("%v, %v", st, err)
	}
	if s := content(t, out); !strings.HasPrefix(s, "1\n") || !strings.Contains(s, "10.7.0.2/24") {
		t.Errorf("output %q", s)
	}
}

func closedPipe(t *testing.T) *os.File {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	w.Close()
	t.Cleanup(func() { r.Close() })
	return r
}

func TestNetNone(t *testing.T) {
	code, out := finish(t, run(t, Spec{Net: NetNone, Argv: sh("ip -o link; ping -c1 -W1 127.0.0.1 | grep -c '1 received'; ls /sys/class/net")}))
	if code != 0 || strings.Count(out, "link/") != 1 || !strings.Contains(out, "<LOOPBACK,UP,LOWER_UP>") || !strings.HasSuffix(out, "1\nlo\n") {
		t.Errorf("status %d: %s", code, out)
	}
}

func TestNetHost(t *testing.T) {
	testbed.Require(t)
	want, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	code, out := finish(t, run(t, Spec{Net: NetHost, Argv: sh("readlink /proc/self/ns/net; readlink /proc/self/ns/mnt; readlink /proc/self/ns/user")}))
	if code != 0 || !strings.HasPrefix(out, want+"\n") {
		t.Errorf("status %d: %s, want %s", code, out, want)
	}
	for _, ns := range []string{"mnt", "user"} {
		if l, _ := os.Readlink("/proc/self/ns/" + ns); strings.Contains(out, l) {
			t.Errorf("the container shares the %s namespace", ns)
		}
	}
}

// TestRefusals: each is status 125 and one line with a remedy.
func TestRefusals(t *testing.T) {
	testbed.RequireTUN(t)
	testbed.Leaks(t)
	unshare := testbed.Tool(t, "unshare")
	private := Spec{Interfaces: []Interface{{Name: "eth0"}}, Argv: []string{"true"}}
	// in runs the rest of its command line after a change to the mounts that only it sees, as the root of the bed.
	in := func(script string) func(*exec.Cmd) {
		return func(c *exec.Cmd) {
			self, _ := os.Executable()
			c.SysProcAttr, c.Path = nil, unshare
			c.Args = []string{"unshare", "-m", "bash", "-c", script + `; exec -a "$0" "$1"`, runArg0, self}
		}
	}
	for _, c := range []struct {
		name   string
		spec   Spec
		change func(*exec.Cmd)
		want   string
	}{
		{"no TUN device", private, in("mount -t tmpfs none /dev/net"), "open tap \"eth0\": open /dev/net/tun: no such file or directory: load the driver (modprobe tun)"},
		{"TUN device not openable", private, in("mount -t tmpfs none /dev/net; : >/dev/net/tun; chmod 0 /dev/net/tun; setcap() { :; }"), "open tap \"eth0\""},
		{"no rights over TUN device", private, in("mount -t tmpfs -o size=64k none /dev/net; mkdir /dev/net/tun"), "open tap \"eth0\""},
		{"chroot", private, in(`mount --rbind / /mnt; exec chroot /mnt bash -c 'exec -a "$0" "$1"' "$0" "$1"`), "namespaces: operation not permitted; a sandbox forbids it"},
		{"bad MTU", Spec{Interfaces: []Interface{{Name: "eth0", MTU: 7}}, Argv: []string{"true"}}, nil, "MTU 7: use 68 to"},
		{"long name", Spec{Interfaces: []Interface{{Name: "abcdefghijklmnopq"}}, Argv: []string{"true"}}, nil, "at most 15 bytes"},
		{"interface without network", Spec{Net: NetNone, Interfaces: []Interface{{Name: "eth0"}}, Argv: []string{"true"}}, nil, "use \"private\""},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmd := run(t, c.spec)
			if c.change != nil {
				c.change(cmd)
			}
			code, out := finish(t, cmd)
			if code != 125 || !strings.Contains(out, c.want) || strings.Count(out, "\n") != 1 {
				t.Errorf("status %d, output %q, want %q", code, out, c.want)
			}
		})
	}
}

func TestNoUserNamespaces(t *testing.T) {
	testbed.Require(t)
	testbed.Sysctl(t, testbed.Host(t), "user/max_user_namespaces", "0")
	cmd := run(t, Spec{Net: NetNone, Argv: []string{"true"}})
	cmd.SysProcAttr = nil // an ordinary user could not even be made
	code, out := finish(t, cmd)
	if code != 125 || !strings.Contains(out, "no space left on device; sudo sysctl -w user.max_user_namespaces=") || strings.Count(out, "\n") != 1 {
		t.Errorf("status %d, output %q", code, out)
	}
	_, err := Start(context.Background(), Spec{Net: NetNone, Argv: []string{"true"}}, Stdio{})
	var e *Error
	if !errors.Is(err, unix.ENOSPC) || !errors.As(err, &e) || e.Status != StatusFailed {
		t.Errorf("error %v", err)
	}
}

func TestStartBoundByContext(t *testing.T) {
	testbed.RequireTUN(t)
	testbed.Leaks(t)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	p, err := Start(ctx, Spec{Interfaces: []Interface{eth0()}, Argv: []string{"true"}}, Stdio{})
	if !errors.Is(err, context.Canceled) || p != nil {
		t.Fatalf("%v, %v", p, err)
	}
	testbed.Eventually(t, 5*time.Second, func() bool { return len(edges()) == 0 })
}
