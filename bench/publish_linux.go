package bench

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"time"
)

// The contenders of scenario publish: the agent is outside, beyond the host's uplink, and the far side in a container whose port the host publishes.

// idlePorts are published besides, where there are to be many; nobody uses them.
const (
	idleFirst = 20000
	idlePorts = 10000
)

// anywhere is a far side that can be reached at every address it has.
func (s *site) anywhere() serveSpec { return serveSpec{Listen: ":" + loadPort, sideSpec: s.side()} }

// serveAnywhere is its command line.
func (s *site) serveAnywhere() []string {
	arg, err := argument(s.anywhere())
	if err != nil {
		panic(err) // of strings
	}
	return role(roleServe, arg)
}

// published starts the far side by line, on the host, and then the agent outside.
func (s *site) published(line []string) error {
	if err := s.far(s.host, asOrdinary, line); err != nil {
		return err
	}
	return s.callFrom(s.server)
}

// callFrom starts the agent in sp, whose target is the published port.
func (s *site) callFrom(sp space) error {
	s.target = net.JoinHostPort(uplinkAddr, loadPort)
	return s.startAgent(sp)
}

// dnat is the baseline: the container on a veth, the host forwards and translates.
func (s *site) dnat() error {
	const rules = "table ip bench {\nchain pre {\ntype nat hook prerouting priority -100;\niifname \"up0\" meta l4proto { tcp, udp } th dport " + loadPort + " dnat to " + clientAddr + "\n}\n}\n"
	if err := s.forwarding(rules); err != nil {
		return err
	}
	if err := s.serveSpec(s.client, asRoot, s.anywhere()); err != nil {
		return err
	}
	return s.callFrom(s.server)
}

// patchbayPublish is `run` with its ports published.
func (s *site) patchbayPublish(many bool) error {
	line := []string{self, "run", "-p", loadPort + ":" + loadPort, "-p", loadPort + ":" + loadPort + "/udp"}
	if many {
		line = append(line, "-p", fmt.Sprintf("%[1]d-%[2]d:%[1]d-%[2]d", idleFirst, idleFirst+idlePorts-1))
	}
	return s.published(append(append(line, "--"), s.serveAnywhere()...))
}

// publishUser has an ordinary user make a namespace with the far side in it, and a daemon publish its ports.
func (s *site) publishUser(spec userSpec) error {
	spec.Inside = s.serveAnywhere()
	arg, err := argument(spec)
	if err != nil {
		return err
	}
	return s.published(role(roleUser, arg))
}

func (s *site) pastaPublish(program string, mtu int, many bool) error {
	ports := loadPort
	if many {
		ports += fmt.Sprintf(",%d-%d", idleFirst, idleFirst+idlePorts-1)
	}
	return s.publishUser(userSpec{Daemon: []string{s.path(program), "-f", "--config-net", "-m", fmt.Sprint(mtu), "-t", ports, "-u", loadPort, "-T", "none", "-U", "none", placePID}})
}

func (s *site) slirpPublish(mtu int, many bool) error {
	spec := userSpec{Slirp: filepath.Join(s.dir, "slirp.sock"), Ports: []int{}}
	spec.Daemon = []string{s.path("slirp4netns"), "-c", fmt.Sprintf("--mtu=%d", mtu), "--disable-host-loopback", "--api-socket", spec.Slirp, placePID, "tap0"}
	if many {
		for i := range idlePorts {
			spec.Ports = append(spec.Ports, idleFirst+i)
		}
	}
	return s.publishUser(spec)
}

// slirpForward has slirp4netns publish loadPort, for both protocols, and ports, for TCP, through its socket: a connection for each, as it demands.
func slirpForward(socket string, ports []int) error {
	call := func(proto string, port int) error {
		var c net.Conn
		var err error
		for deadline := time.Now().Add(reachTime); ; time.Sleep(10 * time.Millisecond) {
			if c, err = net.Dial("unix", socket); err == nil {
				break
			}
			if time.Now().After(deadline) {
				return err
			}
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(reachTime)) // a connection can
		if _, err := fmt.Fprintf(c, `{"execute":"add_hostfwd","arguments":{"proto":%q,"host_addr":"0.0.0.0","host_port":%d,"guest_port":%d}}`, proto, port, port); err != nil {
			return err
		}
		if err := c.(*net.UnixConn).CloseWrite(); err != nil {
			return err
		}
		answer, err := io.ReadAll(c)
		if err != nil {
			return err
		}
		var a struct {
			Error struct{ Desc string }
		}
		if err := json.Unmarshal(answer, &a); err != nil || a.Error.Desc != "" {
			return fmt.Errorf("slirp4netns: publish %d/%s: %s", port, proto, answer)
		}
		return nil
	}
	var number int
	if _, err := fmt.Sscan(loadPort, &number); err != nil {
		return err
	}
	if err := errors.Join(call("tcp", number), call("udp", number)); err != nil {
		return err
	}
	for _, p := range ports {
		if err := call("tcp", p); err != nil {
			return err
		}
	}
	return nil
}

// rootlesskit is its builtin port driver beside slirp4netns.
func (s *site) rootlesskit() error {
	bin, err := s.tenantBin()
	if err != nil {
		return err
	}
	line := []string{
		s.path("rootlesskit"), "--net=slirp4netns", "--mtu=1500", "--disable-host-loopback", "--port-driver=builtin",
		"-p", "0.0.0.0:" + loadPort + ":" + loadPort + "/tcp", "-p", "0.0.0.0:" + loadPort + ":" + loadPort + "/udp", bin,
	}
	if err := s.far(s.host, asTenant, append(line, s.serveAnywhere()[1:]...)); err != nil {
		return err
	}
	return s.callFrom(s.server)
}
