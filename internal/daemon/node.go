package daemon

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/internal/api"
	"patchbay/internal/config"
	"patchbay/internal/node"
	"patchbay/ipam"
	"patchbay/ipam/store"
	"patchbay/nat"
	"patchbay/tunnel"
	"patchbay/tunnel/secure"
)

// DefaultNetwork is the network of who names none. A node that starts makes it if it is not there.
const DefaultNetwork = "default"

// Defaults of Config and of attachments.
const (
	DefaultMaxNetworks    = 1024
	DefaultMaxAttachments = 4096 // of one network; the switch has as many ports
	DefaultStormLimit     = 10000
	DefaultMACLimit       = 16
)

// Config says how a node is made. StateDir is required; the zero value of every other field is its documented default.
type Config struct {
	// StateDir is where networks, attachments and leases are kept.
	StateDir string
	// Version is what Info says.
	Version string
	// ConfigFile is what Info says; Apply does the work.
	ConfigFile string
	// MaxNetworks and MaxAttachments (of one network) bound what may be made. Default DefaultMaxNetworks and DefaultMaxAttachments.
	MaxNetworks, MaxAttachments int
	// Listen is where tunnels listen once there is a peer: the address, and the port of networks that name none. Default DefaultListen.
	Listen netip.AddrPort
	// Identity is who this node is on sealed networks: a certificate, or a key that all nodes have. Default: nobody, there can be no sealed network.
	Identity *secure.Identity
	// Resolve looks the names of peers up. Default: the host's resolver.
	Resolve func(ctx context.Context, host string) ([]netip.Addr, error)
	// Limits bound what containers can make grow, network by network.
	Limits nat.Limits
	// Logger gets state changes. Default: none.
	Logger *slog.Logger
}

// Node owns networks and their attachments. It implements api.Backend. Safe for concurrent use.
type Node struct {
	cfg     Config
	log     *slog.Logger
	started time.Time
	state   *state
	leases  *store.Bolt
	vteps   vteps

	background sync.WaitGroup // watchers and restorers
	ctx        context.Context
	cancel     context.CancelFunc

	mu        sync.Mutex
	closed    bool
	freezing  bool           // for a takeover that waits for the changes under way
	frozen    bool           // by a takeover that is under way
	changes   sync.WaitGroup // those that begin has let in
	takenOver chan struct{}  // closed when another node has taken over
	networks  map[string]*network
	publishes map[string]*publish // by id
	serial    int                 // numbers the attachments that were given no name
	queues    int                 // of TAPs, that have a thread each
	rules     []config.Rule       // of the configuration
}

// network is a network with what the node knows about it. Its maps are guarded by Node.mu.
type network struct {
	*node.Network
	rec         networkRecord // but for the MTU, which Network.MTU knows
	attachments map[string]*attachment
	peers       map[string]*peer // by peerKey

	peering sync.Mutex // held while peers come and go
	saving  sync.Mutex // held while rec is written
}

// New opens the state and brings everything back that is in it: networks and published ports before it returns, attachments in the background as their namespaces are found or their
// clients come. The caller closes the node.
func New(ctx context.Context, cfg Config) (*Node, error) { return newNode(ctx, cfg, nil) }

// newNode is New that goes on with what another node has handed over, if it is not nil.
func newNode(ctx context.Context, cfg Config, from *inheritance) (_ *Node, err error) {
	if cfg.StateDir, err = filepath.Abs(cfg.StateDir); err != nil {
		return nil, fmt.Errorf("state directory %q: %w; name an absolute one with --state-dir", cfg.StateDir, err)
	}
	cfg.MaxNetworks = cmp.Or(cfg.MaxNetworks, DefaultMaxNetworks)
	cfg.MaxAttachments = cmp.Or(cfg.MaxAttachments, DefaultMaxAttachments)
	if !cfg.Listen.IsValid() {
		cfg.Listen = DefaultListen
	}
	if cfg.Resolve == nil {
		cfg.Resolve = func(ctx context.Context, host string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		}
	}
	n := &Node{cfg: cfg, log: cfg.Logger, started: time.Now(), networks: make(map[string]*network), publishes: make(map[string]*publish), takenOver: make(chan struct{})}
	if n.log == nil {
		n.log = slog.New(slog.DiscardHandler)
	}
	n.cfg.Limits = n.cfg.Limits.Fit(n.log) // once, and not for each network
	n.vteps = vteps{n: n, by: make(map[uint16]*vtep)}
	n.ctx, n.cancel = context.WithCancel(context.WithoutCancel(ctx))
	if n.state, err = openState(cfg.StateDir); err != nil {
		n.cancel()
		return nil, err
	}
	defer func() {
		if err != nil {
			n.Close()
		}
	}()
	if n.leases, err = store.New(n.state.file, leaseBucket); err != nil {
		return nil, err
	}
	if err := n.restore(ctx, from); err != nil {
		return nil, err
	}
	n.background.Go(n.watchNamespaces)
	n.background.Go(n.resetOrphans)
	return n, nil
}

