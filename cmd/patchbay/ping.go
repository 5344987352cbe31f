package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
)

// pingLine sends a few ICMP echo requests to name over IPv4 and sums up the answers. It needs a raw socket, which root of a container has.
func pingLine(ctx context.Context, name string) (string, error) {
	const count = 10
	addrs, err := net.DefaultResolver.LookupIP(ctx, "ip4", name)
	if err != nil {
		return "", err
	}
	c, err := icmp.ListenPacket("ip4:icmp", "0.0.0.0")
	if err != nil {
		return "", err
	}
	defer c.Close()
	var times []time.Duration
	for seq := range count {
		d, err := pingOnce(c, &net.IPAddr{IP: addrs[0]}, seq)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			continue
		}
		if err != nil {
			return "", err
		}
		times = append(times, d)
		time.Sleep(5 * time.Millisecond)
	}
	if len(times) == 0 {
		return fmt.Sprintf("0 of %d answered", count), nil
	}
	slices.Sort(times)
	us := func(d time.Duration) int64 { return d.Microseconds() }
	return fmt.Sprintf("%d of %d answered, min %d µs, median %d µs, max %d µs", len(times), count, us(times[0]), us(times[len(times)/2]), us(times[len(times)-1])), nil
}

func pingOnce(c *icmp.PacketConn, to net.Addr, seq int) (time.Duration, error) {
	id := os.Getpid() & 0xffff
	req := icmp.Message{Type: ipv4.ICMPTypeEcho, Body: &icmp.Echo{ID: id, Seq: seq, Data: []byte("patchbay")}}
	b, err := req.Marshal(nil)
	if err != nil {
		return 0, err
	}
	start := time.Now()
	if err := c.SetReadDeadline(start.Add(time.Second)); err != nil {
		return 0, err
	}
	if _, err := c.WriteTo(b, to); err != nil {
		return 0, err
	}
	buf := make([]byte, 1500)
	for {
		n, _, err := c.ReadFrom(buf)
		if err != nil {
			return 0, err
		}
		m, err := icmp.ParseMessage(1, buf[:n])
		if err != nil {
			continue // not for us
		}
		if e, ok := m.Body.(*icmp.Echo); ok && m.Type == ipv4.ICMPTypeEchoReply && e.ID == id && e.Seq == seq {
			return time.Since(start), nil
		}
	}
}
