package secure_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"patchbay/tunnel/secure"
)

// Two nodes with a shared key over UDP. A VTEP does the same: it tells handshakes from messages by the first byte, finds the link of a handshake by VNI and sender and that of a message by the
// session's id.
func Example() {
	dir, err := os.MkdirTemp("", "secure")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer func() { _ = os.RemoveAll(dir) }()
	file := filepath.Join(dir, "mesh.key")
	if err := os.WriteFile(file, []byte("hq3mVb5cXk0nPz8uT2yWf7dJr4sLg9aE1oKiN6vQxBM\n"), 0o600); err != nil {
		fmt.Println(err)
		return
	}
	a, b := socket(), socket()
	defer a.Close()
	defer b.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	one := node(ctx, file, a, b.LocalAddr())
	two := node(ctx, file, b, a.LocalAddr())
	defer one.Close()
	defer two.Close()
	for one.Session() == nil || two.Session() == nil {
		time.Sleep(time.Millisecond)
	}

	s := one.Session()
	seq, ok := s.Next()
	if !ok {
		fmt.Println("no-session")
		return
	}
	header := binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint32(nil, s.ID()), seq)
	sealed := s.Seal(nil, seq, header, []byte("a frame"))

	plain, _, opened := two.Open(s.ID(), seq, header, sealed)
	fmt.Println(string(plain), opened)
	_, drop, again := two.Open(s.ID(), seq, header, sealed)
	fmt.Println(drop, again)
	// Output:
	// a frame true
	// replayed false
}

func socket() *net.UDPConn {
	c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		panic(err)
	}
	return c
}

// node is a link that sends to peer through c, and runs until ctx ends.
func node(ctx context.Context, key string, c *net.UDPConn, peer net.Addr) *secure.Link {
	id, err := secure.LoadPSK(key)
	if err != nil {
		panic(err)
	}
	l, err := secure.NewLink(secure.LinkConfig{Identity: id, Network: "lab", VNI: 42, Host: "127.0.0.1", Send: func(d []byte) error {
		_, err := c.WriteTo(d, peer)
		return err
	}})
	if err != nil {
		panic(err)
	}
	go func() {
		buf := make([]byte, secure.MaxHandshake+1)
		for {
			n, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			if from.String() == peer.String() && n > 0 && buf[0] == secure.HandshakeType {
				l.Deliver(buf[:n])
			}
		}
	}()
	go func() { _ = l.Run(ctx) }()
	return l
}
