package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"patchbay/internal/wire"
)

// raw sends what no client of ours would, and reads the refusal in the answer.
func (s *started) raw(t *testing.T, method, path string, header http.Header, body io.Reader) (*http.Response, *Error) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, "http://patchbay"+path, body)
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range header {
		req.Header[k] = v
	}
	resp, err := s.client.http.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	documented(t, NewServer(ServerConfig{Backend: s.fake}), req, resp.StatusCode)
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode < 400 {
		return resp, nil
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	var r refusal
	if err := dec.Decode(&r); err != nil || r.Error == nil {
		t.Fatalf("%s %s: %s, and not in the error format: %q, %v", method, path, resp.Status, b, err)
	}
	if r.Error.Code.Status() != resp.StatusCode || r.Error.Message == "" {
		t.Errorf("%s %s: %s with %+v", method, path, resp.Status, r.Error)
	}
	return resp, r.Error
}

func (f *fake) changed() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.calls)
}

// TestClient asks every route by the client's method.
func TestClient(t *testing.T) {
	s := start(t, ServerConfig{})
	c, ctx := s.client, t.Context()
	do := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	do("health", c.Health(ctx))
	info, err := c.Info(ctx)
	do("info", err)
	if info.PID != os.Getpid() || info.Version != "v0-test" {
		t.Errorf("info: %+v", info)
	}
	if l, err := c.Networks(ctx); err != nil || l == nil || len(l) != 0 {
		t.Errorf("networks: %v, %v; want an empty list", l, err)
	}
	n, err := c.CreateNetwork(ctx, NetworkSpec{Name: "lan", MTU: 1400})
	do("create", err)
	if n.Name != "lan" || n.MTU != 1400 || n.ID != "id-lan" {
		t.Errorf("network: %+v", n)
	}
	if _, err = c.CreateNetwork(ctx, NetworkSpec{Name: "lan"}); CodeOf(err) != CodeConflict || err.Error() != `there is a network "lan" already; choose another name` {
		t.Errorf("create again: %v", err)
	}
	n, err = c.Network(ctx, "lan")
	do("network", err)
	if n.Flows.TCP != 3 {
		t.Errorf("network: %+v", n)
	}
	a, err := c.AttachStream(ctx, "lan", AttachmentSpec{Name: "vm", Lifetime: LifetimeStream, Stream: "/run/vm.sock"})
	do("stream", err)
	if a.Stream != "/run/vm.sock" || a.State != StateWaiting {
		t.Errorf("attachment: %+v", a)
	}
	_, err = c.Attachment(ctx, "lan", "vm")
	do("attachment", err)
	l, err := c.Attachments(ctx, "lan")
	do("attachments", err)
	if len(l) != 1 {
		t.Errorf("attachments: %v", l)
	}
	if _, err := c.Attachments(ctx, "wan"); CodeOf(err) != CodeNotFound {
		t.Errorf("attachments of no network: %v", err)
	}
	p, err := c.AddPublish(ctx, "lan", "vm", PublishSpec{Spec: "8080:80"})
	do("publish", err)
	ps, err := c.Publishes(ctx)
	do("publishes", err)
	if len(ps) != 1 || ps[0] != p {
		t.Errorf("publishes: %v", ps)
	}
	do("unpublish", c.RemovePublish(ctx, p.ID))
	if err := c.RemovePublish(ctx, "no/such id"); CodeOf(err) != CodeNotFound || !strings.Contains(err.Error(), `"no/such id"`) {
		t.Errorf("unpublish: %v", err)
	}
	fdb, err := c.FDB(ctx, "lan")
	do("fdb", err)
	if len(fdb) != 1 || fdb[0].Age != 1.5 {
		t.Errorf("fdb: %v", fdb)
	}
	for _, network := range []string{"", "lan"} {
		if d, err := c.Drops(ctx, network); err != nil || len(d) != 1 || d[0].Network != network || d[0].Count != 5 {
			t.Errorf("drops: %v, %v", d, err)
		}
	}
	peer, err := c.AddPeer(ctx, "lan", PeerSpec{Host: "2001:db8::7", Port: 4790, Wire: WirePatchbay})
	do("peer", err)
	if peer.Network != "lan" || peer.Port != 4790 || peer.State != PeerUp {
		t.Errorf("peer: %+v", peer)
	}
	ref := PeerRef(peer.Host, peer.Port)
	mac := wire.MAC{2, 0, 0, 0, 0, 7}
	if peer, err = c.AddPeerFDB(ctx, "lan", ref, mac); err != nil || len(peer.FDB) != 1 || peer.FDB[0] != mac {
		t.Errorf("static entry: %+v, %v", peer, err)
	}
	if peer, err = c.RemovePeerFDB(ctx, "lan", ref, mac); err != nil || len(peer.FDB) != 0 {
		t.Errorf("static entry removed: %+v, %v", peer, err)
	}
	if peers, err := c.Peers(ctx, "lan"); err != nil || len(peers) != 1 || peers[0].Host != "2001:db8::7" {
		t.Errorf("peers: %v, %v", peers, err)
	}
	do("peer rm", c.RemovePeer(ctx, "lan", ref))
	if err := c.RemovePeer(ctx, "lan", ref); CodeOf(err) != CodeNotFound {
		t.Errorf("peer rm again: %v", err)
	}
	if _, err := c.AddPeer(ctx, "wan", PeerSpec{Host: "h"}); CodeOf(err) != CodeNotFound {
		t.Errorf("peer of no network: %v", err)
	}
	do("detach", c.Detach(ctx, "lan", "vm"))
	do("remove", c.RemoveNetwork(ctx, "lan"))
	if err := c.RemoveNetwork(ctx, "lan"); CodeOf(err) != CodeNotFound {
		t.Errorf("remove again: %v", err)
	}
	y, err := c.OpenAPI(ctx)
	do("openapi", err)
	if !bytes.Equal(y, openAPI) {
		t.Error("openapi.yaml is not what was embedded")
	}
	want := "create lan, stream lan/vm, publish 8080:80, unpublish p1, peer [2001:db8::7]:4790, fdb [2001:db8::7]:4790 02:00:00:00:00:07, unfdb [2001:db8::7]:4790 02:00:00:00:00:07, unpeer [2001:db8::7]:4790, detach lan/vm, remove lan"
	if got := strings.Join(s.calls, ", "); got != want {
		t.Errorf("changes: %s, want %s", got, want)
	}
}

