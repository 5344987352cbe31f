package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"patchbay/internal/api"
	"patchbay/internal/wire"
	"patchbay/ipam"
	"patchbay/nat"
)

// MaxSize bounds a file, in bytes.
const MaxSize = 1 << 20

// DefaultNetwork is the network of a rule that names none.
const DefaultNetwork = "default"

// File is a configuration as it was read.
type File struct {
	Path     string
	Networks []Network
	Publish  []Rule
}

// Network is one the node is to have.
type Network struct {
	api.NetworkSpec
	Peers []Peer
	Line  int // where it stands in the file
}

// Peer is a node on another host that a network is to go on at.
type Peer struct {
	api.PeerSpec
	Line int
}

// Rule publishes a range of ports of an attachment, whenever one of that name is there.
type Rule struct {
	Network    string
	Attachment string
	Spec       nat.Spec
	Line       int
}

// Load reads the file at path.
func Load(path string) (*File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("configuration: %w; name a file that you may read with --config", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, MaxSize+1))
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	return Parse(path, b)
}

// Parse reads b; path is for errors alone. An error is one line, PATH:LINE: what is wrong; what would be right.
func Parse(path string, b []byte) (*File, error) {
	p := &parser{path: path}
	if len(b) > MaxSize {
		return nil, p.errorf(1, "the file is longer than %d bytes; is it the right one?", MaxSize)
	}
	var doc yaml.Node
	dec := yaml.NewDecoder(bytes.NewReader(b))
	switch err := dec.Decode(&doc); {
	case errors.Is(err, io.EOF):
		return &File{Path: path}, nil // empty, or comments alone
	case err != nil:
		return nil, p.syntax(err)
	}
	if err := dec.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return nil, p.errorf(doc.Line, "a second document follows; put everything into one")
	}
	f := &File{Path: path}
	err := p.mapping(doc.Content[0], "the file", map[string]field{
		"networks": func(n *yaml.Node) (err error) { f.Networks, err = p.networks(n); return err },
		"publish":  func(n *yaml.Node) (err error) { f.Publish, err = p.rules(n); return err },
	})
	if err != nil {
		return nil, err
	}
	return f, nil
}

// parser knows where it is, for its errors.
type parser struct{ path string }

func (p *parser) errorf(line int, format string, args ...any) error {
	return fmt.Errorf("%s:%d: %w", p.path, line, fmt.Errorf(format, args...))
}

// syntax words an error of the library, which says "yaml: line 3: …".
func (p *parser) syntax(err error) error {
	msg := strings.ReplaceAll(strings.TrimPrefix(err.Error(), "yaml: "), "\n", " ")
	line := 1
	if n, serr := fmt.Sscanf(msg, "line %d:", &line); n == 1 && serr == nil {
		_, msg, _ = strings.Cut(msg, ": ")
	}
	return p.errorf(line, "not YAML: %s; check the indentation and quotes there", msg)
}

// field reads the value of one key.
type field func(n *yaml.Node) error

// mapping reads a mapping whose keys are all known.
func (p *parser) mapping(n *yaml.Node, what string, fields map[string]field) error {
	return p.each(n, what, func(key, value *yaml.Node) error {
		f := fields[key.Value]
		if f == nil {
			return p.errorf(key.Line, "%s has no setting %q; there are %s", what, clip(key.Value), names(fields))
		}
		return f(value)
	})
}

// each goes through a mapping with keys of any name.
func (p *parser) each(n *yaml.Node, what string, f func(key, value *yaml.Node) error) error {
	if n.Kind == yaml.ScalarNode && n.Tag == "!!null" {
		return nil // a key with nothing behind it
	}
	if n.Kind != yaml.MappingNode {
		return p.errorf(n.Line, "%s wants settings, each NAME: VALUE", what)
	}
	seen := make(map[string]int, len(n.Content)/2)
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		if key.Kind != yaml.ScalarNode {
			return p.errorf(key.Line, "%s has a setting whose name is no word", what)
		}
		if line, twice := seen[key.Value]; twice {
			return p.errorf(key.Line, "%s has %q twice, first in line %d; keep one", what, clip(key.Value), line)
		}
		seen[key.Value] = key.Line
		if err := f(key, value); err != nil {
			return err
		}
	}
	return nil
}

