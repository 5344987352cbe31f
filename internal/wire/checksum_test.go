package wire

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// naive is RFC 1071 §4.1, word by word and folded at once, so that no carry can be lost.
func naive(b []byte, acc uint16) uint16 {
	add := func(w uint16) {
		s := uint32(acc) + uint32(w)
		acc = uint16(s>>16 + s&0xffff)
	}
	for ; len(b) >= 2; b = b[2:] {
		add(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		add(uint16(b[0]) << 8)
	}
	return acc
}

// same reports whether two sums are equal in ones' complement, where all ones is zero too.
func same(a, b uint16) bool { return a == b || a+b == 0xffff && (a == 0 || b == 0) }

func TestSumAgainstNaive(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	fills := map[string]func(b []byte){
		"random": func(b []byte) {
			for i := range b {
				b[i] = byte(rng.Uint32())
			}
		},
		"ones": func(b []byte) {
			for i := range b {
				b[i] = 0xff
			}
		},
		"zero": func(b []byte) { clear(b) },
		"carries": func(b []byte) { // words of all ones and all ones but one make carries ripple
			for i := range b {
				b[i] = 0xff
				if rng.IntN(9) == 0 {
					b[i] = byte(rng.IntN(2))
				}
			}
		},
	}
	for name, fill := range fills {
		for n := range 400 {
			buf := make([]byte, n+8)
			off := n % 8 // alignment must not matter
			b := buf[off : off+n]
			fill(b)
			for _, acc := range []uint64{0, 1, 0xffff, 0x1_0000, math.MaxUint32, math.MaxUint64, math.MaxUint64 - 1, rng.Uint64()} {
				want := naive(b, Fold(acc))
				if got := Fold(Sum(b, acc)); !same(got, want) {
					t.Fatalf("%s, %d bytes onto %#x: Fold(Sum) = %#04x, want %#04x", name, n, acc, got, want)
				}
				if g := checksum.Checksum(b, Fold(acc)); !same(Fold(Sum(b, acc)), g) {
					t.Fatalf("%s, %d bytes onto %#x: gVisor says %#04x", name, n, acc, g)
				}
			}
		}
	}
}

// A sum over pieces of even length is the sum of the whole.
func TestSumInPieces(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	b := make([]byte, 9001)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	want := Fold(Sum(b, 0))
	for range 200 {
		acc, rest := uint64(0), b
		for len(rest) > 0 {
			n := min(len(rest), 2*rng.IntN(700))
			if len(rest) < 50 {
				n = len(rest)
			}
			acc, rest = Sum(rest[:n], acc), rest[n:]
		}
		if got := Fold(acc); got != want {
			t.Fatalf("pieces sum to %#04x, the whole to %#04x", got, want)
		}
	}
}

func TestFold(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 6))
	for i := range 100000 {
		acc := rng.Uint64()
		switch i {
		case 0:
			acc = 0
		case 1:
			acc = math.MaxUint64
		case 2:
			acc = 0xffff_ffff_0000_0000
		case 3:
			acc = 0xffff_fffe_ffff_ffff
		}
		var b [8]byte
		binary.BigEndian.PutUint64(b[:], acc)
		if got, want := Fold(acc), naive(b[:], 0); got != want {
			t.Fatalf("Fold(%#x) = %#04x, want %#04x", acc, got, want)
		}
	}
}

func FuzzSum(f *testing.F) {
	f.Add([]byte{}, uint64(0))
	f.Add([]byte{1}, uint64(math.MaxUint64))
	f.Add(bytes.Repeat([]byte{0xff}, 65), uint64(math.MaxUint64))
	f.Fuzz(func(t *testing.T, b []byte, acc uint64) {
		if got, want := Fold(Sum(b, acc)), naive(b, Fold(acc)); !same(got, want) {
			t.Fatalf("Fold(Sum) = %#04x, want %#04x", got, want)
		}
	})
}

var (
	a4, b4 = netip.MustParseAddr("10.1.2.3"), netip.MustParseAddr("192.0.2.200")
	a6, b6 = netip.MustParseAddr("fd00:1:2:3::4"), netip.MustParseAddr("2001:db8:ffff::1")
)