// TestBadRequests: a clear error in the error's format, and nothing has changed.
func TestBadRequests(t *testing.T) {
	s := start(t, ServerConfig{})
	s.network(t, "lan")
	before := s.changed()
	long := strings.Repeat("a", 1<<20)
	session := http.Header{"Connection": {"Upgrade"}, "Upgrade": {upgrade}}
	for _, c := range []struct {
		method, path string
		header       http.Header
		body         string
		code         Code
		want         string
	}{
		{"GET", "/", nil, "", CodeNotFound, "there is no route /"},
		{"GET", "/v2/networks", nil, "", CodeNotFound, "there is no route /v2/networks; GET /v1/openapi.yaml"},
		{"GET", "/v1/networks/", nil, "", CodeNotFound, "no route"},
		{"GET", "/v1//networks", nil, "", CodeNotFound, "no route"},
		{"GET", "/v1/networks/../info", nil, "", CodeNotFound, "no route"},
		{"GET", "/v1/networks/%2e%2e/info", nil, "", CodeNotFound, "no route"},
		{"GET", "/v1/networks/lan/" + strings.Repeat("x", 5000), nil, "", CodeNotFound, "…; GET"},
		{"GET", "/v1/networks/a%2Fb", nil, "", CodeNotFound, `no network "a/b"`},
		{"GET", "/v1/networks/%00", nil, "", CodeNotFound, `no network "\x00"`},
		{"PUT", "/v1/networks", nil, "{}", CodeMethod, "PUT is no method of /v1/networks; use GET, POST"},
		{"HEAD", "/v1/networks/lan/capture", nil, "", "", ""},
		{"POST", "/healthz", nil, "", CodeMethod, "use GET"},
		{"BREW", "/v1/info", nil, "", CodeMethod, "BREW is no method"},
		{"GET", "/v1/networks?name=lan", nil, "", CodeInvalid, `parameter "name" is not known`},
		{"GET", "/v1/attachments?network=lan&network=wan", nil, "", CodeInvalid, `it takes network, each once`},
		{"GET", "/v1/info?a=%zz", nil, "", CodeInvalid, "cannot be read"},
		{"GET", "/v1/networks/lan/capture?snaplen=all", nil, "", CodeInvalid, `snaplen="all"`},
		{"GET", "/v1/networks/lan/capture?count=-1", nil, "", CodeInvalid, "-1 frames"},
		{"GET", "/v1/networks/lan/capture?count=99999999999999999999", nil, "", CodeInvalid, "count="},
		{"GET", "/v1/networks/lan/capture?filter=" + strings.Repeat("x", 5000), nil, "", CodeInvalid, "no tcpdump expression"},
		{"GET", "/v1/networks/wan/capture", nil, "", CodeNotFound, "wan"},

		{"POST", "/v1/networks", nil, "", CodeInvalid, "body: it is empty"},
		{"POST", "/v1/networks", nil, "null", CodeInvalid, `name "" is not a host name`},
		{"POST", "/v1/networks", nil, `{"name":"x"`, CodeInvalid, "the JSON ends too early"},
		{"POST", "/v1/networks", nil, `{"name":"x"}{"name":"y"}`, CodeInvalid, "something follows"},
		{"POST", "/v1/networks", nil, `{"name":"x"} x`, CodeInvalid, "something follows"},
		{"POST", "/v1/networks", nil, `{"name":"x","shoe":1}`, CodeInvalid, `unknown field "shoe"`},
		{"POST", "/v1/networks", nil, `["x"]`, CodeInvalid, "a array where an object is due"},
		{"POST", "/v1/networks", nil, `{"name":7}`, CodeInvalid, `field "name": a number`},
		{"POST", "/v1/networks", nil, `{"name":"x","mtu":"big"}`, CodeInvalid, `field "mtu": a string`},
		{"POST", "/v1/networks", nil, `{"name":"x","mtu":1e99}`, CodeInvalid, `field "mtu": a number 1e99`},
		{"POST", "/v1/networks", nil, `{"name":"x","vni":-1}`, CodeInvalid, `field "vni"`},
		{"POST", "/v1/networks", nil, `{"name":"x","subnets":["10.0.0.0/33"]}`, CodeInvalid, "10.0.0.0/33"},
		{"POST", "/v1/networks", nil, `{"name":"x","subnets":[""]}`, CodeInvalid, "subnet"},
		{"POST", "/v1/networks", nil, `{"name":"x","mtu":67}`, CodeInvalid, "MTU 67 is out of range; take one from 576 to 65521, or from 1280 with IPv6"},
		{"POST", "/v1/networks", nil, `{"name":"` + long[:200<<10] + `"}`, CodeInvalid, "is not a host name"},
		{"POST", "/v1/networks", nil, `{"name":"` + long + `"}`, CodeTooLarge, "longer than 262144 bytes"},
		{"POST", "/v1/networks", nil, "\xff\xfe", CodeInvalid, "not JSON at byte 1"},
		{"POST", "/v1/networks", nil, strings.Repeat("[", 100000), CodeInvalid, "body"},
		{"POST", "/v1/networks", http.Header{"Content-Type": {"text/yaml"}}, `{"name":"x"}`, CodeInvalid, `"text/yaml" is not understood`},
		{"POST", "/v1/networks", http.Header{"Content-Type": {";"}}, `{"name":"x"}`, CodeInvalid, "is not understood"},

		{"POST", "/v1/networks/lan/attachments", nil, `{"lifetime":"session"}`, CodeInvalid, "the device's descriptors need a session"},
		{"POST", "/v1/networks/lan/attachments", http.Header{"Upgrade": {upgrade}}, `{"lifetime":"session"}`, CodeInvalid, "need a session"},
		{"POST", "/v1/networks/lan/attachments", http.Header{"Connection": {"Upgrade"}, "Upgrade": {"websocket"}}, `{"lifetime":"session"}`, CodeInvalid, "need a session"},
		{"POST", "/v1/networks/lan/attachments", session, `{"lifetime":"stream","stream":"/s"}`, CodeInvalid, "leave out the Upgrade header"},
		{"POST", "/v1/networks/lan/attachments", session, `{"lifetime":"for ever"}`, CodeInvalid, `lifetime "for ever" is not known`},
		{"POST", "/v1/networks/lan/attachments", session, `{}`, CodeInvalid, "no lifetime is given; use session, namespace or stream"},
		{"POST", "/v1/networks/lan/attachments", session, `{"lifetime":"session","mac":"xx"}`, CodeInvalid, "MAC address"},
		{"POST", "/v1/networks/lan/attachments", session, `{"lifetime":"session","addrs":["10.0.0.300"]}`, CodeInvalid, "10.0.0.300"},
		{"POST", "/v1/networks/wan/attachments", session, `{"lifetime":"session"}`, CodeNotFound, `no network "wan"; `},
		{"POST", "/v1/networks/lan/attachments/web/resume", nil, "", CodeInvalid, "need a session"},
		{"POST", "/v1/networks/lan/attachments/web/resume", session, "{}", CodeInvalid, "takes none"},
		{"POST", "/v1/networks/lan/attachments/web/resume", session, "", CodeNotFound, `no attachment "web"`},
		{"POST", "/v1/networks/lan/attachments/web/publishes", nil, `{"spec":""}`, CodeInvalid, "no port specification"},
		{"POST", "/v1/networks/lan/attachments/web/publishes", nil, `{"spec":"80 80"}`, CodeInvalid, "no port specification"},
		{"DELETE", "/v1/publishes/none", nil, "", CodeNotFound, `"none"`},
	} {
		name := c.method + " " + abbreviate(c.path) + " " + abbreviate(c.body)
		if c.method == "HEAD" {
			resp, err := s.client.http.Head("http://patchbay" + c.path)
			if err != nil || resp.StatusCode != http.StatusMethodNotAllowed {
				t.Errorf("%s: %v, %v", name, resp, err)
			}
			continue
		}
		var body io.Reader
		if c.body != "" {
			body = strings.NewReader(c.body)
		}
		resp, e := s.raw(t, c.method, c.path, c.header, body)
		if e == nil {
			t.Errorf("%s: %s, want %s", name, resp.Status, c.code)
			continue
		}
		if e.Code != c.code || !strings.Contains(e.Error(), c.want) || strings.ContainsAny(e.Error(), "\n\x00") || len(e.Error()) > 500 {
			t.Errorf("%s: %s: %s, want %s with %q", name, e.Code, e, c.code, c.want)
		}
	}
	if s.changed() != before {
		t.Errorf("something was changed: %v", s.calls[before:])
	}
}