// list reads a sequence, or one value that stands for a sequence of one.
func (p *parser) list(n *yaml.Node, f func(n *yaml.Node) error) error {
	switch {
	case n.Kind == yaml.ScalarNode && n.Tag == "!!null":
		return nil
	case n.Kind != yaml.SequenceNode:
		return f(n)
	}
	for _, c := range n.Content {
		if err := f(c); err != nil {
			return err
		}
	}
	return nil
}

// text reads a value that is written as a word.
func (p *parser) text(n *yaml.Node) (string, error) {
	if n.Kind != yaml.ScalarNode || n.Tag == "!!null" {
		return "", p.errorf(n.Line, "a word is wanted here")
	}
	return n.Value, nil
}

// scalar reads into v what the library makes of the value.
func scalar[T bool | int | uint32](p *parser, v *T, want string) field {
	return func(n *yaml.Node) error {
		if n.Kind != yaml.ScalarNode || n.Tag == "!!null" || n.Decode(v) != nil {
			return p.errorf(n.Line, "%q is not %s", clip(n.Value), want)
		}
		return nil
	}
}

// values appends what parse makes of each word of a list.
func values[T any](p *parser, to *[]T, parse func(string) (T, error)) field {
	return func(n *yaml.Node) error {
		return p.list(n, func(n *yaml.Node) error {
			s, err := p.text(n)
			if err != nil {
				return err
			}
			v, err := parse(s)
			if err != nil {
				return p.errorf(n.Line, "%w", err)
			}
			*to = append(*to, v)
			return nil
		})
	}
}

// networks reads the mapping of networks, in the file's order.
func (p *parser) networks(n *yaml.Node) (out []Network, err error) {
	names := make(map[string]int)
	err = p.each(n, "networks", func(key, value *yaml.Node) error {
		nw := Network{Line: key.Line}
		nw.Name = strings.ToLower(key.Value)
		const yesNo = "true or false"
		err := p.mapping(value, fmt.Sprintf("network %q", clip(key.Value)), map[string]field{
			"subnets":      values(p, &nw.Subnets, ipam.ParseSubnet),
			"gateways":     values(p, &nw.Gateways, parseAddr),
			"mtu":          scalar(p, &nw.MTU, "a number of bytes, such as 1500"),
			"internal":     scalar(p, &nw.Internal, yesNo),
			"isolate":      scalar(p, &nw.Isolate, yesNo),
			"vni":          scalar(p, &nw.VNI, "a number from 1 to 16777215"),
			"dns":          values(p, &nw.DNS, api.ParseResolver),
			"hostLoopback": scalar(p, &nw.HostLoopback, yesNo),
			"linkLocal":    scalar(p, &nw.LinkLocal, yesNo),
			"wire":         p.wire(&nw.Wire),
			"seal":         scalar(p, &nw.Seal, yesNo),
			"port":         p.port(&nw.Port),
			"group":        func(n *yaml.Node) (err error) { nw.Group, err = p.text(n); return err },
			"ipRange":      values(p, &nw.IPRanges, parsePrefix),
			"peers":        func(n *yaml.Node) (err error) { nw.Peers, err = p.peers(n); return err },
		})
		if err != nil {
			return err
		}
		if err := nw.Validate(); err != nil {
			return p.errorf(nw.Line, "%w", err)
		}
		if len(nw.Peers) > 0 && nw.VNI == 0 {
			return p.errorf(nw.Peers[0].Line, "network %q has peers and no vni; give it one, the same on all its nodes", nw.Name)
		}
		if line, twice := names[nw.Name]; twice {
			return p.errorf(nw.Line, "network %q stands twice, first in line %d; keep one", nw.Name, line)
		}
		names[nw.Name] = nw.Line
		out = append(out, nw)
		return nil
	})
	return out, err
}

func parseAddr(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" {
		return netip.Addr{}, fmt.Errorf("%q is not an address; write one such as 10.9.0.1", clip(s))
	}
	return a.Unmap(), nil
}

// parsePrefix leaves it to NetworkSpec.Validate whether the prefix is of use.
func parsePrefix(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("%q is no range of addresses; write one such as 10.9.0.64/26", clip(s))
	}
	return p, nil
}

