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

	// RFC 5180's.
	serverAddr6  = "2001:2::1"
	uplinkAddr6  = "2001:2::2"
	gatewayAddr6 = "2001:2:0:1::1"
	clientAddr6  = "2001:2:0:1::2"
)

// site is the topology of one contender in one round, and every process in it.
type site struct {
	dir    string // for sockets
	paths  map[string]string
	iperf  string // the program, where it is to be used
	under  condition
	target string // of the agent's measurements
	tcp    string // congestion control, or empty for the machine's
	farTCP Congestion

	host, client, server space
	peer                 space // the other host, in scenario tunnel
	opened               []space
	cmds                 []*exec.Cmd
	logs                 tail
	agents               agentGroup // one of each pair
	held                 []*os.File // to keep open until the end
}

func newSite(dir string, paths map[string]string, under condition) *site {
	return &site{dir: dir, paths: paths, under: under}
}

func (s *site) path(program string) string { return s.paths[program] }

func (s *site) space(name string) (space, error) {
	sp, err := newSpace(name, s.tcp)
	if err == nil {
		s.opened = append(s.opened, sp)
	}
	return sp, err
}

// open makes the scenario's namespaces; in scenarios nat and publish also the way from the host to the machine outside, and in nat the far side there.
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
	switch scenario {
	case scenarioSwitch:
		return nil
	case scenarioTunnel:
		return s.openUnderlay()
	}
	join := veth
	if s.under.rtt > 0 {
		join = func(a space, aName string, b space, bName string) error {
			return s.longWire(a, aName, b, bName, s.under.rtt)
		}
	}
	if err := join(s.host, "up0", s.server, "eth0"); err != nil {
		return err
	}
	if err := errors.Join(s.host.addr("up0", uplinkAddr+"/24"), s.server.addr("eth0", serverAddr+"/24")); err != nil {
		return err
	}
	if err := s.host.defaultRoute("up0", serverAddr); err != nil || scenario == scenarioPublish {
		return err
	}
	if !s.under.v6 {
		return s.serve(s.server, asRoot, serverAddr)
	}
	if err := errors.Join(s.host.addr("up0", uplinkAddr6+"/64"), s.server.addr("eth0", serverAddr6+"/64"), s.host.defaultRoute("up0", serverAddr6)); err != nil {
		return err
	}
	return s.serve(s.server, asRoot, serverAddr6)
}

// serve starts the far side in sp and waits until it listens. It is started by the command line before, if there is one.
func (s *site) serve(sp space, as user, addr string, before ...string) error {
	s.target = net.JoinHostPort(addr, loadPort)
	return s.serveSpec(sp, as, serveSpec{Listen: s.target, sideSpec: s.side()}, before...)
}

func (s *site) serveSpec(sp space, as user, spec serveSpec, before ...string) error {
	arg, err := argument(spec)
	if err != nil {
		return err
	}
	return s.far(sp, as, append(before, role(roleServe, arg)...))
}

// far starts the far side by a command line in sp and waits until it listens.
func (s *site) far(sp space, as user, line []string) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd := exec.Command(line[0], line[1:]...)
	cmd.Stdout = w
	err = s.launch(sp, cmd, as)
	w.Close()
	if err != nil {
		return err
	}
	_ = r.SetReadDeadline(time.Now().Add(reachTime)) // a pipe can
	var said ready
	if err := json.NewDecoder(r).Decode(&said); err != nil {
		return fmt.Errorf("the far side does not listen: %w", s.why(err))
	}
	s.farTCP = said.Far
	return nil
}

// user is whom a process runs as.
type user int

const (
	asRoot     user = iota // of the bench's namespaces
	asOrdinary             // without capabilities over them, yet able to make user namespaces
	asTenant               // the same, with a user id and subordinate ones that are real ones on the machine; see makeTenant
)

// launch starts cmd in sp.
func (s *site) launch(sp space, cmd *exec.Cmd, as user) error {
	if cmd.Stderr == nil {
		cmd.Stderr = &s.logs
	}
	cmd.WaitDelay = time.Second // whoever else has its standard error is killed too
	var err error
	switch as {
	case asRoot:
		err = sp.start(cmd)
	case asOrdinary:
		err = sp.startOrdinary(cmd)
	case asTenant:
		err = sp.startTenant(cmd, filepath.Join(s.dir, "tenant"))
	}
	if err != nil {
		return err
	}
	s.cmds = append(s.cmds, cmd)
	return nil
}

// lastWords is how long after the end of an agent's output the reason may still be on its way, on standard error.
const lastWords = 500 * time.Millisecond

// launchAgent starts cmd, whose standard input and output come to be an agent's, and waits until the agent has reached its target.
func (s *site) launchAgent(sp space, as user, line ...string) error {
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
	agent := newAgentConn(inW, outR)
	s.agents = append(s.agents, agent)
	cmd := exec.Command(line[0], line[1:]...)
	cmd.Stdin, cmd.Stdout = inR, outW
	if err := s.launch(sp, cmd, as); err != nil {
		return err
	}
	inR.Close()
	outW.Close()
	if err := agent.greet(); err != nil {
		time.Sleep(lastWords)
		return s.why(err)
	}
	return nil
}

// side is what both sides are told.
func (s *site) side() sideSpec {
	return sideSpec{NoGSO: s.under.noGSO, Iperf: s.iperf, Congestion: s.tcp}
}

// agentSpec is what the agent of the present target is told.
func (s *site) agentSpec() agentSpec {
	return agentSpec{Target: s.target, sideSpec: s.side()}
}

// agentRole is the command line of the agent of the present target.
func (s *site) agentRole() ([]string, error) {
	arg, err := argument(s.agentSpec())
	return role(roleAgent, arg), err
}

func (s *site) startAgent(sp space) error {
	line, err := s.agentRole()
	if err != nil {
		return err
	}
	return s.launchAgent(sp, asRoot, line...)
}

func (s *site) startUser(a agentSpec, daemon ...string) error {
	inside, err := argument(a)
	if err != nil {
		return err
	}
	spec, err := argument(userSpec{Inside: role(roleAgent, inside), Daemon: daemon})
	if err != nil {
		return err
	}
	return s.launchAgent(s.host, asOrdinary, role(roleUser, spec)...)
}

// congestion is what the two sides have. Of several pairs it is that of one.
func (s *site) congestion() (near, far Congestion) {
	g := s.agents[0].greeting
	if g.Far != (Congestion{}) {
		return g.Near, g.Far
	}
	return g.Near, s.farTCP
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
	for _, a := range s.agents {
		a.close()
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

// ours reports whether a command line is a generator's, or the one that starts a contender. The role node is patchbay itself.
func ours(a []string) bool {
	return isIperf(a) || len(a) > 3 && a[1] == "bench" && a[2] == "inner" && slices.Contains([]string{roleServe, roleAgent, roleUser, roleWire}, a[3])
}

// far is the process id of the far side, or 0.
func far() int {
	for p := range processes() {
		if a := argv(p); ours(a) && !isIperf(a) && a[3] == roleServe {
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
