package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/urfave/cli/v2"

	"patchbay/internal/api"
	"patchbay/internal/wire"
)

func wireFlag(usage string) cli.Flag {
	return &cli.StringFlag{Name: "wire", Usage: "`WIRE` vxlan (what kernels, Open vSwitch and flannel speak) or patchbay (faster, between our own nodes); " + usage}
}

// parseWire reads --wire; not given is the default, whatever that is there.
func parseWire(c *cli.Context) (api.Wire, error) {
	w := api.Wire(c.String("wire"))
	if c.IsSet("wire") && w != api.WireVXLAN && w != api.WirePatchbay {
		return "", fmt.Errorf("--wire: %.70q is not known; use vxlan or patchbay", string(w))
	}
	return w, nil
}

func peerCommand() *cli.Command {
	add := &cli.Command{
		Name: "add", Usage: "let a network go on at the node on another host",
		UsageText: `patchbay peer add NETWORK HOST[:PORT] [OPTION...]

Examples:
   patchbay peer add lab b.example.test
   patchbay peer add lab 192.0.2.7:8472 --wire vxlan
   patchbay peer add lab '[2001:db8::7]' --wire patchbay`,
		Description: `The network needs a VNI, the same on all its nodes; each node has every other one as its peer (full mesh). A name that leads nowhere now is kept and tried again; a name is
looked up again when the peer does not answer. PORT is the UDP port there, by default the network's.`,
		Flags: []cli.Flag{
			wireFlag("default: the network's"),
			&cli.BoolFlag{Name: "no-offload", Usage: "send each datagram by itself (no UDP_SEGMENT), where the kernel's cutting does harm on the way"},
			&cli.BoolFlag{Name: "one-port", Usage: "send from the listening port alone: to a peer behind a NAT, or one that shares its address with another"},
		},
	}
	return &cli.Command{
		Name: "peer", Usage: "join networks of several hosts: add, list and remove the nodes a network goes on at",
		UsageText:    "patchbay peer add|ls|rm|fdb\n\nExample:\n   patchbay peer add lab b.example.test",
		OnUsageError: usageError,
		Subcommands: []*cli.Command{
			nodeCommand(add, true, "NETWORK HOST[:PORT]", tunnelNames, addPeer),
			nodeCommand(&cli.Command{
				Name: "ls", Usage: "list peers and how they are", UsageText: "patchbay peer ls [NETWORK] [-o json]\n\nExample:\n   patchbay peer ls -o json | jq -r '.[] | select(.state == \"down\") | .host'",
				Description: "STATE is waiting (no address yet), new (never heard), heard (a kernel, which answers no probes), handshake, up, or down.",
			}, true, "[NETWORK]", tunnelNames, listPeers),
			nodeCommand(&cli.Command{
				Name: "rm", Usage: "remove a peer, and what was learned of it", UsageText: "patchbay peer rm NETWORK HOST[:PORT]\n\nExample:\n   patchbay peer rm lab b.example.test",
			}, false, "NETWORK HOST[:PORT]", peerNames, func(c *cli.Context, client *api.Client) error {
				ref, err := peerArg(c)
				if err != nil {
					return err
				}
				return client.RemovePeer(c.Context, c.Args().First(), ref)
			}),
			peerFDBCommand(),
		},
		Action: func(c *cli.Context) error {
			if c.NArg() > 0 {
				return fmt.Errorf("peer: %.70q is no command of it; use add, ls, rm or fdb", c.Args().First())
			}
			return cli.ShowSubcommandHelp(c)
		},
	}
}

func peerFDBCommand() *cli.Command {
	change := func(do func(*api.Client, context.Context, string, string, wire.MAC) (api.Peer, error)) func(*cli.Context, *api.Client) error {
		return func(c *cli.Context, client *api.Client) error {
			ref, err := peerArg(c)
			if err != nil {
				return err
			}
			var spec api.FDBSpec
			if err := spec.MAC.UnmarshalText([]byte(c.Args().Get(2))); err != nil {
				return fmt.Errorf("%.70q is no MAC; write one such as 02:00:5e:10:00:01", c.Args().Get(2))
			}
			if err := spec.Validate(); err != nil {
				return err
			}
			_, err = do(client, c.Context, c.Args().First(), ref, spec.MAC)
			return err
		}
	}
	return &cli.Command{
		Name: "fdb", Usage: "say which MACs live behind a peer, where they cannot be learned",
		UsageText:    "patchbay peer fdb add|ls|rm\n\nExample:\n   patchbay peer fdb add lab b.example.test 02:00:5e:10:00:01",
		OnUsageError: usageError,
		Subcommands: []*cli.Command{
			nodeCommand(&cli.Command{
				Name: "add", Usage: "make a static entry", UsageText: "patchbay peer fdb add NETWORK HOST[:PORT] MAC\n\nExample:\n   patchbay peer fdb add lab b.example.test 02:00:5e:10:00:01",
			}, false, "NETWORK HOST[:PORT] MAC", peerNames, change((*api.Client).AddPeerFDB)),
			nodeCommand(&cli.Command{
				Name: "ls", Usage: "list static entries of peers", UsageText: "patchbay peer fdb ls NETWORK [HOST[:PORT]] [-o json]\n\nExample:\n   patchbay peer fdb ls lab",
			}, true, "NETWORK [HOST[:PORT]]", peerNames, listPeerFDB),
			nodeCommand(&cli.Command{
				Name: "rm", Usage: "remove a static entry", UsageText: "patchbay peer fdb rm NETWORK HOST[:PORT] MAC\n\nExample:\n   patchbay peer fdb rm lab b.example.test 02:00:5e:10:00:01",
			}, false, "NETWORK HOST[:PORT] MAC", peerNames, change((*api.Client).RemovePeerFDB)),
		},
		Action: func(c *cli.Context) error {
			if c.NArg() > 0 {
				return fmt.Errorf("peer fdb: %.70q is no command of it; use add, ls or rm", c.Args().First())
			}
			return cli.ShowSubcommandHelp(c)
		},
	}
}

