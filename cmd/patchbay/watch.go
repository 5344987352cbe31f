package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"patchbay/frame"
	"patchbay/internal/api"
	"patchbay/nat"
)

func publishCommand() *cli.Command {
	return &cli.Command{
		Name: "publish", Usage: "open and close host ports that lead to an attachment",
		UsageText:    "patchbay publish add|ls|rm\n\nExample:\n   patchbay publish add web 127.0.0.1:8080:80",
		OnUsageError: usageError,
		Subcommands: []*cli.Command{
			nodeCommand(&cli.Command{
				Name: "add", Usage: "publish ports of an attachment",
				UsageText: "patchbay publish add NAME|NETWORK/NAME SPEC\n\nSPEC is [HOSTIP:]HOSTPORT[-END]:PORT[-END][/tcp|/udp].\n\nExample:\n   patchbay publish add web 8080-8089:80",
			}, true, "NAME SPEC", attachmentNames, func(c *cli.Context, client *api.Client) error {
				if _, err := nat.ParseSpec(c.Args().Get(1)); err != nil {
					return err
				}
				network, name, err := client.Resolve(c.Context, c.Args().First())
				if err != nil {
					return err
				}
				p, err := client.AddPublish(c.Context, network, name, api.PublishSpec{Spec: c.Args().Get(1)})
				if err != nil {
					return err
				}
				return show(c, p, func(w io.Writer) { fmt.Fprintln(w, p.ID) })
			}),
			nodeCommand(&cli.Command{
				Name: "ls", Usage: "list published ports", UsageText: "patchbay publish ls [-o json]\n\nExample:\n   patchbay publish ls -o json",
			}, true, "", nil, func(c *cli.Context, client *api.Client) error {
				ps, err := client.Publishes(c.Context)
				if err != nil {
					return err
				}
				return show(c, ps, func(w io.Writer) {
					var rows [][]string
					for _, p := range ps {
						rows = append(rows, []string{p.ID, p.Network, p.Attachment, p.Spec, p.Origin, p.Error})
					}
					table(w, "ID NETWORK ATTACHMENT PORTS BY ERROR", rows)
				})
			}),
			nodeCommand(&cli.Command{
				Name: "rm", Usage: "close published ports", UsageText: "patchbay publish rm ID...\n\nExample:\n   patchbay publish rm 1f0c9a3e",
			}, false, "ID...", publishIDs, func(c *cli.Context, client *api.Client) error {
				return each(c, func(id string) error { return client.RemovePublish(c.Context, id) })
			}),
		},
		Action: func(c *cli.Context) error {
			if c.NArg() > 0 {
				return fmt.Errorf("publish: %.70q is no command of it; use add, ls or rm", c.Args().First())
			}
			return cli.ShowSubcommandHelp(c)
		},
	}
}

func fdbCommand() *cli.Command {
	return nodeCommand(&cli.Command{
		Name: "fdb", Usage: "list the MACs that a network's switch knows", UsageText: "patchbay fdb NETWORK [-o json]\n\nExample:\n   patchbay fdb default",
	}, true, "NETWORK", networkNames, func(c *cli.Context, client *api.Client) error {
		es, err := client.FDB(c.Context, c.Args().First())
		if err != nil {
			return err
		}
		return show(c, es, func(w io.Writer) {
			var rows [][]string
			for _, e := range es {
				kind := "learned"
				if e.Static {
					kind = "static"
				}
				rows = append(rows, []string{e.MAC.String(), e.Port, fmt.Sprintf("%.0fs", e.Age), kind})
			}
			table(w, "MAC PORT AGE KIND", rows)
		})
	})
}

func dropsCommand() *cli.Command {
	return nodeCommand(&cli.Command{
		Name: "drops", Usage: "count the frames that were not delivered, by reason",
		UsageText: "patchbay drops [NETWORK] [--all] [-o json]\n\nExample:\n   patchbay drops default --all",
		Flags:     []cli.Flag{&cli.BoolFlag{Name: "all", Usage: "every reason there is, also those that never occurred"}},
	}, true, "[NETWORK]", networkNames, func(c *cli.Context, client *api.Client) error {
		ds, err := client.Drops(c.Context, c.Args().First())
		if err != nil {
			return err
		}
		if c.Bool("all") {
			if ds, err = everyReason(c, client, ds); err != nil {
				return err
			}
		}
		return show(c, ds, func(w io.Writer) {
			var rows [][]string
			for _, d := range ds {
				rows = append(rows, []string{d.Network, d.Reason, fmt.Sprint(d.Count), d.Meaning})
			}
			table(w, "NETWORK REASON COUNT MEANING", rows)
		})
	})
}

