package main

import (
	"cmp"
	"context"
	"fmt"
	"strings"
	"time"

	"patchbay/internal/api"
	"patchbay/internal/kernel"
)

// tunnelResults are doctor's checks of what the daemon's networks have on other hosts. A daemon that does not answer has nothing to be looked at.
func tunnelResults(ctx context.Context, client *api.Client) (out []kernel.Result) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	nets, err := client.Networks(ctx)
	if err != nil {
		return nil
	}
	if info, err := client.Info(ctx); err == nil {
		if r, ok := identityResult(&info, nets, time.Now()); ok {
			out = append(out, r)
		}
	}
	for _, n := range nets {
		peers, err := client.Peers(ctx, n.Name)
		if err != nil || len(peers) == 0 {
			continue
		}
		out = append(out, mtuResult(&n, peers))
		for _, p := range peers {
			out = append(out, peerResult(&p))
		}
	}
	return out
}

// expiresSoon is how long before its end a certificate is complained of.
const expiresSoon = 14 * 24 * time.Hour

// identityResult tells whether the daemon can be known on its sealed networks, and how long. ok is false when there is nothing to say.
func identityResult(info *api.Info, nets []api.Network, now time.Time) (r kernel.Result, ok bool) {
	var sealed []string
	for _, n := range nets {
		if n.Seal {
			sealed = append(sealed, n.Name)
		}
	}
	r = kernel.Result{Name: "identity", OK: true, Detail: "a key that all nodes have"}
	left := info.Expires.Sub(now)
	switch {
	case info.Identity == "" && len(sealed) == 0:
		return r, false
	case info.Identity == "":
		r.OK, r.Detail = false, "the daemon has none, so nothing gets out of or into sealed networks: "+strings.Join(sealed, ", ")
		r.Remedy = "start it with --identity CERT,KEY,CA or --psk-file FILE"
	case info.Identity != "certificate":
	case left < expiresSoon:
		r.OK, r.Detail = false, fmt.Sprintf("the certificate ends, or has, on %s; sealed tunnels then end within 20 minutes", info.Expires.Format(time.DateOnly))
		r.Remedy = "issue another with `patchbay ca issue --force`, and start the daemon with it (--takeover)"
	default:
		r.Detail = fmt.Sprintf("a certificate, valid for %d days more", int(left.Hours()/24))
	}
	return r, true
}

// mtuResult compares what containers take for the network's MTU with what gets to its peers.
func mtuResult(n *api.Network, peers []api.Peer) kernel.Result {
	r := kernel.Result{Name: "mtu " + n.Name}
	least := api.Peer{}
	for _, p := range peers {
		if p.MTU > 0 && (least.MTU == 0 || p.MTU < least.MTU) {
			least = p
		}
	}
	if least.MTU == 0 {
		r.OK, r.Detail = true, fmt.Sprintf("%d bytes; no peer has a route that would say what gets to it", n.MTU)
		return r
	}
	six := least.Address.Addr().Is6()
	ip := "IPv4"
	if six {
		ip = "IPv6"
	}
	path := fmt.Sprintf("%d bytes get to peer %s: what the path carries less the headers of wire %s over %s", least.MTU, api.PeerRef(least.Host, least.Port), cmp.Or(least.Wire, api.WireVXLAN), ip)
	switch lowest := lowestMTU(n); {
	case least.MTU < lowest:
		r.Detail = fmt.Sprintf("%s, which is less than the %d that the network must have; longer packets are lost", path, lowest)
		r.Remedy = "give the underlay a larger MTU, or the network an IPv4 subnet alone"
	case n.MTU > least.MTU:
		r.Detail = fmt.Sprintf("the network's MTU is %d, but %s; TCP is told in its handshake, other senders by ICMP, and who does not heed that loses what is longer", n.MTU, path)
		r.Remedy = fmt.Sprintf("make the network without --mtu, so that it follows the paths, or with --mtu %d; or give the underlay a larger MTU", least.MTU)
	case n.MTU < least.MTU:
		r.OK, r.Detail = true, fmt.Sprintf("%d bytes; %s, so it could be larger: it grows only while nothing is attached", n.MTU, path)
	default:
		r.OK, r.Detail = true, fmt.Sprintf("%d bytes, as many as get to its %d peers", n.MTU, len(peers))
	}
	return r
}

// lowestMTU is the least MTU that the network's IP versions allow.
func lowestMTU(n *api.Network) int {
	for _, p := range n.Subnets {
		if p.Addr().Is6() {
			return api.MinMTU6
		}
	}
	return api.MinMTU
}

// reasons joins a state and what is known of why it is so.
func reasons(state string, why ...string) string {
	for _, s := range why {
		if s != "" {
			state += ": " + s
		}
	}
	return state
}

// peerResult tells what keeps a peer from being there, or from being fast.
func peerResult(p *api.Peer) kernel.Result {
	ref := api.PeerRef(p.Host, p.Port)
	r := kernel.Result{Name: "peer " + p.Network + " " + ref}
	since := fmt.Sprintf("%s for %s", p.State, ago(p.Since))
	var notes []string
	switch p.State {
	case api.PeerWaiting:
		r.Detail, r.Remedy = since+": "+p.Error, "see to the name or the underlay; it is tried again by itself"
		return r
	case api.PeerNew:
		r.Detail = since + ": nothing was heard of it"
		r.Remedy = fmt.Sprintf("see that a node runs there with this host as its peer and the same VNI, and that UDP port %d is open both ways; a kernel's VTEP is heard with its first frame", p.Port)
		return r
	case api.PeerHandshake:
		r.Detail = reasons(since, p.Error, p.SealError)
		r.Remedy = "see that the node there seals the network under the same name and VNI, and that both identities fit (`patchbay ca show`); it is tried again by itself"
		return r
	case api.PeerDown:
		r.Detail, r.Remedy = reasons(since, p.Error, p.SealError), "see whether the host is there and its node runs; it is found again by itself"
		return r
	}
	switch p.Offloads {
	case "refused":
		notes = append(notes, "the kernel does not cut datagrams on this route (UDP_SEGMENT), which costs CPU: its device cannot finish checksums, or IPsec is in the way")
	case "lossy":
		notes = append(notes, "cut datagrams (UDP_SEGMENT) got lost on the way and are not used for a while; if it stays so, add the peer with --no-offload")
	}
	if p.Loss > 0.01 {
		notes = append(notes, fmt.Sprintf("%.0f%% of what it sends is lost", 100*p.Loss))
	}
	r.OK, r.Detail = true, strings.Join(append([]string{since}, notes...), "; ")
	return r
}
