package bypass

import (
	"encoding/binary"
	"net/netip"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

func sockaddr4(ap netip.AddrPort) []byte {
	b := binary.NativeEndian.AppendUint16(nil, unix.AF_INET)
	b = binary.BigEndian.AppendUint16(b, ap.Port())
	a := ap.Addr().As4()
	return append(append(b, a[:]...), make([]byte, 8)...)
}

func sockaddr6(ap netip.AddrPort, scope uint32) []byte {
	b := binary.NativeEndian.AppendUint16(nil, unix.AF_INET6)
	b = binary.BigEndian.AppendUint16(b, ap.Port())
	a := ap.Addr().As16()
	return binary.NativeEndian.AppendUint32(append(append(b, make([]byte, 4)...), a[:]...), scope)
}

func TestParseSockaddr(t *testing.T) {
	four, six := netip.MustParseAddrPort("192.0.2.7:80"), netip.MustParseAddrPort("[2001:db8::7]:443")
	mapped := netip.AddrPortFrom(netip.AddrFrom16(four.Addr().As16()), 80)
	for _, c := range []struct {
		name string
		b    []byte
		want netip.AddrPort
	}{
		{"IPv4", sockaddr4(four), four},
		{"IPv6", sockaddr6(six, 0), six},
		{"IPv4 in IPv6 stays what it is", sockaddr6(mapped, 0), mapped},
		{"a scope is a zone", sockaddr6(six, 2), netip.AddrPortFrom(six.Addr().WithZone("2"), 443)},
		{"IPv6 without a scope, as it once was", sockaddr6(six, 0)[:24], six},
		{"short IPv4", sockaddr4(four)[:15], netip.AddrPort{}},
		{"short IPv6", sockaddr6(six, 0)[:23], netip.AddrPort{}},
		{"unix", append(binary.NativeEndian.AppendUint16(nil, unix.AF_UNIX), "/run/some.socket"...), netip.AddrPort{}},
		{"nothing", nil, netip.AddrPort{}},
	} {
		if got, ok := parseSockaddr(c.b); got != c.want || ok != c.want.IsValid() {
			t.Errorf("%s: %v, %v, want %v", c.name, got, ok, c.want)
		}
	}
}

// What is read is what the bytes say, and is written back the same.
func FuzzSockaddr(f *testing.F) {
	f.Add(sockaddr4(netip.MustParseAddrPort("192.0.2.7:80")))
	f.Add(sockaddr6(netip.MustParseAddrPort("[2001:db8::7]:443"), 0))
	f.Add(sockaddr6(netip.MustParseAddrPort("[fe80::1]:443"), 3))
	f.Fuzz(func(t *testing.T, b []byte) {
		ap, ok := parseSockaddr(b)
		if !ok {
			return
		}
		scope, _ := strconv.ParseUint(ap.Addr().Zone(), 10, 32)
		back := sockaddr6(ap, uint32(scope))
		if ap.Addr().Is4() {
			back = sockaddr4(ap)
		}
		if again, ok := parseSockaddr(back); !ok || again != ap {
			t.Errorf("%x is %v, and that is %v", b, ap, again)
		}
	})
}

func TestParseFlags(t *testing.T) {
	for info, want := range map[string]int{
		"pos:\t0\nflags:\t02004002\nmnt_id:\t9\n": unix.O_RDWR | unix.O_NONBLOCK | unix.O_CLOEXEC,
		"flags:\t02\n": unix.O_RDWR,
	} {
		if got, err := parseFlags(info); got != want || err != nil {
			t.Errorf("%q: %o, %v, want %o", info, got, err, want)
		}
	}
	for _, info := range []string{"", "pos:\t0\n", "flags:\t8\n", "flags:\t-1\n", "flags:\t777777777777\n"} {
		if got, err := parseFlags(info); err == nil {
			t.Errorf("%q: %o and no error", info, got)
		}
	}
}

func FuzzFlags(f *testing.F) {
	f.Add("pos:\t0\nflags:\t02004002\nmnt_id:\t9\n")
	f.Add("flags:\t")
	f.Fuzz(func(t *testing.T, info string) {
		if n, err := parseFlags(info); err == nil && (n < 0 || n > 1<<32-1) {
			t.Errorf("%q: %d", info, n)
		}
	})
}