// TestTruncatedBody promises more than it sends.
func TestTruncatedBody(t *testing.T) {
	s := start(t, ServerConfig{IOTimeout: 100 * time.Millisecond})
	for name, finish := range map[string]bool{"closed": true, "silent": false} {
		c, err := net.Dial("unix", s.path)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(c, "POST /v1/networks HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{\"name\":\"x\"}")
		if finish {
			c.(*net.UnixConn).CloseWrite()
		}
		c.SetReadDeadline(time.Now().Add(20 * time.Second))
		b, err := io.ReadAll(c)
		if err != nil || !strings.Contains(string(b), `{"error":{"code":"invalid","message":"body: `) {
			t.Errorf("%s: %q, %v", name, b, err)
		}
		c.Close()
	}
	if s.changed() != 0 {
		t.Error("something was changed")
	}
}

// TestBackendErrors: what the node says arrives as it was said, and what it did not expect is internal.
func TestBackendErrors(t *testing.T) {
	s := start(t, ServerConfig{})
	for _, c := range []struct {
		err    error
		code   Code
		msg    string
		remedy string
	}{
		{Errorf(CodeExhausted, "remove one", "pool %s is used up", "10.88.0.0/24"), CodeExhausted, "pool 10.88.0.0/24 is used up", "remove one"},
		{fmt.Errorf("network: %w", Errorf(CodeUnavailable, "wait", "busy")), CodeUnavailable, "network: busy", "wait"},
		{fmt.Errorf("a, %w, b", Errorf(CodeConflict, "wait", "busy")), CodeConflict, "a, busy; wait, b", "wait"},
		{errors.New("disk on fire"), CodeInternal, "disk on fire", ""},
	} {
		s.mu.Lock()
		s.fake.err = c.err
		s.mu.Unlock()
		_, err := s.client.CreateNetwork(t.Context(), NetworkSpec{Name: "lan"})
		var e *Error
		if !errors.As(err, &e) || e.Code != c.code || e.Message != c.msg || e.Remedy != c.remedy {
			t.Errorf("%v arrived as %+v", c.err, err)
		}
	}
}

