package main

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/api"
	"patchbay/internal/porttest"
	"patchbay/internal/testbed"
)

// own puts a file with what only a host's user may read into a directory of his.
func (h *meshHost) own(name string, content []byte) string {
	h.t.Helper()
	dir := h.t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o711); err != nil {
		h.t.Fatal(err)
	}
	h.login.Own(h.t, dir)
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		h.t.Fatal(err)
	}
	h.login.Own(h.t, path)
	return path
}

// meshCA is a CA in a directory, of `patchbay ca`.
type meshCA struct {
	t   *testing.T
	dir string
}

func newMeshCA(t *testing.T) *meshCA {
	t.Helper()
	c := &meshCA{t, filepath.Join(t.TempDir(), "ca")}
	c.run("init", c.dir)
	return c
}

func (c *meshCA) run(args ...string) {
	c.t.Helper()
	if out, err := exec.Command(testbed.Build(c.t), append([]string{"ca"}, args...)...).CombinedOutput(); err != nil {
		c.t.Fatalf("patchbay ca %v: %v: %s", args, err, out)
	}
}

// identity are the flags of h's daemon with a certificate for name.
func (c *meshCA) identity(h *meshHost, name string, flags ...string) []string {
	c.t.Helper()
	c.run(append([]string{"issue", c.dir, name}, flags...)...)
	var files []string
	for _, file := range []string{name + ".crt", name + ".key", "ca.crt"} {
		b, err := os.ReadFile(filepath.Join(c.dir, file))
		if err != nil {
			c.t.Fatal(err)
		}
		files = append(files, h.own(file, b))
	}
	return []string{"--identity", strings.Join(files, ",")}
}

// certified has each host's daemon known by a certificate of one new CA, for some networks.
func certified(t *testing.T, networks ...string) func(h *meshHost) []string {
	t.Helper()
	ca := newMeshCA(t)
	return func(h *meshHost) []string {
		flags := []string{"--san", h.addr6.String()}
		for _, n := range networks {
			flags = append(flags, "--network", n)
		}
		return ca.identity(h, h.addr.String(), flags...)
	}
}

// sharing has all hosts' daemons know each other by one key.
func sharing(key string) func(h *meshHost) []string {
	return func(h *meshHost) []string { return []string{"--psk-file", h.own("psk", []byte(key+"\n"))} }
}

// sealPattern is in what containers send, and nowhere on the cables.
var sealPattern = []byte{0xfe, 0xed, 0xfa, 0xce, 0xca, 0xfe, 0xbe, 0xef}

const meshKey = "bm90IGEgc2VjcmV0IGFueSBtb3JlLCBpdCBpcyBpbiBhIHRlc3Q="

// TestMeshSealed: three users' nodes with certificates, or a key, are one network, and on the cable between them there is nothing but sealed messages and handshakes.
func TestMeshSealed(t *testing.T) {
	testbed.Leaks(t)
	for _, c := range []struct {
		name, wire string
		flags      func(h *meshHost) []string
	}{{"certificates", "patchbay", certified(t, "lab")}, {"key", "vxlan", sharing(meshKey)}} {
		t.Run(c.name, func(t *testing.T) {
			m := newMeshOf(t, 3, c.flags)
			read := porttest.PacketReader(t, m.lan, m.hosts[0].port)
			m.network("lab", 42, "--wire", c.wire, "--seal")
			var cs []*container
			for i, h := range m.hosts {
				cs = append(cs, h.run("lab", fmt.Sprintf("c%d", i+1), "--", testbed.Tool(t, "iperf3"), "-s"))
			}
			for _, a := range cs {
				for _, b := range cs {
					if a != b {
						a.mustPing(b.ip4, "-p", fmt.Sprintf("%x", sealPattern))
						a.mustPing(b.ip6, "-p", fmt.Sprintf("%x", sealPattern))
						a.mustPing(b.ip4, "-M", "do", "-s", fmt.Sprint(1418-28))
					}
				}
			}
			once(t, cs)
			var fs []frame.Frame
			for got := read(time.Second); len(got) > 0; got = read(200 * time.Millisecond) {
				fs = append(fs, got...)
			}
			porttest.OnlySealed(t, fs, 30, sealPattern)
			for i, a := range cs {
				b := cs[(i+1)%len(cs)]
				if out, err := a.exec("iperf3", "-c", b.ip4.String(), "-n", "20M", "--connect-timeout", "5000").CombinedOutput(); err != nil {
					t.Errorf("TCP from container %d: %v: %s", i+1, err, out)
				}
			}
			for _, h := range m.hosts {
				for _, p := range h.peers("lab") {
					if !p.Sealed || p.State != api.PeerUp || p.MTU != 1418 || p.Error != "" || p.SealError != "" || p.Handshakes == 0 || p.RxFrames == 0 {
						t.Errorf("peer: %+v", p)
					}
				}
			}
			t.Logf("\n%s", m.hosts[0].do("peer", "ls"))
		})
	}
}

// mustTell waits until peer ls says why there are no keys for a peer, and sees to it that no frame has passed.
func (h *meshHost) mustTell(peer netip.Addr, words string) {
	h.t.Helper()
	if !testbed.Wait(30*time.Second, func() bool {
		for _, p := range h.peers("lab") {
			if p.Host == peer.String() && p.State == api.PeerHandshake && !p.Sealed && p.Handshakes == 0 && strings.Contains(p.SealError, words) && p.RxFrames == 0 && p.TxFrames == 0 {
				return true
			}
		}
		return false
	}) {
		h.t.Errorf("not told %q: %s", words, h.do("peer", "ls"))
	}
}

