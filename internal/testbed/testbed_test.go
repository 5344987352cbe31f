package testbed

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

func TestMain(m *testing.M) { Main(m) }

func TestInsideIsAnOrdinaryUsersRoot(t *testing.T) {
	Require(t)
	b, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		t.Fatal(err)
	}
	f := strings.Fields(string(b))
	// In a bed made by root of a user namespace that knows no other uid, 0 stands for that one.
	// In one made by root there are some more, for NewUser.
	if (len(f) != 3 && len(f) != 6) || f[0] != "0" || f[2] != "1" || len(f) == 6 && (f[3] != fmt.Sprint(firstUser) || f[5] != fmt.Sprint(users)) {
		t.Errorf("uid_map = %q, want a line that maps 0, and perhaps the further users", b)
	}
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	if len(links) != 1 || links[0].Attrs().Name != "lo" || links[0].Attrs().Flags&net.FlagUp == 0 {
		t.Errorf("links = %v, want lo alone, up", links)
	}
	if _, err := os.Stat("doc.go"); err != nil {
		t.Errorf("the package's directory is not readable: %v", err)
	}
	if err := os.WriteFile(t.TempDir()+"/x", nil, 0o600); err != nil {
		t.Error(err)
	}
}

func TestTUN(t *testing.T) {
	RequireTUN(t)
	if err := probeTUN(); err != nil {
		t.Error(err)
	}
}

func TestOrdinaryUserHasNoPowerOverHost(t *testing.T) {
	Require(t)
	ip := Tool(t, "ip")
	if out, err := AsOrdinaryUser(exec.Command(ip, "link", "set", "lo", "mtu", "1400")).CombinedOutput(); err == nil {
		t.Errorf("an ordinary user could change the host's lo: %s", out)
	}
	out, err := AsOrdinaryUser(exec.Command("id", "-u")).CombinedOutput()
	if err != nil || strings.TrimSpace(string(out)) != "1000" {
		t.Errorf("id -u = %q, %v", out, err)
	}
	// It can still make a namespace of its own and open the TUN device there.
	RequireTUN(t)
	unshare := Tool(t, "unshare")
	cmd := AsOrdinaryUser(exec.Command(unshare, "-Urnm", ip, "tuntap", "add", "dev", "tap0", "mode", "tap"))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("tap in a nested namespace: %v: %s", err, out)
	}
}

func TestNamespacesAndExternal(t *testing.T) {
	Leaks(t)
	e := NewExternal(t, "server")
	l, err := e.Listen("tcp", net.JoinHostPort(e.Addr4.String(), "0"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		c, err := l.Accept()
		if err == nil {
			_, _ = c.Write([]byte("hello"))
			c.Close()
		}
	}()
	c, err := net.DialTimeout("tcp", l.Addr().String(), time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got := c.LocalAddr().(*net.TCPAddr).IP.String(); got != e.HostAddr4.String() {
		t.Errorf("local address %s, want %s", got, e.HostAddr4)
	}
	out, err := e.Command("ip", "-br", "addr").CombinedOutput()
	if err != nil || !strings.Contains(string(out), e.Addr6.String()) {
		t.Errorf("ip addr in %s: %v: %s", e.Name, err, out)
	}
	// An ordinary user in there is refused too.
	out, err = AsOrdinaryUser(e.Command("ip", "link", "set", "eth0", "mtu", "1300")).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "not permitted") {
		t.Errorf("ordinary user in %s: %v: %s", e.Name, err, out)
	}
	RequirePing(t)
	if out, err := AsOrdinaryUser(exec.Command(Tool(t, "ping"), "-c1", "-W2", e.Addr6.String())).CombinedOutput(); err != nil {
		t.Errorf("ping: %v: %s", err, out)
	}
}

// [a] eth0 ── pa [br] pb ── eth0 [b]
func TestBridge(t *testing.T) {
	br, a, b := NewNS(t, "br"), NewNS(t, "a"), NewNS(t, "b")
	Veth(t, br, "pa", a, "eth0")
	Veth(t, br, "pb", b, "eth0")
	Bridge(t, br, "br0", "pa", "pb")
	AddAddrs(t, a, "eth0", netip.MustParsePrefix("10.9.0.1/24"))
	AddAddrs(t, b, "eth0", netip.MustParsePrefix("10.9.0.2/24"))
	RequirePing(t)
	if out, err := a.Command(Tool(t, "ping"), "-c1", "-W2", "10.9.0.2").CombinedOutput(); err != nil {
		t.Errorf("ping: %v: %s", err, out)
	}
}

func TestDoNests(t *testing.T) {
	a, b := NewNS(t, "a"), NewNS(t, "b")
	in := func() string {
		s, err := os.Readlink("/proc/thread-self/ns/net")
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	before := in()
	var inA, inB, back string
	a.Do(func() {
		inA = in()
		b.Do(func() { inB = in() })
		back = in()
	})
	if inA == inB || inA == before || back != inA || in() != before {
		t.Errorf("before %s, a %s, b %s, back %s, after %s", before, inA, inB, back, in())
	}
}

func TestCommandDiesWithTheTest(t *testing.T) {
	Require(t)
	var cmd *exec.Cmd
	t.Run("inner", func(t *testing.T) {
		cmd = NewNS(t).Command("sleep", "2000")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
	})
	Eventually(t, 2*time.Second, func() bool { return !alive(cmd.Process.Pid) })
}

func TestBindFile(t *testing.T) {
	f := BindFile(t, "/etc/hostname", "one\n")
	read := func() string {
		out, err := AsOrdinaryUser(exec.Command("cat", "/etc/hostname")).Output()
		if err != nil {
			t.Fatal(err)
		}
		return string(out)
	}
	if got := read(); got != "one\n" {
		t.Errorf("read %q", got)
	}
	if err := os.WriteFile(f, []byte("two\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := read(); got != "two\n" {
		t.Errorf("read %q", got)
	}
}
