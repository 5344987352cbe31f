package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"patchbay/internal/api"
)

// each does something for every word of the command line, and goes on with the next when it fails: one that is not there should not keep the others. Each failure is a line on standard error, the
// last of them the command's own.
func each(c *cli.Context, do func(word string) error) (last error) {
	for _, word := range c.Args().Slice() {
		err := do(word)
		if err == nil {
			continue
		}
		if last != nil {
			fmt.Fprintf(os.Stderr, "patchbay: %s: %v\n", strings.TrimPrefix(c.Command.HelpName, "patchbay "), last)
		}
		last = err
	}
	return last
}

// nodeCommand is a command that talks to the node: it has --socket and, when lists says so, --output; the words behind it are called as words says, and its errors begin with
// its name. complete lists what the next word may be.
func nodeCommand(cmd *cli.Command, lists bool, words string, complete func(ctx context.Context, c *api.Client, nth int) []string, action func(c *cli.Context, client *api.Client) error) *cli.Command {
	cmd.OnUsageError = usageError
	cmd.Flags = append(cmd.Flags, socketFlag())
	if lists {
		cmd.Flags = append(cmd.Flags, outputFlag())
	}
	cmd.BashComplete = func(c *cli.Context) {
		var names []string
		word := lastWord()
		complete := complete
		switch word { // a flag whose value comes next
		case "-o", "--output":
			complete, word = func(context.Context, *api.Client, int) []string { return []string{"text", "json"} }, ""
		case "--wire":
			complete, word = func(context.Context, *api.Client, int) []string { return []string{"vxlan", "patchbay"} }, ""
		case "--network":
			complete, word = networkNames, ""
		}
		if client, err := clientFor(c); err == nil && complete != nil && !strings.HasPrefix(word, "-") {
			ctx, cancel := context.WithTimeout(c.Context, time.Second)
			defer cancel()
			nth := c.NArg()
			if strings.HasSuffix(words, "...") {
				nth = 0 // each word is as the first
			}
			names = complete(ctx, client, nth)
		}
		if len(names) == 0 {
			for _, f := range cmd.Flags {
				names = append(names, "--"+f.Names()[0])
			}
		}
		for _, w := range names {
			fmt.Fprintln(c.App.Writer, w)
		}
	}
	cmd.Action = func(c *cli.Context) error {
		err := checkWords(c, words)
		if err == nil && lists {
			err = checkOutput(c) // before something is made that could not be shown
		}
		if err == nil {
			var client *api.Client
			if client, err = clientFor(c); err == nil {
				err = action(c, client)
			}
		}
		var status exitStatus
		if err == nil || errors.As(err, &status) {
			return err
		}
		return fmt.Errorf("%s: %w", strings.TrimPrefix(c.Command.HelpName, "patchbay "), err)
	}
	return cmd
}

// lastWord is the one before what is to be completed; where that may become a flag, it is that, since the shells' scripts hand it over.
func lastWord() string {
	if n := len(os.Args); n > 1 {
		return os.Args[n-2]
	}
	return ""
}

func clientFor(c *cli.Context) (*api.Client, error) {
	path, err := socketPath(c)
	if err != nil {
		return nil, err
	}
	return api.NewClient(path), nil
}

// checkWords compares what was given with what is wanted, such as "NETWORK", "NAME SPEC", "[NETWORK]" or "NAME...".
func checkWords(c *cli.Context, words string) error {
	want := strings.Fields(words)
	least, most := len(want), len(want)
	if n := len(want); n > 0 {
		switch last := want[n-1]; {
		case strings.HasSuffix(last, "..."):
			most = 1 << 20
		case strings.HasPrefix(last, "["):
			least--
		}
	}
	switch n := c.NArg(); {
	case n < least:
		return fmt.Errorf("%s is missing; see patchbay %s --help", want[n], strings.TrimPrefix(c.Command.HelpName, "patchbay "))
	case n > most:
		return fmt.Errorf("%.70q is a word too many; see patchbay %s --help", c.Args().Get(most), strings.TrimPrefix(c.Command.HelpName, "patchbay "))
	}
	for i := range c.NArg() {
		if len(c.Args().Get(i)) == 0 {
			return fmt.Errorf("word %d is empty; see patchbay %s --help", i+1, strings.TrimPrefix(c.Command.HelpName, "patchbay "))
		}
	}
	return nil
}

// attachmentOf finds the attachment that the command line names NAME or NETWORK/NAME.
func attachmentOf(ctx context.Context, client *api.Client, ref string) (api.Attachment, error) {
	network, name, err := client.Resolve(ctx, ref)
	if err != nil {
		return api.Attachment{}, err
	}
	return client.Attachment(ctx, network, name)
}

// Completions. A node that does not answer completes nothing.

func networkNames(ctx context.Context, c *api.Client, nth int) (out []string) {
	if nth > 0 {
		return nil
	}
	nets, _ := c.Networks(ctx)
	for _, n := range nets {
		out = append(out, n.Name)
	}
	return out
}

func attachmentNames(ctx context.Context, c *api.Client, nth int) (out []string) {
	if nth > 0 {
		return nil
	}
	as, _ := c.Attachments(ctx, "")
	seen := map[string]int{}
	for _, a := range as {
		seen[a.Name]++
	}
	for _, a := range as {
		if seen[a.Name] > 1 {
			out = append(out, a.Network+"/"+a.Name)
		} else {
			out = append(out, a.Name)
		}
	}
	return out
}

func bothNames(ctx context.Context, c *api.Client, nth int) []string {
	return append(networkNames(ctx, c, nth), attachmentNames(ctx, c, nth)...)
}

func publishIDs(ctx context.Context, c *api.Client, _ int) (out []string) {
	ps, _ := c.Publishes(ctx)
	for _, p := range ps {
		out = append(out, p.ID)
	}
	return out
}