// TestMeshSealRefuses: who has nothing to be known by, or the wrong thing, makes no sealed network or reaches nobody on it, and both sides say why.
func TestMeshSealRefuses(t *testing.T) {
	testbed.Leaks(t)
	good, other := certified(t, "lab"), certified(t, "lab")
	m := newMeshOf(t, 3, func(h *meshHost) []string {
		switch h.addr {
		case netip.MustParseAddr("10.77.0.1"):
			return good(h)
		case netip.MustParseAddr("10.77.0.2"):
			return other(h)
		}
		return nil
	})
	sealed, stranger, nobody := m.hosts[0], m.hosts[1], m.hosts[2]
	nobody.refused([]string{"network", "create", "lab", "--vni", "42", "--seal"}, `network "lab" is sealed`, "--identity CERT,KEY,CA or --psk-file FILE")
	sealed.refused([]string{"network", "create", "prod", "--vni", "43", "--seal"}, `network "prod" is sealed`, "ca issue DIR HOST --network prod")
	for i, h := range m.hosts {
		args := []string{"network", "create", "lab", "--vni", "42", "--subnet", "10.9.0.0/24", "--ip-range", fmt.Sprintf("10.9.0.%d/26", 64*(i+1)), "--wire", "patchbay"}
		if h != nobody {
			args = append(args, "--seal")
		}
		h.do(args...)
	}
	sealed.do("peer", "add", "lab", stranger.addr.String())
	sealed.do("peer", "add", "lab", nobody.addr.String())
	stranger.do("peer", "add", "lab", sealed.addr.String())
	nobody.do("peer", "add", "lab", sealed.addr.String())
	var cs []*container
	for i, h := range m.hosts {
		cs = append(cs, h.run("lab", fmt.Sprintf("c%d", i+1)))
	}
	for _, pair := range [][2]int{{0, 1}, {1, 0}, {0, 2}, {2, 0}} {
		if out, ok := cs[pair[0]].pings(cs[pair[1]].ip4); ok {
			t.Errorf("container %d reaches container %d: %s", pair[0]+1, pair[1]+1, out)
		}
	}
	for _, x := range []struct {
		h     *meshHost
		peer  netip.Addr
		words string
	}{{sealed, stranger.addr, "was not issued by the given CA"}, {stranger, sealed.addr, "was not issued by the given CA"}, {sealed, nobody.addr, "does not seal this network"}} {
		x.h.mustTell(x.peer, x.words)
	}
	t.Logf("\n%s", sealed.do("peer", "ls"))
	drops := map[string]uint64{}
	for _, p := range sealed.peers("lab") {
		for _, d := range p.Drops {
			drops[d.Reason] += d.Count
		}
	}
	if drops["unsealed"] == 0 || drops["no-session"] == 0 {
		t.Errorf("what came clear, or could not be sealed, is not counted: %v", drops)
	}
	// A daemon that has lost its identity keeps the network and lets nothing out.
	sealed.end(15)
	sealed.args = nil
	sealed.start()
	if ps := sealed.peers("lab"); len(ps) != 2 || ps[0].State != api.PeerWaiting || !strings.Contains(ps[0].Error, "--identity") {
		t.Errorf("without an identity: %+v", ps)
	}
}

// TestMeshSealMismatch: nodes of one CA are no peers where one has the network under another name, or has the certificate of another host; when that is put right they are, by themselves.
func TestMeshSealMismatch(t *testing.T) {
	testbed.Leaks(t)
	ca := newMeshCA(t)
	m := newMeshOf(t, 3, func(h *meshHost) []string {
		name := h.addr.String()
		if name == "10.77.0.3" {
			name = "10.77.0.99"
		}
		return ca.identity(h, name)
	})
	good, renamed, posing := m.hosts[0], m.hosts[1], m.hosts[2]
	subnet := func(h *meshHost, name string) {
		h.do("network", "create", name, "--vni", "42", "--seal", "--subnet", "10.9.0.0/24", "--ip-range", fmt.Sprintf("10.9.0.%d/26", 64*(int(h.addr.As4()[3]))))
	}
	subnet(good, "lab")
	subnet(renamed, "prod")
	subnet(posing, "lab")
	for _, h := range []*meshHost{renamed, posing} {
		good.do("peer", "add", "lab", h.addr.String())
	}
	renamed.do("peer", "add", "prod", good.addr.String())
	posing.do("peer", "add", "lab", good.addr.String())
	a := good.run("lab", "a")
	b, c := renamed.run("prod", "b"), posing.run("lab", "c")
	good.mustTell(renamed.addr, "under another name or VNI")
	good.mustTell(posing.addr, "issued for host 10.77.0.99 and not for 10.77.0.3")
	for _, x := range [][2]*container{{a, b}, {b, a}, {a, c}, {c, a}} {
		if out, ok := x[0].pings(x[1].ip4); ok {
			t.Errorf("%s is reached: %s", x[1].ip4, out)
		}
	}
	a.mustPing(netip.MustParseAddr("10.9.0.1"))       // what is local goes on
	out, _ := good.command("doctor").CombinedOutput() // it fails, as it should
	for _, words := range []string{"under another name or VNI", "issued for host 10.77.0.99", "under the same name and VNI"} {
		if !strings.Contains(string(out), words) {
			t.Errorf("doctor lacks %q: %s", words, out)
		}
	}
	t.Logf("\n%s", good.do("peer", "ls"))
	posing.args = ca.identity(posing, posing.addr.String())
	posing.takeOver()
	good.waitPeers("lab", api.PeerUp, 1)
	// The containers' kernels may still be giving up what they asked for while there were no keys.
	if !testbed.Wait(20*time.Second, func() bool { _, ok := c.pings(a.ip4); return ok }) {
		t.Error("with the right certificate it is not reached either")
	}
}
