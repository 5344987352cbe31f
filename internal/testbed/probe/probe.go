// Package probe is the far side of reachability tests: a server that tells each client what address it sees, and a client that says what
// became of an attempt. A test binary that calls Main is its own probe, so that nothing needs to be installed in a container.
package probe

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const envArgs = "PATCHBAY_PROBE"

// timeout ends an attempt that nobody answers.
const timeout = 2 * time.Second

// Attempt is one thing to try.
type Attempt struct {
	Net  string // "tcp", "udp", "ping", "name", "http"
	Addr string // host:port; an address for ping; a name for name
}

// Outcome is what became of it.
type Outcome struct {
	Attempt
	// Said is the server's answer: the client's address as it saw it. For ping it is "answered", for name the addresses, for http the page.
	Said string `json:",omitempty"`
	// Err is the errno's name (ECONNREFUSED), "timeout", or another error's text.
	Err string `json:",omitempty"`
}

// OK reports whether the attempt got through.
func (o Outcome) OK() bool { return o.Err == "" }

func (o Outcome) String() string {
	if o.OK() {
		return fmt.Sprintf("%s %s: %s", o.Net, o.Addr, o.Said)
	}
	return fmt.Sprintf("%s %s: failed: %s", o.Net, o.Addr, o.Err)
}

// Main runs the probe and exits, if this process was started to be one. Call it before testbed.Main.
func Main() {
	spec, ok := os.LookupEnv(envArgs)
	if !ok {
		return
	}
	verb, arg, _ := strings.Cut(spec, " ")
	switch verb {
	case "serve":
		s, err := Serve(context.Background(), nil, strings.Fields(arg)...)
		if err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
		fmt.Println("serving")
		_, _ = io.Copy(io.Discard, os.Stdin) // until the test closes it
		s.Close()
		os.Exit(0)
	case "try":
		var list []Attempt
		if err := json.Unmarshal([]byte(arg), &list); err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
		out := make([]Outcome, len(list))
		var wg sync.WaitGroup
		for i, a := range list {
			wg.Go(func() { out[i] = Try(a) })
		}
		wg.Wait()
		if err := json.NewEncoder(os.Stdout).Encode(out); err != nil {
			os.Exit(1)
		}
		os.Exit(0)
	}
	fmt.Println("error: unknown probe", spec)
	os.Exit(2)
}

// Binary is a copy of this test binary that anybody may execute.
func Binary(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "probe")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	in, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	name := filepath.Join(dir, "probe")
	out, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.Copy(out, in)
	if err = errors.Join(err, out.Close()); err != nil {
		t.Fatal(err)
	}
	return name
}

// ServeEnv is the environment entry that makes Binary a server on the ports (host:port, TCP and UDP). It says "serving" and goes on until
// its standard input ends.
func ServeEnv(addrs ...string) string { return envArgs + "=serve " + strings.Join(addrs, " ") }

// TryEnv is the environment entry that makes Binary try everything at once and print the outcomes as one line of JSON.
func TryEnv(list ...Attempt) string {
	b, err := json.Marshal(list)
	if err != nil {
		panic(err) // two strings
	}
	return envArgs + "=try " + string(b)
}

// Outcomes reads what TryEnv's command printed.
func Outcomes(t testing.TB, out []byte) []Outcome {
	t.Helper()
	var list []Outcome
	if err := json.Unmarshal(out, &list); err != nil {
		t.Fatalf("probe printed %q: %v", out, err)
	}
	return list
}

// Listener opens sockets in some namespace; testbed.NS is one. nil is the caller's own.
type Listener interface {
	Listen(network, addr string) (net.Listener, error)
	ListenPacket(network, addr string) (net.PacketConn, error)
}

type here struct{}

func (here) Listen(network, addr string) (net.Listener, error) { return net.Listen(network, addr) }
func (here) ListenPacket(network, addr string) (net.PacketConn, error) {
	return net.ListenPacket(network, addr)
}

// Server tells every client its address.
type Server struct {
	closers []io.Closer
	wg      sync.WaitGroup
}

// Serve listens on every addr over TCP and UDP.
func Serve(_ context.Context, in Listener, addrs ...string) (*Server, error) {
	if in == nil {
		in = here{}
	}
	s := new(Server)
	for _, addr := range addrs {
		l, err := in.Listen("tcp", addr)
		if err != nil {
			s.Close()
			return nil, err
		}
		s.closers = append(s.closers, l)
		p, err := in.ListenPacket("udp", addr)
		if err != nil {
			s.Close()
			return nil, err
		}
		s.closers = append(s.closers, p)
		s.wg.Go(func() { s.tcp(l) })
		s.wg.Go(func() { s.udp(p) })
	}
	return s, nil
}

func (s *Server) tcp(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		fmt.Fprint(c, c.RemoteAddr())
		c.Close()
	}
}

func (s *Server) udp(p net.PacketConn) {
	buf := make([]byte, 64<<10)
	for {
		_, from, err := p.ReadFrom(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			_, _ = p.WriteTo([]byte(from.String()), from) // a client that is gone does not ask
		}
	}
}

// Close ends the server.
func (s *Server) Close() {
	for _, c := range s.closers {
		c.Close()
	}
	s.wg.Wait()
}

// Try makes one attempt.
func Try(a Attempt) Outcome {
	o := Outcome{Attempt: a}
	said, err := try(a)
	o.Said = said
	var errno syscall.Errno
	var ne net.Error
	switch {
	case err == nil:
	case errors.As(err, &errno):
		o.Err = errnoName(errno)
	case errors.As(err, &ne) && ne.Timeout():
		o.Err = "timeout"
	default:
		o.Err = err.Error()
	}
	return o
}

func try(a Attempt) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	switch a.Net {
	case "ping":
		out, err := exec.CommandContext(ctx, "ping", "-n", "-c1", "-W1", a.Addr).CombinedOutput()
		if err == nil {
			return "answered", nil
		}
		for _, why := range []string{"prohibited", "Unreachable", "unreachable"} {
			if strings.Contains(string(out), why) {
				return "", errors.New("unreachable")
			}
		}
		return "", errors.New("silence")
	case "name":
		addrs, err := net.DefaultResolver.LookupHost(ctx, a.Addr)
		return strings.Join(addrs, " "), err
	case "http":
		return page(ctx, "http://"+a.Addr+"/")
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, a.Net, a.Addr)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(timeout)); err != nil {
		return "", err
	}
	if strings.HasPrefix(a.Net, "udp") {
		if _, err := c.Write([]byte("who am I")); err != nil {
			return "", err
		}
	}
	buf := make([]byte, 256)
	n, err := c.Read(buf)
	return string(buf[:n]), err
}

func page(ctx context.Context, url string) (string, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	a, err := c.Do(r)
	if err != nil {
		return "", err
	}
	defer a.Body.Close()
	b, err := io.ReadAll(io.LimitReader(a.Body, 1<<16))
	return string(b), err
}

func errnoName(e syscall.Errno) string {
	for name, v := range map[string]syscall.Errno{
		"ECONNREFUSED": syscall.ECONNREFUSED, "EHOSTUNREACH": syscall.EHOSTUNREACH, "ENETUNREACH": syscall.ENETUNREACH,
		"EACCES": syscall.EACCES, "ECONNRESET": syscall.ECONNRESET, "EADDRNOTAVAIL": syscall.EADDRNOTAVAIL, "EINVAL": syscall.EINVAL,
		"EPERM": syscall.EPERM,
	} {
		if v == e {
			return name
		}
	}
	return e.Error()
}
