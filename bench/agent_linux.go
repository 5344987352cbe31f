package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"patchbay/bench/load"
)

// loadPort is where the far side listens.
const loadPort = "7070"

// reachTime is how long a contender may take until the far side can be reached through it.
const reachTime = 15 * time.Second

// agentSpec is what an agent is told on its command line.
type agentSpec struct {
	Target string // of the measurements
	// A TAP that the agent makes, and a daemon that it then starts, for contenders that have a half inside.
	TAP     *tapSpec `json:",omitempty"`
	Program []string `json:",omitempty"`
}

type tapSpec struct {
	Name, MAC, Addr, Gateway string
	MTU                      int
}

// greeting is what an agent says first, once the target can be reached.
type greeting struct {
	Interface string
	MTU       int
	Offloads  []string
	Failed    string // why the target cannot be reached
}

type request struct {
	Kind   string
	Config load.Config
}

type reply struct {
	Result load.Result
	Failed string
}

// agent takes measurements on standard input, one JSON value each, and answers each on standard output.
func agent(ctx context.Context, args []string) error {
	if len(args) != 1 {
		return errors.New("want one argument")
	}
	var spec agentSpec
	if err := json.Unmarshal([]byte(args[0]), &spec); err != nil {
		return err
	}
	out := json.NewEncoder(os.Stdout)
	g, err := prepareAgent(ctx, spec)
	if err != nil {
		g.Failed = err.Error()
	}
	if err := out.Encode(g); err != nil || g.Failed != "" {
		return err
	}
	in := json.NewDecoder(os.Stdin)
	for {
		var q request
		if err := in.Decode(&q); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		q.Config.Addr = spec.Target
		res, err := runLoad(ctx, q.Kind, q.Config)
		r := reply{Result: res}
		if err != nil {
			r.Failed = err.Error()
		}
		if err := out.Encode(r); err != nil {
			return err
		}
	}
}

func prepareAgent(ctx context.Context, spec agentSpec) (g greeting, err error) {
	if err := shortConnections(); err != nil {
		return g, err
	}
	if spec.TAP != nil {
		if err := makeTAP(*spec.TAP); err != nil {
			return g, err
		}
	}
	if len(spec.Program) > 0 {
		cmd := exec.CommandContext(ctx, spec.Program[0], spec.Program[1:]...)
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			return g, err
		}
		go func() { _ = cmd.Wait() }() // an early end shows as a target out of reach
	}
	local, err := reach(ctx, spec.Target)
	if err != nil {
		return g, err
	}
	ifi, err := interfaceOf(local)
	if err != nil {
		return g, err
	}
	g.Interface, g.MTU = ifi.Name, ifi.MTU
	g.Offloads, err = offloads(ifi.Name)
	return g, err
}

// shortConnections lets this namespace make as many short connections a second as are measured: 28,000 ports, each unusable for a minute, would
// end a run within two seconds.
func shortConnections() error {
	for name, v := range map[string]string{"ip_local_port_range": "2048 65535", "tcp_tw_reuse": "1"} {
		if err := os.WriteFile("/proc/sys/net/ipv4/"+name, []byte(v), 0); err != nil {
			return fmt.Errorf("sysctl: %w", err)
		}
	}
	return nil
}

// reach waits until target accepts a connection, and returns the address it was made from.
func reach(ctx context.Context, target string) (net.IP, error) {
	deadline := time.Now().Add(reachTime)
	for {
		d := net.Dialer{Timeout: time.Second}
		c, err := d.DialContext(ctx, "tcp", target)
		if err == nil {
			defer c.Close()
			return c.LocalAddr().(*net.TCPAddr).IP, nil
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			return nil, fmt.Errorf("%s is out of reach after %v: %w", target, reachTime, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func interfaceOf(ip net.IP) (*net.Interface, error) {
	ifs, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	for _, i := range ifs {
		addrs, err := i.Addrs()
		if err != nil {
			return nil, err
		}
		for _, a := range addrs {
			if n, ok := a.(*net.IPNet); ok && n.IP.Equal(ip) {
				return &i, nil
			}
		}
	}
	return nil, fmt.Errorf("no interface has the address %s", ip)
}

// makeTAP is what a contender's own DHCP client would come to.
func makeTAP(t tapSpec) error {
	mac, err := net.ParseMAC(t.MAC)
	if err != nil {
		return err
	}
	addr, err := netlink.ParseAddr(t.Addr)
	if err != nil {
		return err
	}
	la := netlink.NewLinkAttrs()
	la.Name, la.MTU, la.HardwareAddr = t.Name, t.MTU, mac
	tap := &netlink.Tuntap{LinkAttrs: la, Mode: netlink.TUNTAP_MODE_TAP, Flags: netlink.TUNTAP_NO_PI | unix.IFF_ONE_QUEUE}
	if err := netlink.LinkAdd(tap); err != nil {
		return fmt.Errorf("TAP %s: %w", t.Name, err)
	}
	l, err := netlink.LinkByName(t.Name)
	if err != nil {
		return err
	}
	return errors.Join(
		netlink.LinkSetHardwareAddr(l, mac), netlink.LinkSetMTU(l, t.MTU), netlink.AddrAdd(l, addr), netlink.LinkSetUp(l),
		netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: net.ParseIP(t.Gateway)}),
	)
}

// serve is the far side. It says so on standard output when it can be reached.
func serve(ctx context.Context, args []string) error {
	if len(args) != 1 {
		return errors.New("want ADDR:PORT")
	}
	s, err := load.Listen(args[0])
	if err != nil {
		return err
	}
	fmt.Println("ready")
	return s.Serve(ctx)
}

// userSpec is what the role user starts.
type userSpec struct {
	Agent agentSpec
	// Daemon runs where the role runs; placePID in it becomes the agent's process id.
	Daemon []string
}

const placePID = "{PID}"

// user is an ordinary user who makes a network namespace and then lets a daemon give it a network. The agent in it has this process's standard
// input and output.
func user(ctx context.Context, args []string) error {
	if len(args) != 1 {
		return errors.New("want one argument")
	}
	var spec userSpec
	if err := json.Unmarshal([]byte(args[0]), &spec); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	b, err := json.Marshal(spec.Agent)
	if err != nil {
		return err
	}
	line := role(roleAgent, string(b))
	inside := exec.CommandContext(ctx, line[0], line[1:]...)
	inside.Stdin, inside.Stdout, inside.Stderr = os.Stdin, os.Stdout, os.Stderr
	inside.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
	}
	if err := inside.Start(); err != nil {
		return err
	}
	for i, a := range spec.Daemon {
		if a == placePID {
			spec.Daemon[i] = fmt.Sprint(inside.Process.Pid)
		}
	}
	daemon := exec.CommandContext(ctx, spec.Daemon[0], spec.Daemon[1:]...)
	daemon.Stdout, daemon.Stderr = os.Stderr, os.Stderr
	if err := daemon.Start(); err != nil {
		cancel()
		return errors.Join(err, inside.Wait())
	}
	var daemonErr, insideErr error
	gone, ended := make(chan struct{}), make(chan struct{})
	go func() { daemonErr = daemon.Wait(); close(gone) }()
	go func() { insideErr = inside.Wait(); close(ended) }()
	select {
	case <-ended:
		cancel()
		<-gone // killed
		return insideErr
	case <-gone:
		cancel()
		<-ended
		return fmt.Errorf("%s has ended: %w", spec.Daemon[0], orExit(daemonErr))
	}
}

// orExit is err, or that there was none.
func orExit(err error) error {
	if err == nil {
		return errors.New("exit status 0")
	}
	return err
}
