package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net/netip"
	"os"
	"strings"

	"github.com/urfave/cli/v2"
	"patchbay/internal/api"
	"patchbay/internal/edge"
	"patchbay/internal/node"
	"patchbay/internal/spin"
	"patchbay/internal/wire"
	"patchbay/ipam"
	"patchbay/nat"
)

func runCommand() *cli.Command {
	return &cli.Command{
		Name:  "run",
		Usage: "run a command in a container network of its own",
		UsageText: `patchbay run [OPTION...] [--] COMMAND [ARG...]

Examples:
   patchbay run -- curl http://example.test/
   patchbay run -p 8080:80 -p 127.0.0.1:5300-5309:53/udp --name web -- ./server
   patchbay run --host-loopback -- psql -h host.patchbay.internal
   patchbay run --bypass -- git clone https://example.test/big.git
   patchbay run --net none --pid -- sh
   patchbay run --network lab --name db -- ./database
   patchbay run --net container:db -- ss -tln
   patchbay run -d --name web --log web.log -- ./server`,
		Description: `COMMAND runs as root of a new user namespace, with an interface eth0 on a private network whose gateway
translates to the host's network. Where a daemon runs (see patchbay daemon) that is its network, and containers on it find each other by name; --socket none, or an
option that describes the network, gives it one of its own. Its exit status is that of COMMAND, or 128 and the number of the signal that ended it; 125 is a
failure of patchbay itself, 126 a COMMAND that cannot be executed, 127 one that is not found.`,
		OnUsageError: usageError,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "name", Usage: "`NAME` that others on the network find it by, and its host name"},
			&cli.StringFlag{Name: "hostname", Usage: "host `NAME` inside, when not --name"},
			&cli.StringSliceFlag{Name: "publish", Aliases: []string{"p"}, Usage: "publish ports by `SPEC`: [HOSTIP:]HOSTPORT[-END]:PORT[-END][/tcp|/udp]"},
			&cli.StringFlag{Name: "net", Usage: "`MODE`: private (a network), none (only lo), host (the host's network), container:NAME (another one's network, or that of process container:PID)", Value: "private"},
			&cli.StringSliceFlag{Name: "network", Usage: "join the daemon's network `NAME`; several become eth0, eth1, … (default, where a daemon runs: default)"},
			&cli.StringSliceFlag{Name: "alias", Usage: "a further `NAME` that others on the daemon's network find it by"},
			&cli.StringFlag{Name: "rate", Usage: "the daemon's network takes at most `RATE` from it: bytes a second such as 10M, or 100Mbit"},
			socketFlag(),
			&cli.BoolFlag{Name: "pid", Usage: "give it a PID namespace too"},
			&cli.BoolFlag{Name: "detach", Aliases: []string{"d"}, Usage: "run it in the background: print its name when it runs, and return"},
			&cli.StringFlag{Name: "log", Usage: "with --detach, append what it writes to `FILE` (default: nowhere)"},
			&cli.BoolFlag{Name: "pause", Hidden: true, Usage: "no command: namespaces that others join"},
			&cli.BoolFlag{Name: "keep-id", Usage: "keep your user and group ids inside, instead of root"},
			&cli.BoolFlag{Name: "host-loopback", Usage: "let host.patchbay.internal reach the host's 127.0.0.1 and ::1"},
			&cli.BoolFlag{Name: "bypass", Usage: "TCP connections to the outside use sockets of the host: its speed, and its address in what COMMAND sees (see README)"},
			&cli.BoolFlag{Name: "link-local", Usage: "let it reach link-local addresses such as 169.254.169.254 (cloud metadata)"},
			&cli.StringSliceFlag{Name: "subnet", Usage: "the network's `CIDR`, one IPv4 and one IPv6 (default: such as no host route clashes with)"},
			&cli.StringSliceFlag{Name: "ip", Usage: "its `ADDRESS` on the network"},
			&cli.StringFlag{Name: "mac", Usage: "its `MAC` address"},
			&cli.IntFlag{Name: "mtu", Usage: "the network's MTU in `BYTES`", Value: 1500},
			&cli.StringSliceFlag{Name: "dns", Usage: "ask the resolver at `ADDRESS` instead of those in the host's /etc/resolv.conf"},
			&cli.IntFlag{Name: "queues", Usage: "`N` TAP queues, each read by its own thread", Value: 1},
			&cli.StringFlag{Name: "device", Usage: "`KIND` of its interface: tap, packet (slower; needs no /dev/net/tun), auto (tap where it can be had)", Value: "auto"},
			&cli.BoolFlag{Name: "plain-tap", Usage: "open the TAP without offloads, as where a sandbox refuses them"},
			&cli.IntFlag{Name: "max-flows", Usage: "at most `N` TCP connections, and as many UDP flows, through NAT"},
			&cli.IntFlag{Name: "max-dials", Usage: "at most `N` connections waiting for an answer"},
			&cli.IntFlag{Name: "max-memory", Usage: "at most `MIB` in the buffers of all TCP connections through NAT", Value: 64},
			&cli.StringFlag{Name: "stats", Usage: "when it has ended, write ports, counters and drops as JSON to `FILE` (- for standard error)"},
			&cli.StringFlag{Name: "profile", Usage: "write a CPU and a heap profile into `DIR`"},
			&cli.BoolFlag{Name: "verbose", Aliases: []string{"v"}, Usage: "log state changes to standard error"},
		},
		Action: func(c *cli.Context) error {
			if c.Bool("detach") && !backgroundOf(c).is() {
				if err := detach(c.Context, os.Args[1:], c.String("log"), c.App.Writer); err != nil {
					return fmt.Errorf("run: %w", err)
				}
				return nil
			}
			if c.NArg() == 0 && !c.Bool("pause") {
				return errors.New("run: no command given; for example: patchbay run -- curl http://example.test/")
			}
			err := run(c)
			var status exitStatus
			if err != nil && !errors.As(err, &status) {
				return fmt.Errorf("run: %w", err)
			}
			return err
		},
	}
}

