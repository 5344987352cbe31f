package bench

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"github.com/vishvananda/netlink"
)

// The contenders of scenario switch.

// pair is a client and a server that talk through a switch. near and far are their devices.
type pair struct {
	client, server    space
	near, far         string
	nearAddr, farAddr string
}

// pairs is what the condition asks for, on devices whose names are number's of 0, 1, 2 and so on.
func (s *site) pairs(number func(int) string) (ps []pair, err error) {
	for i := range max(s.under.pairs, 1) {
		p := pair{
			client: s.client, server: s.server, near: number(2 * i), far: number(2*i + 1),
			nearAddr: fmt.Sprintf("198.18.2.%d", 2*i+1), farAddr: fmt.Sprintf("198.18.2.%d", 2*i+2),
		}
		if i > 0 {
			if p.client, err = s.space("client"); err != nil {
				return nil, err
			}
			if p.server, err = s.space("server"); err != nil {
				return nil, err
			}
		}
		ps = append(ps, p)
	}
	return ps, nil
}

// join addresses the two sides of each pair, whose devices are in their namespaces, and starts the far sides and the agents.
func (s *site) join(ps ...pair) error {
	for _, p := range ps {
		if err := errors.Join(p.client.addr(p.near, p.nearAddr+"/24"), p.server.addr(p.far, p.farAddr+"/24")); err != nil {
			return err
		}
		if err := s.serve(p.server, asRoot, p.farAddr); err != nil {
			return err
		}
		if err := s.startAgent(p.client); err != nil {
			return err
		}
	}
	return nil
}

// joinTAPs moves the TAPs that a daemon makes in the host's namespace each to its side, and goes on as join does.
func (s *site) joinTAPs(ps []pair) error {
	for _, p := range ps {
		if err := errors.Join(s.take(s.host, p.near, p.client), s.take(s.host, p.far, p.server)); err != nil {
			return err
		}
	}
	return s.join(ps...)
}

// kernelBridge is the baseline of scenario switch: two veth pairs on a bridge.
func (s *site) kernelBridge() error {
	ps, err := s.pairs(func(int) string { return "eth0" })
	if err != nil {
		return err
	}
	var ports []string
	for i, p := range ps {
		near, far := fmt.Sprintf("p%d", 2*i), fmt.Sprintf("p%d", 2*i+1)
		if err := errors.Join(veth(p.client, p.near, s.host, near), veth(p.server, p.far, s.host, far)); err != nil {
			return err
		}
		ports = append(ports, near, far)
	}
	if err := s.host.bridge("br0", ports...); err != nil {
		return err
	}
	return s.join(ps...)
}

// wireAlone is no switch but the least that joins two namespaces.
func (s *site) wireAlone() error {
	ps, err := s.pairs(func(int) string { return "eth0" })
	if err != nil {
		return err
	}
	for _, p := range ps {
		if err := veth(p.client, p.near, p.server, p.far); err != nil {
			return err
		}
	}
	return s.join(ps...)
}

func (s *site) patchbayNode() error {
	if s.under.bare {
		return s.patchbaySwitch()
	}
	arg, err := argument(nodeSpec{Pairs: max(s.under.pairs, 1), sideSpec: s.side()})
	if err != nil {
		return err
	}
	return s.launchAgent(s.host, asOrdinary, role(roleNode, arg)...)
}

// patchbaySwitch is our switch without a node, which would not let a container speak for other MACs, nor so many.
func (s *site) patchbaySwitch() error {
	p := pair{client: s.client, server: s.server, near: "eth0", far: "eth0", nearAddr: nearAddr, farAddr: farAddr}
	if err := s.betweenTAPs(roleSwitch, s.host, 0, [2]tapEnd{{p.client, p.near}, {p.server, p.far}}); err != nil {
		return err
	}
	return s.join(p)
}

// vde is vde_switch with TAPs that it makes in the host's namespace; each then moves to its side.
func (s *site) vde() error {
	ps, err := s.pairs(func(i int) string { return fmt.Sprintf("vt%d", i) })
	if err != nil {
		return err
	}
	args := []string{"-s", filepath.Join(s.dir, "vde"), "-n", strconv.Itoa(2*len(ps) + 2)}
	for _, p := range ps {
		args = append(args, "-t", p.near, "-t", p.far)
	}
	if err := s.vdeSwitch(s.host, args...); err != nil {
		return err
	}
	return s.joinTAPs(ps)
}

