package daemon

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"patchbay/internal/api"
	"patchbay/internal/testbed"
)

// TestNetworkBadInput holds that each refusal has its code, a reason and a remedy, and changes nothing.
func TestNetworkBadInput(t *testing.T) {
	n := newTestNode(t, t.TempDir())
	testbed.AddAddrs(t, testbed.Host(t), "lo", netip.MustParsePrefix("10.44.0.1/16"))
	if _, err := n.CreateNetwork(t.Context(), api.NetworkSpec{Name: "first", Subnets: prefixes("10.70.0.0/24"), VNI: 7}); err != nil {
		t.Fatal(err)
	}
	before := n.Networks()
	for _, c := range []struct {
		name string
		spec api.NetworkSpec
		code api.Code
		want string
	}{
		{"name taken", api.NetworkSpec{Name: "First"}, api.CodeConflict, `"first" exists already`},
		{"VNI taken", api.NetworkSpec{Name: "x", VNI: 7}, api.CodeConflict, `VNI 7 is network "first"'s`},
		{"no name", api.NetworkSpec{}, api.CodeInvalid, "is not a host name"},
		{"slash", api.NetworkSpec{Name: "a/b"}, api.CodeInvalid, "is not a host name"},
		{"1 MB name", api.NetworkSpec{Name: strings.Repeat("a", 1<<20)}, api.CodeInvalid, "is not a host name"},
		{"a subnet the host routes", api.NetworkSpec{Name: "x", Subnets: prefixes("10.44.3.0/24")}, api.CodeInvalid, "clashes with the host's route"},
		{"overlap", api.NetworkSpec{Name: "x", Subnets: prefixes("10.71.0.0/24", "10.71.0.0/16")}, api.CodeInvalid, "overlap"},
		{"gateway outside", api.NetworkSpec{Name: "x", Subnets: prefixes("10.71.0.0/24"), Gateways: []netip.Addr{netip.MustParseAddr("10.72.0.1")}}, api.CodeInvalid, "gateway"},
		{"gateway is broadcast", api.NetworkSpec{Name: "x", Subnets: prefixes("10.71.0.0/24"), Gateways: []netip.Addr{netip.MustParseAddr("10.71.0.255")}}, api.CodeInvalid, "gateway"},
		{"MTU 67", api.NetworkSpec{Name: "x", MTU: 67}, api.CodeInvalid, "MTU 67"},
		{"MTU 70000", api.NetworkSpec{Name: "x", MTU: 70000}, api.CodeInvalid, "MTU 70000"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := n.CreateNetwork(t.Context(), c.spec)
			if err == nil || api.CodeOf(err) != c.code || !strings.Contains(err.Error(), c.want) || len(err.Error()) > 500 || strings.Contains(err.Error(), "\n") {
				t.Errorf("%v (%s), want %s …%s…", err, api.CodeOf(err), c.code, c.want)
			}
		})
	}
	if after := n.Networks(); !reflect.DeepEqual(before, after) {
		t.Errorf("something has changed:\n%+v\n%+v", before, after)
	}
	// Equal subnets in two networks are fine.
	if _, err := n.CreateNetwork(t.Context(), api.NetworkSpec{Name: "second", Subnets: prefixes("10.70.0.0/24")}); err != nil {
		t.Error(err)
	}
}

// TestRaces has many ask for one name, and for one host port, at the same time: one gets it, and nothing of the others is left.
func TestRaces(t *testing.T) {
	testbed.Leaks(t)
	n := newTestNode(t, t.TempDir())
	const askers = 16
	race := func(what string, ask func(i int) error) {
		t.Helper()
		var wg sync.WaitGroup
		errs := make([]error, askers)
		for i := range askers {
			wg.Go(func() { errs[i] = ask(i) })
		}
		wg.Wait()
		won := 0
		for _, err := range errs {
			switch {
			case err == nil:
				won++
			case api.CodeOf(err) != api.CodeConflict:
				t.Errorf("%s: %v (%s)", what, err, api.CodeOf(err))
			}
		}
		if won != 1 {
			t.Errorf("%s: %d of %d got it: %v", what, won, askers, errs)
		}
	}
	race("one network", func(int) error {
		_, err := n.CreateNetwork(t.Context(), api.NetworkSpec{Name: "lab", Subnets: prefixes("10.73.0.0/24")})
		return err
	})
	race("one name", func(int) error {
		_, err := attachTAP(t, n, "lab", api.AttachmentSpec{Name: "web"})
		return err
	})
	race("one address", func(i int) error {
		_, err := attachTAP(t, n, "lab", api.AttachmentSpec{Name: fmt.Sprintf("a%d", i), Addrs: []netip.Addr{netip.MustParseAddr("10.73.0.99")}})
		return err
	})
	race("one port", func(i int) error {
		_, err := attachTAP(t, n, "lab", api.AttachmentSpec{Name: fmt.Sprintf("p%d", i), Publish: []string{"18080:80"}})
		return err
	})
	as, err := n.Attachments("")
	if err != nil || len(as) != 3 {
		t.Errorf("%d attachments, %v: %+v", len(as), err, as)
	}
	if ps := n.Publishes(); len(ps) != 1 {
		t.Errorf("published: %+v", ps)
	}
	for _, a := range as {
		if err := n.Detach(t.Context(), a.Network, a.Name); err != nil {
			t.Error(err)
		}
	}
	if err := n.RemoveNetwork(t.Context(), "lab"); err != nil {
		t.Error(err)
	}
	l, err := net.Listen("tcp", ":18080")
	if err != nil {
		t.Fatalf("the port is still held: %v", err)
	}
	l.Close()
}