// run starts the command in the mode asked for and returns how it ended.
func run(c *cli.Context) error {
	stopProfile, err := startProfile(c.String("profile"))
	if err != nil {
		return err
	}
	defer stopProfile()
	spec, err := processSpec(c)
	if err != nil {
		return err
	}
	stdio := edge.Stdio{In: os.Stdin, Out: os.Stdout, Err: os.Stderr}
	ctx, cancel := context.WithCancel(c.Context)
	defer cancel()
	if spec.Net != edge.NetPrivate {
		if err := rejectPrivateFlags(c); err != nil {
			return err
		}
		if spec.Net == edge.NetContainer {
			for _, f := range []string{"name", "hostname"} {
				if c.IsSet(f) {
					return fmt.Errorf("--%s has no meaning with --net %s, whose name and host name are the container's; leave it out", f, c.String("net"))
				}
			}
			t, err := joinTarget(ctx, c, &spec)
			if err != nil {
				return err
			}
			defer t.Close()
			spec.Join = t
		}
		p, err := edge.Start(ctx, spec, stdio)
		if err != nil {
			return err
		}
		defer p.Close()
		defer p.ForwardSignals()()
		if err := p.Release(); err != nil {
			return err
		}
		backgroundOf(c).up(fmt.Sprintf("pid %d", p.PID()))
		return wait(p)
	}
	client, networks, err := nodeFor(ctx, c)
	if err != nil {
		return err
	}
	if client != nil {
		return runOnNode(ctx, c, client, networks, spec, stdio)
	}
	cfg, err := networkConfig(c)
	if err != nil {
		return err
	}
	ctr, err := containerConfig(c, spec, stdio)
	if err != nil {
		return err
	}
	blocked := nat.Loops + max(ctr.Queues, 1)
	if spec.Bypass {
		blocked++ // its supervisor
	}
	spin.SetProcs(blocked)
	stats, err := openStats(c.String("stats"))
	if err != nil {
		return err
	}
	network, err := node.NewNetwork(ctx, cfg)
	if err != nil {
		return err
	}
	defer network.Close()
	container, err := network.Start(ctx, ctr)
	if err != nil {
		return err
	}
	backgroundOf(c).up(container.Name())
	err = wait(container)
	if werr := writeStats(stats, network); werr != nil {
		fmt.Fprintln(os.Stderr, "patchbay: run: --stats:", werr)
	}
	return err
}

