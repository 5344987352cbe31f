package main

import (
	"reflect"
	"slices"
	"strings"
	"testing"
)

func TestFlagsFirst(t *testing.T) {
	for in, want := range map[string]string{
		"network create lab --mtu 1400":                      "network create --mtu 1400 lab",
		"network create lab --mtu=1400 --internal":           "network create --mtu=1400 --internal lab",
		"network create --internal lab --subnet 10.0.0.0/24": "network create --internal --subnet 10.0.0.0/24 lab",
		"network ls -o json":                                 "network ls -o json",
		"attach lab --pid 7 -p 8080:80":                      "attach --pid 7 -p 8080:80 lab",
		"attach lab --pid 7 -- --name":                       "attach --pid 7 lab -- --name",
		"capture -w - lab --filter tcp":                      "capture -w - --filter tcp lab",
		"publish add web 8080:80 --socket /x":                "publish add --socket /x web 8080:80",
		"fdb lab --nonsense x":                               "fdb --nonsense lab x",
		"network create lab --mtu 1400 --help":               "network create --help",
		"ps --network --help":                                "ps --network --help",
		"attach lab -- -h":                                   "attach lab -- -h",
		"fdb --generate-bash-completion":                     "fdb --generate-bash-completion",
		"fdb lab -o --generate-bash-completion":              "fdb -o lab --generate-bash-completion",
		"run -p 1:1 cmd --network x":                         "run -p 1:1 cmd --network x",
		"run cmd -o x":                                       "run cmd -o x",
		"--version":                                          "--version",
		"nonsense x -y":                                      "nonsense x -y",
		"":                                                   "",
	} {
		args := append([]string{"patchbay"}, strings.Fields(in)...)
		if got := flagsFirst(newApp(), args, commandLines...); strings.Join(got[1:], " ") != want {
			t.Errorf("%s:\n%s, want\n%s", in, strings.Join(got[1:], " "), want)
		}
	}
}

// FuzzFlagsFirst holds that no word is lost or made up, but for those beside --help, and that doing it twice changes nothing more.
func FuzzFlagsFirst(f *testing.F) {
	f.Add("network create lab --mtu 1400 -- --x")
	f.Add("attach --pid lab -p")
	f.Fuzz(func(t *testing.T, line string) {
		args := append([]string{"patchbay"}, strings.Fields(line)...)
		got := flagsFirst(newApp(), slices.Clone(args), commandLines...)
		a, b := slices.Sorted(slices.Values(args)), slices.Sorted(slices.Values(got))
		help := slices.ContainsFunc(got, func(w string) bool {
			return strings.HasPrefix(w, "-") && slices.Contains([]string{"h", "help"}, strings.TrimLeft(w, "-"))
		})
		if !slices.Equal(a, b) && !help {
			t.Errorf("%q became %q", args, got)
		}
		if again := flagsFirst(newApp(), slices.Clone(got), commandLines...); !reflect.DeepEqual(again, got) {
			t.Errorf("%q became %q, then %q", args, got, again)
		}
	})
}
