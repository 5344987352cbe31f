package tunnel

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/testbed"
)

// Open vSwitch in userspace is a peer like a kernel:
//
//	[c1] eth0 ── TAP ── switch ── VTEP [a] eth0 ── p0 br-phy ┐ ovs-vswitchd [o]
//	                                [c2] eth0 ── p1 br-int ── vx0
func TestOpenVSwitchPeer(t *testing.T) {
	testbed.RequireTUN(t)
	for _, tool := range []string{"ovsdb-server", "ovs-vswitchd", "ovs-vsctl", "ovsdb-tool", "ovs-appctl"} {
		testbed.Tool(t, tool)
	}
	a, o, c2 := testbed.NewNS(t, "a"), testbed.NewNS(t, "ovs"), testbed.NewNS(t, "c2")
	testbed.Veth(t, a, "eth0", o, "p0")
	testbed.Veth(t, c2, "eth0", o, "p1")
	testbed.AddAddrs(t, a, "eth0", netip.MustParsePrefix("10.9.0.1/24"))
	testbed.AddAddrs(t, c2, "eth0", netip.MustParsePrefix("10.1.0.2/24"))
	// OVS reads packets with a packet socket and completes no checksum.
	run(t, a, "ethtool", "-K", "eth0", "tx", "off")
	run(t, c2, "ethtool", "-K", "eth0", "tx", "off")
	run(t, c2, "ip", "link", "set", "eth0", "mtu", "1450")

	dir := t.TempDir()
	sock := "unix:" + filepath.Join(dir, "db.sock")
	ovs := func(args ...string) {
		t.Helper()
		cmd := o.Command(testbed.Tool(t, args[0]), args[1:]...)
		cmd.Env = append(cmd.Environ(), "OVS_RUNDIR="+dir, "OVS_LOGDIR="+dir, "OVS_DBDIR="+dir)
		if out, err := cmd.CombinedOutput(); err != nil {
			log, _ := os.ReadFile(filepath.Join(dir, "ovs-vswitchd.log"))
			t.Fatalf("%v: %v\n%s%s", args, err, out, log)
		}
	}
	daemon := func(args ...string) {
		t.Helper()
		cmd := o.Command(testbed.Tool(t, args[0]), append(args[1:], "--log-file="+filepath.Join(dir, args[0]+".log"), "--unixctl="+filepath.Join(dir, args[0]+".ctl"))...)
		cmd.Env = append(cmd.Environ(), "OVS_RUNDIR="+dir, "OVS_LOGDIR="+dir, "OVS_DBDIR="+dir)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
	}
	db := filepath.Join(dir, "conf.db")
	ovs("ovsdb-tool", "create", db, "/usr/share/openvswitch/vswitch.ovsschema")
	daemon("ovsdb-server", db, "--remote=p"+sock)
	testbed.Eventually(t, 10*time.Second, func() bool { _, err := os.Stat(filepath.Join(dir, "db.sock")); return err == nil })
	vsctl := func(args ...string) {
		t.Helper()
		ovs(append([]string{"ovs-vsctl", "--db=" + sock, "--timeout=20"}, args...)...)
	}
	ovs("ovs-vsctl", "--db="+sock, "--no-wait", "init")
	daemon("ovs-vswitchd", sock)
	vsctl("add-br", "br-phy", "--", "set", "bridge", "br-phy", "datapath_type=netdev")
	vsctl("add-port", "br-phy", "p0")
	vsctl("add-br", "br-int", "--", "set", "bridge", "br-int", "datapath_type=netdev")
	vsctl("add-port", "br-int", "p1")
	vsctl("add-port", "br-int", "vx0", "--", "set", "interface", "vx0", "type=vxlan", "options:remote_ip=10.9.0.1", "options:local_ip=10.9.0.2", "options:key=99", "options:csum=true")
	testbed.AddAddrs(t, o, "br-phy", netip.MustParsePrefix("10.9.0.2/24"))
	testbed.Up(t, o, "br-phy")

	v := newVTEP(t, a, Config{Listen: netip.MustParseAddrPort("10.9.0.1:4789")})
	n := newNetwork(v, 99)
	p := n.peer(t, PeerConfig{Remote: netip.MustParseAddrPort("10.9.0.2:4789")})
	c1 := n.container(t, 1, 1450, "10.1.0.1/24")
	// OVS learns the underlay's address and our MAC from packets it sees, and drops while it does.
	testbed.Eventually(t, 20*time.Second, func() bool {
		return c1.Command(testbed.Tool(t, "ping"), "-c", "1", "-W", "1", "10.1.0.2").Run() == nil
	})
	ping(t, c1, "10.1.0.2")
	ping(t, c2, "10.1.0.1", "-s", fmt.Sprint(1450-28), "-M", "do")
	transfer(t, c1, c2, "10.1.0.2", 1<<20)
	transfer(t, c2, c1, "10.1.0.1", 1<<20)
	clean(t, []*frame.DropCounters{v.Drops(), p.Drops()}, a, c1, c2)
}
