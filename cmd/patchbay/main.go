// Command patchbay gives containers a network without root. This package holds flags and wiring only; the work is done by the
// packages below it, assembled in internal/node.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"patchbay/internal/api"
	"patchbay/internal/edge"
)

// version is set by the Makefile.
var version = "unknown"

// Exit statuses of patchbay's own failures, as container tools use them. 126 and 127 come from the edge process.
const exitOwnFailure = 125

// commandLines are the commands behind which another command line stands, which is not ours to reorder.
var commandLines = []string{"run", "load", "bench", "demo"}

func main() {
	// The re-exec'd process inside a container's namespaces never comes back from here.
	edge.Main()
	app := newApp()
	bg := openBackground()
	app.Metadata = map[string]any{backgroundKey: bg}
	if err := app.Run(flagsFirst(app, os.Args, commandLines...)); err != nil {
		os.Exit(report(err, bg))
	}
}

func newApp() *cli.App {
	return &cli.App{
		Name:                      "patchbay",
		Usage:                     "a network for containers, without root",
		UsageText:                 "patchbay COMMAND [OPTION...]\n\nExample:\n   patchbay run -p 8080:80 -- ./server",
		Version:                   version,
		EnableBashCompletion:      true,
		DisableSliceFlagSeparator: true, // a comma inside -p or --dns is the value's, not ours
		UseShortOptionHandling:    false,
		Suggest:                   true,
		ExitErrHandler:            func(*cli.Context, error) {}, // main reports, once
		OnUsageError:              usageError,
		CommandNotFound: func(c *cli.Context, name string) {
			fmt.Fprintf(os.Stderr, "patchbay: %q is not a command; see patchbay --help\n", name)
			os.Exit(exitOwnFailure)
		},
		Commands: []*cli.Command{
			runCommand(), podCommand(), daemonCommand(), networkCommand(), peerCommand(), attachCommand(), detachCommand(), psCommand(), inspectCommand(), publishCommand(),
			fdbCommand(), dropsCommand(), captureCommand(), topCommand(), caCommand(),
			demoCommand(), loadCommand(), benchCommand(), doctorCommand(), doctorInside(), versionCommand(), completionCommand(),
		},
	}
}

// usageError is one line, and not the whole help behind an error that scrolls away.
func usageError(c *cli.Context, err error, _ bool) error {
	name := "patchbay"
	// HelpName is "patchbay network ls" where Name is "ls" alone. The App's own is its name.
	if c.Command != nil && strings.HasPrefix(c.Command.HelpName, "patchbay ") {
		name = c.Command.HelpName
	}
	if sub, ok := strings.CutPrefix(name, "patchbay "); ok {
		err = fmt.Errorf("%s: %w", sub, err)
	}
	return fmt.Errorf("%w; see %s --help", err, name)
}

// exitStatus is an error that has been reported, or needs no report, and carries the status to end with.
type exitStatus int

func (e exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// noArgs refuses words that a command has no use for, so that a typing error is not taken for consent.
func noArgs(c *cli.Context) error {
	if c.NArg() > 0 {
		return fmt.Errorf("%s: takes no argument, and was given %q; see patchbay %s --help", c.Command.Name, c.Args().First(), c.Command.Name)
	}
	return nil
}

// report prints err as one line and returns the status to end with.
func report(err error, bg *detachedEnd) int {
	var status exitStatus
	if errors.As(err, &status) {
		return int(status)
	}
	msg := strings.ReplaceAll(strings.TrimSpace(err.Error()), "\n", "; ")
	bg.failed("patchbay: " + msg)
	fmt.Fprintln(os.Stderr, "patchbay: "+msg)
	var edgeErr *edge.Error
	if errors.As(err, &edgeErr) {
		return edgeErr.Status
	}
	return exitOwnFailure
}

func versionCommand() *cli.Command {
	return &cli.Command{
		Name: "version", Usage: "print the version, and that of the daemon that runs",
		UsageText:    "patchbay version [-o json]\n\nExample:\n   patchbay version -o json | jq -r .version",
		OnUsageError: usageError,
		Before:       noArgs,
		Flags:        []cli.Flag{socketFlag(), outputFlag()},
		Action: func(c *cli.Context) error {
			v := struct {
				Version string    `json:"version"`
				Daemon  *api.Info `json:"daemon,omitempty"`
			}{Version: version}
			// A daemon that does not answer is no error here: most people who ask have none, and some not even a place for its socket.
			if path, err := socketPath(c); err == nil {
				ctx, cancel := context.WithTimeout(c.Context, time.Second)
				defer cancel()
				if info, err := api.NewClient(path).Info(ctx); err == nil {
					v.Daemon = &info
				} else if !errors.Is(err, api.ErrNoNode) || c.IsSet("socket") {
					fmt.Fprintln(os.Stderr, "patchbay: version: note:", err)
				}
			}
			if v.Daemon != nil && v.Daemon.Version != version {
				fmt.Fprintf(os.Stderr, "patchbay: version: note: the daemon (pid %d) is version %s; patchbay daemon --takeover replaces it under traffic\n", v.Daemon.PID, v.Daemon.Version)
			}
			err := show(c, v, func(w io.Writer) {
				fmt.Fprintln(w, "patchbay", version)
				if v.Daemon != nil {
					fmt.Fprintf(w, "daemon   %s (pid %d, since %s)\n", v.Daemon.Version, v.Daemon.PID, ago(v.Daemon.Started))
				}
			})
			if err != nil {
				return fmt.Errorf("version: %w", err)
			}
			return nil
		},
	}
}
