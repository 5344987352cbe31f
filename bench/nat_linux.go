package bench

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
)

// The contenders of scenario nat.

// masquerade is the baseline: the client on a veth, the host forwards and masquerades.
func (s *site) masquerade() error {
	const rules = "table inet bench {\nchain post {\ntype nat hook postrouting priority 100;\noifname \"up0\" masquerade\n}\n}\n"
	if err := s.forwarding(rules); err != nil {
		return err
	}
	return s.startAgent(s.client)
}

// forwarding puts the client behind the host on a veth, and has the host forward by rules.
func (s *site) forwarding(rules string) error {
	if err := veth(s.client, "eth0", s.host, "down0"); err != nil {
		return err
	}
	if err := errors.Join(s.client.addr("eth0", clientAddr+"/24"), s.host.addr("down0", gatewayAddr+"/24"), s.client.defaultRoute("eth0", gatewayAddr)); err != nil {
		return err
	}
	sysctls := []string{"ipv4/ip_forward"}
	if s.under.v6 {
		if err := errors.Join(s.client.addr("eth0", clientAddr6+"/64"), s.host.addr("down0", gatewayAddr6+"/64"), s.client.defaultRoute("eth0", gatewayAddr6)); err != nil {
			return err
		}
		sysctls = append(sysctls, "ipv6/conf/all/forwarding")
	}
	for _, name := range sysctls {
		if err := s.host.Do(func() error { return os.WriteFile("/proc/sys/net/"+name, []byte("1"), 0) }); err != nil {
			return err
		}
	}
	return s.host.run(rules, s.path("nft"), "-f", "-")
}

// direct is no contender but what there is to translate: the client on the host itself.
func (s *site) direct() error { return s.startAgent(s.host) }

func (s *site) patchbayRun(mtu int, flags ...string) error {
	agent, err := s.agentRole()
	if err != nil {
		return err
	}
	return s.launchAgent(s.host, asOrdinary, slices.Concat([]string{self, "run", "--mtu", strconv.Itoa(mtu)}, flags, []string{"--"}, agent)...)
}

func (s *site) gvproxy() error {
	sock := "unix://" + filepath.Join(s.dir, "gv.sock")
	if s.under.v6 {
		return errors.New("gvproxy has no IPv6")
	}
	// gvforwarder's -mtu is the size of its buffer, which takes the Ethernet header too.
	return s.startUser(agentSpec{Target: s.target, sideSpec: s.gvforwarder(sock, "5a:94:ef:e4:0c:ee", "192.168.127.2/24")}, s.gvproxyLine(sock)...)
}

func (s *site) gvproxyLine(sock string) []string {
	return []string{s.path("gvproxy"), "-listen", sock, "-mtu", "1500", "-ssh-port", "-1"}
}

// gvforwarder is a side of gvproxy.
func (s *site) gvforwarder(sock, mac, addr string) sideSpec {
	side := s.side()
	side.TAP = &tapSpec{Name: "tap0", MAC: mac, Addr: addr, Gateway: "192.168.127.1", MTU: 1500}
	side.Program = []string{s.path("gvforwarder"), "-url", sock, "-iface", "tap0", "-preexisting", "-mtu", "4000"}
	return side
}
