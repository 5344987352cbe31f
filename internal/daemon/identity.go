package daemon

import (
	"fmt"
	"strings"
	"time"

	"patchbay/internal/api"
	"patchbay/tunnel"
	"patchbay/tunnel/secure"
)

// LoadIdentity reads what --identity names: CERT,KEY,CA, three files in PEM.
func LoadIdentity(spec string) (*secure.Identity, error) {
	files := strings.Split(spec, ",")
	if len(files) != 3 || files[0] == "" || files[1] == "" || files[2] == "" {
		return nil, fmt.Errorf("identity %.200q: want three files, CERT,KEY,CA, such as node.crt,node.key,ca.crt", spec)
	}
	return secure.LoadIdentity(files[0], files[1], files[2])
}

// sealing is why a sealed network cannot be had: this node has nothing to be known by. Nothing clear ever goes in or out of such a network, so it is refused, or its peers wait.
func (n *Node) sealing(spec *api.NetworkSpec) error {
	if !spec.Seal {
		return nil
	}
	if n.cfg.Identity == nil {
		return api.Errorf(api.CodeInvalid, "start the daemon with --identity CERT,KEY,CA or --psk-file FILE", "network %q is sealed, and this node has nothing to be known by to its peers", spec.Name)
	}
	if err := n.cfg.Identity.Check(spec.Name, time.Now()); err != nil {
		return api.Errorf(api.CodeInvalid, "give the daemon a certificate for it, as `patchbay ca issue DIR HOST --network "+spec.Name+"` makes", "network %q is sealed: %v", spec.Name, err)
	}
	return nil
}

// seal is how what goes between this node and p is sealed; nil on a clear network. p.mu is held.
func (p *peer) seal() (*tunnel.Seal, error) {
	spec := &p.network.rec.NetworkSpec
	if err := p.node.sealing(spec); err != nil || !spec.Seal {
		return nil, err
	}
	s := &tunnel.Seal{Identity: p.node.cfg.Identity, Network: spec.Name, Host: p.rec.Host, Sessions: p.sessions}
	p.sessions = nil
	return s, nil
}

// handOverSessions sends the keys of sealed tunnels to a successor. Nothing is received any more.
func (n *Node) handOverSessions(send func(p api.Part, fds []int) error) error {
	for _, nw := range n.sorted() {
		for _, p := range n.peersOf(nw) {
			p.mu.Lock()
			var b []byte
			var err error
			if p.live != nil {
				b, err = p.live.ExportSessions()
			}
			p.mu.Unlock()
			if err == nil && b != nil {
				err = send(api.Part{Kind: api.PartSessions, Network: nw.rec.Name, Name: n.peerKey(nw, p.rec.Host, p.rec.Port), Data: b}, nil)
			}
			if err != nil {
				return fmt.Errorf("hand over peer %q of network %q: %w", p.rec.Host, nw.rec.Name, err)
			}
		}
	}
	return nil
}