// wire reads the name of a wire.
func (p *parser) wire(to *api.Wire) field {
	return func(n *yaml.Node) error {
		s, err := p.text(n)
		if err != nil {
			return err
		}
		if *to = api.Wire(s); *to != api.WireVXLAN && *to != api.WirePatchbay {
			return p.errorf(n.Line, "wire %q is not known; use vxlan or patchbay", clip(s))
		}
		return nil
	}
}

// port reads a UDP port.
func (p *parser) port(to *uint16) field {
	return func(n *yaml.Node) error {
		var v int
		if err := scalar(p, &v, "a port from 1 to 65535")(n); err != nil {
			return err
		}
		if v < 1 || v > 65535 {
			return p.errorf(n.Line, "%q is not a port from 1 to 65535", clip(n.Value))
		}
		*to = uint16(v)
		return nil
	}
}

// peers reads a network's list of peers, each a word or a mapping.
func (p *parser) peers(n *yaml.Node) (out []Peer, err error) {
	seen := make(map[string]int)
	err = p.list(n, func(n *yaml.Node) error {
		peer := Peer{Line: n.Line}
		host := func(n *yaml.Node) error {
			s, err := p.text(n)
			if err == nil {
				peer.Host, peer.Port, err = api.ParsePeer(s)
				if err != nil {
					err = p.errorf(n.Line, "%w", err)
				}
			}
			return err
		}
		var err error
		if n.Kind == yaml.ScalarNode {
			err = host(n)
		} else {
			const yesNo = "true or false"
			err = p.mapping(n, "a peer", map[string]field{
				"host": host, "wire": p.wire(&peer.Wire), "noOffload": scalar(p, &peer.NoOffload, yesNo), "onePort": scalar(p, &peer.OnePort, yesNo),
				"fdb": values(p, &peer.FDB, parseMAC),
			})
		}
		switch {
		case err != nil:
			return err
		case peer.Host == "":
			return p.errorf(peer.Line, "a peer has no host; name it, such as b.example.test")
		}
		if err := peer.Validate(); err != nil {
			return p.errorf(peer.Line, "%w", err)
		}
		ref := api.PeerRef(peer.Host, peer.Port)
		if line, twice := seen[ref]; twice {
			return p.errorf(peer.Line, "peer %q stands twice, first in line %d; keep one", ref, line)
		}
		seen[ref] = peer.Line
		out = append(out, peer)
		return nil
	})
	return out, err
}

func parseMAC(s string) (m wire.MAC, err error) {
	if err := m.UnmarshalText([]byte(s)); err != nil {
		return m, fmt.Errorf("%q is no MAC; write one such as 02:00:5e:10:00:01", clip(s))
	}
	return m, nil
}

// rules reads the list of published ports.
func (p *parser) rules(n *yaml.Node) (out []Rule, err error) {
	seen := make(map[Rule]int)
	err = p.list(n, func(n *yaml.Node) error {
		r := Rule{Network: DefaultNetwork, Line: n.Line}
		var specs []nat.Spec
		name := func(to *string) field {
			return func(n *yaml.Node) (err error) {
				if *to, err = p.text(n); err == nil {
					err = api.CheckName(*to)
				}
				if err != nil {
					return p.errorf(n.Line, "%w", err)
				}
				*to = strings.ToLower(*to)
				return nil
			}
		}
		err := p.mapping(n, "a rule of publish", map[string]field{
			"network": name(&r.Network), "attachment": name(&r.Attachment), "ports": values(p, &specs, nat.ParseSpec),
		})
		switch {
		case err != nil:
			return err
		case r.Attachment == "":
			return p.errorf(r.Line, "a rule of publish has no attachment; name whose ports they are")
		case len(specs) == 0:
			return p.errorf(r.Line, "a rule of publish has no ports; write some, such as \"8080:80\"")
		}
		for _, s := range specs {
			r.Spec = s
			key := r
			key.Line = 0
			if line, twice := seen[key]; twice {
				return p.errorf(r.Line, "ports %s of %q are published twice, first in line %d; keep one", s, r.Attachment, line)
			}
			seen[key] = r.Line
			out = append(out, r)
		}
		return nil
	})
	return out, err
}

// names lists what a mapping may have, for an error.
func names(fields map[string]field) string {
	return strings.Join(slices.Sorted(maps.Keys(fields)), ", ")
}

// clip keeps an error on one line whatever was written.
func clip(s string) string {
	const most = 60
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}
