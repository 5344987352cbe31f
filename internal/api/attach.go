package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func servingOf(r *http.Request) *serving { return r.Context().Value(servingKey{}).(*serving) }

// untilEnd is the request's context, and ends with the server too.
func (s *Server) untilEnd(r *http.Request) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(r.Context())
	ending := servingOf(r).ending
	go func() {
		select {
		case <-ending:
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}

func (s *Server) attach(w http.ResponseWriter, r *http.Request) error {
	var spec AttachmentSpec
	if err := s.decode(w, r, &spec); err != nil {
		return err
	}
	network := r.PathValue("network")
	if spec.Lifetime == LifetimeStream {
		if r.Header.Get("Upgrade") != "" {
			return Errorf(CodeInvalid, "leave out the Upgrade header", "an attachment with lifetime stream has no device of the client's")
		}
		a, err := s.cfg.Backend.AttachStream(r.Context(), network, spec)
		return ok(w, http.StatusCreated, a, err)
	}
	if err := wantsSession(r); err != nil {
		return err
	}
	a, err := s.cfg.Backend.Attach(r.Context(), network, spec, peerOf(r))
	if err != nil {
		return err
	}
	return s.session(w, r, a)
}

func (s *Server) resume(w http.ResponseWriter, r *http.Request) error {
	if err := wantsSession(r); err != nil {
		return err
	}
	if n, _ := io.ReadFull(r.Body, make([]byte, 1)); n > 0 {
		return Errorf(CodeInvalid, "send none", "body: resume takes none")
	}
	a, err := s.cfg.Backend.Resume(r.Context(), r.PathValue("network"), r.PathValue("name"), peerOf(r))
	if err != nil {
		return err
	}
	return s.session(w, r, a)
}

// wantsSession refuses a request that descriptors could not follow.
func wantsSession(r *http.Request) error {
	if !strings.EqualFold(r.Header.Get("Upgrade"), upgrade) || !strings.EqualFold(r.Header.Get("Connection"), "upgrade") || !r.ProtoAtLeast(1, 1) {
		return Errorf(CodeInvalid, "send Connection: Upgrade and Upgrade: "+upgrade+" over HTTP/1.1, or use `patchbay attach`", "the device's descriptors need a session")
	}
	return nil
}

// session takes the connection from HTTP and brings the attachment up, then stays until either side ends it. a is Aborted or left in every case.
func (s *Server) session(w http.ResponseWriter, r *http.Request, a Attaching) error {
	run := servingOf(r)
	if !run.begin() {
		a.Abort()
		return errEnding()
	}
	defer run.sessions.Done()
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		a.Abort()
		return fmt.Errorf("take the connection from HTTP: %w", err)
	}
	defer conn.Close()
	c, isUnix := conn.(*net.UnixConn)
	if !isUnix || rw.Reader.Buffered() > 0 {
		a.Abort()
		_ = conn.SetWriteDeadline(time.Now().Add(s.cfg.IOTimeout))
		b, _ := json.Marshal(refusal{Error: Errorf(CodeInvalid, "wait for the plan", "the client spoke before its turn")})
		_ = (&http.Response{
			StatusCode: http.StatusBadRequest, ProtoMajor: 1, ProtoMinor: 1, Close: true, ContentLength: int64(len(b)),
			Header: http.Header{"Content-Type": {"application/json"}}, Body: io.NopCloser(bytes.NewReader(b)),
		}).Write(conn)
		return nil
	}
	ss := &serverSession{s: s, conn: c, a: a, ending: run.ending}
	ss.run(context.WithoutCancel(r.Context()))
	return nil
}

// serverSession is the server's end of a session. It belongs to the request's goroutine.
type serverSession struct {
	s      *Server
	conn   *net.UnixConn
	a      Attaching
	ending <-chan struct{}
}

func (ss *serverSession) run(ctx context.Context) {
	stop := make(chan struct{})
	defer close(stop)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	up := make(chan struct{})
	go func() { // the server's end unblocks a session that is still waiting for its device
		select {
		case <-ss.ending:
			select {
			case <-up:
			default:
				_ = ss.conn.SetReadDeadline(time.Now())
			}
		case <-stop:
		}
	}()
	att, err := ss.plug(ctx)
	close(up)
	if err != nil {
		ss.a.Abort()
		if !errors.Is(err, errClientGone) {
			_ = ss.send(Event{Kind: EventError, Error: asError(err)})
		}
		return
	}
	if err := ss.send(Event{Kind: EventUp, Attachment: &att}); err != nil {
		ss.a.Leave()
		return
	}
	ss.watch()
}

func errEnding() error {
	return Errorf(CodeUnavailable, "try again when the next one runs", "the node ends")
}

// isGone reports whether the other end of a connection is no more.
func isGone(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE)
}

// errClientGone is a client that ended before it sent its device.
var errClientGone = errors.New("the client has gone")

// plug sends the plan and waits for the device.
func (ss *serverSession) plug(ctx context.Context) (Attachment, error) {
	_ = ss.conn.SetWriteDeadline(time.Now().Add(ss.s.cfg.IOTimeout))
	if _, err := io.WriteString(ss.conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+upgrade+"\r\n\r\n"); err != nil {
		return Attachment{}, errClientGone
	}
	if err := ss.send(ss.a.Plan()); err != nil {
		return Attachment{}, errClientGone
	}
	_ = ss.conn.SetReadDeadline(time.Now().Add(ss.s.cfg.DeviceTimeout))
	select {
	case <-ss.ending: // its deadline may have come before this one
		return Attachment{}, errEnding()
	default:
	}
	var d Device
	fds, err := recvLine(ss.conn, &d)
	var timeout net.Error
	switch {
	case isGone(err):
		return Attachment{}, errClientGone
	case errors.As(err, &timeout) && timeout.Timeout():
		select {
		case <-ss.ending:
			return Attachment{}, errEnding()
		default:
		}
		return Attachment{}, Errorf(CodeInvalid, "try again", "the device did not come within %v", ss.s.cfg.DeviceTimeout)
	case err != nil:
		return Attachment{}, Errorf(CodeInvalid, "use a client of the node's own version", "device: %w", err)
	}
	if err := d.check(len(fds)); err != nil {
		closeAll(fds)
		return Attachment{}, err
	}
	_ = ss.conn.SetReadDeadline(time.Time{})
	d.FDs = fds
	return ss.a.Plug(ctx, d)
}

// check is what the server itself wants of a Device that came with n descriptors.
func (d *Device) check(n int) error {
	switch {
	case d.Error != "":
		return Errorf(CodeInvalid, "", "the client has no device: %s", d.Error)
	case n == 0:
		return Errorf(CodeInvalid, "send them with the first byte of the line", "device: no descriptors came with it")
	case d.PID < 0:
		return Errorf(CodeInvalid, "give that of a living process", "device: pid %d is none", d.PID)
	}
	return nil
}

// watch stays until the client goes, the attachment is taken away, or the server ends.
func (ss *serverSession) watch() {
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		_, _ = ss.conn.Read(make([]byte, 1)) // a client has nothing more to say, so what it says ends the session as well
	}()
	select {
	case <-gone:
		select {
		case <-ss.ending: // it is the next node that the client turns to now
		default:
			ss.a.Leave()
		}
	case <-ss.a.Detached():
		_ = ss.send(Event{Kind: EventDetached})
		ss.a.Leave()
	case <-ss.ending:
	}
	ss.conn.Close()
	<-gone
}

func (ss *serverSession) send(v any) error {
	_ = ss.conn.SetWriteDeadline(time.Now().Add(ss.s.cfg.IOTimeout))
	return sendLine(ss.conn, v)
}
