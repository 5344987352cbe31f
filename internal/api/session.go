package api

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"
)

// Session is a client's end of an attachment on its way up, and then of its life. It ends with Up, Fail or Close, and after an Up that succeeded with Wait or Close. It belongs to
// one goroutine, but for Close.
type Session struct {
	c    *Client
	conn *net.UnixConn
	r    *bufio.Reader
	plan Plan

	closeOnce sync.Once
	closed    chan struct{}
}

// Attach asks for a membership and waits for the Plan. ctx bounds the call alone.
func (c *Client) Attach(ctx context.Context, network string, spec AttachmentSpec) (*Session, error) {
	return c.session(ctx, place("networks", network, "attachments"), spec)
}

// Resume is Attach for an attachment that the node knows and has no device of, after a restart.
func (c *Client) Resume(ctx context.Context, network, name string) (*Session, error) {
	return c.session(ctx, place("networks", network, "attachments", name, "resume"), nil)
}

// session opens a Session and waits for its Plan.
func (c *Client) session(ctx context.Context, path string, body any) (_ *Session, err error) {
	conn, r, err := c.upgrade(ctx, path, upgrade, body)
	if err != nil {
		return nil, err
	}
	s := &Session{c: c, conn: conn, r: r, closed: make(chan struct{})}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	defer s.until(ctx)()
	if err := s.recv(&s.plan); err != nil {
		return nil, s.lost(ctx, err)
	}
	return s, nil
}

// upgrade makes a request whose answer leaves HTTP for protocol, on a connection of its own. It speaks HTTP by itself, since net/http does not give the socket away. r has what was
// read ahead.
func (c *Client) upgrade(ctx context.Context, path, protocol string, body any) (_ *net.UnixConn, r *bufio.Reader, err error) {
	req, err := newRequest(ctx, http.MethodPost, path, body)
	if err != nil {
		return nil, nil, err
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", protocol)
	conn, err := c.dialer.DialContext(ctx, "unix", c.socket)
	if err != nil {
		if ctx.Err() != nil {
			return nil, nil, fmt.Errorf("node at %s: %w", c.socket, err)
		}
		return nil, nil, c.noNode(err)
	}
	s := &Session{c: c, conn: conn.(*net.UnixConn), r: bufio.NewReaderSize(conn, MaxBody), closed: make(chan struct{})}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	defer s.until(ctx)()
	// A refused peer may be answered before its request is read, so a failed write is no reason not to read.
	werr := req.Write(conn)
	resp, err := http.ReadResponse(s.r, req)
	if err != nil {
		return nil, nil, s.lost(ctx, errors.Join(werr, err))
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		b, err := c.body(resp)
		if err != nil {
			return nil, nil, err
		}
		return nil, nil, readRefusal(resp.Status, b)
	}
	return s.conn, s.r, nil
}

// Plan is what to open inside, and how to configure it.
func (s *Session) Plan() Plan { return s.plan }

// Up gives the node the device, and waits until frames flow. The descriptors stay the caller's: the node has duplicates. On error the Session is closed, and nothing of the
// attachment is left. It blocks until the node answers, or Close.
func (s *Session) Up(d Device) (Attachment, error) {
	e, err := s.answerTo(d)
	if err != nil {
		s.Close()
		return Attachment{}, err
	}
	return *e.Attachment, nil
}

// Fail tells the node that there is no device, waits until the reservation is undone, and closes the Session.
func (s *Session) Fail(msg string) error {
	defer s.Close()
	if msg == "" {
		msg = "it does not say why"
	}
	_, err := s.answerTo(Device{Error: msg})
	var e *Error
	if errors.As(err, &e) && e.Code == CodeInvalid { // the node's word that it is undone
		return nil
	}
	return err
}

// answerTo sends d and waits for EventUp, or the error instead.
func (s *Session) answerTo(d Device) (Event, error) {
	if err := sendLine(s.conn, d, d.FDs...); err != nil && !isGone(err) {
		return Event{}, s.lost(context.Background(), err)
	} // a node that would not read on may still have said why
	e, err := s.event()
	switch {
	case err != nil:
		return Event{}, s.lost(context.Background(), err)
	case e.Kind == EventError && e.Error != nil:
		return Event{}, e.Error
	case e.Kind != EventUp || e.Attachment == nil:
		return Event{}, s.c.nonsense(fmt.Errorf("event %q, where up or error is due", abbreviate(string(e.Kind))))
	}
	return e, nil
}

// Wait blocks until the node says something (EventDetached), ctx ends, or the Session does. A node that has gone is ErrNoNode, Close is net.ErrClosed. After ctx has ended it may
// be called again.
func (s *Session) Wait(ctx context.Context) (Event, error) {
	defer s.until(ctx)()
	e, err := s.event()
	if err != nil {
		return Event{}, s.lost(ctx, err)
	}
	return e, nil
}

// endTimeout bounds how long End waits for the node.
const endTimeout = 5 * time.Second

// End is Close that waits until the node has taken the attachment away, so that its name, addresses and host ports are free when End returns; a node that hangs
// is waited for no longer than endTimeout. No other method may be running.
func (s *Session) End() error {
	if s.conn.CloseWrite() == nil {
		_ = s.conn.SetReadDeadline(time.Now().Add(endTimeout))
		_, _ = io.Copy(io.Discard, s.r)
	}
	return s.Close()
}

// Close ends the Session, and with it an attachment of LifetimeSession, which may take the node a moment more. Idempotent; it unblocks the other methods.
func (s *Session) Close() error {
	s.closeOnce.Do(func() {
		close(s.closed)
		s.conn.Close()
	})
	return nil
}

// until makes reads and writes fail when ctx ends, until the function it returns is called.
func (s *Session) until(ctx context.Context) (stop func()) {
	done := make(chan struct{})
	off := context.AfterFunc(ctx, func() {
		_ = s.conn.SetDeadline(time.Unix(1, 0))
		close(done)
	})
	return func() {
		if !off() {
			<-done
			_ = s.conn.SetDeadline(time.Time{})
		}
	}
}

// lost explains an error of the connection.
func (s *Session) lost(ctx context.Context, err error) error {
	select {
	case <-s.closed:
		return fmt.Errorf("session with the node at %s: %w", s.c.socket, net.ErrClosed)
	default:
	}
	var e *Error
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("session with the node at %s: %w", s.c.socket, context.Cause(ctx))
	case errors.As(err, &e):
		return err
	case isGone(err):
		return s.c.noNode(errors.New("it has gone"))
	}
	return s.c.noNode(err)
}

func (s *Session) event() (e Event, err error) { return e, s.recv(&e) }

// recv reads a line. What has arrived of one when ctx ends is kept for the next call.
func (s *Session) recv(v any) error {
	// Peek, and not ReadSlice: a deadline in the middle of a line must not lose its beginning.
	for n := 1; ; {
		b, err := s.r.Peek(n)
		if i := bytes.IndexByte(b, '\n'); i >= 0 {
			err := json.Unmarshal(b[:i], v)
			_, _ = s.r.Discard(i + 1)
			if err != nil {
				return s.c.nonsense(err)
			}
			return nil
		}
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			return s.c.nonsense(fmt.Errorf("a line longer than %d bytes", MaxBody))
		case errors.Is(err, io.EOF) && len(b) > 0:
			return io.ErrUnexpectedEOF
		case err != nil:
			return err
		}
		n = max(n+1, s.r.Buffered())
	}
}