// TestRemoveNetworkInUse names who uses it, and changes nothing.
func TestRemoveNetworkInUse(t *testing.T) {
	n := newTestNode(t, t.TempDir())
	if _, err := n.CreateNetwork(t.Context(), api.NetworkSpec{Name: "lab"}); err != nil {
		t.Fatal(err)
	}
	if _, err := attachTAP(t, n, "lab", api.AttachmentSpec{Name: "web"}); err != nil {
		t.Fatal(err)
	}
	if err := n.RemoveNetwork(t.Context(), "lab"); api.CodeOf(err) != api.CodeConflict || !strings.Contains(err.Error(), `in use by web`) {
		t.Errorf("%v", err)
	}
	if _, err := n.Attachment("lab", "web"); err != nil {
		t.Error(err)
	}
	if err := n.RemoveNetwork(t.Context(), "none"); api.CodeOf(err) != api.CodeNotFound {
		t.Errorf("%v", err)
	}
}

// TestExhaustion holds that a full pool says who holds it, and that what is given back can be had again.
func TestExhaustion(t *testing.T) {
	n := newTestNode(t, t.TempDir())
	if _, err := n.CreateNetwork(t.Context(), api.NetworkSpec{Name: "tiny", Subnets: prefixes("10.74.0.0/29")}); err != nil {
		t.Fatal(err)
	}
	var err error
	var got []api.Attachment
	for range 8 {
		var a api.Attachment
		if a, err = attachTAP(t, n, "tiny", api.AttachmentSpec{}); err != nil {
			break
		}
		got = append(got, a)
	}
	if api.CodeOf(err) != api.CodeExhausted || !strings.Contains(err.Error(), `"tiny"`) || !strings.Contains(err.Error(), got[0].Name) {
		t.Fatalf("after %d: %v (%s)", len(got), err, api.CodeOf(err))
	}
	if err := n.Detach(t.Context(), "tiny", got[0].Name); err != nil {
		t.Fatal(err)
	}
	if a, err := attachTAP(t, n, "tiny", api.AttachmentSpec{Name: "next"}); err != nil || a.Addrs[0] != got[0].Addrs[0] {
		t.Errorf("%v, %v; want %v again", a.Addrs, err, got[0].Addrs[0])
	}
}

