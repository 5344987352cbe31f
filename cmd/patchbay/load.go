package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os/signal"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"patchbay/bench/load"
)

// loadCommand is the generator on the command line: what the demo starts inside its containers, and what a user measures a path with
// where iperf3 is not at hand.
func loadCommand() *cli.Command {
	return &cli.Command{
		Name:         "load",
		Usage:        "traffic generator: serve on one side, measure from the other",
		UsageText:    "patchbay load serve [ADDR:PORT]\npatchbay load stream|flood|rr|crr [OPTION...] ADDR:PORT\n\nExample:\n   patchbay load serve :7070 &\n   patchbay load stream --time 5s 127.0.0.1:7070",
		OnUsageError: usageError,
		Subcommands: []*cli.Command{
			{
				Name: "serve", Usage: "answer every measurement on one TCP and UDP port (the port above it greets first)", ArgsUsage: "[ADDR:PORT]",
				OnUsageError: usageError,
				Action: func(c *cli.Context) error {
					addr := c.Args().First()
					if addr == "" {
						addr = ":7070"
					}
					ctx, stop := signal.NotifyContext(c.Context, unix.SIGINT, unix.SIGTERM)
					defer stop()
					return load.Run(ctx, addr)
				},
			},
			measurement("stream", "TCP throughput", load.Stream),
			measurement("flood", "UDP datagrams delivered", load.Flood),
			measurement("rr", "request and response over one connection", load.RequestResponse),
			measurement("crr", "connect, request, response, close", load.ConnectRequestClose),
		},
	}
}

func measurement(name, usage string, run func(context.Context, load.Config) (load.Result, error)) *cli.Command {
	return &cli.Command{
		Name: name, Usage: "measure " + usage, ArgsUsage: "ADDR:PORT",
		OnUsageError: usageError,
		Flags: []cli.Flag{
			&cli.DurationFlag{Name: "time", Usage: "how `LONG`", Value: 2 * time.Second},
			&cli.IntFlag{Name: "count", Usage: "rr, crr: stop after `N` requests in all"},
			&cli.IntFlag{Name: "streams", Usage: "`N` side by side", Value: 1},
			&cli.IntFlag{Name: "size", Usage: "`BYTES` a write or datagram"},
			&cli.IntFlag{Name: "rate", Usage: "flood: `N` datagrams a second; 0 is flat out"},
			&cli.BoolFlag{Name: "reverse", Aliases: []string{"R"}, Usage: "stream, flood: from the server to here"},
			&cli.BoolFlag{Name: "udp", Usage: "rr: over UDP"},
			&cli.BoolFlag{Name: "greeting", Usage: "crr: the server speaks first"},
			&cli.StringFlag{Name: "output", Aliases: []string{"o"}, Usage: "`FORMAT` text or json", Value: "text"},
		},
		Action: func(c *cli.Context) error {
			if c.NArg() != 1 {
				return fmt.Errorf("load %s: want one ADDR:PORT, such as 10.88.0.2:7070", name)
			}
			ctx, stop := signal.NotifyContext(c.Context, unix.SIGINT, unix.SIGTERM)
			defer stop()
			cfg := load.Config{
				Addr: c.Args().First(), Duration: c.Duration("time"), Count: c.Int("count"), Streams: c.Int("streams"), Size: c.Int("size"),
				Rate: c.Int("rate"), Reverse: c.Bool("reverse"), Greeting: c.Bool("greeting"),
			}
			if c.Bool("udp") {
				cfg.Network = "udp"
			}
			res, err := run(ctx, cfg)
			if err != nil {
				return fmt.Errorf("load %s: %w", name, err)
			}
			switch c.String("output") {
			case "json":
				return json.NewEncoder(c.App.Writer).Encode(res)
			case "text":
				fmt.Fprintln(c.App.Writer, describe(name, res))
				return nil
			}
			return fmt.Errorf("load %s: output format %q is not known; use text or json", name, c.String("output"))
		},
	}
}

// describe is a result as one line.
func describe(name string, r load.Result) string {
	us := func(d time.Duration) int64 { return d.Microseconds() }
	switch name {
	case "stream":
		return fmt.Sprintf("%.2f Gbit/s", r.BitsPerSecond()/1e9)
	case "flood":
		return fmt.Sprintf("%.0f datagrams/s delivered, %.2f Gbit/s, %d of %d arrived", r.PacketsPerSecond(), r.BitsPerSecond()/1e9, r.Received, r.Sent)
	}
	s := fmt.Sprintf("%.0f/s, p50 %d µs, p99 %d µs, max %d µs", r.OpsPerSecond(), us(r.P50), us(r.P99), us(r.Max))
	if r.Errors > 0 {
		s += fmt.Sprintf(", %d failed (%s)", r.Errors, r.FirstErr)
	}
	return s
}
