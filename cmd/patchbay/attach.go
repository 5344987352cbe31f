package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/urfave/cli/v2"

	"patchbay/internal/api"
	"patchbay/internal/edge"
	"patchbay/internal/netns"
	"patchbay/internal/wire"
	"patchbay/nat"
)

func attachCommand() *cli.Command {
	return nodeCommand(&cli.Command{
		Name: "attach", Usage: "join a running container, namespace or virtual machine to a network",
		UsageText: `patchbay attach NETWORK (--pid PID | --netns PATH|NAME | --stream SOCKET) [OPTION...]

Examples:
   patchbay attach lab --pid $(podman inspect -f '{{.State.Pid}}' web) --name web
   patchbay attach lab --netns blue -p 8080:80        # of ip netns, as root
   patchbay attach lab --stream /tmp/vm.sock          # for qemu -netdev stream`,
		Description: `The interface appears in the namespace with address and route while its programs run, and lives until patchbay detach, or until the namespace ends. A second and third
one are as good as the first; where there is a default route already it stays.`,
		Flags: []cli.Flag{
			&cli.IntFlag{Name: "pid", Usage: "the network namespace of process `PID`"},
			&cli.StringFlag{Name: "netns", Usage: "the network namespace at `PATH`, or that ip netns knows by NAME"},
			&cli.StringFlag{Name: "stream", Usage: "a virtual machine that connects to the unix socket `PATH`, as qemu -netdev stream does"},
			&cli.StringFlag{Name: "name", Usage: "`NAME` that others on the network find it by"},
			&cli.StringSliceFlag{Name: "alias", Usage: "a further `NAME`; several attachments may share it"},
			&cli.StringFlag{Name: "ifname", Usage: "the interface's `NAME` inside (default: the first free ethN)"},
			&cli.StringSliceFlag{Name: "ip", Usage: "its `ADDRESS` on the network"},
			&cli.StringFlag{Name: "mac", Usage: "its `MAC` address"},
			&cli.StringSliceFlag{Name: "publish", Aliases: []string{"p"}, Usage: "publish ports by `SPEC`: [HOSTIP:]HOSTPORT[-END]:PORT[-END][/tcp|/udp]"},
			&cli.StringFlag{Name: "rate", Usage: "take at most `RATE` from it: bytes a second such as 10M, or 100Mbit"},
			&cli.IntFlag{Name: "storm-limit", Usage: "take at most `N` broadcast, multicast and unknown frames a second from it (default: 10000)"},
			&cli.IntFlag{Name: "mac-limit", Usage: "learn at most `N` MACs behind it, with --trust (default: 16)"},
			&cli.BoolFlag{Name: "trust", Usage: "let it send from any MAC and address: for a bridge or router"},
			&cli.IntFlag{Name: "queues", Usage: "`N` TAP queues, each read by its own thread"},
			&cli.StringFlag{Name: "device", Usage: "`KIND` of its interface: tap, packet, auto", Value: "auto"},
		},
	}, true, "NETWORK", networkNames, attachTo)
}

func attachTo(c *cli.Context, client *api.Client) error {
	spec, err := attachmentSpec(c)
	if err != nil {
		return err
	}
	var at api.Attachment
	if spec.Lifetime == api.LifetimeStream {
		at, err = client.AttachStream(c.Context, c.Args().First(), spec)
	} else {
		at, err = attachNamespace(c.Context, client, c.Args().First(), spec)
	}
	if err != nil {
		return err
	}
	for _, n := range at.Notes {
		fmt.Fprintln(os.Stderr, "patchbay: attach: note:", n)
	}
	return show(c, at, func(w io.Writer) {
		if at.Stream == "" {
			fmt.Fprintf(w, "%s on %s: %s %s %s\n", at.Name, at.Network, at.IfName, joined(at.Addrs), at.MAC)
			return
		}
		mac := ""
		if !at.MAC.IsZero() {
			mac = ",mac=" + at.MAC.String()
		}
		fmt.Fprintf(w, "%s on %s: %s, for\nqemu-system-x86_64 … -netdev stream,id=n0,server=off,addr.type=unix,addr.path=%s -device virtio-net-pci,netdev=n0%s\n", at.Name, at.Network, joined(at.Addrs), at.Stream, mac)
	})
}

