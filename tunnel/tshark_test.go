package tunnel

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"patchbay/frame"
	"patchbay/internal/offload"
	"patchbay/internal/porttest"
	"patchbay/internal/testbed"
)

// pcap is a capture file of frames, superframes cut as a network card would.
func pcap(t testing.TB, fs []frame.Frame) string {
	t.Helper()
	var b bytes.Buffer
	binary.Write(&b, binary.NativeEndian, []uint32{0xa1b2c3d4, 2 | 4<<16, 0, 0, 1 << 18, 1})
	var seg offload.Segmenter
	for i := range fs {
		n, ok := seg.Reset(&fs[i])
		if !ok {
			t.Fatalf("a captured frame contradicts its header: %+v", fs[i].Hdr)
		}
		for range n {
			d := seg.Append(nil)
			binary.Write(&b, binary.NativeEndian, []uint32{uint32(i), 0, uint32(len(d)), uint32(len(d))})
			b.Write(d)
		}
	}
	name := filepath.Join(t.TempDir(), "capture.pcap")
	if err := os.WriteFile(name, b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return name
}

// An independent decoder finds nothing to say about what we send: lengths, checksums inside and outside, the header.
func TestTsharkDecodes(t *testing.T) {
	testbed.Leaks(t)
	tshark := testbed.Tool(t, "tshark")
	for _, remote := range []string{"10.9.0.2", "fd09::2"} {
		a, b := underlay(t, 1500)
		v := newVTEP(t, a, Config{})
		n := newNetwork(v, 4242)
		n.peer(t, PeerConfig{Remote: netip.AddrPortFrom(netip.MustParseAddr(remote), 0)})
		kernelVXLAN(t, b, 4242, []string{"local", remote, "remote", remote[:len(remote)-1] + "1", "dstport", "4789", "udpcsum"}, "10.1.0.2/24", "fd01::2/64")
		run(t, b, "ip", "link", "set", "vx0", "mtu", "1430")
		c1 := n.container(t, 1, 1430, "10.1.0.1/24", "fd01::1/64")
		read := porttest.PacketReader(t, b, "eth0")
		for _, to := range []string{"10.1.0.2", "fd01::2"} {
			ping(t, c1, to)
			transfer(t, c1, b, to, 200<<10)
		}
		var fs []frame.Frame
		for got := read(time.Second); len(got) > 0; got = read(200 * time.Millisecond) {
			fs = append(fs, got...)
		}
		cmd := exec.Command(tshark, "-r", pcap(t, fs), "-o", "ip.check_checksum:TRUE", "-o", "udp.check_checksum:TRUE", "-o", "tcp.check_checksum:TRUE",
			"-o", "tcp.analyze_sequence_numbers:FALSE", "-d", "udp.port==4789,vxlan", "-Y", "udp.dstport==4789",
			"-T", "fields", "-e", "frame.protocols", "-e", "vxlan.vni", "-e", "_ws.expert.severity", "-e", "_ws.expert.message", "-e", "ip.checksum.status", "-e", "udp.checksum.status", "-e", "tcp.checksum.status")
		cmd.Env = append(os.Environ(), "HOME="+t.TempDir())
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("tshark: %v\n%s", err, stderr.String())
		}
		lines, tcp := 0, 0
		for line := range strings.Lines(string(out)) {
			lines++
			f := strings.Split(strings.TrimRight(line, "\n"), "\t")
			if len(f) != 7 || f[1] != "4242" || !strings.Contains(f[0], ":udp:vxlan:eth:") {
				t.Fatalf("%s: not what we send: %q", remote, line)
			}
			const note = 0x400000 // of Wireshark's severities; chat is less, warning and error are more
			for s := range strings.SplitSeq(f[2], ",") {
				var n int
				if len(s) > 0 {
					n = severity(t, s)
				}
				if n > note {
					t.Errorf("%s: severity %s: %s", remote, s, f[3])
				}
			}
			for _, status := range strings.Split(f[4]+","+f[5]+","+f[6], ",") {
				if status != "" && status != "1" {
					t.Errorf("%s: a checksum is not good: %q", remote, line)
				}
			}
			if strings.HasSuffix(f[0], ":tcp") || strings.Contains(f[0], ":tcp:") {
				tcp++
			}
		}
		if tcp < 300 {
			t.Errorf("%s: %d of %d datagrams carry TCP; the capture missed some", remote, tcp, lines)
		}
	}
}

func severity(t testing.TB, s string) int {
	t.Helper()
	n, err := strconv.ParseInt(s, 0, 64)
	if err != nil {
		t.Fatalf("severity %q: %v", s, err)
	}
	return int(n)
}