// EnsureDefault makes the default network if it is not there. It is apart from New so that a configuration file may make it otherwise.
func (n *Node) EnsureDefault(ctx context.Context) error {
	if _, err := n.lookup(DefaultNetwork); err == nil {
		return nil
	}
	_, err := n.CreateNetwork(ctx, api.NetworkSpec{Name: DefaultNetwork})
	return err
}

// Close ends the node and leaves what is on disk as it is: attachments come back with the next node. Idempotent.
func (n *Node) Close() error {
	n.mu.Lock()
	if n.closed {
		n.mu.Unlock()
		return nil
	}
	n.closed = true
	nets := slices.Collect(maps.Values(n.networks))
	var as []*attachment
	for _, nw := range nets {
		as = slices.AppendSeq(as, maps.Values(nw.attachments)) // a detach that began before may still take some away
	}
	n.mu.Unlock()
	n.cancel()
	n.background.Wait()
	for _, a := range as {
		a.serving.Wait()
	}
	var errs []error
	for _, nw := range nets {
		errs = append(errs, nw.Shutdown())
	}
	n.vteps.close()
	errs = append(errs, n.state.close())
	return errors.Join(errs...)
}

// begin is called before a change that somebody has asked for, and end after it: a takeover begins when none is under way, and none begins after it, so that what is handed over is what was answered.
func (n *Node) begin() (end func(), err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := n.busy(); err != nil {
		return nil, err
	}
	if n.freezing {
		return nil, errTakenOver
	}
	n.changes.Add(1)
	return n.changes.Done, nil
}

var errTakenOver = api.Errorf(api.CodeUnavailable, "try again in a moment", "the node is being taken over")

// busy is why nothing can be changed now, or nil. n.mu is held.
func (n *Node) busy() error {
	switch {
	case n.closed:
		return api.Errorf(api.CodeUnavailable, "try again when the next one runs", "the node is ending")
	case n.frozen:
		return errTakenOver
	}
	return nil
}

// lookup finds a network by name.
func (n *Node) lookup(name string) (*network, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if nw := n.networks[strings.ToLower(name)]; nw != nil && nw.Network != nil {
		return nw, nil
	}
	return nil, api.Errorf(api.CodeNotFound, "`patchbay network ls` shows those there are", "network %.70q does not exist", name)
}

// Info implements api.Backend.
func (n *Node) Info() api.Info {
	info := api.Info{Version: n.cfg.Version, PID: os.Getpid(), Started: n.started, StateDir: n.cfg.StateDir, Config: n.cfg.ConfigFile}
	switch id := n.cfg.Identity; {
	case id == nil:
	case id.PSK():
		info.Identity = "key"
	default:
		info.Identity, info.Expires = "certificate", id.Expires()
	}
	return info
}

// CreateNetwork implements api.Backend.
func (n *Node) CreateNetwork(ctx context.Context, spec api.NetworkSpec) (api.Network, error) {
	end, err := n.begin()
	if err != nil {
		return api.Network{}, err
	}
	defer end()
	return n.createNetwork(ctx, spec, originAPI)
}

