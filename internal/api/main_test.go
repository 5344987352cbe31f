package api

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/internal/edge"
	"patchbay/internal/testbed"
	"patchbay/internal/wire"
	"patchbay/tap"
)

// envNext makes this binary a node that listens at what descriptor 3 is, until its standard input ends.
const envNext = "PATCHBAY_TEST_API_NEXT"

func TestMain(m *testing.M) {
	if os.Getenv(envNext) != "" {
		l, err := ListenFile(os.NewFile(3, "listener"))
		fmt.Println(err)
		_, _ = io.Copy(io.Discard, os.Stdin)
		if err == nil {
			l.Close()
		}
		os.Exit(0)
	}
	testbed.Main(m)
}

// fake is a Backend that remembers what it was asked; the node's own tests show that the real one does it.
type fake struct {
	mu          sync.Mutex
	networks    map[string]Network
	attachments map[string]Attachment // by NETWORK/NAME
	publishes   map[string]Publish
	peers       []Peer
	calls       []string
	sessions    []*fakeAttaching
	plugErr     error
	err         error         // of every call that can fail, when set
	slow        chan struct{} // Attach waits for it, when set
	waiting     int           // Attaches that do or did
	capture     func(ctx context.Context, w io.Writer) error
	captureSpec CaptureSpec
	handing     *fakeHanding // nil: refuses to hand over
}

// fakeHanding says what became of a handover.
type fakeHanding struct {
	fds   []int
	ended chan string
}

func (h *fakeHanding) Commit() { h.ended <- "committed" }
func (h *fakeHanding) Resume() { h.ended <- "resumed" }

func newFake() *fake {
	return &fake{networks: map[string]Network{}, attachments: map[string]Attachment{}, publishes: map[string]Publish{}}
}

// note counts a call as a change, unless the fake is told to fail.
func (f *fake) note(format string, args ...any) error {
	f.calls = append(f.calls, fmt.Sprintf(format, args...))
	return f.err
}

// HandOver gives the other end of a pipe, so that a test sees it arrive.
func (f *fake) HandOver(send func(Part, []int) error) (Handing, error) {
	if f.handing == nil {
		return nil, Errorf(CodeUnavailable, "try again", "no handover now")
	}
	if err := send(Part{Kind: PartTAP, Network: "lab", Name: "web"}, f.handing.fds); err != nil {
		return nil, err
	}
	return f.handing, nil
}

func (f *fake) Info() Info { return Info{Version: "v0-test", PID: os.Getpid(), StateDir: "/state"} }

func (f *fake) Networks() (l []Network) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, n := range f.networks {
		l = append(l, n)
	}
	return l
}

func noNetwork(name string) error {
	return Errorf(CodeNotFound, "`patchbay network ls` lists them", "there is no network %q", abbreviate(name))
}

func (f *fake) Network(name string) (Network, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n, ok := f.networks[name]
	if !ok {
		return n, noNetwork(name)
	}
	return n, f.err
}

func (f *fake) CreateNetwork(_ context.Context, spec NetworkSpec) (Network, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, taken := f.networks[spec.Name]; taken {
		return Network{}, Errorf(CodeConflict, "choose another name", "there is a network %q already", spec.Name)
	}
	if err := f.note("create %s", spec.Name); err != nil {
		return Network{}, err
	}
	n := Network{NetworkSpec: spec, ID: "id-" + spec.Name, Origin: "api", Ports: []Port{{Name: Gateway, RxFrames: 7}}, Flows: Flows{TCP: 3}}
	f.networks[spec.Name] = n
	return n, nil
}

func (f *fake) RemoveNetwork(_ context.Context, name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.networks[name]; !ok {
		return noNetwork(name)
	}
	delete(f.networks, name)
	return f.note("remove %s", name)
}

func (f *fake) Attachments(network string) (l []Attachment, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.networks[network]; !ok && network != "" {
		return nil, noNetwork(network)
	}
	for _, a := range f.attachments {
		if network == "" || a.Network == network {
			l = append(l, a)
		}
	}
	return l, f.err
}

func (f *fake) Attachment(network, name string) (Attachment, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	a, ok := f.attachments[network+"/"+name]
	if !ok {
		return a, Errorf(CodeNotFound, "`patchbay ps` lists them", "there is no attachment %q on network %q", name, network)
	}
	return a, f.err
}

func (f *fake) Attach(_ context.Context, network string, spec AttachmentSpec, peer Caller) (Attaching, error) {
	f.mu.Lock()
	slow := f.slow
	defer f.mu.Unlock()
	if slow != nil {
		f.waiting++
		f.mu.Unlock()
		<-slow
		f.mu.Lock()
	}
	if _, ok := f.networks[network]; !ok {
		return nil, noNetwork(network)
	}
	if err := f.note("attach %s/%s", network, spec.Name); err != nil {
		return nil, err
	}
	a := &fakeAttaching{f: f, att: Attachment{Network: network, Name: spec.Name, Lifetime: spec.Lifetime, PID: peer.PID}, detached: make(chan struct{}), peer: peer}
	f.sessions = append(f.sessions, a)
	return a, nil
}

