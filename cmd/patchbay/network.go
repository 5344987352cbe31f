package main

import (
	"fmt"
	"io"
	"net/netip"

	"github.com/urfave/cli/v2"

	"patchbay/internal/api"
	"patchbay/ipam"
)

func networkCommand() *cli.Command {
	create := &cli.Command{
		Name: "create", Usage: "make a network",
		UsageText: `patchbay network create NAME [OPTION...]

Examples:
   patchbay network create lab
   patchbay network create lab --subnet 10.9.0.0/24 --subnet fd09::/64 --isolate
   patchbay network create closed --internal
   patchbay network create mesh --vni 42 --subnet 10.9.0.0/16 --ip-range 10.9.1.0/24     # on the next host 10.9.2.0/24; then patchbay peer add
   patchbay network create vault --vni 43 --seal --wire patchbay                        # wants a daemon with --identity or --psk-file`,
		Flags: []cli.Flag{
			&cli.StringSliceFlag{Name: "subnet", Usage: "the network's `CIDR`, one IPv4 and one IPv6 (default: free ones)"},
			&cli.StringSliceFlag{Name: "gateway", Usage: "the gateway's `IP` in a subnet (default: its first address)"},
			&cli.IntFlag{Name: "mtu", Usage: "`BYTES` of an IP packet, 576 to 65521 (default: 1500; with --vni what the paths to its peers carry)"},
			&cli.BoolFlag{Name: "internal", Usage: "no way out: names and addresses, but no NAT and no published ports"},
			&cli.BoolFlag{Name: "isolate", Usage: "containers reach the gateway alone, never each other"},
			&cli.UintFlag{Name: "vni", Usage: "its `NUMBER` on tunnels between hosts, 1 to 16777215"},
			wireFlag("to peers that name no other (default: vxlan)"),
			&cli.BoolFlag{Name: "seal", Usage: "nothing of it leaves this host unencrypted, and nothing unauthenticated enters"},
			&cli.StringFlag{Name: "group", Usage: "hear what kernels among the peers send to the multicast group `ADDR%IFACE`, such as 239.1.1.1%eth0"},
			&cli.UintFlag{Name: "port", Usage: "UDP `PORT` of its tunnels, here and at its peers (default: the daemon's)"},
			&cli.StringSliceFlag{Name: "ip-range", Usage: "the part of a subnet, in `CIDR` form, that this node hands addresses out of: nodes that share a subnet must not give one twice (default: all)"},
			&cli.StringSliceFlag{Name: "dns", Usage: "ask the resolver at `IP` or IP:PORT instead of the host's"},
			&cli.BoolFlag{Name: "host-loopback", Usage: "let host.patchbay.internal reach the host's 127.0.0.1 and ::1"},
			&cli.BoolFlag{Name: "link-local", Usage: "let containers reach link-local addresses such as 169.254.169.254 (cloud metadata)"},
		},
	}
	return &cli.Command{
		Name: "network", Usage: "make, list, describe and remove networks of the daemon",
		UsageText:    "patchbay network create|ls|inspect|rm\n\nExample:\n   patchbay network create lab --subnet 10.9.0.0/24",
		OnUsageError: usageError,
		Subcommands: []*cli.Command{
			nodeCommand(create, true, "NAME", nil, createNetwork),
			nodeCommand(&cli.Command{
				Name: "ls", Usage: "list networks", UsageText: "patchbay network ls [-o json]\n\nExample:\n   patchbay network ls -o json | jq -r '.[].name'",
			}, true, "", nil, listNetworks),
			nodeCommand(&cli.Command{
				Name: "inspect", Usage: "describe a network: addresses, ports, flows", UsageText: "patchbay network inspect NAME [-o json]\n\nExample:\n   patchbay network inspect default",
			}, true, "NAME", networkNames, inspectNetwork),
			nodeCommand(&cli.Command{
				Name: "rm", Usage: "remove networks that nothing is attached to", UsageText: "patchbay network rm NAME...\n\nExample:\n   patchbay network rm lab",
			}, false, "NAME...", networkNames, func(c *cli.Context, client *api.Client) error {
				return each(c, func(name string) error { return client.RemoveNetwork(c.Context, name) })
			}),
		},
		Action: func(c *cli.Context) error {
			if c.NArg() > 0 {
				return fmt.Errorf("network: %.70q is no command of it; use create, ls, inspect or rm", c.Args().First())
			}
			return cli.ShowSubcommandHelp(c)
		},
	}
}