// everyReason adds the reasons that have not occurred.
func everyReason(c *cli.Context, client *api.Client, ds []api.DropCount) ([]api.DropCount, error) {
	names := []string{c.Args().First()}
	if names[0] == "" {
		nets, err := client.Networks(c.Context)
		if err != nil {
			return nil, err
		}
		names = nil
		for _, n := range nets {
			names = append(names, n.Name)
		}
	}
	have := make(map[[2]string]uint64, len(ds))
	for _, d := range ds {
		have[[2]string{d.Network, d.Reason}] = d.Count
	}
	ds = nil
	for _, n := range names {
		for r := range frame.Drop(frame.NumDrops) {
			ds = append(ds, api.DropCount{Network: n, Reason: r.String(), Count: have[[2]string{n, r.String()}], Meaning: r.Meaning()})
		}
	}
	return ds, nil
}

func captureCommand() *cli.Command {
	return nodeCommand(&cli.Command{
		Name: "capture", Usage: "record the frames of a network or an attachment as pcapng",
		UsageText: `patchbay capture NETWORK|NAME|NETWORK/NAME [-w FILE|-] [--filter EXPR] [OPTION...]

Examples:
   patchbay capture lab -w lab.pcapng --filter 'tcp port 80'
   patchbay capture web | wireshark -k -i -
   patchbay capture lab/web -w - | tcpdump -nr -`,
		Description: `A frame is recorded where it enters the switch. One that was dropped has the reason as its comment. A name that is a network's and an attachment's too means the network.`,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "write", Aliases: []string{"w"}, Usage: "`FILE` to write, - for standard output", Value: "-"},
			&cli.StringFlag{Name: "filter", Usage: "`EXPR` as tcpdump takes it"},
			&cli.IntFlag{Name: "snaplen", Usage: "keep `BYTES` of each frame (default: all)"},
			&cli.IntFlag{Name: "count", Usage: "end after `N` frames"},
		},
	}, false, "NAME", bothNames, runCapture)
}

func runCapture(c *cli.Context, client *api.Client) error {
	for _, f := range []string{"snaplen", "count"} {
		if c.IsSet(f) && c.Int(f) < 1 {
			return fmt.Errorf("--%s: %d is too few; use 1 or more", f, c.Int(f))
		}
	}
	file := c.String("write")
	if _, err := unix.IoctlGetTermios(int(os.Stdout.Fd()), unix.TCGETS); err == nil && file == "-" {
		return errors.New("standard output is a terminal, and pcapng is not for reading; give -w FILE, or a pipe: | tcpdump -nr -")
	}
	if file == "" {
		return errors.New("--write: the path is empty; name a file, or - for standard output")
	}
	spec := api.CaptureSpec{Filter: c.String("filter"), SnapLen: c.Int("snaplen"), Count: c.Int("count")}
	ref := c.Args().First()
	network := ref
	if _, err := client.Network(c.Context, ref); err != nil {
		if api.CodeOf(err) != api.CodeNotFound && api.CodeOf(err) != api.CodeInvalid {
			return err
		}
		var rerr error
		if network, spec.Attachment, rerr = client.Resolve(c.Context, ref); rerr != nil {
			if api.CodeOf(rerr) != api.CodeNotFound && api.CodeOf(rerr) != api.CodeInvalid {
				return rerr // on two networks, for instance
			}
			return fmt.Errorf("%.70q is neither a network nor an attachment; `patchbay network ls` and `patchbay ps` show those there are", ref)
		}
	}
	ctx, stop := signal.NotifyContext(c.Context, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	body, err := client.Capture(ctx, network, spec)
	if err != nil {
		return err
	}
	defer body.Close()
	out := os.Stdout
	if file != "-" {
		// Not before the node has agreed: a file that is there already stays whole when the filter is none.
		if out, err = os.Create(file); err != nil {
			return fmt.Errorf("--write: %w; name a file that you may write", err)
		}
		defer out.Close()
	}
	began := time.Now()
	n, err := io.Copy(out, body)
	if errors.Is(err, syscall.EPIPE) || ctx.Err() != nil {
		err = nil // the reader, or the person, has had enough
	}
	if out != os.Stdout {
		if serr := out.Sync(); !errors.Is(serr, syscall.EINVAL) { // a pipe or device has nothing to wait for
			err = errors.Join(err, serr)
		}
		fmt.Fprintf(os.Stderr, "patchbay: capture: %s in %s written to %s\n", bytesText(uint64(n)), time.Since(began).Round(time.Millisecond), out.Name())
	}
	return err
}
