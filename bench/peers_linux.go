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
	scenarioNAT     = "nat"
	scenarioSwitch  = "switch"
	scenarioPublish = "publish"
	scenarioTunnel  = "tunnel"
	scenarioScale   = "scale" // variants of the others
)

// Names of the contenders that reports treat specially.
const (
	peerKernel   = "kernel"
	peerPatchbay = "patchbay"
	// With 10,000 ports more that nobody uses.
	peerManyPorts = "patchbay@10k"
	// Not contenders but what there is without one: no translation, no switch.
	peerHost = "host"
	peerVeth = "veth"
	// With sockets of the host for connections to the outside.
	peerBypass = "patchbay@bypass"
	// On the superframe wire, clear and sealed; peerPatchbay is plain VXLAN there.
	peerSuperframe = "patchbay@superframe"
	peerSealed     = "patchbay@sealed"
)

// peer is a contender of a scenario.
type peer struct {
	name     string
	scenario string
	programs []string // that it needs; the first tells its version
	version  string   // the argument that makes it tell
	pkg      string   // Debian's name, for a program that does not know its own version
	remedy   string   // how to come by the programs
	start    func(*site) error
}

var gvPrograms = []string{"gvproxy", "gvforwarder"}

const gvRemedy = "script/deps bench builds it by `go install` into the user's cache directory"

// pastaNewest is a pasta of one's own beside the distribution's, which is often years old.
const pastaNewest = "pasta-newest"

var pastaRemedies = map[string]string{
	"pasta":     "install package passt",
	pastaNewest: "build passt's newest release and put its pasta, by this name, into PATH or beside what script/deps bench builds in the user's cache directory",
}

