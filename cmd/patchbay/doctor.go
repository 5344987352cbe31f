package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"

	"github.com/urfave/cli/v2"

	"patchbay/internal/kernel"
)

// probeArg is what this binary is started with again, inside namespaces, to try what needs them.
const probeArg = "doctor-inside"

func doctorCommand() *cli.Command {
	return &cli.Command{
		Name:  "doctor",
		Usage: "check what this machine lets an ordinary user do, each failure with its remedy",
		UsageText: `patchbay doctor [-o text|json]

Example:
   patchbay doctor -o json | jq '.[] | select(.ok | not)'`,
		Description: "Every check tries the thing itself and leaves nothing behind. The exit status is 1 when something is missing that `patchbay run` needs. Where a daemon answers, the tunnels of its " +
			"networks are looked at too: whether the peers are there, and whether what a network takes for its MTU gets to them.",
		OnUsageError: usageError,
		Before:       noArgs,
		Flags:        []cli.Flag{socketFlag(), &cli.StringFlag{Name: "output", Aliases: []string{"o"}, Usage: "`FORMAT` text or json", Value: "text"}},
		Action: func(c *cli.Context) error {
			format := c.String("output")
			if format != "text" && format != "json" {
				return fmt.Errorf("doctor: output format %q is not known; use text or json", format)
			}
			results := kernel.All(kernel.Config{Child: func() *exec.Cmd { return exec.Command("/proc/self/exe", probeArg) }})
			if client, err := clientFor(c); err == nil {
				results = append(results, tunnelResults(c.Context, client)...)
			}
			if format == "json" {
				enc := json.NewEncoder(c.App.Writer)
				enc.SetIndent("", "  ")
				if err := enc.Encode(results); err != nil {
					return err
				}
			} else {
				printResults(c, results)
			}
			interfaces := 0 // ways to give a container an interface; one is enough
			for _, r := range results {
				if r.Required && !r.OK {
					return exitStatus(1)
				}
				if r.OK && (r.Name == "tap" || r.Name == "packet-device") {
					interfaces++
				}
			}
			if interfaces == 0 {
				return exitStatus(1)
			}
			return nil
		},
	}
}

func printResults(c *cli.Context, results []kernel.Result) {
	for _, r := range results {
		mark := "ok  "
		switch {
		case !r.OK && r.Required:
			mark = "FAIL"
		case !r.OK:
			mark = "-   "
		}
		fmt.Fprintf(c.App.Writer, "%s  %-18s %s\n", mark, r.Name, r.Detail)
		if !r.OK && r.Remedy != "" {
			fmt.Fprintf(c.App.Writer, "      %-18s remedy: %s\n", "", r.Remedy)
		}
	}
}

// doctorInside is the second start of this binary, inside namespaces. Hidden, as it makes sense nowhere else.
func doctorInside() *cli.Command {
	return &cli.Command{Name: probeArg, Hidden: true, Action: func(*cli.Context) error { return kernel.Inside(os.Stdout) }}
}
