package bench

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Addresses out of RFC 2544's range, which no route of a default host leads to.
const (
	serverAddr  = "198.18.0.1"
	uplinkAddr  = "198.18.0.2"
	gatewayAddr = "198.18.1.1"
	clientAddr  = "198.18.1.2"
	nearAddr    = "198.18.2.1"
	farAddr     = "198.18.2.2"
)

// site is the topology of one contender in one round, and every process in it.
type site struct {
	dir    string // for sockets
	paths  map[string]string
	target string // of the agent's measurements

	host, client, server space
	opened               []space
	cmds                 []*exec.Cmd
	logs                 tail
	agent                *agentConn
	held                 []*os.File // to keep open until the end
}

func newSite(dir string, paths map[string]string) *site { return &site{dir: dir, paths: paths} }

func (s *site) path(program string) string { return s.paths[program] }

func (s *site) space(name string) (space, error) {
	sp, err := newSpace(name)
	if err == nil {
		s.opened = append(s.opened, sp)
	}
	return sp, err
}

// open makes the scenario's namespaces; in scenario nat also the way from the host to the far side, and the far side.
func (s *site) open(scenario string) (err error) {
	if s.host, err = s.space("host"); err != nil {
		return err
	}
	if s.server, err = s.space("server"); err != nil {
		return err
	}
	if s.client, err = s.space("client"); err != nil {
		return err
	}
	if scenario != scenarioNAT {
		return nil
	}
	if err := veth(s.host, "up0", s.server, "eth0"); err != nil {
		return err
	}
	if err := errors.Join(s.host.addr("up0", uplinkAddr+"/24"), s.server.addr("eth0", serverAddr+"/24")); err != nil {
		return err
	}
	if err := s.host.defaultRoute("up0", serverAddr); err != nil {
		return err
	}
	return s.serve(serverAddr)
}

// serve starts the far side in its namespace and waits until it listens.
func (s *site) serve(addr string) error {
	s.target = net.JoinHostPort(addr, loadPort)
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	line := role(roleServe, s.target)
	cmd := exec.Command(line[0], line[1:]...)
	cmd.Stdout = w
	err = s.launch(s.server, cmd, false)
	w.Close()
	if err != nil {
		return err
	}
	_ = r.SetReadDeadline(time.Now().Add(reachTime)) // a pipe can
	var b [16]byte
	if _, err := r.Read(b[:]); err != nil {
		return fmt.Errorf("the far side does not listen: %w", s.why(err))
	}
	return nil
}

// launch starts cmd in sp, as an ordinary user or as the namespaces' root.
func (s *site) launch(sp space, cmd *exec.Cmd, ordinary bool) error {
	if cmd.Stderr == nil {
		cmd.Stderr = &s.logs
	}
	cmd.WaitDelay = time.Second // whoever else has its standard error is killed too
	start := sp.start
	if ordinary {
		start = sp.startOrdinary
	}
	if err := start(cmd); err != nil {
		return err
	}
	s.cmds = append(s.cmds, cmd)
	return nil
}

// launchAgent starts cmd, whose standard input and output come to be an agent's, and waits until the agent has reached its target.
func (s *site) launchAgent(sp space, ordinary bool, line ...string) error {
	inR, inW, err := os.Pipe()
	if err != nil {
		return err
	}
	defer inR.Close()
	outR, outW, err := os.Pipe()
	if err != nil {
		inW.Close()
		return err
	}
	defer outW.Close()
	s.agent = &agentConn{in: inW, out: outR, dec: json.NewDecoder(outR)}
	cmd := exec.Command(line[0], line[1:]...)
	cmd.Stdin, cmd.Stdout = inR, outW
	if err := s.launch(sp, cmd, ordinary); err != nil {
		return err
	}
	inR.Close()
	outW.Close()
	_ = outR.SetReadDeadline(time.Now().Add(reachTime + 5*time.Second)) // a pipe can
	if err := s.agent.dec.Decode(&s.agent.greeting); err != nil {
		return s.why(fmt.Errorf("no agent: %w", err))
	}
	if f := s.agent.greeting.Failed; f != "" {
		return s.why(errors.New(f))
	}
	return nil
}

func (s *site) startAgent(sp space) error {
	spec, err := json.Marshal(agentSpec{Target: s.target})
	if err != nil {
		return err
	}
	return s.launchAgent(sp, false, role(roleAgent, string(spec))...)
}

func (s *site) startUser(a agentSpec, daemon ...string) error {
	spec, err := json.Marshal(userSpec{Agent: a, Daemon: daemon})
	if err != nil {
		return err
	}
	return s.launchAgent(s.host, true, role(roleUser, string(spec))...)
}