func (n *Node) createNetwork(ctx context.Context, spec api.NetworkSpec, origin string) (api.Network, error) {
	spec.Name = strings.ToLower(spec.Name)
	if err := spec.Validate(); err != nil {
		return api.Network{}, err
	}
	if err := n.sealing(&spec); err != nil {
		return api.Network{}, err
	}
	auto := spec.MTU == 0 && spec.VNI != 0
	if auto {
		var err error
		if spec.MTU, err = n.tunnelMTU(&spec); err != nil {
			return api.Network{}, err
		}
	}
	nw := newNetwork(networkRecord{NetworkSpec: spec, AutoMTU: auto, ID: newID(), Created: time.Now().UTC(), Origin: origin})
	taken, err := n.claim(nw)
	if err != nil {
		return api.Network{}, err
	}
	fail := func(err error) (api.Network, error) {
		n.mu.Lock()
		delete(n.networks, spec.Name)
		n.mu.Unlock()
		return api.Network{}, err
	}
	live, err := n.open(ctx, &nw.rec, false, taken)
	if err != nil {
		return fail(err)
	}
	st := live.Status()
	nw.rec.Subnets, nw.rec.Gateways, nw.rec.MTU, nw.rec.GatewayMAC = st.Subnets, st.Gateway, st.MTU, live.GatewayMAC()
	if err := n.state.put(networkBucket, spec.Name, nw.rec); err != nil {
		return fail(errors.Join(err, live.Close()))
	}
	n.mu.Lock()
	nw.Network = live
	n.mu.Unlock()
	n.log.Info("network created", "network", spec.Name, "id", nw.rec.ID, "origin", origin)
	return n.describeNetwork(nw), nil
}

func newNetwork(rec networkRecord) *network {
	return &network{rec: rec, attachments: make(map[string]*attachment), peers: make(map[string]*peer)}
}

// claim puts nw's name into the table, so that nobody else makes one of that name meanwhile, and says which prefixes others have.
func (n *Node) claim(nw *network) (taken []netip.Prefix, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := n.busy(); err != nil {
		return nil, err
	}
	name := nw.rec.Name
	if n.networks[name] != nil {
		return nil, api.Errorf(api.CodeConflict, "choose another name, or remove it first with `patchbay network rm "+name+"`", "network %q exists already", name)
	}
	if len(n.networks) >= n.cfg.MaxNetworks {
		return nil, api.Errorf(api.CodeExhausted, "remove one, or raise maxNetworks", "network %q: the node has %d networks, which is its limit", name, len(n.networks))
	}
	for _, o := range n.networks {
		if nw.rec.VNI != 0 && o.rec.VNI == nw.rec.VNI {
			return nil, api.Errorf(api.CodeConflict, "choose another with --vni", "network %q: VNI %d is network %q's", name, nw.rec.VNI, o.rec.Name)
		}
		taken = append(taken, o.rec.Subnets...)
	}
	n.networks[name] = nw
	return taken, nil
}

// open makes the live network of a record.
func (n *Node) open(ctx context.Context, rec *networkRecord, restored bool, taken []netip.Prefix) (*node.Network, error) {
	name := rec.Name
	wire, err := tunnel.ParseWire(string(rec.Wire))
	if err != nil {
		return nil, refuse(api.CodeInvalid, err)
	}
	live, err := node.NewNetwork(ctx, node.NetworkConfig{
		Name: rec.Name, Subnets: rec.Subnets, Taken: taken, Restored: restored, Gateways: rec.Gateways, VNI: rec.VNI, Wire: wire, Seal: rec.Seal, Ranges: rec.IPRanges, GatewayMAC: rec.GatewayMAC,
		Internal: rec.Internal, Isolate: rec.Isolate, MTU: rec.MTU, HostLoopback: rec.HostLoopback, AllowLinkLocal: rec.LinkLocal, DNS: rec.DNS,
		Others: func(client netip.Addr) []*node.Network { return n.othersOf(name, client) },
		Leases: n.leases, JournalDir: n.journalDir(rec), Limits: n.cfg.Limits, Logger: n.log, LoopTAPs: node.FewCores(),
	})
	if err != nil {
		return nil, refuse(api.CodeInvalid, err)
	}
	return live, nil
}