// attachmentSpec reads the flags of attach.
func attachmentSpec(c *cli.Context) (spec api.AttachmentSpec, err error) {
	places := 0
	for _, f := range []string{"pid", "netns", "stream"} {
		if c.IsSet(f) {
			places++
		}
	}
	if places != 1 {
		return spec, errors.New("give one of --pid, --netns and --stream: what is to be attached")
	}
	spec = api.AttachmentSpec{
		Name: c.String("name"), Aliases: c.StringSlice("alias"), Lifetime: api.LifetimeNamespace, IfName: c.String("ifname"), Publish: c.StringSlice("publish"),
		StormLimit: c.Int("storm-limit"), MACLimit: c.Int("mac-limit"), Trust: c.Bool("trust"), Device: c.String("device"), Queues: c.Int("queues"),
	}
	switch {
	case c.IsSet("pid"):
		if spec.PID = c.Int("pid"); spec.PID <= 0 {
			return spec, fmt.Errorf("--pid: %d is no process id; give one that ps shows", spec.PID)
		}
	case c.IsSet("netns"):
		if spec.NetNS, err = netnsPath(c.String("netns")); err != nil {
			return spec, fmt.Errorf("--netns: %w", err)
		}
	default:
		spec.Lifetime, spec.Device = api.LifetimeStream, ""
		if spec.Stream, err = filepath.Abs(c.String("stream")); err != nil {
			return spec, fmt.Errorf("--stream: %w", err)
		}
	}
	for _, s := range c.StringSlice("ip") {
		a, err := netip.ParseAddr(s)
		if err != nil || a.Zone() != "" {
			return spec, fmt.Errorf("--ip: %.70q is not an address; use one of the network's, such as 10.88.0.7", s)
		}
		spec.Addrs = append(spec.Addrs, a.Unmap())
	}
	if s := c.String("mac"); s != "" {
		if spec.MAC, err = wire.ParseMAC(s); err != nil {
			return spec, fmt.Errorf("--mac: %w", err)
		}
	}
	if s := c.String("rate"); s != "" {
		if spec.Rate, err = parseRate(s); err != nil {
			return spec, fmt.Errorf("--rate: %w", err)
		}
	}
	for _, s := range spec.Publish {
		if _, err := nat.ParseSpec(s); err != nil {
			return spec, fmt.Errorf("--publish: %w", err)
		}
	}
	return spec, spec.Validate()
}

// netnsPath is where the namespace is that a person named.
func netnsPath(ref string) (string, error) {
	if strings.Contains(ref, "/") {
		return filepath.Abs(ref)
	}
	if ref == "" {
		return "", errors.New("the name is empty; see `ip netns list`")
	}
	return filepath.Join(netns.NamedDir, ref), nil
}

// attachNamespace reserves a place on the network, opens the interface inside the namespace and hands it to the node.
func attachNamespace(ctx context.Context, client *api.Client, network string, spec api.AttachmentSpec) (api.Attachment, error) {
	var t *netns.Target
	var err error
	if spec.NetNS != "" {
		t, err = netns.OpenTargetPath(spec.NetNS)
	} else {
		t, err = netns.OpenTarget(spec.PID)
	}
	if err != nil {
		return api.Attachment{}, err
	}
	defer t.Close()
	id, err := t.Identity()
	if err != nil {
		return api.Attachment{}, err
	}
	s, err := client.Attach(ctx, network, spec)
	if err != nil {
		return api.Attachment{}, err
	}
	defer s.Close()
	hs, notes, err := edge.OpenIn(ctx, t, []edge.Interface{s.Plan().Interface})
	if err != nil {
		return api.Attachment{}, errors.Join(err, s.Fail(err.Error()))
	}
	h := hs[0]
	defer h.Close()
	// The interface is the node's from here on, or, if it does not want it, vanishes with h.
	return s.Up(api.Device{Info: h.Info, Notes: notes, PID: spec.PID, Identity: &id, FDs: h.FDs})
}

