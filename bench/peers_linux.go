package bench

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Names of the scenarios.
const (
	scenarioNAT    = "nat"
	scenarioSwitch = "switch"
)

// Names of the contenders that reports treat specially.
const (
	peerKernel   = "kernel"
	peerPatchbay = "patchbay"
)

// peer is a contender of a scenario.
type peer struct {
	name     string
	scenario string
	optional bool     // measured only when asked for
	programs []string // that it needs; the first tells its version
	version  string   // the argument that makes it tell
	pkg      string   // Debian's name, for a program that does not know its own version
	remedy   string   // how to come by the programs
	start    func(*site) error
}

// peers is every contender, the baseline first in each scenario.
func peers() []peer {
	slirp := func(name string, mtu int, optional bool) peer {
		return peer{
			name: name, scenario: scenarioNAT, optional: optional, programs: []string{"slirp4netns"}, version: "--version", remedy: "install package slirp4netns",
			start: func(s *site) error {
				return s.startUser(agentSpec{Target: s.target}, s.path("slirp4netns"), "-c", fmt.Sprintf("--mtu=%d", mtu), "--disable-host-loopback", placePID, "tap0")
			},
		}
	}
	pasta := func(name string, mtu int, optional bool) peer {
		return peer{
			name: name, scenario: scenarioNAT, optional: optional, programs: []string{"pasta"}, version: "--version", pkg: "passt", remedy: "install package passt",
			start: func(s *site) error {
				return s.startUser(agentSpec{Target: s.target}, s.path("pasta"), "-f", "--config-net", "-m", fmt.Sprint(mtu),
					"--no-map-gw", "-t", "none", "-u", "none", "-T", "none", "-U", "none", placePID) // the far side is the host's gateway
			},
		}
	}
	return []peer{
		{name: peerKernel, scenario: scenarioNAT, programs: []string{"nft"}, remedy: "install package nftables", start: (*site).masquerade},
		{name: peerPatchbay, scenario: scenarioNAT, start: (*site).patchbayRun},
		slirp("slirp4netns", 1500, false),
		pasta("pasta", 1500, false),
		{
			name: "gvproxy", scenario: scenarioNAT, programs: []string{"gvproxy", "gvforwarder"}, version: "-version",
			remedy: "script/deps bench builds it by `go install` into the user's cache directory", start: (*site).gvproxy,
		},
		slirp("slirp4netns@65520", 65520, true),
		pasta("pasta@65520", 65520, true),
		{name: peerKernel, scenario: scenarioSwitch, start: (*site).kernelBridge},
		{name: peerPatchbay, scenario: scenarioSwitch, start: (*site).patchbayNode},
		{name: "vde_switch", scenario: scenarioSwitch, programs: []string{"vde_switch"}, version: "--version", remedy: "install package vde2", start: (*site).vde},
		{
			name: "openvswitch", scenario: scenarioSwitch, programs: []string{"ovs-vswitchd", "ovsdb-server", "ovsdb-tool", "ovs-vsctl"}, version: "--version",
			remedy: "install package openvswitch-switch", start: (*site).openvswitch,
		},
	}
}

// choose returns the contenders of a scenario that names ask for: "auto", "all", or names separated by commas. The kernel is always among them,
// as the baseline. Names that nobody has are returned too.
func choose(scenario, names string) (chosen []peer, unknown []string) {
	want := strings.FieldsFunc(names, func(r rune) bool { return r == ',' || r == ' ' })
	known := map[string]bool{}
	for _, p := range peers() {
		known[p.name] = true
		if p.scenario != scenario {
			continue
		}
		auto := len(want) == 0 || slices.Contains(want, "auto")
		if p.name == peerKernel || slices.Contains(want, p.name) || slices.Contains(want, "all") || auto && !p.optional {
			chosen = append(chosen, p)
		}
	}
	for _, w := range want {
		if w != "auto" && w != "all" && !known[w] {
			unknown = append(unknown, w)
		}
	}
	return chosen, unknown
}

// peerNames is every name once, for messages.
func peerNames() (out []string) {
	for _, p := range peers() {
		if !slices.Contains(out, p.name) {
			out = append(out, p.name)
		}
	}
	return out
}

// find looks a program up in PATH, where administrators' programs are, and where script/deps builds what no distribution has.
func find(name string) (string, error) {
	if p, err := exec.LookPath(name); err == nil {
		return filepath.Abs(p)
	}
	dirs := []string{"/usr/local/sbin", "/usr/sbin", "/sbin"}
	if c, err := os.UserCacheDir(); err == nil {
		dirs = append(dirs, filepath.Join(c, "patchbay", "bench", "bin"))
	}
	for _, d := range dirs {
		p := filepath.Join(d, name)
		if fi, err := os.Stat(p); err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0 {
			return p, nil
		}
	}
	return "", fmt.Errorf("%s is not installed", name)
}

// findAll finds p's programs.
func (p peer) findAll() (map[string]string, error) {
	paths := map[string]string{}
	for _, name := range p.programs {
		path, err := find(name)
		if err != nil {
			return nil, fmt.Errorf("%w: %s", err, p.remedy)
		}
		paths[name] = path
	}
	return paths, nil
}

// versionOf asks the program, then the package database.
func (p peer) versionOf(ctx context.Context, paths map[string]string, commit string, m Machine) string {
	switch p.name {
	case peerKernel:
		return m.Kernel
	case peerPatchbay:
		return commit
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	out, _ := exec.CommandContext(ctx, paths[p.programs[0]], p.version).CombinedOutput() // some tell and fail
	line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
	if p.pkg != "" && (line == "" || strings.Contains(line, "unknown")) {
		if v, err := exec.CommandContext(ctx, "dpkg-query", "-W", "-f=${Package} ${Version}", p.pkg).Output(); err == nil {
			line = string(v)
		}
	}
	return line
}