// peerArg is the peer that the second word names.
func peerArg(c *cli.Context) (string, error) {
	host, port, err := api.ParsePeer(c.Args().Get(1))
	return api.PeerRef(host, port), err
}

func addPeer(c *cli.Context, client *api.Client) error {
	host, port, err := api.ParsePeer(c.Args().Get(1))
	if err != nil {
		return err
	}
	w, err := parseWire(c)
	if err != nil {
		return err
	}
	spec := api.PeerSpec{Host: host, Port: port, Wire: w, NoOffload: c.Bool("no-offload"), OnePort: c.Bool("one-port")}
	if err := spec.Validate(); err != nil {
		return err
	}
	p, err := client.AddPeer(c.Context, c.Args().First(), spec)
	if err != nil {
		return err
	}
	if p.Error != "" {
		fmt.Fprintf(os.Stderr, "patchbay: peer add: %s is kept and tried again: %s\n", api.PeerRef(p.Host, p.Port), p.Error)
	}
	return show(c, p, func(w io.Writer) {
		at := "no address yet"
		if p.Address.IsValid() {
			at = p.Address.String()
		}
		fmt.Fprintf(w, "%s %s (%s) over %s\n", p.Network, api.PeerRef(p.Host, p.Port), at, p.Wire)
	})
}

func listPeers(c *cli.Context, client *api.Client) error {
	peers, err := client.Peers(c.Context, c.Args().First())
	if err != nil {
		return err
	}
	return show(c, peers, func(w io.Writer) {
		var rows [][]string
		for _, p := range peers {
			rows = append(rows, peerRow(&p))
		}
		table(w, peerHead, rows)
		for _, p := range peers {
			if p.Error != "" {
				fmt.Fprintf(w, "%s %s: %s\n", p.Network, api.PeerRef(p.Host, p.Port), p.Error)
			}
			if p.SealError != "" {
				fmt.Fprintf(w, "%s %s: handshake: %s\n", p.Network, api.PeerRef(p.Host, p.Port), p.SealError)
			}
		}
	})
}

const peerHead = "NETWORK HOST ADDRESS STATE SINCE RTT LOSS WIRE MODE SEALED OFFLOADS MTU RX RX-FRAMES TX TX-FRAMES DROPS"

// peerRow is a peer as peerHead names it.
func peerRow(p *api.Peer) []string {
	addr, rtt, loss, mtu, sealed := "", "", "", "", "no"
	if p.Address.IsValid() {
		addr = p.Address.String()
	}
	if p.RTT > 0 {
		rtt = time.Duration(p.RTT * float64(time.Second)).Round(10 * time.Microsecond).String()
	}
	if p.State == api.PeerUp || p.State == api.PeerDown {
		loss = fmt.Sprintf("%.1f%%", 100*p.Loss)
	}
	if p.MTU > 0 {
		mtu = fmt.Sprint(p.MTU)
	}
	if p.Sealed {
		sealed = "yes"
	}
	var drops uint64
	for _, d := range p.Drops {
		drops += d.Count
	}
	return []string{
		p.Network, p.Host, addr, string(p.State), ago(p.Since), rtt, loss, string(p.Wire), p.Mode, sealed, p.Offloads, mtu,
		bytesText(p.RxBytes), fmt.Sprint(p.RxFrames), bytesText(p.TxBytes), fmt.Sprint(p.TxFrames), fmt.Sprint(drops),
	}
}

// peerFDB is what `peer fdb ls` lists.
type peerFDB struct {
	Network string   `json:"network"`
	Host    string   `json:"host"`
	Port    uint16   `json:"port"`
	MAC     wire.MAC `json:"mac"`
}

func listPeerFDB(c *cli.Context, client *api.Client) error {
	network := c.Args().First()
	peers, err := client.Peers(c.Context, network)
	if err != nil {
		return err
	}
	host, port := "", uint16(0)
	if c.NArg() > 1 {
		if host, port, err = api.ParsePeer(c.Args().Get(1)); err != nil {
			return err
		}
	}
	list, found := []peerFDB{}, host == ""
	for _, p := range peers {
		if host != "" && (p.Host != host || port != 0 && p.Port != port) {
			continue
		}
		found = true
		for _, m := range p.FDB {
			list = append(list, peerFDB{p.Network, p.Host, p.Port, m})
		}
	}
	if !found {
		return fmt.Errorf("network %q has no peer %q; `patchbay peer ls %s` shows those there are", network, c.Args().Get(1), network)
	}
	return show(c, list, func(w io.Writer) {
		var rows [][]string
		for _, e := range list {
			rows = append(rows, []string{e.MAC.String(), e.Network, api.PeerRef(e.Host, e.Port)})
		}
		table(w, "MAC NETWORK PEER", rows)
	})
}

// tunnelNames completes the networks that can have peers.
func tunnelNames(ctx context.Context, c *api.Client, nth int) (out []string) {
	if nth > 0 {
		return nil
	}
	nets, _ := c.Networks(ctx)
	for _, n := range nets {
		if n.VNI != 0 {
			out = append(out, n.Name)
		}
	}
	return out
}

// peerNames completes a network, and behind it peers.
func peerNames(ctx context.Context, c *api.Client, nth int) (out []string) {
	if nth != 1 {
		return tunnelNames(ctx, c, nth)
	}
	peers, _ := c.Peers(ctx, "")
	for _, p := range peers {
		out = append(out, api.PeerRef(p.Host, p.Port))
	}
	return out
}