func detachCommand() *cli.Command {
	return nodeCommand(&cli.Command{
		Name: "detach", Usage: "take an attachment off its network, while its programs run",
		UsageText: "patchbay detach NAME|NETWORK/NAME...\n\nExample:\n   patchbay detach lab/web",
	}, false, "NAME...", attachmentNames, func(c *cli.Context, client *api.Client) error {
		return each(c, func(ref string) error {
			network, name, err := client.Resolve(c.Context, ref)
			if err != nil {
				return err
			}
			return client.Detach(c.Context, network, name)
		})
	})
}

func psCommand() *cli.Command {
	return nodeCommand(&cli.Command{
		Name: "ps", Usage: "list attachments",
		UsageText: "patchbay ps [--network NAME] [-o json]\n\nExample:\n   patchbay ps -o json | jq -r '.[] | select(.state==\"up\") | .name'",
		Flags:     []cli.Flag{&cli.StringFlag{Name: "network", Usage: "those of network `NAME` alone"}},
	}, true, "", nil, func(c *cli.Context, client *api.Client) error {
		as, err := client.Attachments(c.Context, c.String("network"))
		if err != nil {
			return err
		}
		return show(c, as, func(w io.Writer) {
			var rows [][]string
			for _, a := range as {
				rows = append(rows, []string{a.Name, a.Network, joined(a.Addrs), a.MAC.String(), a.IfName, portText(&a), whereText(&a), string(a.State), bytesText(a.Traffic.RxBytes), bytesText(a.Traffic.TxBytes), ago(a.Since)})
			}
			table(w, "NAME NETWORK ADDRESSES MAC INTERFACE PORT WHERE STATE RX TX SINCE", rows)
		})
	})
}

func portText(a *api.Attachment) string {
	if a.Port == 0 {
		return ""
	}
	return fmt.Sprint(a.Port)
}

// whereText is the process, namespace or socket it is behind.
func whereText(a *api.Attachment) string {
	switch {
	case a.Stream != "":
		return a.Stream
	case a.NetNS != "":
		return a.NetNS
	case a.PID != 0:
		return fmt.Sprintf("pid %d", a.PID)
	}
	return ""
}

func inspectCommand() *cli.Command {
	return nodeCommand(&cli.Command{
		Name: "inspect", Usage: "describe an attachment",
		UsageText: "patchbay inspect NAME|NETWORK/NAME [-o json]\n\nExample:\n   patchbay inspect web",
	}, true, "NAME", attachmentNames, func(c *cli.Context, client *api.Client) error {
		a, err := attachmentOf(c.Context, client, c.Args().First())
		if err != nil {
			return err
		}
		return show(c, a, func(w io.Writer) {
			line := func(name, value string) {
				if value != "" {
					fmt.Fprintf(w, "%-10s %s\n", name, value)
				}
			}
			line("name", a.Name)
			line("network", a.Network)
			line("aliases", strings.Join(a.Aliases, ","))
			line("state", string(a.State))
			line("addresses", joined(a.Addrs))
			line("mac", a.MAC.String())
			line("interface", fmt.Sprintf("%s (%s)", a.IfName, a.Device))
			line("port", portText(&a))
			line("where", whereText(&a))
			if a.Holder != 0 {
				line("held by", fmt.Sprintf("pid %d, and ends with it", a.Holder))
			}
			line("since", ago(a.Since)+" ago")
			if !a.Up.IsZero() {
				line("up", ago(a.Up))
			}
			if a.Rate > 0 {
				line("rate", rateText(float64(a.Rate)))
			}
			if a.Trust {
				line("trust", "sends from any MAC and address")
			}
			for _, p := range a.Publish {
				line("published", publishText(&p))
			}
			for _, n := range a.Notes {
				line("note", n)
			}
			fmt.Fprintln(w)
			table(w, portHead, [][]string{portRow(&a.Traffic)})
		})
	})
}

// publishText is a range of published ports with what is wrong with it.
func publishText(p *api.Publish) string {
	s := fmt.Sprintf("%s  (%s, by %s)", p.Spec, p.ID, p.Origin)
	if p.Error != "" {
		s += "  NOT OPEN: " + p.Error
	}
	return s
}