func (f *fake) Resume(ctx context.Context, network, name string, peer Caller) (Attaching, error) {
	if _, err := f.Attachment(network, name); err != nil {
		return nil, err
	}
	return f.Attach(ctx, network, AttachmentSpec{Name: name, Lifetime: LifetimeSession}, peer)
}

func (f *fake) AttachStream(_ context.Context, network string, spec AttachmentSpec) (Attachment, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.note("stream %s/%s", network, spec.Name); err != nil {
		return Attachment{}, err
	}
	a := Attachment{Network: network, Name: spec.Name, Lifetime: spec.Lifetime, Stream: spec.Stream, State: StateWaiting}
	f.attachments[network+"/"+spec.Name] = a
	return a, nil
}

func (f *fake) Detach(_ context.Context, network, name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.attachments[network+"/"+name]; !ok {
		return Errorf(CodeNotFound, "`patchbay ps` lists them", "there is no attachment %q on network %q", name, network)
	}
	delete(f.attachments, network+"/"+name)
	for _, a := range f.sessions {
		if a.att.Network == network && a.att.Name == name {
			close(a.detached)
		}
	}
	return f.note("detach %s/%s", network, name)
}

func (f *fake) Publishes() (l []Publish) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, p := range f.publishes {
		l = append(l, p)
	}
	return l
}

func (f *fake) AddPublish(_ context.Context, network, attachment string, spec PublishSpec) (Publish, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := Publish{ID: fmt.Sprintf("p%d", len(f.publishes)+1), Network: network, Attachment: attachment, Spec: spec.Spec, Origin: "api"}
	f.publishes[p.ID] = p
	return p, f.note("publish %s", spec.Spec)
}

func (f *fake) RemovePublish(_ context.Context, id string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.publishes[id]; !ok {
		return Errorf(CodeNotFound, "`patchbay publish ls` lists them", "there is no published port %q", id)
	}
	delete(f.publishes, id)
	return f.note("unpublish %s", id)
}

func (f *fake) Peers(network string) (l []Peer, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.networks[network]; !ok && network != "" {
		return nil, noNetwork(network)
	}
	for _, p := range f.peers {
		if network == "" || p.Network == network {
			l = append(l, p)
		}
	}
	return l, f.err
}

func (f *fake) AddPeer(_ context.Context, network string, spec PeerSpec) (Peer, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.networks[network]; !ok {
		return Peer{}, noNetwork(network)
	}
	p := Peer{PeerSpec: spec, Network: network, State: PeerUp, Sealed: true, RTT: 0.25, Loss: 0.5, RxFrames: 3, TxBytes: 9, Drops: []DropCount{{Reason: "too-big", Count: 2}}, Origin: "api"}
	f.peers = append(f.peers, p)
	return p, f.note("peer %s", PeerRef(spec.Host, spec.Port))
}

// peer finds one; f.mu is held.
func (f *fake) peer(network, ref string) (*Peer, error) {
	for i := range f.peers {
		if p := &f.peers[i]; p.Network == network && PeerRef(p.Host, p.Port) == ref {
			return p, nil
		}
	}
	return nil, Errorf(CodeNotFound, "`patchbay peer ls` lists them", "network %q has no peer %q", network, ref)
}

func (f *fake) RemovePeer(_ context.Context, network, ref string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, err := f.peer(network, ref); err != nil {
		return err
	}
	f.peers = slices.DeleteFunc(f.peers, func(p Peer) bool { return p.Network == network && PeerRef(p.Host, p.Port) == ref })
	return f.note("unpeer %s", ref)
}

func (f *fake) AddPeerFDB(_ context.Context, network, ref string, mac wire.MAC) (Peer, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p, err := f.peer(network, ref)
	if err != nil {
		return Peer{}, err
	}
	p.FDB = append(p.FDB, mac)
	return *p, f.note("fdb %s %s", ref, mac)
}

func (f *fake) RemovePeerFDB(_ context.Context, network, ref string, mac wire.MAC) (Peer, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p, err := f.peer(network, ref)
	if err != nil {
		return Peer{}, err
	}
	p.FDB = slices.DeleteFunc(p.FDB, func(m wire.MAC) bool { return m == mac })
	return *p, f.note("unfdb %s %s", ref, mac)
}

func (f *fake) FDB(network string) ([]FDBEntry, error) {
	if _, err := f.Network(network); err != nil {
		return nil, err
	}
	return []FDBEntry{{Port: "web", Age: 1.5}}, nil
}

func (f *fake) Drops(network string) ([]DropCount, error) {
	if network != "" {
		if _, err := f.Network(network); err != nil {
			return nil, err
		}
	}
	return []DropCount{{Network: network, Reason: "storm", Count: 5, Meaning: "too many"}}, nil
}

