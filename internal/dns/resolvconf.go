package dns

import (
	"bytes"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/miekg/dns"
)

// HostFile is where the host's resolvers are listed unless Config says otherwise.
const HostFile = "/etc/resolv.conf"

const (
	maxServers    = 3     // what libc heeds
	maxSearch     = 255   // bytes of search list musl heeds
	maxResolvConf = 65536 // bytes of file looked at
)

// HostConf is what a resolv.conf(5) says.
type HostConf struct {
	Servers []netip.AddrPort // at most three, in the order of the file
	Search  []string         // domains, without a dot at the end
	Options []string         // such as "ndots:2"
}

// ParseResolvConf reads a resolv.conf(5). Lines that make no sense are passed over, as libc does. A nameserver's port is 53.
func ParseResolvConf(r io.Reader) (HostConf, error) {
	var h HostConf
	text, err := io.ReadAll(io.LimitReader(r, maxResolvConf))
	if err != nil {
		return h, err
	}
	c, err := dns.ClientConfigFromReader(bytes.NewReader(text))
	if err != nil {
		return h, err
	}
	for _, s := range c.Servers {
		if a, err := netip.ParseAddr(s); err == nil && len(h.Servers) < maxServers {
			h.Servers = append(h.Servers, netip.AddrPortFrom(a.Unmap(), 53))
		}
	}
	for _, s := range c.Search {
		if s = strings.TrimSuffix(s, "."); s != "" {
			if _, ok := dns.IsDomainName(s); ok {
				h.Search = append(h.Search, s)
			}
		}
	}
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "options" {
			h.Options = append(h.Options, f[1:]...)
		}
	}
	return h, nil
}

// ReadResolvConf parses the file at path ("" is HostFile).
func ReadResolvConf(path string) (HostConf, error) {
	if path == "" {
		path = HostFile
	}
	f, err := os.Open(path)
	if err != nil {
		return HostConf{}, fmt.Errorf("read the host's resolvers: %w", err)
	}
	defer f.Close()
	h, err := ParseResolvConf(f)
	if err != nil {
		return HostConf{}, fmt.Errorf("read the host's resolvers: %s: %w", path, err)
	}
	return h, nil
}

// keptOptions are the host's options that mean something to a container, whose one resolver is the gateway. The others (rotate, debug, inet6, …)
// choose between resolvers or are obsolete.
var keptOptions = []string{"ndots", "timeout", "attempts", "edns0", "trust-ad", "use-vc", "single-request", "single-request-reopen", "no-aaaa", "no-tld-query"}

// ResolvConf is what ContainerResolvConf makes of this host's /etc/resolv.conf as it is now; a missing one has nothing to add.
func ResolvConf(gateway []netip.Addr, network string) []byte {
	host, _ := ReadResolvConf("")
	return ContainerResolvConf(host, network, gateway...)
}

// ContainerResolvConf is the text of a container's /etc/resolv.conf: the gateway's addresses as nameservers, the network's domain in front of the
// host's search list, and the host's options where they make sense. network may be "" for a container without a network name.
func ContainerResolvConf(host HostConf, network string, gateway ...netip.Addr) []byte {
	var b bytes.Buffer
	b.WriteString("# Written by patchbay: the resolver is the network's gateway, which asks the host's resolvers.\n")
	n := 0
	for _, a := range gateway {
		if a.IsValid() && n < maxServers {
			fmt.Fprintf(&b, "nameserver %s\n", a)
			n++
		}
	}
	var search []string
	if network != "" {
		search = append(search, SearchDomain(network))
	}
	size := len(search)
	for _, s := range search {
		size += len(s)
	}
	for _, s := range host.Search {
		if size += len(s) + 1; size > maxSearch {
			break
		}
		if !slices.Contains(search, s) {
			search = append(search, s)
		}
	}
	if len(search) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(search, " "))
	}
	var options []string
	for _, o := range host.Options {
		if name, _, _ := strings.Cut(o, ":"); slices.Contains(keptOptions, name) && !slices.Contains(options, o) {
			options = append(options, o)
		}
	}
	if len(options) > 0 {
		fmt.Fprintf(&b, "options %s\n", strings.Join(options, " "))
	}
	return b.Bytes()
}
