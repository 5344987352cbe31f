package bench

import (
	"bytes"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The contenders of scenario tunnel that are others' programs.

// ovsTunnel is Open vSwitch with its userspace datapath: a bridge that holds the underlay's device and address, and one with the tunnel and the container.
func (s *site) ovsTunnel() error {
	for _, e := range s.ends() {
		dir := filepath.Join(s.dir, e.name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		if err := e.host.link("up0", func(l netlink.Link) error {
			a, err := netlink.ParseAddr(e.outer + "/24")
			return errors.Join(err, netlink.AddrDel(l, a))
		}); err != nil {
			return err
		}
		err := s.vswitchd(e.host, dir, "add-br", "br-phy", "--", "set", "bridge", "br-phy", "datapath_type=netdev", "--", "add-port", "br-phy", "up0",
			"--", "add-br", "br-int", "--", "set", "bridge", "br-int", "datapath_type=netdev",
			"--", "add-port", "br-int", "ov0", "--", "set", "interface", "ov0", "type=internal",
			"--", "add-port", "br-int", "vx0", "--", "set", "interface", "vx0", "type=vxlan", "options:remote_ip="+e.otherOuter, "options:local_ip="+e.outer, "options:key=9", "options:csum=true")
		if err != nil {
			return err
		}
		if err := s.take(e.host, "ov0", e.container); err != nil {
			return err
		}
		set := e.container.link("ov0", func(l netlink.Link) error { return netlink.LinkSetMTU(l, s.underlayMTU()-vxlanTakes) })
		if err := errors.Join(set, e.host.addr("br-phy", e.outer+"/24"), e.host.up("br-phy")); err != nil {
			return err
		}
	}
	return s.join(pair{client: s.client, server: s.server, near: "ov0", far: "ov0", nearAddr: nearAddr, farAddr: farAddr})
}

// vdeTunnel is a vde_switch on each host, and between the two vde_plug over a TCP connection, as `dpipe vde_plug = ssh HOST vde_plug` has it.
func (s *site) vdeTunnel() error {
	ends := s.ends()
	var conns [2]*os.File
	defer func() {
		for _, f := range conns {
			f.Close()
		}
	}()
	var l net.Listener
	err := ends[1].host.Do(func() (err error) { l, err = net.Listen("tcp4", ends[1].outer+":0"); return err })
	if err != nil {
		return err
	}
	defer l.Close()
	for i := range ends {
		var c net.Conn
		if i == 0 {
			err = ends[0].host.Do(func() (err error) { c, err = net.DialTimeout("tcp4", l.Addr().String(), reachTime); return err })
		} else {
			c, err = l.Accept() // the first has connected
		}
		if err != nil {
			return err
		}
		conns[i], err = c.(*net.TCPConn).File()
		c.Close()
		if err != nil {
			return err
		}
		if err := unix.SetNonblock(int(conns[i].Fd()), false); err != nil { // the program would not expect that
			return err
		}
	}
	for i, e := range ends {
		dir, dev := filepath.Join(s.dir, "vde-"+e.name), "vt-"+e.name
		if err := s.vdeSwitch(e.host, "-s", dir, "-t", dev); err != nil {
			return err
		}
		if err := s.take(e.host, dev, e.container); err != nil {
			return err
		}
		cmd := exec.Command(s.path("vde_plug"), dir)
		cmd.Stdin, cmd.Stdout = conns[i], conns[i]
		if err := s.launch(e.host, cmd, asRoot); err != nil {
			return err
		}
	}
	return s.join(pair{client: s.client, server: s.server, near: "vt-near", far: "vt-far", nearAddr: nearAddr, farAddr: farAddr})
}

// wireguard is wireguard-go on each host, configured through its socket.
func (s *site) wireguard() error {
	if err := unix.Mount("tmpfs", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755"); err != nil { // its sockets have fixed places
		return fmt.Errorf("mount /run: %w", err)
	}
	defer func() { _ = unix.Unmount("/run", unix.MNT_DETACH) }() // another contender may mount its own over it
	var keys [2]*ecdh.PrivateKey
	for i := range keys {
		var err error
		if keys[i], err = ecdh.X25519().GenerateKey(rand.Reader); err != nil {
			return err
		}
	}
	ends := s.ends()
	for i, e := range ends {
		dev := "wg-" + e.name
		cmd := exec.Command(s.path("wireguard"), "-f", dev)
		cmd.Env = append(os.Environ(), "WG_PROCESS_FOREGROUND=1", "LOG_LEVEL=error")
		if err := s.launch(e.host, cmd, asRoot); err != nil {
			return err
		}
		if err := s.await(e.host, dev); err != nil {
			return err
		}
		set := fmt.Sprintf("set=1\nprivate_key=%s\nlisten_port=51820\nreplace_peers=true\npublic_key=%s\nendpoint=%s:51820\nallowed_ip=0.0.0.0/0\n\n",
			hex.EncodeToString(keys[i].Bytes()), hex.EncodeToString(keys[1-i].PublicKey().Bytes()), e.otherOuter)
		if err := configureWireguard("/run/wireguard/"+dev+".sock", set); err != nil {
			return s.why(err)
		}
	}
	return s.onDevices(s.underlayMTU()-wireguardTakes, func(e end) string { return "wg-" + e.name })
}

// configureWireguard sends a configuration in wireguard's own protocol.
func configureWireguard(sock, set string) error {
	var c net.Conn
	var err error
	for deadline := time.Now().Add(reachTime); ; time.Sleep(10 * time.Millisecond) {
		if c, err = net.Dial("unix", sock); err == nil {
			break
		}
		if time.Now().After(deadline) {
			return err
		}
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(reachTime))
	if _, err := c.Write([]byte(set)); err != nil {
		return err
	}
	answer := make([]byte, 64)
	n, err := c.Read(answer)
	if err != nil {
		return err
	}
	if !bytes.HasPrefix(answer[:n], []byte("errno=0\n")) {
		return fmt.Errorf("wireguard: %q", answer[:n])
	}
	return nil
}

// nebula is nebula on each host, with AES and every offload that it knows.
func (s *site) nebula() error {
	file := func(name string) string { return filepath.Join(s.dir, name) }
	ca := []string{"-ca-crt", file("ca.crt"), "-ca-key", file("ca.key")}
	if err := s.host.run("", s.path("nebula-cert"), "ca", "-name", "bench", "-out-crt", file("ca.crt"), "-out-key", file("ca.key")); err != nil {
		return err
	}
	for _, e := range s.ends() {
		sign := append([]string{"sign"}, ca...)
		sign = append(sign, "-name", e.name, "-networks", e.inner+"/24", "-out-crt", file(e.name+".crt"), "-out-key", file(e.name+".key"))
		if err := s.host.run("", s.path("nebula-cert"), sign...); err != nil {
			return err
		}
		const config = `pki: {ca: %[1]s/ca.crt, cert: %[1]s/%[2]s.crt, key: %[1]s/%[2]s.key}
static_host_map: {"%[3]s": ["%[4]s:4242"]}
lighthouse: {am_lighthouse: false}
listen: {host: 0.0.0.0, port: 4242, batch: 64, udp_offloads: true}
cipher: aes
tun: {dev: neb-%[2]s, mtu: %[5]d, use_offloads: true}
logging: {level: error}
firewall: {outbound: [{port: any, proto: any, host: any}], inbound: [{port: any, proto: any, host: any}]}
`
		path := file(e.name + ".yml")
		if err := os.WriteFile(path, fmt.Appendf(nil, config, s.dir, e.name, e.otherInner, e.otherOuter, s.underlayMTU()-nebulaTakes), 0o600); err != nil {
			return err
		}
		if err := s.launch(e.host, exec.Command(s.path("nebula"), "-config", path), asRoot); err != nil {
			return err
		}
		if err := s.await(e.host, "neb-"+e.name); err != nil {
			return err
		}
	}
	if err := s.serve(s.peer, asRoot, farAddr); err != nil {
		return err
	}
	return s.startAgent(s.host)
}