// TestRestore holds that networks come back as they were, with leases that nobody holds any more reclaimed, and that a damaged or newer file is refused with its name.
func TestRestore(t *testing.T) {
	dir := t.TempDir()
	n := newTestNode(t, dir)
	if _, err := n.CreateNetwork(t.Context(), api.NetworkSpec{Name: "lab", Subnets: prefixes("10.75.0.0/24", "fd75::/64"), Isolate: true, MTU: 1400, VNI: 75}); err != nil {
		t.Fatal(err)
	}
	// A lease without an attachment, as a kill between the two leaves it.
	at, err := n.Attach(t.Context(), "lab", api.AttachmentSpec{Name: "half", Lifetime: api.LifetimeSession}, self())
	if err != nil {
		t.Fatal(err)
	}
	addr := at.Plan().Interface.Addrs[0].Addr()
	before, err := n.Network("lab")
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	n = newTestNode(t, dir)
	after, err := n.Network("lab")
	if err != nil || !reflect.DeepEqual(before.NetworkSpec, after.NetworkSpec) || before.ID != after.ID || before.GatewayMAC != after.GatewayMAC {
		t.Errorf("%v\n%+v\n%+v", err, before, after)
	}
	if as, _ := n.Attachments(""); len(as) != 0 {
		t.Errorf("%+v", as)
	}
	if _, err := attachTAP(t, n, "lab", api.AttachmentSpec{Name: "other", Addrs: []netip.Addr{addr}}); err != nil {
		t.Errorf("the lease is not reclaimed: %v", err)
	}
	if _, err := New(t.Context(), Config{StateDir: dir}); err == nil || !strings.Contains(err.Error(), "in use by another node") {
		t.Errorf("a second node on the same state: %v", err)
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	for what, change := range map[string]func(tx *bbolt.Tx) error{
		"a later version": func(tx *bbolt.Tx) error { return tx.Bucket(metaBucket).Put(schemaKey, []byte("99")) },
		"damage":          func(tx *bbolt.Tx) error { return tx.Bucket(networkBucket).Put([]byte("lab"), []byte("{")) },
	} {
		file := filepath.Join(dir, "state.db")
		whole, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		db, err := bbolt.Open(file, 0o600, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := db.Update(change); err != nil {
			t.Fatal(err)
		}
		db.Close()
		if _, err := New(t.Context(), Config{StateDir: dir}); err == nil || !strings.Contains(err.Error(), file) {
			t.Errorf("%s: %v", what, err)
		}
		if err := os.WriteFile(file, whole, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// TestStateDirOfOthers is refused: what is in there need not be this user's own.
func TestStateDirOfOthers(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "open")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if n, err := New(t.Context(), Config{StateDir: dir}); err == nil || !strings.Contains(err.Error(), "others may write to it") {
		if n != nil {
			n.Close()
		}
		t.Errorf("%v", err)
	}
}

// TestConfigure applies files one after the other, good and bad ones.
func TestConfigure(t *testing.T) {
	dir := t.TempDir()
	n := newTestNode(t, dir)
	apply := func(text string) error { return n.Configure(t.Context(), write(t, dir, text)) }
	nets := func() string {
		var s []string
		for _, nw := range n.Networks() {
			s = append(s, fmt.Sprintf("%s:%d:%s", nw.Name, nw.MTU, nw.Origin))
		}
		return strings.Join(s, " ")
	}
	ports := func() string {
		var s []string
		for _, p := range n.Publishes() {
			s = append(s, p.Attachment+"="+p.Spec+"="+p.Origin)
		}
		return strings.Join(s, " ")
	}
	must := func(err error, wantNets, wantPorts string) {
		t.Helper()
		if err != nil || nets() != wantNets || ports() != wantPorts {
			t.Fatalf("%v: networks %q, want %q; ports %q, want %q", err, nets(), wantNets, ports(), wantPorts)
		}
	}
	refused := func(err error, want string) {
		t.Helper()
		was, wasPorts := nets(), ports()
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Fatalf("%v, want …%s…", err, want)
		}
		if nets() != was || ports() != wasPorts {
			t.Fatalf("half applied: %s, %s", nets(), ports())
		}
	}
	must(apply("networks:\n  a: {mtu: 1400}\n  b:\npublish:\n  - {network: a, attachment: web, ports: [\"18081:80\", \"18082:80\"]}\n"), "a:1400:config b:1500:config", "")
	// A rule waits for its attachment, and is not taken for the API's.
	if _, err := attachTAP(t, n, "a", api.AttachmentSpec{Name: "web", Publish: []string{"18090:80"}}); err != nil {
		t.Fatal(err)
	}
	must(nil, "a:1400:config b:1500:config", "web=18081:80/tcp=config web=18082:80/tcp=config web=18090:80/tcp=attach")

	refused(apply("networks:\n  a: {mtu: 1300}\n"), `patchbay.yaml:2: network "a" has another mtu and is in use by web`)
	refused(apply("networks:\n  b:\n"), `network "a" is named no more and is in use by web`)
	refused(apply("networks:\n  a: {mtu: 1400}\n  b:\n  c: {colour: red}\n"), `patchbay.yaml:4: network "c" has no setting "colour"`)
	// The second network of a file that fails takes the first with it, and the rules too.
	testbed.AddAddrs(t, testbed.Host(t), "lo", netip.MustParsePrefix("10.45.0.1/16"))
	refused(apply("networks:\n  a: {mtu: 1400}\n  b: {mtu: 1300}\n  c:\n  d: {subnets: [10.45.1.0/24]}\npublish:\n  - {network: a, attachment: web, ports: \"18083:80\"}\n"), "patchbay.yaml:5: ")
	// So does a port that somebody else has.
	l, err := net.Listen("tcp", ":18084")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	refused(apply("networks:\n  a: {mtu: 1400}\n  b:\n  c:\npublish:\n  - {network: a, attachment: web, ports: [\"18083:80\", \"18084:80\"]}\n"), "18084")

	must(apply("networks:\n  a:\n  c: {mtu: 1300}\npublish:\n  - {network: a, attachment: web, ports: [\"18082:80\", \"18085:80\"]}\n"),
		"a:1400:config c:1300:config", "web=18082:80/tcp=config web=18085:80/tcp=config web=18090:80/tcp=attach")
	must(apply("networks:\n  a:\n  c: {mtu: 1200}\n"), "a:1400:config c:1200:config", "web=18090:80/tcp=attach")
	if conn, err := net.DialTimeout("tcp", "127.0.0.1:18082", time.Second); err == nil {
		conn.Close()
		t.Error("a port that no rule names any more is still open")
	}
	if err := n.Configure(context.Background(), filepath.Join(dir, "absent.yaml")); err == nil || !strings.Contains(err.Error(), "absent.yaml") {
		t.Errorf("%v", err)
	}
}