func (f *fake) Capture(network string, spec CaptureSpec) (func(context.Context, io.Writer) error, error) {
	if _, err := f.Network(network); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.captureSpec = spec
	return f.capture, f.err
}

// slowed waits until an Attach waits.
func (f *fake) slowed(t *testing.T) {
	t.Helper()
	testbed.Eventually(t, 20*time.Second, func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return f.waiting > 0
	})
}

// session is the n-th that was begun, once it is there.
func (f *fake) session(t *testing.T, n int) *fakeAttaching {
	t.Helper()
	var a *fakeAttaching
	testbed.Eventually(t, 20*time.Second, func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		if len(f.sessions) > n {
			a = f.sessions[n]
		}
		return a != nil
	})
	return a
}

// fakeAttaching counts what the server does with it.
type fakeAttaching struct {
	f        *fake
	att      Attachment
	peer     Caller
	detached chan struct{}

	mu            sync.Mutex
	plugs, aborts int
	leaves        int
	device        Device
	plugged       bool
}

func (a *fakeAttaching) Plan() Plan {
	return Plan{
		Network: a.att.Network, Name: a.att.Name,
		Interface: edge.Interface{Name: "eth0", MTU: 1500, Addrs: []netip.Prefix{netip.MustParsePrefix("10.88.0.2/24")}, Kind: tap.KindAuto}, Hosts: []byte("127.0.0.1 localhost\n"),
	}
}

func (a *fakeAttaching) Plug(_ context.Context, d Device) (Attachment, error) {
	a.f.mu.Lock()
	err := a.f.plugErr
	if err == nil {
		a.f.attachments[a.att.Network+"/"+a.att.Name] = a.att
	}
	a.f.mu.Unlock()
	a.mu.Lock()
	defer a.mu.Unlock()
	a.plugs++
	a.device = d
	a.plugged = err == nil
	if err != nil {
		closeAll(d.FDs)
		return Attachment{}, err
	}
	a.att.State, a.att.PID = StateUp, d.PID
	return a.att, nil
}

func (a *fakeAttaching) Abort() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.aborts++
}

func (a *fakeAttaching) Detached() <-chan struct{} { return a.detached }

func (a *fakeAttaching) Leave() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.leaves++
}

// is waits until the counts are as given.
func (a *fakeAttaching) is(t *testing.T, plugs, aborts, leaves int) {
	t.Helper()
	var got [3]int
	if !testbed.Wait(20*time.Second, func() bool {
		a.mu.Lock()
		defer a.mu.Unlock()
		got = [3]int{a.plugs, a.aborts, a.leaves}
		return got == [3]int{plugs, aborts, leaves}
	}) {
		t.Errorf("plugs, aborts, leaves: %v, want %v", got, [3]int{plugs, aborts, leaves})
	}
}

// started is a server on a socket of its own.
type started struct {
	*fake
	path   string
	l      *net.UnixListener
	client *Client
	stop   func() error // ends Serve and waits for it
}

func start(t *testing.T, cfg ServerConfig) *started {
	t.Helper()
	// Before the server, so that it is checked after its end.
	testbed.Leaks(t)
	path := filepath.Join(t.TempDir(), "patchbay", "node.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	return startOn(t, l, newFake(), cfg)
}

func startOn(t *testing.T, l *net.UnixListener, f *fake, cfg ServerConfig) *started {
	t.Helper()
	cfg.Backend = f
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.NewTextHandler(noPanic{t}, nil))
	}
	s := NewServer(cfg)
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, l) }()
	path := l.Addr().String()
	st := &started{fake: f, path: path, l: l, client: NewClient(path)}
	st.stop = sync.OnceValue(func() error {
		cancel()
		select {
		case err := <-served:
			return err
		case <-time.After(30 * time.Second):
			return fmt.Errorf("Serve does not end")
		}
	})
	t.Cleanup(func() {
		if err := st.stop(); err != nil {
			t.Error(err)
		}
		st.client.Close()
		for _, a := range f.sessions { // a node closes what it was given
			if a.plugged {
				closeAll(a.device.FDs)
			}
		}
	})
	return st
}

func (s *started) network(t *testing.T, name string) {
	t.Helper()
	if _, err := s.client.CreateNetwork(t.Context(), NetworkSpec{Name: name}); err != nil {
		t.Fatal(err)
	}
}

// pipe is a real descriptor to hand over, and what is written to it comes out at r.
func pipe(t *testing.T) (r *os.File, w int) {
	t.Helper()
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	r = os.NewFile(uintptr(p[0]), "pipe")
	t.Cleanup(func() { r.Close() })
	return r, p[1]
}

// noPanic fails the test for a panic that net/http would hide.
type noPanic struct{ t *testing.T }

func (n noPanic) Write(b []byte) (int, error) {
	if strings.Contains(string(b), "panic") {
		n.t.Errorf("%s", b)
	}
	return len(b), nil
}

func timeout(t *testing.T, d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(t.Context(), d)
}