func TestL4ChecksumAgainstGVisor(t *testing.T) {
	rng := rand.New(rand.NewPCG(7, 8))
	for _, proto := range []uint8{ProtoTCP, ProtoUDP, ProtoICMP, ProtoICMPv6} {
		for _, pair := range [][2]netip.Addr{{a4, b4}, {a6, b6}} {
			src, dst := pair[0], pair[1]
			if (proto == ProtoICMP && src.Is6()) || (proto == ProtoICMPv6 && src.Is4()) {
				continue
			}
			for n := 20; n < 90; n++ {
				b := make([]byte, n)
				for i := range b {
					b[i] = byte(rng.Uint32())
				}
				binary.BigEndian.PutUint16(b[4:], uint16(n)) // UDP length
				PutL4Checksum(b, src, dst, proto)
				p := IP{Src: src, Dst: dst, Version: 4, Proto: proto}
				if src.Is6() {
					p.Version = 6
				}
				if !VerifyL4(&p, b) {
					t.Fatalf("protocol %d, %d bytes: VerifyL4 refuses what PutL4Checksum wrote", proto, n)
				}
				if !gvisorValid(&p, b) {
					t.Fatalf("protocol %d, %d bytes: gVisor refuses what PutL4Checksum wrote", proto, n)
				}
				// The partial sum is what remains to be added to the rest.
				whole := bytes.Clone(b)
				off, _ := ChecksumOff(proto)
				if proto != ProtoICMP {
					PutPartialL4(b, src, dst, proto, n)
					if c := ^Fold(Sum(b, 0)); !same(c, binary.BigEndian.Uint16(whole[off:])) {
						t.Fatalf("protocol %d: partial checksum completes to %#04x, want %x", proto, c, whole[off:off+2])
					}
				}
				whole[n-1]++
				if VerifyL4(&p, whole) {
					t.Fatalf("protocol %d, %d bytes: VerifyL4 takes a damaged packet", proto, n)
				}
			}
		}
	}
}

func gvisorValid(p *IP, l4 []byte) bool {
	ph := uint16(0)
	if p.Proto != ProtoICMP {
		ph = header.PseudoHeaderChecksum(transport(p.Proto), gaddr(p.Src), gaddr(p.Dst), uint16(len(l4)))
	}
	return checksum.Checksum(l4, ph) == 0xffff
}

func TestUDPWithoutChecksum(t *testing.T) {
	b := make([]byte, 12)
	PutUDP(b, 1, 2, 4)
	if p := (IP{Src: a4, Dst: b4, Version: 4, Proto: ProtoUDP}); !VerifyL4(&p, b) {
		t.Error("UDP over IPv4 without a checksum is refused")
	}
	if p := (IP{Src: a6, Dst: b6, Version: 6, Proto: ProtoUDP}); VerifyL4(&p, b) {
		t.Error("UDP over IPv6 without a checksum is taken")
	}
	// A datagram whose checksum comes out as zero is sent as all ones.
	b = make([]byte, 10)
	PutUDP(b, 1, 2, 2)
	acc := Sum(b, PseudoSum(a4, b4, ProtoUDP, 10))
	binary.BigEndian.PutUint16(b[8:], ^Fold(acc))
	PutL4Checksum(b, a4, b4, ProtoUDP)
	if b[6] != 0xff || b[7] != 0xff {
		t.Errorf("checksum is %x, want ffff", b[6:8])
	}
	if p := (IP{Src: a4, Dst: b4, Version: 4, Proto: ProtoUDP}); !VerifyL4(&p, b) {
		t.Error("all ones as UDP checksum is refused")
	}
}

func BenchmarkSum(b *testing.B) {
	buf := make([]byte, 65536)
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range buf {
		buf[i] = byte(rng.Uint32())
	}
	for _, n := range []int{20, 40, 64, 1448, 65536} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.SetBytes(int64(n))
			var acc uint64
			for b.Loop() {
				acc += Sum(buf[:n], 0)
			}
			sink = acc
		})
		b.Run(fmt.Sprintf("gvisor/%d", n), func(b *testing.B) {
			b.SetBytes(int64(n))
			var acc uint16
			for b.Loop() {
				acc += checksum.Checksum(buf[:n], 0)
			}
			sink = uint64(acc)
		})
	}
}

var sink uint64
