package node

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"time"
)

// stall is how long a direction of a transfer may be without a byte before it is a failure.
const stall = 10 * time.Second

// transfer moves pseudo-random bytes both ways over one connection, at the same time. The client sends three numbers (Up, Down, Seed) and then Up bytes and
// its FIN; the server sends Down bytes and then what it has received: see writeReport. So each direction ends, and is verified, by itself. Where Up is 0 the FIN comes after the last byte down: netstack
// acknowledges selectively (SACK) only until its own FIN, and what is lost on a line is not recovered fast after that (package stack, Limits).
type transfer struct {
	Addr     string
	Up, Down int64
	Seed     uint64
}

// moved is what became of it.
type moved struct {
	Elapsed    time.Duration
	Up, Down   received
	UpS, DownS string // sha256 of what was sent
}

// received is one direction as its receiver saw it.
type received struct {
	Bytes   int64
	Sum     string        // sha256
	Wrong   int64         // offset of the first byte that is another than was sent, or -1
	Longest time.Duration // between two reads that yielded bytes
	Err     string
}

func stream(seed uint64, up bool) *rand.ChaCha8 {
	var s [32]byte
	binary.BigEndian.PutUint64(s[:], seed)
	if up {
		s[31] = 1
	}
	return rand.NewChaCha8(s)
}

// send writes n bytes of the stream and returns their sum. A write that nobody takes is an error after stall.
func send(c net.Conn, n int64, src *rand.ChaCha8) (string, error) {
	h := sha256.New()
	buf := make([]byte, 256<<10)
	for n > 0 {
		b := buf[:min(n, int64(len(buf)))]
		_, _ = src.Read(b) // never fails
		h.Write(b)
		for len(b) > 0 {
			_ = c.SetWriteDeadline(time.Now().Add(stall))
			k, err := c.Write(b)
			n -= int64(k)
			b = b[k:]
			if k == 0 && err != nil || err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
				return "", fmt.Errorf("%d bytes before the end: %w", n, err)
			}
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// receive reads want bytes, or to the end where eof is set, and holds them against the stream.
func receive(c net.Conn, want int64, src *rand.ChaCha8, eof bool) (r received) {
	h := sha256.New()
	buf, exp := make([]byte, 256<<10), make([]byte, 256<<10)
	r.Wrong = -1
	wait := stall
	if want == 0 {
		wait = 5 * time.Minute // the end comes with that of the other direction
	}
	last := time.Now()
	for r.Bytes < want || eof {
		b := buf
		if !eof {
			b = buf[:min(want-r.Bytes, int64(len(buf)))]
		}
		_ = c.SetReadDeadline(time.Now().Add(wait))
		n, err := c.Read(b)
		if n > 0 {
			now := time.Now()
			r.Longest = max(r.Longest, now.Sub(last))
			last = now
			h.Write(b[:n])
			_, _ = src.Read(exp[:n])
			if r.Wrong < 0 && !bytes.Equal(b[:n], exp[:n]) {
				for i := range n {
					if b[i] != exp[i] {
						r.Wrong = r.Bytes + int64(i)
						break
					}
				}
			}
			r.Bytes += int64(n)
		}
		if err == io.EOF && eof && r.Bytes == want {
			break
		}
		if err != nil {
			r.Err = fmt.Sprintf("after %d of %d bytes: %v", r.Bytes, want, err)
			break
		}
	}
	r.Sum = hex.EncodeToString(h.Sum(nil))
	return r
}

// run is the client's side.
func (t *transfer) run() (m moved, err error) {
	start := time.Now()
	c, err := net.DialTimeout("tcp", t.Addr, stall)
	if err != nil {
		return m, err
	}
	defer c.Close()
	var hdr [24]byte
	binary.BigEndian.PutUint64(hdr[:], uint64(t.Up))
	binary.BigEndian.PutUint64(hdr[8:], uint64(t.Down))
	binary.BigEndian.PutUint64(hdr[16:], t.Seed)
	if _, err := c.Write(hdr[:]); err != nil {
		return m, err
	}
	sent, down := make(chan error, 1), make(chan struct{})
	go func() {
		var err error
		if m.UpS, err = send(c, t.Up, stream(t.Seed, true)); err == nil {
			if t.Up == 0 {
				<-down
			}
			err = c.(*net.TCPConn).CloseWrite()
		}
		sent <- err
	}()
	m.Down = receive(c, t.Down, stream(t.Seed, false), false)
	close(down)
	if m.Down.Err != "" {
		return m, fmt.Errorf("down: %s", m.Down.Err)
	}
	if err := <-sent; err != nil {
		return m, fmt.Errorf("up: %w", err)
	}
	_ = c.SetReadDeadline(time.Now().Add(stall))
	if err := readReport(c, &m); err != nil {
		return m, fmt.Errorf("the server's report: %w", err)
	}
	m.Elapsed = time.Since(start)
	if n, err := c.Read(hdr[:]); n != 0 || err != io.EOF {
		return m, fmt.Errorf("after the end: %d bytes, %w", n, err)
	}
	return m, nil
}

// serveTransfers is the server's side, one connection after the other or several at once.
func serveTransfers(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			var hdr [24]byte
			if _, err := io.ReadFull(c, hdr[:]); err != nil {
				return // the client says so
			}
			up, down, seed := int64(binary.BigEndian.Uint64(hdr[:])), int64(binary.BigEndian.Uint64(hdr[8:])), binary.BigEndian.Uint64(hdr[16:])
			got := make(chan received, 1)
			go func() { got <- receive(c, up, stream(seed, true), true) }()
			sum, err := send(c, down, stream(seed, false))
			r := <-got
			if err == nil {
				_ = writeReport(c, r, sum)
			}
		}()
	}
}

// A report is a length (2 bytes) and so many of text.
func writeReport(c net.Conn, r received, downSum string) error {
	s := fmt.Sprintf("%d %s %d %d %s\n%s", r.Bytes, r.Sum, r.Wrong, r.Longest, downSum, r.Err)
	_, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(s))), s...))
	return err
}

func readReport(c net.Conn, m *moved) error {
	var n [2]byte
	if _, err := io.ReadFull(c, n[:]); err != nil {
		return err
	}
	b := make([]byte, binary.BigEndian.Uint16(n[:]))
	if _, err := io.ReadFull(c, b); err != nil {
		return err
	}
	line, rest, _ := bytes.Cut(b, []byte("\n"))
	m.Up.Err = string(rest)
	_, err := fmt.Sscan(string(line), &m.Up.Bytes, &m.Up.Sum, &m.Up.Wrong, &m.Up.Longest, &m.DownS)
	return err
}
