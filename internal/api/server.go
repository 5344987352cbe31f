package api

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net"
	"net/http"
	"net/url"
	"os"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// ServerConfig is what a Server needs.
type ServerConfig struct {
	// Backend answers. Required.
	Backend Backend
	// Logger gets refused users, failures of the node's own (CodeInternal), and the server's beginning and end. Default: none.
	Logger *slog.Logger
	// Peer asks who is at the other end of a connection. Default: PeerOf, the kernel.
	Peer func(*net.UnixConn) (Caller, error)
	// UID is whose node this is. Default: the process's effective uid.
	UID func() int
	// DeviceTimeout is how long a client may take from the Plan to its Device. Default 1 minute.
	DeviceTimeout time.Duration
	// IOTimeout is how long a client may take to send a request, or to take a message of a session. Default 30 s.
	IOTimeout time.Duration
	// Grace is how long requests may go on when Serve is to end. Default 5 s.
	Grace time.Duration
}

// Server turns requests into calls of a Backend. It is safe for concurrent use.
type Server struct {
	cfg     ServerConfig
	log     *slog.Logger
	mux     *http.ServeMux
	metrics http.Handler
	handing atomic.Bool // to a successor, or handed over
}

// NewServer makes a Server. It holds nothing that has to be closed.
func NewServer(cfg ServerConfig) *Server {
	s := &Server{cfg: cfg, log: cfg.Logger, mux: http.NewServeMux()}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if cfg.Peer == nil {
		s.cfg.Peer = PeerOf
	}
	if cfg.UID == nil {
		s.cfg.UID = os.Geteuid
	}
	s.cfg.DeviceTimeout = cmp.Or(cfg.DeviceTimeout, time.Minute)
	s.cfg.IOTimeout = cmp.Or(cfg.IOTimeout, 30*time.Second)
	s.cfg.Grace = cmp.Or(cfg.Grace, 5*time.Second)
	s.metrics = newMetrics(cfg.Backend)
	for _, r := range routes {
		s.mux.HandleFunc(r.method+" "+r.pattern, s.handler(r))
	}
	return s
}

// serving is one call of Serve.
type serving struct {
	ending <-chan struct{}
	socket *socket

	mu       sync.Mutex
	ended    bool // no session begins any more
	sessions sync.WaitGroup
}

func (v *serving) begin() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	if !v.ended {
		v.sessions.Add(1)
	}
	return !v.ended
}

func (v *serving) wait() {
	v.mu.Lock()
	v.ended = true
	v.mu.Unlock()
	v.sessions.Wait()
}

type (
	servingKey struct{}
	peerKey    struct{}
)

// who is the outcome of ServerConfig.Peer for a connection.
type who struct {
	peer Caller
	err  error
}

// Serve answers on l until ctx ends, and then ends captures and sessions, lets other requests end, and closes l. Attachments of LifetimeSession outlast that: their
// clients resume them at the next node. It blocks. The error is nil when ctx ended it. Several calls may run at once.
func (s *Server) Serve(ctx context.Context, l *net.UnixListener) error {
	run := &serving{ending: ctx.Done(), socket: &socket{UnixListener: l}}
	base, cancel := context.WithCancel(context.WithValue(context.WithoutCancel(ctx), servingKey{}, run))
	defer cancel()
	srv := &http.Server{
		Handler:           http.HandlerFunc(s.serveHTTP),
		ReadHeaderTimeout: s.cfg.IOTimeout,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelWarn),
		BaseContext:       func(net.Listener) context.Context { return base },
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			u, ok := c.(*net.UnixConn)
			if !ok {
				return context.WithValue(ctx, peerKey{}, who{err: fmt.Errorf("%T is no unix socket", c)})
			}
			p, err := s.cfg.Peer(u)
			return context.WithValue(ctx, peerKey{}, who{p, err})
		},
	}
	place := inode(l)
	s.log.Info("listening", "socket", l.Addr().String())
	served := make(chan error, 1)
	go func() { served <- srv.Serve(run.socket) }()
	var err error
	select {
	case err = <-served:
		err = fmt.Errorf("socket %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	if inode(l) != place {
		run.socket.SetUnlinkOnClose(false) // somebody has put another socket there
	}
	grace, stop := context.WithTimeout(context.WithoutCancel(ctx), s.cfg.Grace)
	defer stop()
	if srv.Shutdown(grace) != nil {
		cancel()
		srv.Close()
	}
	run.wait()
	s.log.Info("no longer listening", "socket", l.Addr().String())
	return err
}

// inode tells the file at l's path from another; zero where there is none.
func inode(l *net.UnixListener) (id [2]uint64) {
	var st unix.Stat_t
	if unix.Lstat(l.Addr().String(), &st) == nil {
		id = [2]uint64{uint64(st.Dev), st.Ino}
	}
	return id
}