// journalDir is where a network's TCP flows are noted.
func (n *Node) journalDir(rec *networkRecord) string {
	return filepath.Join(n.cfg.StateDir, "flows", rec.ID)
}

// othersOf is the further networks of the attachment that has the address on a network, by name.
func (n *Node) othersOf(network string, client netip.Addr) (out []*node.Network) {
	n.mu.Lock()
	defer n.mu.Unlock()
	nw := n.networks[network]
	if nw == nil {
		return nil
	}
	var a *attachment
	for _, b := range nw.attachments {
		if slices.Contains(b.rec.Addrs, client) {
			a = b
		}
	}
	if a == nil {
		return nil
	}
	for _, name := range slices.Sorted(maps.Keys(n.networks)) {
		o := n.networks[name]
		if o == nw || o.Network == nil {
			continue
		}
		for _, b := range o.attachments {
			if !b.going && a.sameNamespace(b) {
				out = append(out, o.Network)
				break
			}
		}
	}
	return out
}

// sameNamespace reports whether two attachments are interfaces of one container. Node.mu is held.
func (a *attachment) sameNamespace(b *attachment) bool {
	x, y := a.rec.Identity, b.rec.Identity
	return a.rec.PID != 0 && a.rec.PID == b.rec.PID || x != nil && y != nil && x.NetDev == y.NetDev && x.NetIno == y.NetIno
}

// RemoveNetwork implements api.Backend.
func (n *Node) RemoveNetwork(ctx context.Context, name string) error {
	end, err := n.begin()
	if err != nil {
		return err
	}
	defer end()
	return n.removeNetwork(ctx, name)
}

func (n *Node) removeNetwork(ctx context.Context, name string) error {
	nw, err := n.lookup(name)
	if err != nil {
		return err
	}
	nw.peering.Lock()
	defer nw.peering.Unlock()
	if left, ok := nw.CloseUnused(); !ok {
		return api.Errorf(api.CodeConflict, "detach them first", "network %q is in use by %s", nw.rec.Name, enumerate(left))
	}
	for _, p := range n.peersOf(nw) {
		p.stop() // it goes with its network, on disk too
	}
	if err := n.state.removeNetwork(nw.rec.Name); err != nil {
		return err
	}
	for _, p := range nw.rec.Subnets {
		if err := n.leases.Drop(ctx, ipam.Key(nw.rec.Name, p)); err != nil {
			n.log.Warn("leases of a removed network stay on disk", "network", nw.rec.Name, "subnet", p, "error", err)
		}
	}
	if err := os.RemoveAll(n.journalDir(&nw.rec)); err != nil {
		n.log.Warn("flows of a removed network stay on disk", "network", nw.rec.Name, "error", err)
	}
	n.mu.Lock()
	delete(n.networks, nw.rec.Name)
	n.mu.Unlock()
	n.log.Info("network removed", "network", nw.rec.Name)
	return nil
}

// enumerate is a list for an error: a few of them, and how many more.
func enumerate(names []string) string {
	const most = 5
	if len(names) > most {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
	}
	return strings.Join(names, ", ")
}

// newID is unique over time.
func newID() string {
	var b [8]byte
	rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// refuse makes an api.Error of what a room below says in one line, "object: reason; remedy".
func refuse(code api.Code, err error) error {
	var e *api.Error
	if errors.As(err, &e) {
		return err
	}
	switch {
	case errors.Is(err, ipam.ErrExhausted):
		code = api.CodeExhausted
	case errors.Is(err, ipam.ErrTaken), errors.Is(err, node.ErrTaken), errors.Is(err, tunnel.ErrTaken), errors.Is(err, unix.EADDRINUSE):
		code = api.CodeConflict
	}
	msg := err.Error()
	remedy := ""
	if i := strings.LastIndex(msg, "; "); i > 0 {
		msg, remedy = msg[:i], msg[i+2:]
	} else if i := strings.LastIndex(msg, ": "); i > 0 && strings.Contains(msg[:i], ": ") {
		msg, remedy = msg[:i], msg[i+2:]
	}
	return &api.Error{Code: code, Message: msg, Remedy: remedy, Err: err}
}
