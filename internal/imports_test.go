package internal_test

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// floors is the house of DESIGN.md §2: a room imports rooms of lower floors only, and never one of its own floor. Rooms that are a nest of
// packages are named by their common prefix.
var floors = []struct {
	floor int
	room  string
}{
	{0, "patchbay/internal/wire"},
	{0, "patchbay/internal/kernel"},
	{0, "patchbay/internal/netns"},
	{0, "patchbay/internal/mmsg"},
	{0, "patchbay/internal/spin"},
	{1, "patchbay/frame"},
	{1, "patchbay/internal/bypass"},
	{2, "patchbay/internal/offload"},
	{3, "patchbay/tap"},
	{3, "patchbay/switch"},
	{3, "patchbay/tunnel"},
	{3, "patchbay/ipam"},
	{3, "patchbay/stream"},
	{4, "patchbay/ipam/store"},
	{4, "patchbay/internal/ca"},
	{4, "patchbay/stack"},
	{4, "patchbay/internal/edge"},
	{4, "patchbay/internal/capture"},
	{5, "patchbay/nat"},
	{5, "patchbay/internal/dns"},
	{5, "patchbay/internal/dhcp"},
	{5, "patchbay/internal/api"},
	{6, "patchbay/internal/node"},
	{6, "patchbay/internal/config"},
	{6, "patchbay/internal/attach"},
	{7, "patchbay/internal/daemon"},
	{7, "patchbay/bench"},
	{8, "patchbay/cmd/patchbay"},
}

// bans are the imports that have one home, or a few with a space between, each with its reason.
var bans = []struct {
	pkg, home, reason string
}{
	{"go.etcd.io/bbolt", "patchbay/ipam/store patchbay/internal/daemon", "one file holds the state; the daemon opens it and leases are kept in it"},
	{"gvisor.dev/gvisor", "patchbay/stack", "netstack is an implementation of the gateway's TCP, nobody else's business"},
	{"go.yaml.in/yaml", "patchbay/internal/config", "one home for the format of the configuration"},
	{"github.com/gopacket/gopacket", "patchbay/internal/capture", "one home for the capture format"},
	{"github.com/songgao/water", "patchbay/tap", "only tap opens devices"},
	{"github.com/miekg/dns", "patchbay/internal/dns", "one home for the DNS wire format"},
	{"github.com/insomniacslk/dhcp", "patchbay/internal/dhcp", "one home for the DHCP wire format"},
	{"github.com/pion", "patchbay/tunnel/secure", "one home for handshakes; what they export is sealed with the standard library"},
	{"github.com/prometheus/client_golang", "patchbay/internal/api", "counters are plain; the API alone words them for a scraper"},
	{"charm.land/bubbletea", "patchbay/cmd/patchbay", "a terminal is the command's, not a library's"},
	{"github.com/urfave/cli", "patchbay/cmd/patchbay", "flags are the command's, not a library's"},
}

type goPackage struct {
	ImportPath string
	Imports    []string
}

func projectPackages(t *testing.T) []goPackage {
	t.Helper()
	out, err := exec.Command("go", "list", "-json=ImportPath,Imports", "patchbay/...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var pkgs []goPackage
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p goPackage
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		pkgs = append(pkgs, p)
	}
	if len(pkgs) < 5 {
		t.Fatalf("go list named %d packages; the test looks at the wrong place", len(pkgs))
	}
	return pkgs
}

func within(pkg, room string) bool { return pkg == room || strings.HasPrefix(pkg, room+"/") }

func floorOf(pkg string) (floor int, room string, ok bool) {
	for _, f := range floors {
		if within(pkg, f.room) && len(f.room) > len(room) {
			floor, room, ok = f.floor, f.room, true
		}
	}
	return floor, room, ok
}

// TestImports holds the house together: it fails when a room imports upwards, sideways, or a library that has its home elsewhere.
func TestImports(t *testing.T) {
	for _, p := range projectPackages(t) {
		if p.ImportPath == "patchbay/internal" || within(p.ImportPath, "patchbay/internal/testbed") || within(p.ImportPath, "patchbay/internal/porttest") {
			continue // for tests only, and TestNoTestCodeInTheBinary keeps them there
		}
		from, fromRoom, known := floorOf(p.ImportPath)
		if !known {
			t.Errorf("%s stands on no floor: give it one in this test and in ARCHITECTURE.md", p.ImportPath)
			continue
		}
		for _, imp := range p.Imports {
			for _, b := range bans {
				home := slices.ContainsFunc(strings.Fields(b.home), func(h string) bool { return within(p.ImportPath, h) })
				if within(imp, b.pkg) && !home {
					t.Errorf("%s imports %s, whose home is %s: %s", p.ImportPath, imp, b.home, b.reason)
				}
			}
			if !strings.HasPrefix(imp, "patchbay/") {
				continue
			}
			to, toRoom, known := floorOf(imp)
			if known && toRoom != fromRoom && to >= from {
				t.Errorf("%s (floor %d) imports %s (floor %d): imports run downwards only", p.ImportPath, from, imp, to)
			}
		}
	}
}

// TestNoTestCodeInTheBinary keeps what is written for tests out of what is shipped.
func TestNoTestCodeInTheBinary(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "patchbay/cmd/patchbay").Output()
	if err != nil {
		t.Fatalf("go list -deps: %v", err)
	}
	for _, pkg := range strings.Fields(string(out)) {
		switch {
		case pkg == "testing", within(pkg, "patchbay/internal/testbed"), within(pkg, "patchbay/internal/porttest"):
			t.Errorf("the binary contains %s", pkg)
		}
	}
}