// peers is every contender, the baseline first in each scenario.
func peers() []peer {
	slirp := func(name string, mtu int) peer {
		return peer{
			name: name, scenario: scenarioNAT, programs: []string{"slirp4netns"}, version: "--version", remedy: "install package slirp4netns",
			start: func(s *site) error {
				line := []string{s.path("slirp4netns"), "-c", fmt.Sprintf("--mtu=%d", mtu), "--disable-host-loopback"}
				if s.under.v6 {
					line = append(line, "--enable-ipv6")
				}
				return s.startUser(s.agentSpec(), append(line, placePID, "tap0")...)
			},
		}
	}
	pasta := func(name, program string, mtu int) peer {
		return peer{
			name: name, scenario: scenarioNAT, programs: []string{program}, version: "--version", pkg: "passt", remedy: pastaRemedies[program],
			start: func(s *site) error {
				return s.startUser(s.agentSpec(), s.path(program), "-f", "--config-net", "-m", fmt.Sprint(mtu),
					"--no-map-gw", "-t", "none", "-u", "none", "-T", "none", "-U", "none", placePID) // the far side is the host's gateway
			},
		}
	}
	publishPasta := func(name, program string, many bool) peer {
		return peer{
			name: name, scenario: scenarioPublish, programs: []string{program}, version: "--version", pkg: "passt", remedy: pastaRemedies[program],
			start: func(s *site) error { return s.pastaPublish(program, 1500, many) },
		}
	}
	publish := func(name, pkg string, start func(s *site) error) peer {
		program, _, _ := strings.Cut(name, "@")
		return peer{name: name, scenario: scenarioPublish, programs: []string{program}, version: "--version", pkg: pkg, remedy: "install package " + pkg, start: start}
	}
	return []peer{
		{name: peerKernel, scenario: scenarioNAT, programs: []string{"nft"}, remedy: "install package nftables", start: (*site).masquerade},
		{name: peerPatchbay, scenario: scenarioNAT, start: func(s *site) error { return s.patchbayRun(1500) }},
		{name: peerBypass, scenario: scenarioNAT, start: func(s *site) error { return s.patchbayRun(1500, "--bypass") }},
		slirp("slirp4netns", 1500),
		pasta("pasta", "pasta", 1500),
		pasta("pasta@newest", pastaNewest, 1500),
		{
			name: "gvproxy", scenario: scenarioNAT, programs: gvPrograms, version: "-version", remedy: gvRemedy, start: (*site).gvproxy,
		},
		{name: "patchbay@65520", scenario: scenarioNAT, start: func(s *site) error { return s.patchbayRun(65520) }},
		slirp("slirp4netns@65520", 65520),
		pasta("pasta@65520", "pasta", 65520),
		pasta("pasta@newest65520", pastaNewest, 65520),
		{name: peerHost, scenario: scenarioNAT, start: (*site).direct},
		{name: peerKernel, scenario: scenarioSwitch, start: (*site).kernelBridge},
		{name: peerPatchbay, scenario: scenarioSwitch, start: (*site).patchbayNode},
		{name: peerVeth, scenario: scenarioSwitch, start: (*site).wireAlone},
		{name: "vde_switch", scenario: scenarioSwitch, programs: []string{"vde_switch"}, version: "--version", remedy: "install package vde2", start: (*site).vde},
		{
			name: "openvswitch", scenario: scenarioSwitch, programs: []string{"ovs-vswitchd", "ovsdb-server", "ovsdb-tool", "ovs-vsctl"}, version: "--version",
			remedy: "install package openvswitch-switch", start: (*site).openvswitch,
		},
		{name: "gvproxy", scenario: scenarioSwitch, programs: gvPrograms, version: "-version", remedy: gvRemedy, start: (*site).gvproxySwitch},
		{name: peerKernel, scenario: scenarioPublish, programs: []string{"nft"}, remedy: "install package nftables", start: (*site).dnat},
		{name: peerPatchbay, scenario: scenarioPublish, start: func(s *site) error { return s.patchbayPublish(false) }},
		publishPasta("pasta", "pasta", false),
		publishPasta("pasta@newest", pastaNewest, false),
		publish("slirp4netns", "slirp4netns", func(s *site) error { return s.slirpPublish(1500, false) }),
		{
			name: "rootlesskit", scenario: scenarioPublish, programs: []string{"rootlesskit", "slirp4netns"}, version: "--version",
			remedy: "install packages rootlesskit and slirp4netns", start: (*site).rootlesskit,
		},
		{name: peerManyPorts, scenario: scenarioPublish, start: func(s *site) error { return s.patchbayPublish(true) }},
		publishPasta("pasta@10k", "pasta", true),
		publish("slirp4netns@10k", "slirp4netns", func(s *site) error { return s.slirpPublish(1500, true) }),
		{name: peerKernel, scenario: scenarioTunnel, start: (*site).kernelVXLAN},
		{name: peerPatchbay, scenario: scenarioTunnel, start: func(s *site) error { return s.patchbayTunnel() }},
		{name: peerSuperframe, scenario: scenarioTunnel, start: func(s *site) error { return s.patchbayTunnel("--wire", "patchbay") }},
		{name: peerSealed, scenario: scenarioTunnel, start: func(s *site) error { return s.patchbayTunnel("--wire", "patchbay", "--seal") }},
		{
			name: "openvswitch", scenario: scenarioTunnel, programs: []string{"ovs-vswitchd", "ovsdb-server", "ovsdb-tool", "ovs-vsctl"}, version: "--version",
			remedy: "install package openvswitch-switch", start: (*site).ovsTunnel,
		},
		{
			name: "vde_plug", scenario: scenarioTunnel, programs: []string{"vde_switch", "vde_plug"}, version: "--version", remedy: "install package vde2", start: (*site).vdeTunnel,
		},
		{
			name: "wireguard-go", scenario: scenarioTunnel, programs: []string{"wireguard"}, version: "--version",
			remedy: "script/deps bench builds it by `go install` into the user's cache directory", start: (*site).wireguard,
		},
		{
			name: "nebula", scenario: scenarioTunnel, programs: []string{"nebula", "nebula-cert"}, version: "-version",
			remedy: "script/deps bench builds it by `go install` into the user's cache directory", start: (*site).nebula,
		},
	}
}

// choose returns the contenders of a variant that names ask for: "auto" or "all", which are the same, or names separated by commas. The kernel is always among them,
// as the baseline. Names that nobody has are returned too.
func choose(v variant, names string) (chosen []peer, unknown []string) {
	want := strings.FieldsFunc(names, func(r rune) bool { return r == ',' || r == ' ' })
	known := map[string]bool{}
	for _, p := range peers() {
		known[p.name] = true
		if p.scenario != v.scenario || !v.takesPart(p.name) {
			continue
		}
		every := len(want) == 0 || slices.Contains(want, "auto") || slices.Contains(want, "all")
		if p.name == peerKernel || slices.Contains(want, p.name) || every {
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
	case peerKernel, peerHost, peerVeth:
		return m.Kernel
	}
	if strings.HasPrefix(p.name, peerPatchbay) {
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
