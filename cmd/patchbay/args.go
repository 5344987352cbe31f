package main

import (
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

// completing is what the shells' scripts append; it has to stay last.
const completing = "--generate-bash-completion"

// flagsFirst puts the flags of a command before its names, as urfave/cli wants them, so that people may write them where they like. Commands that have a command line behind
// their own, those in keep, are left alone: what stands there is not ours. So is what follows "--".
func flagsFirst(app *cli.App, args []string, keep ...string) []string {
	if len(args) < 2 || strings.HasPrefix(args[1], "-") || slices.Contains(keep, args[1]) {
		return args
	}
	cmd := app.Command(args[1])
	if cmd == nil {
		return args
	}
	at := 2
	for at < len(args) {
		sub := subcommand(cmd, args[at])
		if sub == nil {
			break
		}
		cmd, at = sub, at+1
	}
	rest := args[at:]
	var last []string
	if n := len(rest); n > 0 && rest[n-1] == completing {
		rest, last = rest[:n-1], rest[n-1:]
	}
	var flags, names []string
	for i := 0; i < len(rest); i++ {
		a := rest[i]
		if a == "--" {
			names = append(names, rest[i:]...)
			break
		}
		if len(a) < 2 || a[0] != '-' {
			names = append(names, a)
			continue
		}
		if name := strings.TrimLeft(a, "-"); name == "help" || name == "h" {
			// With a name behind it, urfave/cli takes that for the command to explain.
			return slices.Concat(args[:at], []string{a}, last)
		}
		flags = append(flags, a)
		if !strings.Contains(a, "=") && takesValue(cmd, strings.TrimLeft(a, "-")) && i+1 < len(rest) {
			i++
			flags = append(flags, rest[i])
		}
	}
	return slices.Concat(args[:at], flags, names, last)
}

func subcommand(cmd *cli.Command, name string) *cli.Command {
	for _, s := range cmd.Subcommands {
		if s.HasName(name) {
			return s
		}
	}
	return nil
}

// takesValue reports whether the flag of that name has its value in the next word. One that cmd does not have takes none; it is refused anyway.
func takesValue(cmd *cli.Command, name string) bool {
	for _, f := range cmd.Flags {
		if slices.Contains(f.Names(), name) {
			_, isBool := f.(*cli.BoolFlag)
			return !isBool
		}
	}
	return false
}