// serveHTTP lets the peer in or not, and finds the route.
func (s *Server) serveHTTP(w http.ResponseWriter, r *http.Request) {
	if err := s.admit(r); err != nil {
		w.Header().Set("Connection", "close")
		s.refuse(w, r, err)
		return
	}
	if path.Clean(r.URL.Path) != r.URL.Path { // the mux would redirect
		s.refuse(w, r, noRoute(r))
		return
	}
	if _, pattern := s.mux.Handler(r); pattern != "" {
		s.mux.ServeHTTP(w, r)
		return
	}
	// The mux knows which methods the path has, and says so in its own words.
	probe := &discard{header: http.Header{}}
	s.mux.ServeHTTP(probe, r)
	if probe.status == http.StatusMethodNotAllowed {
		allow := strings.ReplaceAll(probe.header.Get("Allow"), "GET, HEAD", "GET")
		w.Header().Set("Allow", allow)
		s.refuse(w, r, badMethod(r, allow))
		return
	}
	s.refuse(w, r, noRoute(r))
}

func badMethod(r *http.Request, allow string) error {
	return Errorf(CodeMethod, "use "+allow, "%s is no method of %s", abbreviate(r.Method), abbreviate(r.URL.Path))
}

func noRoute(r *http.Request) error {
	return Errorf(CodeNotFound, "GET "+Prefix+"/openapi.yaml lists the routes", "there is no route %s", abbreviate(r.URL.Path))
}

// discard takes an answer that nobody is to see.
type discard struct {
	header http.Header
	status int
}

func (d *discard) Header() http.Header         { return d.header }
func (d *discard) Write(b []byte) (int, error) { return len(b), nil }
func (d *discard) WriteHeader(status int)      { d.status = status }

func (s *Server) admit(r *http.Request) error {
	c, _ := r.Context().Value(peerKey{}).(who)
	err := c.err
	if err != nil {
		err = Errorf(CodeForbidden, "connect to the node's unix socket itself", "the kernel does not say who asks: %w", err)
	} else {
		err = checkPeer(c.peer, s.cfg.UID())
	}
	if err != nil {
		s.log.Warn("refused", "uid", c.peer.UID, "pid", c.peer.PID, "err", err)
	}
	return err
}

func peerOf(r *http.Request) Caller { return r.Context().Value(peerKey{}).(who).peer }

// handler is what all routes have in common: parameters that the route does not know are refused, and errors are answered.
func (s *Server) handler(rt route) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.Method != rt.method { // the mux takes HEAD for GET, and a capture without a body would not end
			w.Header().Set("Allow", rt.method)
			s.refuse(w, r, badMethod(r, rt.method))
			return
		}
		q, err := url.ParseQuery(r.URL.RawQuery)
		if err != nil {
			s.refuse(w, r, Errorf(CodeInvalid, "escape it as a URL's", "query %q cannot be read", abbreviate(r.URL.RawQuery)))
			return
		}
		for k, v := range q {
			if !rt.takes(k) || len(v) > 1 {
				s.refuse(w, r, Errorf(CodeInvalid, "it takes "+orNone(rt.query)+", each once", "%s %s: parameter %q is not known, or is there twice", r.Method, abbreviate(r.URL.Path), abbreviate(k)))
				return
			}
		}
		if err := rt.serve(s, w, r); err != nil {
			s.refuse(w, r, err)
		}
	}
}

func orNone(names []string) string {
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ", ")
}

// refuse answers with err.
func (s *Server) refuse(w http.ResponseWriter, r *http.Request, err error) {
	e := asError(err)
	if e.Code == CodeInternal && r.Context().Err() == nil {
		s.log.Error("request failed", "method", r.Method, "path", abbreviate(r.URL.Path), "err", err)
	}
	answer(w, e.Code.Status(), refusal{Error: e})
}

// answer writes v as the whole answer.
func answer(w http.ResponseWriter, status int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		status = http.StatusInternalServerError
		b, _ = json.Marshal(refusal{Error: &Error{Code: CodeInternal, Message: "the answer cannot be written as JSON: " + err.Error()}})
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(append(b, '\n')) // a client that has gone has nobody to tell
}

// validator is a spec that can look at itself.
type validator interface{ Validate() error }

// decode reads the request's body, strictly, and validates it.
func (s *Server) decode(w http.ResponseWriter, r *http.Request, v validator) error {
	if ct := r.Header.Get("Content-Type"); ct != "" {
		if mt, _, err := mime.ParseMediaType(ct); err != nil || mt != "application/json" {
			return Errorf(CodeInvalid, "send JSON, as Content-Type: application/json", "body: %q is not understood", abbreviate(ct))
		}
	}
	// The deadline is for the body alone: a capture or a session goes on for days.
	rc := http.NewResponseController(w)
	if err := rc.SetReadDeadline(time.Now().Add(s.cfg.IOTimeout)); err != nil {
		return err
	}
	var buf bytes.Buffer
	_, err := io.Copy(&buf, http.MaxBytesReader(w, r.Body, MaxBody))
	if err == nil {
		err = rc.SetReadDeadline(time.Time{})
	} else {
		w.Header().Set("Connection", "close") // and the deadline stays, for net/http would wait for the rest before it answers
	}
	var tooLong *http.MaxBytesError
	switch {
	case errors.As(err, &tooLong):
		return Errorf(CodeTooLarge, "send less", "body: it is longer than %d bytes", MaxBody)
	case err != nil:
		return Errorf(CodeInvalid, "send all of it", "body: %w", err)
	}
	if err := decodeStrict(buf.Bytes(), v); err != nil {
		return Errorf(CodeInvalid, "see "+Prefix+"/openapi.yaml", "body: %w", err)
	}
	return v.Validate()
}
