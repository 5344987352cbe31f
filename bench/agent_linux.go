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
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"patchbay/bench/load"
)

// loadPort is where the far side listens.
const loadPort = "7070"

// reachTime is how long a contender may take until the far side can be reached through it.
const reachTime = 15 * time.Second

// sideSpec is what both the agent and the far side are told on their command lines.
type sideSpec struct {
	// A TAP to make, and a daemon to start then, for contenders that have a half inside.
	TAP     *tapSpec `json:",omitempty"`
	Program []string `json:",omitempty"`
	// NoGSO has the interface send packets of the MTU.
	NoGSO bool `json:",omitempty"`
	// Iperf is the program iperf3, where there is one.
	Iperf string `json:",omitempty"`
	// Congestion is the congestion control of TCP, where the machine's is not to be.
	Congestion string `json:",omitempty"`
}

type agentSpec struct {
	Target string // of the measurements
	sideSpec
}

type serveSpec struct {
	Listen string // ADDR:PORT
	sideSpec
}

// argument is a role's argument.
func argument(spec any) (string, error) {
	b, err := json.Marshal(spec)
	return string(b), err
}

// prepare is what a side does before it reaches or is reached, and says which congestion control it has.
func (s sideSpec) prepare(ctx context.Context) (c Congestion, err error) {
	if err := shortConnections(); err != nil {
		return c, err
	}
	if c, err = settleCongestion(s.Congestion); err != nil { // a contender's namespace has the machine's
		return c, err
	}
	if s.TAP != nil {
		if err := makeTAP(*s.TAP); err != nil {
			return c, err
		}
	}
	if len(s.Program) > 0 {
		cmd := exec.CommandContext(ctx, s.Program[0], s.Program[1:]...)
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			return c, err
		}
		go func() { _ = cmd.Wait() }() // an early end shows as a target out of reach
	}
	if !s.NoGSO {
		return c, nil
	}
	links, err := netlink.LinkList()
	for _, l := range links {
		if l.Attrs().Flags&net.FlagLoopback == 0 {
			err = errors.Join(err, noGSO(l))
		}
	}
	return c, err
}

// generator is what the sockets of the side's generator are told when it has c: nothing where the machine's is left.
func (s sideSpec) generator(c Congestion) string {
	if s.Congestion == "" {
		return ""
	}
	return c.Sockets
}

// noGSO has l's kernel cut what it sends through it.
func noGSO(l netlink.Link) error {
	if err := netlink.LinkSetGSOMaxSegs(l, 1); err != nil {
		return fmt.Errorf("%s: longest superframe: %w", l.Attrs().Name, err)
	}
	return nil
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
	Near      Congestion
	Far       Congestion `json:",omitzero"` // where the agent is whoever started the far side
	Failed    string     // why the target cannot be reached
	// Ahead says that this is no greeting yet: one more container has come up, and so many are to come.
	Ahead int `json:",omitempty"`
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
	in, h := json.NewDecoder(os.Stdin), holder{device: g.Interface, iperf: spec.Iperf, congestion: spec.generator(g.Near)}
	for {
		var q request
		if err := in.Decode(&q); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		q.Config.Addr = spec.Target
		res, err := h.measure(ctx, q)
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
	if g.Near, err = spec.prepare(ctx); err != nil {
		return g, err
	}
	local, congestion, err := reach(ctx, spec.Target, spec.generator(g.Near))
	if err != nil {
		return g, err
	}
	ifi, err := interfaceOf(local)
	if err != nil {
		return g, err
	}
	if congestion != g.Near.Sockets { // no use to ask for it again for each connection
		g.Near.Refused = fmt.Sprintf("asked for %s, and a connection has come out with %s", g.Near.Sockets, congestion)
		g.Near.Sockets = congestion
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

// reach waits until target accepts a connection, and returns the address of this side on the way there, and the congestion control that the connection had, of the one asked for: it may be on a socket
// of the host (run --bypass).
func reach(ctx context.Context, target, congestion string) (local net.IP, got string, err error) {
	deadline := time.Now().Add(reachTime)
	for {
		d := net.Dialer{Timeout: time.Second, Control: load.Control(congestion)}
		c, err := d.DialContext(ctx, "tcp", target)
		if err == nil {
			got, err = load.CongestionOf(c.(*net.TCPConn))
			c.Close()
			if err != nil {
				return nil, "", err
			}
			u, err := d.DialContext(ctx, "udp", target) // by UDP, which sends nothing yet: see above
			if err != nil {
				return nil, "", err
			}
			defer u.Close()
			return u.LocalAddr().(*net.UDPAddr).IP, got, nil
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			return nil, "", fmt.Errorf("%s is out of reach after %v: %w", target, reachTime, err)
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

// ready is what the far side says when it can be reached.
type ready struct{ Far Congestion }

// serve is the far side. It says so on standard output when it can be reached.
func serve(ctx context.Context, args []string) error {
	if len(args) != 1 {
		return errors.New("want one argument")
	}
	var spec serveSpec
	if err := json.Unmarshal([]byte(args[0]), &spec); err != nil {
		return err
	}
	far, err := spec.prepare(ctx)
	if err != nil {
		return err
	}
	s, err := load.Listen(load.ServerConfig{Addr: spec.Listen, Congestion: spec.generator(far)})
	if err != nil {
		return err
	}
	if far.Sockets, err = s.Congestion(); err != nil {
		return err
	}
	if spec.Iperf != "" {
		if err := serveIperf(ctx, spec.Iperf); err != nil {
			return err
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(ready{far}); err != nil {
		return err
	}
	return s.Serve(ctx)
}