// wait returns how the command ended, as the error that main exits with.
func wait(p interface{ Wait() (edge.Status, error) }) error {
	st, err := p.Wait()
	if err != nil {
		return err
	}
	if code := st.ExitCode(); code != 0 {
		return exitStatus(code)
	}
	return nil
}

// privateFlags make sense on a private network only.
var privateFlags = []string{"network", "alias", "rate", "publish", "host-loopback", "bypass", "link-local", "subnet", "ip", "mac", "mtu", "dns", "queues", "device", "plain-tap", "max-flows", "max-dials", "max-memory", "stats"}

func rejectPrivateFlags(c *cli.Context) error {
	for _, f := range privateFlags {
		if c.IsSet(f) {
			return fmt.Errorf("--%s has no meaning with --net %s; leave it out, or use --net private", f, c.String("net"))
		}
	}
	return nil
}

func processSpec(c *cli.Context) (edge.Spec, error) {
	mode := edge.Net(c.String("net"))
	if strings.HasPrefix(string(mode), joinPrefix) && len(mode) > len(joinPrefix) {
		mode = edge.NetContainer
	}
	switch mode {
	case edge.NetPrivate, edge.NetNone, edge.NetHost, edge.NetContainer:
	default:
		return edge.Spec{}, fmt.Errorf("--net: mode %q is not known; use private, none, host or container:NAME", mode)
	}
	for _, f := range []string{"name", "hostname"} {
		if c.IsSet(f) {
			if err := api.CheckName(c.String(f)); err != nil {
				return edge.Spec{}, fmt.Errorf("--%s: %w", f, err)
			}
		}
	}
	hostname := c.String("hostname")
	if hostname == "" {
		hostname = c.String("name")
	}
	dir, err := os.Getwd()
	if err != nil {
		return edge.Spec{}, fmt.Errorf("working directory: %w", err)
	}
	return edge.Spec{Net: mode, PID: c.Bool("pid"), KeepID: c.Bool("keep-id"), Pause: c.Bool("pause"), Bypass: c.Bool("bypass"), Hostname: hostname, Argv: c.Args().Slice(), Env: os.Environ(), Dir: dir}, nil
}

func networkConfig(c *cli.Context) (node.NetworkConfig, error) {
	cfg := node.NetworkConfig{
		Name: "default", MTU: c.Int("mtu"), TCPMemory: c.Int("max-memory") << 20, HostLoopback: c.Bool("host-loopback"), AllowLinkLocal: c.Bool("link-local"),
	}
	var err error
	if cfg.Limits, err = limitFlags(c); err != nil {
		return cfg, err
	}
	if !c.IsSet("publish") { // descriptors that published ports would need are for its own connections
		cfg.Limits.PublishedFlows = 1
	}
	if !c.IsSet("max-flows") { // the default, and there is nobody to share it with
		cfg.Limits.TCPFlowsPerContainer, cfg.Limits.UDPFlowsPerContainer = math.MaxInt32, math.MaxInt32
	}
	if cfg.MTU < node.MinMTU || cfg.MTU > node.MaxMTU {
		return cfg, fmt.Errorf("--mtu: %d bytes; use %d to %d", cfg.MTU, node.MinMTU, node.MaxMTU)
	}
	cfg.LoopTAPs = node.FewCores()
	for _, s := range c.StringSlice("subnet") {
		p, err := ipam.ParseSubnet(s)
		if err != nil {
			return cfg, fmt.Errorf("--subnet: %w", err)
		}
		cfg.Subnets = append(cfg.Subnets, p)
	}
	for _, s := range c.StringSlice("dns") {
		a, err := parseResolver(s)
		if err != nil {
			return cfg, fmt.Errorf("--dns: %w", err)
		}
		cfg.DNS = append(cfg.DNS, a)
	}
	if err := atLeastOne(c, "max-memory", "queues"); err != nil {
		return cfg, err
	}
	if c.Bool("verbose") {
		cfg.Logger = slog.New(slog.NewTextHandler(os.Stderr, nil))
	}
	return cfg, nil
}