func createNetwork(c *cli.Context, client *api.Client) error {
	spec := api.NetworkSpec{
		Name: c.Args().First(), MTU: c.Int("mtu"), Internal: c.Bool("internal"), Isolate: c.Bool("isolate"), HostLoopback: c.Bool("host-loopback"), LinkLocal: c.Bool("link-local"),
	}
	if c.IsSet("mtu") && spec.MTU == 0 {
		return fmt.Errorf("--mtu: 0 bytes; use %d to %d", api.MinMTU, api.MaxMTU)
	}
	if v := c.Uint("vni"); v > api.MaxVNI || c.IsSet("vni") && v == 0 {
		return fmt.Errorf("--vni: %d is out of range; take one from 1 to %d", v, api.MaxVNI)
	}
	spec.VNI = uint32(c.Uint("vni"))
	if v := c.Uint("port"); v > 65535 || c.IsSet("port") && v == 0 {
		return fmt.Errorf("--port: %d is out of range; take one from 1 to 65535", v)
	}
	spec.Port, spec.Seal, spec.Group = uint16(c.Uint("port")), c.Bool("seal"), c.String("group")
	var err error
	if spec.Wire, err = parseWire(c); err != nil {
		return err
	}
	for _, s := range c.StringSlice("ip-range") {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return fmt.Errorf("--ip-range: %.70q is no range of addresses; write ADDR/LENGTH, a part of the subnet, such as 10.9.0.64/26", s)
		}
		spec.IPRanges = append(spec.IPRanges, p)
	}
	for _, s := range c.StringSlice("subnet") {
		p, err := ipam.ParseSubnet(s)
		if err != nil {
			return fmt.Errorf("--subnet: %w", err)
		}
		spec.Subnets = append(spec.Subnets, p)
	}
	for _, s := range c.StringSlice("gateway") {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return fmt.Errorf("--gateway: %.70q is not an address; give one inside the subnet, such as 10.9.0.1", s)
		}
		spec.Gateways = append(spec.Gateways, a)
	}
	for _, s := range c.StringSlice("dns") {
		a, err := api.ParseResolver(s)
		if err != nil {
			return fmt.Errorf("--dns: %w", err)
		}
		spec.DNS = append(spec.DNS, a)
	}
	if err := spec.Validate(); err != nil {
		return err
	}
	nw, err := client.CreateNetwork(c.Context, spec)
	if err != nil {
		return err
	}
	return show(c, nw, func(w io.Writer) {
		fmt.Fprintf(w, "%s %s gateway %s\n", nw.Name, joined(nw.Subnets), joined(nw.Gateways))
	})
}

func listNetworks(c *cli.Context, client *api.Client) error {
	nets, err := client.Networks(c.Context)
	if err != nil {
		return err
	}
	return show(c, nets, func(w io.Writer) {
		var rows [][]string
		for _, n := range nets {
			vni := ""
			if n.VNI != 0 {
				vni = fmt.Sprint(n.VNI)
			}
			rows = append(rows, []string{n.Name, joined(n.Subnets), fmt.Sprint(n.MTU), kindText(&n), vni, fmt.Sprint(n.Attachments), fmt.Sprint(n.Flows.TCP + n.Flows.UDP + n.Flows.Ping + n.Flows.Published), ago(n.Created)})
		}
		table(w, "NAME SUBNETS MTU KIND VNI ATTACHMENTS FLOWS CREATED", rows)
	})
}

// kindText is who reaches whom on it, in a word or two.
func kindText(n *api.Network) string {
	switch {
	case n.Internal && n.Isolate:
		return "internal,isolated"
	case n.Internal:
		return "internal"
	case n.Isolate:
		return "isolated"
	}
	return "nat"
}

func inspectNetwork(c *cli.Context, client *api.Client) error {
	n, err := client.Network(c.Context, c.Args().First())
	if err != nil {
		return err
	}
	return show(c, n, func(w io.Writer) {
		fmt.Fprintf(w, "name          %s\nid            %s\nsubnets       %s\ngateway       %s (%s)\nmtu           %d\nkind          %s\n", n.Name, n.ID, joined(n.Subnets), joined(n.Gateways), n.GatewayMAC, n.MTU, kindText(&n))
		if n.VNI != 0 {
			fmt.Fprintf(w, "vni           %d\nwire          %s\nsealed        %s\ntunnel port   %d\n", n.VNI, n.Wire, yesNo(n.Seal), n.Port)
		}
		if n.Group != "" {
			fmt.Fprintf(w, "group         %s\n", n.Group)
		}
		if len(n.IPRanges) > 0 {
			fmt.Fprintf(w, "ip range      %s\n", joined(n.IPRanges))
		}
		if len(n.DNS) > 0 {
			fmt.Fprintf(w, "dns           %s\n", resolvers(n.DNS))
		}
		fmt.Fprintf(w, "host loopback %s\nlink-local    %s\ncreated       %s ago, by %s\nattachments   %d\n", yesNo(n.HostLoopback), yesNo(n.LinkLocal), ago(n.Created), n.Origin, n.Attachments)
		f := n.Flows
		fmt.Fprintf(w, "flows         %d TCP (%d opening), %d UDP, %d ping, %d through %d published ports\n\n", f.TCP, f.TCPOpening, f.UDP, f.Ping, f.Published, f.PublishedPorts)
		var rows [][]string
		for _, p := range n.Ports {
			rows = append(rows, portRow(&p))
		}
		table(w, portHead, rows)
	})
}

const portHead = "PORT RX RX-FRAMES TX TX-FRAMES UNICAST FLOODED DROPPED REFUSED"

// portRow is a port's counters as portHead names them.
func portRow(p *api.Port) []string {
	n := func(v uint64) string { return fmt.Sprint(v) }
	return []string{p.Name, bytesText(p.RxBytes), n(p.RxFrames), bytesText(p.TxBytes), n(p.TxFrames), n(p.Unicast), n(p.Flooded), n(p.Dropped), n(p.TxRefused)}
}