func TestCodes(t *testing.T) {
	want := map[Code]int{
		CodeInvalid: 400, CodeForbidden: 403, CodeNotFound: 404, CodeMethod: 405, CodeConflict: 409, CodeExhausted: 409, CodeTooLarge: 413, CodeUnavailable: 503, CodeInternal: 500, "new": 500,
	}
	for c, status := range want {
		if c.Status() != status {
			t.Errorf("%s: %d, want %d", c, c.Status(), status)
		}
	}
}

// TestOtherUser is refused by name on every route, whatever the mode of the socket. The tests' user namespace has one uid, so that the kernel's word is replaced here; that it
// is asked and right for the own user TestSession shows, and TestCheckPeer has the words.
func TestOtherUser(t *testing.T) {
	var uid atomic.Int64
	uid.Store(424242)
	s := start(t, ServerConfig{Peer: func(*net.UnixConn) (Caller, error) {
		if uid.Load() < 0 {
			return Caller{}, errors.New("EBADF")
		}
		return Caller{PID: 7, UID: int(uid.Load())}, nil
	}})
	for _, r := range routes {
		_, e := s.raw(t, r.method, strings.NewReplacer("{", "", "}", "").Replace(r.pattern), nil, nil)
		if e == nil || e.Code != CodeForbidden || !strings.HasPrefix(e.Error(), "user with uid 424242 may not use ") || e.Remedy != "run a daemon of your own" {
			t.Errorf("%s %s: %v", r.method, r.pattern, e)
		}
	}
	if _, err := s.client.Attach(t.Context(), "lan", AttachmentSpec{Lifetime: LifetimeSession}); CodeOf(err) != CodeForbidden {
		t.Errorf("attach: %v", err)
	}
	if _, e := s.raw(t, "GET", "/none", nil, nil); e.Code != CodeForbidden {
		t.Errorf("an unknown route: %v", e)
	}
	if len(s.calls) > 0 {
		t.Errorf("the node was asked: %v", s.calls)
	}
	s.client.Close() // a new connection is asked anew
	uid.Store(-1)
	if err := s.client.Health(t.Context()); CodeOf(err) != CodeForbidden || !strings.Contains(err.Error(), "EBADF") {
		t.Errorf("unknown peer: %v", err)
	}
	s.client.Close()
	uid.Store(0)
	if err := s.client.Health(t.Context()); err != nil {
		t.Errorf("root: %v", err)
	}
}