// limitFlags reads --max-flows and --max-dials.
func limitFlags(c *cli.Context) (nat.Limits, error) {
	flows, dials := c.Int("max-flows"), c.Int("max-dials")
	return nat.Limits{
		TCPFlows: flows, TCPFlowsPerContainer: flows, UDPFlows: flows, UDPFlowsPerContainer: flows, HalfOpen: dials, HalfOpenPerContainer: dials,
	}, atLeastOne(c, "max-flows", "max-dials")
}

func atLeastOne(c *cli.Context, flags ...string) error {
	for _, f := range flags {
		if c.IsSet(f) && c.Int(f) < 1 {
			return fmt.Errorf("--%s: %d is too few; use 1 or more", f, c.Int(f))
		}
	}
	return nil
}

// parseResolver reads ADDRESS or ADDRESS:PORT.
func parseResolver(s string) (netip.AddrPort, error) {
	if a, err := netip.ParseAddr(strings.Trim(s, "[]")); err == nil {
		return netip.AddrPortFrom(a, 53), nil
	}
	if ap, err := netip.ParseAddrPort(s); err == nil && ap.Port() != 0 {
		return ap, nil
	}
	return netip.AddrPort{}, fmt.Errorf("%q is not an address; use one such as 192.0.2.53 or [2001:db8::53]:5353", s)
}

func containerConfig(c *cli.Context, spec edge.Spec, stdio edge.Stdio) (node.ContainerConfig, error) {
	cfg := node.ContainerConfig{
		AttachConfig:   node.AttachConfig{Name: c.String("name"), Hostname: spec.Hostname, Queues: c.Int("queues"), ForcePlain: c.Bool("plain-tap")},
		Process:        spec,
		Stdio:          stdio,
		ForwardSignals: true,
	}
	if err := cfg.Device.UnmarshalText([]byte(c.String("device"))); err != nil {
		return cfg, fmt.Errorf("--device: %w", err)
	}
	for _, s := range c.StringSlice("publish") {
		p, err := nat.ParseSpec(s)
		if err != nil {
			return cfg, fmt.Errorf("--publish: %w", err)
		}
		cfg.Publish = append(cfg.Publish, p)
	}
	for _, s := range c.StringSlice("ip") {
		a, err := netip.ParseAddr(s)
		if err != nil || a.Zone() != "" {
			return cfg, fmt.Errorf("--ip: %q is not an address; use one of the network's, such as 10.88.0.7", s)
		}
		cfg.Addrs = append(cfg.Addrs, a.Unmap())
	}
	if s := c.String("mac"); s != "" {
		m, err := wire.ParseMAC(s)
		if err != nil {
			return cfg, fmt.Errorf("--mac: %w", err)
		}
		if m.IsGroup() || m.IsZero() {
			return cfg, fmt.Errorf("--mac: %s is a group address or zero; use a unicast one, such as 02:00:5e:10:00:01", m)
		}
		cfg.MAC = m
	}
	return cfg, nil
}

// openStats opens where the counters go, before anything is started; - is standard error, so that they never mix with the command's output. Nil: nowhere.
func openStats(file string) (*os.File, error) {
	switch file {
	case "":
		return nil, nil
	case "-":
		return os.Stderr, nil
	}
	f, err := os.Create(file)
	if err != nil {
		return nil, fmt.Errorf("--stats: %w; name a file that you may write", err)
	}
	return f, nil
}

// writeStats writes the network's state to what openStats opened.
func writeStats(f *os.File, network *node.Network) error {
	if f == nil {
		return nil
	}
	enc := json.NewEncoder(f)
	enc.SetIndent("", "  ")
	err := enc.Encode(network.Status())
	if f != os.Stderr {
		err = errors.Join(err, f.Close())
	}
	return err
}
