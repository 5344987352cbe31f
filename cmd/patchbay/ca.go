package main

import (
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"patchbay/internal/api"
	"patchbay/internal/ca"
	"patchbay/tunnel/secure"
)

func caCommand() *cli.Command {
	return &cli.Command{
		Name: "ca", Usage: "issue the certificates of sealed networks",
		UsageText: `patchbay ca init|issue|show

A sealed network's nodes know each other by certificates of one CA. Keep the CA's directory on one machine; each node needs three files of it: its own certificate and key, and ca.crt.
A key file that all nodes share (patchbay daemon --psk-file) is the simple alternative.

Example:
   patchbay ca init ~/mesh-ca
   patchbay ca issue ~/mesh-ca host1.example.net --network lab
   patchbay daemon --identity ~/mesh-ca/host1.example.net.crt,~/mesh-ca/host1.example.net.key,~/mesh-ca/ca.crt`,
		OnUsageError: usageError,
		Subcommands: []*cli.Command{
			fileCommand(&cli.Command{
				Name: "init", Usage: "make a CA in a directory",
				UsageText: "patchbay ca init DIR [OPTION...]\n\nIt writes DIR/ca.crt, which every node gets, and DIR/ca.key, which none does.\n\nExample:\n   patchbay ca init ~/mesh-ca",
				Flags: []cli.Flag{
					&cli.IntFlag{Name: "days", Usage: "`NUMBER` of days that it is valid", Value: ca.DefaultCADays},
					&cli.BoolFlag{Name: "force", Usage: "replace the CA that is there; what it has issued then is worthless"},
				},
			}, "DIR", caInit),
			fileCommand(&cli.Command{
				Name: "issue", Usage: "issue a certificate to a host",
				UsageText: `patchbay ca issue DIR HOSTNAME [OPTION...]

HOSTNAME is what the other nodes name the host by in "patchbay peer add": a DNS name or an IP address. It writes DIR/HOSTNAME.crt and DIR/HOSTNAME.key.
Without --network the certificate is good for all networks.

Examples:
   patchbay ca issue ~/mesh-ca host1.example.net
   patchbay ca issue ~/mesh-ca host2.example.net --network lab --network prod --san 192.0.2.7 --days 90`,
				Flags: []cli.Flag{
					&cli.StringSliceFlag{Name: "network", Usage: "let the host join the network of that `NAME`, and others only if named, too"},
					&cli.StringSliceFlag{Name: "san", Usage: "another `NAME` or IP address that nodes may name the host by"},
					&cli.IntFlag{Name: "days", Usage: "`NUMBER` of days that it is valid, at most as long as the CA", Value: ca.DefaultLeafDays},
					&cli.BoolFlag{Name: "force", Usage: "replace the host's certificate and key that are there"},
				},
			}, "DIR HOSTNAME", caIssue),
			fileCommand(&cli.Command{
				Name: "show", Usage: "describe a certificate: hosts, networks, how long it is valid",
				UsageText: "patchbay ca show FILE [-o json]\n\nExamples:\n   patchbay ca show ~/mesh-ca/host1.example.net.crt\n   patchbay ca show ~/mesh-ca/ca.crt -o json | jq '.[0].daysLeft'",
				Flags:     []cli.Flag{outputFlag()},
			}, "FILE", caShow),
		},
		Action: func(c *cli.Context) error {
			if c.NArg() > 0 {
				return fmt.Errorf("ca: %.70q is no command of it; use init, issue or show", c.Args().First())
			}
			return cli.ShowSubcommandHelp(c)
		},
	}
}

// fileCommand is a command that works on files alone and asks no node; the words behind it are called as words says, and its errors begin with its name.
func fileCommand(cmd *cli.Command, words string, action func(c *cli.Context) error) *cli.Command {
	cmd.OnUsageError = usageError
	cmd.BashComplete = func(c *cli.Context) {
		// Files are the shell's to complete, and it does where nothing is offered; a flag it asks for begins with a hyphen.
		if word := lastWord(); word == "-o" || word == "--output" {
			fmt.Fprintln(c.App.Writer, "text\njson")
		} else if strings.HasPrefix(word, "-") {
			for _, f := range cmd.Flags {
				fmt.Fprintln(c.App.Writer, "--"+f.Names()[0])
			}
		}
	}
	cmd.Action = func(c *cli.Context) error {
		err := checkWords(c, words)
		if err == nil {
			err = action(c)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", strings.TrimPrefix(c.Command.HelpName, "patchbay "), err)
		}
		return nil
	}
	return cmd
}