// vdeSwitch starts a vde_switch in sp.
func (s *site) vdeSwitch(sp space, args ...string) error {
	// Its console is standard input, whose end would be its own.
	console, keep, err := os.Pipe()
	if err != nil {
		return err
	}
	defer console.Close()
	cmd := exec.Command(s.path("vde_switch"), args...)
	cmd.Stdin = console
	if err := s.launch(sp, cmd, asRoot); err != nil {
		keep.Close()
		return err
	}
	s.held = append(s.held, keep)
	return nil
}

// gvproxySwitch is gvproxy with a gvforwarder in the namespace of each side.
func (s *site) gvproxySwitch() error {
	if s.under.noGSO {
		return errors.New("gvforwarder's TAP has no superframes in any case")
	}
	sock := "unix://" + filepath.Join(s.dir, "gv.sock")
	line := s.gvproxyLine(sock)
	if err := s.launch(s.host, exec.Command(line[0], line[1:]...), asRoot); err != nil {
		return err
	}
	if err := s.awaitFile(filepath.Join(s.dir, "gv.sock")); err != nil {
		return err
	}
	const near, far = "192.168.127.2", "192.168.127.3"
	s.target = net.JoinHostPort(far, loadPort)
	if err := s.serveSpec(s.server, asRoot, serveSpec{Listen: s.target, sideSpec: s.gvforwarder(sock, "5a:94:ef:e4:0c:ef", far+"/24")}); err != nil {
		return err
	}
	agent, err := argument(agentSpec{Target: s.target, sideSpec: s.gvforwarder(sock, "5a:94:ef:e4:0c:ee", near+"/24")})
	if err != nil {
		return err
	}
	return s.launchAgent(s.client, asRoot, role(roleAgent, agent)...)
}

// take moves a device that a daemon makes in from, when it has come, to the namespace to, and sets it up.
func (s *site) take(from space, name string, to space) error {
	if err := s.await(from, name); err != nil {
		return err
	}
	return errors.Join(from.give(name, to), to.up(name))
}

// await waits for a device that a daemon makes in sp.
func (s *site) await(sp space, name string) error {
	return s.awaitThat(name, func() bool { return sp.link(name, func(netlink.Link) error { return nil }) == nil })
}

func (s *site) awaitFile(name string) error {
	return s.awaitThat(name, func() bool { _, err := os.Stat(name); return err == nil })
}

// awaitThat waits for what a daemon makes.
func (s *site) awaitThat(name string, there func() bool) error {
	for deadline := time.Now().Add(reachTime); !there(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			return s.why(fmt.Errorf("nobody makes %s", name))
		}
	}
	return nil
}

// openvswitch is Open vSwitch with its userspace datapath, whose internal ports are TAPs.
func (s *site) openvswitch() error {
	ps, err := s.pairs(func(i int) string { return fmt.Sprintf("ov%d", i) })
	if err != nil {
		return err
	}
	transaction := []string{"add-br", "br0", "--", "set", "bridge", "br0", "datapath_type=netdev"}
	for _, p := range ps {
		for _, name := range []string{p.near, p.far} {
			transaction = append(transaction, "--", "add-port", "br0", name, "--", "set", "interface", name, "type=internal")
		}
	}
	if err := s.vswitchd(s.host, s.dir, transaction...); err != nil {
		return err
	}
	return s.joinTAPs(ps)
}

// vswitchd starts an Open vSwitch in sp that keeps its files in dir, and configures it in one transaction, in which ovs-vsctl waits for the database and then for the daemon.
func (s *site) vswitchd(sp space, dir string, transaction ...string) error {
	db, remote := filepath.Join(dir, "conf.db"), "unix:"+filepath.Join(dir, "db.sock")
	if err := sp.run("", s.path("ovsdb-tool"), "create", db, "/usr/share/openvswitch/vswitch.ovsschema"); err != nil {
		return err
	}
	env := append(os.Environ(), "OVS_RUNDIR="+dir, "OVS_LOGDIR="+dir, "OVS_DBDIR="+dir)
	for _, line := range [][]string{
		{s.path("ovsdb-server"), db, "--remote=p" + remote, "--unixctl=" + filepath.Join(dir, "ovsdb.ctl")},
		{s.path("ovs-vswitchd"), remote, "--disable-system", "--unixctl=" + filepath.Join(dir, "vswitchd.ctl")},
	} {
		cmd := exec.Command(line[0], line[1:]...)
		cmd.Env = env
		if err := s.launch(sp, cmd, asRoot); err != nil {
			return err
		}
	}
	if err := sp.run("", s.path("ovs-vsctl"), append([]string{"--db=" + remote, "--retry", "--timeout=10"}, transaction...)...); err != nil {
		return s.why(err)
	}
	return nil
}