// why adds to err what the processes last wrote to standard error.
func (s *site) why(err error) error {
	if l := s.logs.String(); l != "" {
		return fmt.Errorf("%w; standard error: %s", err, l)
	}
	return err
}

// close ends every process but this one, which must be the PID namespace's first, and gives the namespaces back.
func (s *site) close() {
	if s.agent != nil {
		s.agent.in.Close()
		s.agent.out.Close()
	}
	_ = unix.Kill(-1, unix.SIGKILL) // none is as good
	for _, c := range s.cmds {
		_ = c.Wait() // killed
	}
	for range 500 {
		if _, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); errors.Is(err, unix.ECHILD) {
			break
		}
		time.Sleep(2 * time.Millisecond)
	}
	for _, f := range s.held {
		f.Close()
	}
	for _, sp := range s.opened {
		sp.Close()
	}
	_ = os.RemoveAll(s.dir)
}

// daemons is the contender's own processes: all there are, but for the bench's.
func daemons() (pids []int) {
	for _, p := range tree(processes(), os.Getpid()) {
		if a := argv(p); p != os.Getpid() && len(a) > 0 && !ours(a) {
			pids = append(pids, p)
		}
	}
	return pids
}

// ours reports whether a command line is the generator's, or the one that starts a contender. The role node is patchbay itself.
func ours(a []string) bool {
	return len(a) > 3 && a[1] == "bench" && a[2] == "inner" && slices.Contains([]string{roleServe, roleAgent, roleUser}, a[3])
}

// far is the process id of the far side, or 0.
func far() int {
	for p := range processes() {
		if a := argv(p); ours(a) && a[3] == roleServe {
			return p
		}
	}
	return 0
}

func describe(pids []int) (out []Process) {
	for _, p := range pids {
		exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", p))
		if err != nil {
			exe = "unknown: " + err.Error()
		}
		a := argv(p)
		for i := range a {
			if len(a[i]) > 200 {
				a[i] = a[i][:200] + "…"
			}
		}
		out = append(out, Process{Exe: exe, Argv: a})
	}
	return out
}

// agentConn is the scenario's end of an agent.
type agentConn struct {
	in, out  *os.File
	dec      *json.Decoder
	greeting greeting
}

// do has the agent take a measurement, which takes its duration and at most a minute more. Along with an error there may be a result, of
// what worked.
func (a *agentConn) do(m measurement, d time.Duration) (reply, error) {
	cfg := m.cfg
	cfg.Duration = d
	_ = a.out.SetReadDeadline(time.Now().Add(d + time.Minute)) // a pipe can
	if err := json.NewEncoder(a.in).Encode(request{Kind: m.kind, Config: cfg}); err != nil {
		return reply{}, err
	}
	var r reply
	if err := a.dec.Decode(&r); err != nil {
		return r, fmt.Errorf("the agent does not answer: %w", err)
	}
	if r.Failed != "" {
		return r, errors.New(r.Failed)
	}
	return r, nil
}

// tail keeps the end of what was written to it. It is safe for concurrent use.
type tail struct {
	mu sync.Mutex
	b  []byte
}

func (t *tail) Write(b []byte) (int, error) {
	const most = 600
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, b...)
	if len(t.b) > most {
		t.b = append(t.b[:0], t.b[len(t.b)-most:]...)
	}
	return len(b), nil
}

func (t *tail) reset() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = t.b[:0]
}

// String is one line.
func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.ToValidUTF8(strings.Join(strings.FieldsFunc(string(t.b), func(r rune) bool { return r == '\n' }), "; "), "")
}

// The contenders, scenario nat first.

// masquerade is the baseline: the client on a veth, the host forwards and masquerades.
func (s *site) masquerade() error {
	if err := veth(s.client, "eth0", s.host, "down0"); err != nil {
		return err
	}
	if err := errors.Join(s.client.addr("eth0", clientAddr+"/24"), s.host.addr("down0", gatewayAddr+"/24")); err != nil {
		return err
	}
	if err := s.client.defaultRoute("eth0", gatewayAddr); err != nil {
		return err
	}
	if err := s.host.Do(func() error { return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0) }); err != nil {
		return err
	}
	const rules = "table ip bench {\nchain post {\ntype nat hook postrouting priority 100;\noifname \"up0\" masquerade\n}\n}\n"
	if err := s.host.run(rules, s.path("nft"), "-f", "-"); err != nil {
		return err
	}
	return s.startAgent(s.client)
}

func (s *site) patchbayRun() error {
	spec, err := json.Marshal(agentSpec{Target: s.target})
	if err != nil {
		return err
	}
	return s.launchAgent(s.host, true, append([]string{self, "run", "--"}, role(roleAgent, string(spec))...)...)
}

