package api

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"patchbay/tap"
)

// takeoverUpgrade is what a node and its successor speak after HTTP. The successor says {}, so that nothing with descriptors is read as HTTP, and then answers each part, which is a line with
// its descriptors, with {}. The answer to PartEnd comes when it serves; then the old node ends. A connection that breaks before that leaves everything with the old node.
const takeoverUpgrade = "patchbay-takeover/1"

// MaxPartFDs is how many descriptors a Part can carry.
const MaxPartFDs = MaxQueues

// Part is one thing that a node hands to its successor. What is on disk is not among them.
type Part struct {
	Kind    PartKind `json:"kind"`
	Network string   `json:"network,omitempty"`
	Name    string   `json:"name,omitempty"` // of the attachment; HOST:PORT of a PartSessions' peer
	ID      string   `json:"id,omitempty"`   // of the published ports
	// Info describes the device of a PartTAP.
	Info *tap.Info `json:"info,omitempty"`
	// Data is what has been read already of a PartMachine's connection, or what PartSessions is about.
	Data []byte `json:"data,omitempty"`
	// Listen is where PartTunnel's sockets were asked to listen.
	Listen netip.AddrPort `json:"listen,omitzero"`
	// Flows are what PartUDP's sockets belong to.
	Flows json.RawMessage `json:"flows,omitempty"`
}

// PartKind is what a Part is.
type PartKind string

// The kinds of Part.
const (
	PartAPI      PartKind = "api"      // the node's own socket
	PartTAP      PartKind = "tap"      // an attachment's device
	PartStream   PartKind = "stream"   // the socket where a virtual machine connects
	PartMachine  PartKind = "machine"  // the connection of one; Info has its MAC
	PartPublish  PartKind = "publish"  // some of the sockets of published ports, in order of the range
	PartUDP      PartKind = "udp"      // sockets of NAT's UDP flows
	PartTunnel   PartKind = "tunnel"   // sockets of the tunnels at one UDP port, the listening one first
	PartSessions PartKind = "sessions" // the keys of a sealed peer
	PartEnd      PartKind = "end"      // that is all, and the state on disk may be opened
)

// Handing is a node that has stopped for its successor.
type Handing interface {
	// Commit says that the successor serves. The node ends soon.
	Commit()
	// Resume says that there is no successor: the node goes on.
	Resume()
}

// Successor is a node's end of taking another one over. It belongs to one goroutine.
type Successor struct {
	c    *Client
	conn *net.UnixConn
}

// TakeOver asks the node to hand itself over. The caller reads Parts until PartEnd, then says Done or Closes.
func (c *Client) TakeOver(ctx context.Context) (*Successor, error) {
	conn, r, err := c.upgrade(ctx, Prefix+"/takeover", takeoverUpgrade, nil)
	if err != nil {
		return nil, err
	}
	if err = sendLine(conn, struct{}{}); err != nil || r.Buffered() > 0 {
		conn.Close()
		return nil, fmt.Errorf("take over the node at %s: it does not keep to the protocol: %w", c.socket, err)
	}
	return &Successor{c: c, conn: conn}, nil
}

// partTimeout bounds the wait for the other node.
const partTimeout = 30 * time.Second

// Next is the next part with its descriptors, which are the caller's.
func (s *Successor) Next() (Part, []int, error) {
	_ = s.conn.SetDeadline(time.Now().Add(partTimeout)) // a connection that is closed needs none
	var p Part
	fds, err := recvLine(s.conn, &p)
	if err == nil && p.Kind != PartEnd {
		if err = sendLine(s.conn, struct{}{}); err != nil {
			closeAll(fds)
		}
	}
	if err != nil {
		return Part{}, nil, fmt.Errorf("take over the node at %s: %w", s.c.socket, err)
	}
	return p, fds, nil
}

// Done says that this node serves now, and waits until the old one no longer does. It is ending then, and may not have ended.
func (s *Successor) Done() error {
	_ = s.conn.SetDeadline(time.Now().Add(partTimeout)) // as above
	if err := sendLine(s.conn, struct{}{}); err != nil {
		return fmt.Errorf("take over the node at %s: %w", s.c.socket, err)
	}
	if _, err := s.conn.Read(make([]byte, 1)); !isGone(err) {
		return fmt.Errorf("take over the node at %s: it does not end: %w", s.c.socket, err)
	}
	return nil
}

// Close gives up; before Done, the old node then goes on.
func (s *Successor) Close() error { return s.conn.Close() }

// takeover is the old node's end.
func (s *Server) takeover(w http.ResponseWriter, r *http.Request) error {
	if !strings.EqualFold(r.Header.Get("Upgrade"), takeoverUpgrade) || !strings.EqualFold(r.Header.Get("Connection"), "upgrade") || !r.ProtoAtLeast(1, 1) {
		return Errorf(CodeInvalid, "send Connection: Upgrade and Upgrade: "+takeoverUpgrade+", or use `patchbay daemon --takeover`", "a takeover needs a connection that descriptors can follow")
	}
	run := servingOf(r)
	if !run.begin() {
		return errEnding()
	}
	defer run.sessions.Done()
	// One at a time: one that fails makes the socket this node's own again, which is to remove it when it ends.
	if !s.handing.CompareAndSwap(false, true) {
		return Errorf(CodeUnavailable, "try again in a moment", "another node is taking this one over")
	}
	done := false
	defer func() { s.handing.Store(done) }() // for good, once it has been taken over
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return fmt.Errorf("take the connection from HTTP: %w", err)
	}
	defer conn.Close()
	c, ok := conn.(*net.UnixConn)
	if !ok || rw.Reader.Buffered() > 0 {
		return nil // it spoke before its turn, and gets no answer
	}
	if _, err := io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+takeoverUpgrade+"\r\n\r\n"); err != nil {
		return nil
	}
	if err := s.handOver(run, c); err != nil {
		s.log.Warn("nobody took over", "reason", err)
		return nil
	}
	done = true
	s.log.Info("taken over", "pid", peerOf(r).PID)
	<-run.ending // the successor waits until this server ends
	return nil
}

// handOver sends everything and waits for the successor to serve.
func (s *Server) handOver(run *serving, c *net.UnixConn) error {
	var ack struct{}
	answer := func() error {
		_ = c.SetDeadline(time.Now().Add(partTimeout)) // a connection that is closed needs none
		got, err := recvLine(c, &ack)
		closeAll(got)
		return err
	}
	send := func(p Part, fds []int) error {
		if err := sendLine(c, p, fds...); err != nil {
			return err
		}
		return answer()
	}
	if err := answer(); err != nil {
		return err
	}
	own, err := run.socket.handOver()
	if err != nil {
		return err
	}
	defer unix.Close(own)
	keep := func() { run.socket.SetUnlinkOnClose(true) }
	if err := send(Part{Kind: PartAPI}, []int{own}); err != nil {
		keep()
		return err
	}
	h, err := s.cfg.Backend.HandOver(send)
	if err != nil {
		keep()
		return err
	}
	if err := send(Part{Kind: PartEnd}, nil); err != nil {
		h.Resume()
		keep()
		return fmt.Errorf("the other node did not come up: %w", err)
	}
	h.Commit()
	return nil
}

// ListenFD is ListenFile for what came with a PartAPI or PartStream. It takes the descriptors over.
func ListenFD(fds []int) (*net.UnixListener, error) {
	if len(fds) != 1 {
		closeAll(fds)
		return nil, fmt.Errorf("socket handed over: %d descriptors, where one is due", len(fds))
	}
	f := os.NewFile(uintptr(fds[0]), "socket")
	defer f.Close()
	return ListenFile(f)
}
