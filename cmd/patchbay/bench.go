package main

import (
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"patchbay/bench"
)

// benchCommand measures patchbay beside the kernel and its peers.
func benchCommand() *cli.Command {
	return &cli.Command{
		Name:         "bench",
		Usage:        "measure against the kernel and the peers, side by side, on this machine",
		UsageText:    "patchbay bench [OPTION...] [switch|nat|publish|tunnel|scale|all]\n\nA scenario is measured in all its variants; " + strings.Join(bench.Variants(), ", ") + " name one of them.\n\nExample:\n   patchbay bench nat --peers patchbay,pasta --rounds 1 --time 2s\n   patchbay bench nat@rtt10",
		OnUsageError: usageError,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "peers", Usage: "`LIST` of names such as pasta or pasta@65520, or auto for all of them; the kernel is always measured", Value: "auto"},
			&cli.IntFlag{Name: "rounds", Usage: "measure every contender `N` times, in turn", Value: 3},
			&cli.DurationFlag{Name: "time", Usage: "how `LONG` each measurement takes", Value: 5 * time.Second},
			&cli.StringFlag{
				Name: "congestion", DefaultText: "cubic, or reno where there is no cubic",
				Usage: "have TCP use congestion control `NAME`, the same for every contender; machine leaves what this machine has, and with BBR that is measured and not the path",
			},
			&cli.StringFlag{Name: "report", Usage: "write rows as JSON lines, and the report as Markdown and as one HTML page with plots, into `DIR`"},
		},
		Action: func(c *cli.Context) error {
			if err := runBench(c); err != nil {
				return fmt.Errorf("bench: %w", err)
			}
			return nil
		},
		Subcommands: []*cli.Command{
			{Name: "inner", Hidden: true, SkipFlagParsing: true, Action: func(c *cli.Context) error { return bench.Inner(c.Context, c.Args().Slice()) }},
		},
	}
}

func runBench(c *cli.Context) error {
	args, err := flagsAnywhere(c)
	if err != nil {
		return err
	}
	cfg := bench.Config{
		Peers: c.String("peers"), Rounds: c.Int("rounds"), Time: c.Duration("time"), Congestion: c.String("congestion"), Report: c.String("report"), Commit: commit(),
		Out: c.App.Writer, Progress: os.Stderr,
	}
	for _, a := range args {
		if a == "all" {
			cfg.Scenarios = bench.Scenarios()
		} else if !slices.Contains(cfg.Scenarios, a) {
			cfg.Scenarios = append(cfg.Scenarios, a)
		}
	}
	if _, err := unix.IoctlGetTermios(int(os.Stderr.Fd()), unix.TCGETS); err == nil {
		cfg.Live = true
	}
	ctx, stop := signal.NotifyContext(c.Context, unix.SIGINT, unix.SIGTERM)
	defer stop()
	_, err = bench.Run(ctx, cfg)
	return err
}

// flagsAnywhere takes flags after the scenario too, which the flag package leaves among the arguments.
func flagsAnywhere(c *cli.Context) ([]string, error) {
	var names []string
	args := c.Args().Slice()
	for i := 0; i < len(args); i++ {
		name := args[i]
		if len(name) < 2 || name[0] != '-' {
			names = append(names, name)
			continue
		}
		flag, value, has := strings.Cut(strings.TrimLeft(name, "-"), "=")
		if !has {
			if i++; i == len(args) {
				return nil, fmt.Errorf("%s wants a value", name)
			}
			value = args[i]
		}
		if err := c.Set(flag, value); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	return names, nil
}

// commit is the version, or the revision that go build noted where the Makefile has not set one.
func commit() string {
	info, ok := debug.ReadBuildInfo()
	if version != "unknown" || !ok {
		return version
	}
	out := version
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision":
			out = s.Value[:min(len(s.Value), 12)]
		case s.Key == "vcs.modified" && s.Value == "true":
			out += "-dirty"
		}
	}
	return out
}