func (s *site) gvproxy() error {
	sock := "unix://" + filepath.Join(s.dir, "gv.sock")
	// gvforwarder's -mtu is the size of its buffer, which takes the Ethernet header too.
	return s.startUser(agentSpec{
		Target:  s.target,
		TAP:     &tapSpec{Name: "tap0", MAC: "5a:94:ef:e4:0c:ee", Addr: "192.168.127.2/24", Gateway: "192.168.127.1", MTU: 1500},
		Program: []string{s.path("gvforwarder"), "-url", sock, "-iface", "tap0", "-preexisting", "-mtu", "4000"},
	}, s.path("gvproxy"), "-listen", sock, "-mtu", "1500", "-ssh-port", "-1")
}

// kernelBridge is the baseline of scenario switch: two veth pairs on a bridge.
func (s *site) kernelBridge() error {
	if err := errors.Join(veth(s.client, "eth0", s.host, "p0"), veth(s.server, "eth0", s.host, "p1")); err != nil {
		return err
	}
	if err := s.host.bridge("br0", "p0", "p1"); err != nil {
		return err
	}
	return s.joined("eth0", "eth0")
}

// joined addresses the two sides of a segment and starts the far side and the agent.
func (s *site) joined(near, far string) error {
	if err := errors.Join(s.client.addr(near, nearAddr+"/24"), s.server.addr(far, farAddr+"/24")); err != nil {
		return err
	}
	if err := s.serve(farAddr); err != nil {
		return err
	}
	return s.startAgent(s.client)
}

func (s *site) patchbayNode() error { return s.launchAgent(s.host, true, role(roleNode)...) }

// vde is vde_switch with two TAPs that it makes in the host's namespace; each then moves to its side.
func (s *site) vde() error {
	// Its console is standard input, whose end would be its own.
	console, keep, err := os.Pipe()
	if err != nil {
		return err
	}
	defer console.Close()
	cmd := exec.Command(s.path("vde_switch"), "-s", filepath.Join(s.dir, "vde"), "-t", "vt0", "-t", "vt1")
	cmd.Stdin = console
	if err := s.launch(s.host, cmd, false); err != nil {
		keep.Close()
		return err
	}
	s.held = append(s.held, keep)
	return s.joinedByTAPs("vt0", "vt1")
}

// joinedByTAPs moves two TAPs that a daemon makes in the host's namespace each to its side, and goes on as joined does.
func (s *site) joinedByTAPs(near, far string) error {
	for name, sp := range map[string]space{near: s.client, far: s.server} {
		deadline := time.Now().Add(reachTime)
		for s.host.link(name, func(netlink.Link) error { return nil }) != nil {
			if time.Now().After(deadline) {
				return s.why(fmt.Errorf("nobody makes %s", name))
			}
			time.Sleep(10 * time.Millisecond)
		}
		if err := errors.Join(s.host.give(name, sp), sp.up(name)); err != nil {
			return err
		}
	}
	return s.joined(near, far)
}

// openvswitch is Open vSwitch with its userspace datapath, whose internal ports are TAPs.
func (s *site) openvswitch() error {
	db, remote := filepath.Join(s.dir, "conf.db"), "unix:"+filepath.Join(s.dir, "db.sock")
	if err := s.host.run("", s.path("ovsdb-tool"), "create", db, "/usr/share/openvswitch/vswitch.ovsschema"); err != nil {
		return err
	}
	env := append(os.Environ(), "OVS_RUNDIR="+s.dir, "OVS_LOGDIR="+s.dir, "OVS_DBDIR="+s.dir)
	for _, line := range [][]string{
		{s.path("ovsdb-server"), db, "--remote=p" + remote, "--unixctl=" + filepath.Join(s.dir, "ovsdb.ctl")},
		{s.path("ovs-vswitchd"), remote, "--disable-system", "--unixctl=" + filepath.Join(s.dir, "vswitchd.ctl")},
	} {
		cmd := exec.Command(line[0], line[1:]...)
		cmd.Env = env
		if err := s.launch(s.host, cmd, false); err != nil {
			return err
		}
	}
	// One transaction, in which ovs-vsctl waits for the database and then for the daemon.
	if err := s.host.run("", s.path("ovs-vsctl"), "--db="+remote, "--retry", "--timeout=10", "add-br", "br0", "--", "set", "bridge", "br0", "datapath_type=netdev",
		"--", "add-port", "br0", "ov0", "--", "set", "interface", "ov0", "type=internal",
		"--", "add-port", "br0", "ov1", "--", "set", "interface", "ov1", "type=internal"); err != nil {
		return s.why(err)
	}
	return s.joinedByTAPs("ov0", "ov1")
}