func TestCheckPeer(t *testing.T) {
	for _, c := range []struct {
		uid, self int
		want      string
	}{
		{1000, 1000, ""}, {0, 1000, ""}, {0, 0, ""},
		{1001, 0, "user with uid 1001 may not use root's node; run a daemon of your own"},
		{424242, 424243, "user with uid 424242 may not use uid 424243's node; run a daemon of your own"},
		{1, 424242, "user daemon (uid 1) may not use uid 424242's node; run a daemon of your own"},
	} {
		err := checkPeer(Caller{UID: c.uid}, c.self)
		if c.want == "" && err != nil || c.want != "" && (err == nil || err.Error() != c.want || CodeOf(err) != CodeForbidden) {
			t.Errorf("uid %d at uid %d's: %v, want %q", c.uid, c.self, err, c.want)
		}
	}
}

func TestCapture(t *testing.T) {
	s := start(t, ServerConfig{})
	s.network(t, "lan")
	got := make(chan []byte)
	s.capture = func(ctx context.Context, w io.Writer) error {
		for b := range got {
			if _, err := w.Write(b); err != nil {
				return err
			}
		}
		return errors.New("the ring is broken")
	}
	spec := CaptureSpec{Attachment: "web", Filter: "tcp port 80 & host a", SnapLen: 100, Count: 3}
	r, err := s.client.Capture(t.Context(), "lan", spec)
	if err != nil {
		t.Fatal(err)
	}
	if s.captureSpec != spec {
		t.Errorf("spec: %+v", s.captureSpec)
	}
	buf := make([]byte, 100)
	for _, block := range []string{"one", "two"} { // each arrives by itself, before the next is written
		got <- []byte(block)
		if n, err := r.Read(buf); err != nil || string(buf[:n]) != block {
			t.Errorf("read %q, %v", buf[:n], err)
		}
	}
	close(got)
	if _, err := io.ReadAll(r); CodeOf(err) != CodeInternal || err.Error() != "the ring is broken" {
		t.Errorf("the end: %v", err)
	}
	r.Close()

	// A client that goes ends the node's side, and a capture that is complete has no error.
	ended := make(chan error, 1)
	s.capture = func(ctx context.Context, w io.Writer) error {
		<-ctx.Done()
		ended <- ctx.Err()
		return nil
	}
	ctx, cancel := context.WithCancel(t.Context())
	if r, err = s.client.Capture(ctx, "lan", CaptureSpec{}); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	r.Close()
	s.capture = func(_ context.Context, w io.Writer) error {
		_, err := w.Write([]byte("all"))
		return err
	}
	if r, err = s.client.Capture(t.Context(), "lan", CaptureSpec{Count: 1}); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(r); err != nil || string(b) != "all" {
		t.Errorf("%q, %v", b, err)
	}
	r.Close()

	// The node's end is told too.
	s.capture = func(ctx context.Context, w io.Writer) error {
		<-ctx.Done()
		return nil
	}
	if r, err = s.client.Capture(t.Context(), "lan", CaptureSpec{}); err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	go s.stop()
	if _, err := io.ReadAll(r); CodeOf(err) != CodeUnavailable {
		t.Errorf("the end: %v", err)
	}
}