func caOptions(c *cli.Context) (ca.Options, error) {
	o := ca.Options{Days: c.Int("days"), Force: c.Bool("force"), Networks: c.StringSlice("network"), SANs: c.StringSlice("san")}
	if o.Days < 1 || o.Days > ca.MaxDays {
		return o, fmt.Errorf("--days: %d is out of range; take 1 to %d", o.Days, ca.MaxDays)
	}
	for _, n := range o.Networks {
		if err := api.CheckName(n); err != nil {
			return o, fmt.Errorf("--network: %w", err)
		}
	}
	return o, nil
}

func caInit(c *cli.Context) error {
	o, err := caOptions(c)
	if err != nil {
		return err
	}
	dir := c.Args().First()
	cert, err := ca.Init(dir, o)
	if err != nil {
		return err
	}
	fmt.Fprintf(c.App.Writer, "%s: %s, valid until %s; every node gets a copy\n", filepath.Join(dir, ca.CertFile), cert.Subject.CommonName, cert.NotAfter.UTC().Format(time.DateOnly))
	fmt.Fprintf(c.App.Writer, "%s: whoever has it can issue certificates; it stays here\n", filepath.Join(dir, ca.KeyFile))
	return nil
}

func caIssue(c *cli.Context) error {
	o, err := caOptions(c)
	if err != nil {
		return err
	}
	dir, host := c.Args().Get(0), c.Args().Get(1)
	cert, err := ca.Issue(dir, host, o)
	if err != nil {
		return err
	}
	i := ca.Describe(cert, time.Now())
	certFile, keyFile := ca.HostFiles(dir, host)
	fmt.Fprintf(c.App.Writer, "%s: %s, for %s, valid until %s\n", certFile, strings.Join(i.Hosts, ", "), networksText(i), i.NotAfter.Format(time.DateOnly))
	fmt.Fprintf(c.App.Writer, "%s: its key\non the host: patchbay daemon --identity %[2]s,%[1]s,%[3]s\n", keyFile, certFile, filepath.Join(dir, ca.CertFile))
	return nil
}

// networksText is which networks a certificate is good for.
func networksText(i ca.Info) string {
	var names []string
	for _, n := range i.Networks {
		if n == secure.AnyNetwork {
			return "all networks"
		}
		names = append(names, n)
	}
	switch len(names) {
	case 0:
		return "no network"
	case 1:
		return "network " + names[0]
	}
	return "networks " + strings.Join(names, ", ")
}

func caShow(c *cli.Context) error {
	if err := checkOutput(c); err != nil {
		return err
	}
	certs, err := ca.Read(c.Args().First())
	if err != nil {
		return err
	}
	now := time.Now()
	var infos []ca.Info
	for _, cert := range certs {
		infos = append(infos, ca.Describe(cert, now))
	}
	return show(c, infos, func(w io.Writer) {
		for n, i := range infos {
			if n > 0 {
				fmt.Fprintln(w)
			}
			kind, hosts := "of a host", strings.Join(i.Hosts, ", ")
			if i.CA {
				kind = "of a CA"
			}
			if hosts == "" {
				hosts = "-"
			}
			valid := fmt.Sprintf("%s to %s, ", i.NotBefore.Format(time.RFC3339), i.NotAfter.Format(time.RFC3339))
			switch {
			case now.Before(i.NotBefore):
				valid += "NOT YET VALID"
			case now.After(i.NotAfter):
				valid += "EXPIRED"
			default:
				valid += fmt.Sprintf("%d days left", i.DaysLeft)
			}
			fmt.Fprintf(w, "subject       %s\ncertificate   %s\nissuer        %s\nserial        %s\n", i.Subject, kind, i.Issuer, i.Serial)
			if !i.CA {
				fmt.Fprintf(w, "hosts         %s\nnetworks      %s\n", hosts, strings.TrimPrefix(strings.TrimPrefix(networksText(i), "networks "), "network "))
			}
			fmt.Fprintf(w, "valid         %s\nfingerprint   sha256 %s\n", valid, i.Fingerprint)
		}
	})
}