// TestMetrics is read by Prometheus' own parser.
func TestMetrics(t *testing.T) {
	s := start(t, ServerConfig{})
	s.network(t, "lan")
	s.network(t, "dmz")
	n := s.networks["lan"]
	n.Ports = append(n.Ports, Port{Name: "twin", TxBytes: 1}, Port{Name: "twin", TxBytes: 2})
	s.networks["lan"] = n
	s.attachments["lan/web"] = Attachment{Network: "lan", Name: "web", State: StateUp}
	if _, err := s.AddPeer(t.Context(), "lan", PeerSpec{Host: "b.test", Port: 4789}); err != nil {
		t.Fatal(err)
	}
	resp, _ := s.raw(t, "GET", "/metrics", nil, nil)
	if ct := resp.Header.Get("Content-Type"); !strings.HasPrefix(ct, "text/plain; version=0.0.4") {
		t.Errorf("content type %q", ct)
	}
	b, err := s.client.Metrics(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	p := expfmt.NewTextParser(model.LegacyValidation)
	families, err := p.TextToMetricFamilies(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"go_goroutines", "process_open_fds"} {
		if families[name] == nil {
			t.Errorf("no %s", name)
		}
	}
	for _, line := range []string{
		`patchbay_info{version="v0-test"} 1`,
		`patchbay_networks 2`,
		`patchbay_attachments{network="lan",state="up"} 1`,
		`patchbay_attachments{network="lan",state="waiting"} 0`,
		`patchbay_attachments{network="dmz",state="up"} 0`,
		`patchbay_port_receive_frames_total{network="lan",port="gateway"} 7`,
		`patchbay_port_transmit_bytes_total{network="lan",port="twin"} 3`,
		`patchbay_drops_total{network="lan",reason="storm"} 5`,
		`patchbay_flows{kind="tcp",network="dmz"} 3`,
		`patchbay_fdb_entries{network="lan"} 1`,
		`patchbay_peer_up{network="lan",peer="b.test:4789"} 1`,
		`patchbay_peer_sealed{network="lan",peer="b.test:4789"} 1`,
		`patchbay_peer_rtt_seconds{network="lan",peer="b.test:4789"} 0.25`,
		`patchbay_peer_loss_ratio{network="lan",peer="b.test:4789"} 0.5`,
		`patchbay_peer_receive_frames_total{network="lan",peer="b.test:4789"} 3`,
		`patchbay_peer_transmit_bytes_total{network="lan",peer="b.test:4789"} 9`,
		`patchbay_peer_drops_total{network="lan",peer="b.test:4789",reason="too-big"} 2`,
	} {
		if !strings.Contains(string(b), line+"\n") {
			t.Errorf("no line %s", line)
		}
	}
	// The strict registry compares what is collected with what is described.
	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(&collector{b: s.fake})
	if _, err := reg.Gather(); err != nil {
		t.Error(err)
	}
}

func TestResolve(t *testing.T) {
	s := start(t, ServerConfig{})
	for _, k := range []string{"lan/web", "dmz/web", "lan/db"} {
		network, name, _ := strings.Cut(k, "/")
		s.attachments[k] = Attachment{Network: network, Name: name}
	}
	for _, c := range []struct {
		ref, want string
		code      Code
	}{
		{"db", "lan/db", ""}, {"DB", "lan/db", ""}, {"dmz/web", "dmz/web", ""},
		{"web", "dmz/web, lan/web", CodeConflict}, {"none", "patchbay ps", CodeNotFound}, {"dmz/db", `"db" on network "dmz"`, CodeNotFound},
		{"", "not a host name", CodeInvalid}, {"a/b/c", "NETWORK/NAME", CodeInvalid}, {"/", "NETWORK/NAME", CodeInvalid},
	} {
		network, name, err := s.client.Resolve(t.Context(), c.ref)
		if c.code == "" {
			if err != nil || network+"/"+name != c.want {
				t.Errorf("%q: %s/%s, %v", c.ref, network, name, err)
			}
			continue
		}
		text := fmt.Sprint(err)
		if c.code == CodeConflict { // in the order in which the node lists them
			text = strings.ReplaceAll(text, "lan/web, dmz/web", "dmz/web, lan/web")
		}
		if CodeOf(err) != c.code || !strings.Contains(text, c.want) || network != "" || name != "" {
			t.Errorf("%q: %s/%s, %v", c.ref, network, name, err)
		}
	}
}

// TestNotANode is another server at the socket.
func TestNotANode(t *testing.T) {
	path := t.TempDir() + "/s"
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/v1/info" {
			_, _ = io.WriteString(w, "<html>")
			return
		}
		http.Error(w, "go away", http.StatusTeapot)
	})}
	go func() { _ = srv.Serve(l) }()
	defer srv.Close()
	c := NewClient(path)
	defer c.Close()
	for _, err := range []error{c.Health(t.Context()), func() error { _, err := c.Info(t.Context()); return err }(), func() error { _, err := c.Attach(t.Context(), "n", AttachmentSpec{}); return err }()} {
		if CodeOf(err) != CodeInternal || !strings.Contains(fmt.Sprint(err), "is it a patchbay node") {
			t.Errorf("%v", err)
		}
	}
}
