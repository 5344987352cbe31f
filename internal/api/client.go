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
	"net/url"
	"strconv"
	"strings"
	"syscall"
	"time"

	"patchbay/internal/wire"
)

// maxAnswer bounds an answer that is not a stream, in bytes: a list of 65,536 FDB entries fits well.
const maxAnswer = 64 << 20

// Client asks the node at a socket. Each method is one route. Errors are *Error as the node gave it, or have ErrNoNode in their chain. It is safe for concurrent use.
type Client struct {
	socket string
	http   *http.Client
	dialer net.Dialer
}

// NewClient makes a Client. It connects when it is used.
func NewClient(socketPath string) *Client {
	c := &Client{socket: socketPath}
	c.http = &http.Client{
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return c.dialer.DialContext(ctx, "unix", socketPath)
			},
			DisableCompression: true,
			IdleConnTimeout:    30 * time.Second,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return c
}

// Socket is the path it was made with.
func (c *Client) Socket() string { return c.socket }

// Close closes idle connections. The Client may still be used.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Health asks whether the node answers.
func (c *Client) Health(ctx context.Context) error {
	_, err := c.text(ctx, "/healthz")
	return err
}

// Metrics are the node's, in Prometheus' text format.
func (c *Client) Metrics(ctx context.Context) ([]byte, error) { return c.text(ctx, "/metrics") }

// OpenAPI is the node's description of its routes.
func (c *Client) OpenAPI(ctx context.Context) ([]byte, error) {
	return c.text(ctx, Prefix+"/openapi.yaml")
}

// Info is who answers.
func (c *Client) Info(ctx context.Context) (v Info, err error) {
	return v, c.get(ctx, place("info"), &v)
}

// Networks are all networks, by name.
func (c *Client) Networks(ctx context.Context) (v []Network, err error) {
	return v, c.get(ctx, place("networks"), &v)
}

// Network is one network.
func (c *Client) Network(ctx context.Context, name string) (v Network, err error) {
	return v, c.get(ctx, place("networks", name), &v)
}

// CreateNetwork makes a network.
func (c *Client) CreateNetwork(ctx context.Context, spec NetworkSpec) (v Network, err error) {
	return v, c.do(ctx, http.MethodPost, place("networks"), spec, &v)
}

// RemoveNetwork removes one that has no attachments.
func (c *Client) RemoveNetwork(ctx context.Context, name string) error {
	return c.do(ctx, http.MethodDelete, place("networks", name), nil, nil)
}

// Attachments are those of one network, or of all with "".
func (c *Client) Attachments(ctx context.Context, network string) (v []Attachment, err error) {
	p := place("attachments")
	if network != "" {
		p += "?" + url.Values{"network": {network}}.Encode()
	}
	return v, c.get(ctx, p, &v)
}

// Attachment is one attachment.
func (c *Client) Attachment(ctx context.Context, network, name string) (v Attachment, err error) {
	return v, c.get(ctx, place("networks", network, "attachments", name), &v)
}

// AttachStream makes an attachment of LifetimeStream.
func (c *Client) AttachStream(ctx context.Context, network string, spec AttachmentSpec) (v Attachment, err error) {
	return v, c.do(ctx, http.MethodPost, place("networks", network, "attachments"), spec, &v)
}

// Detach ends an attachment.
func (c *Client) Detach(ctx context.Context, network, name string) error {
	return c.do(ctx, http.MethodDelete, place("networks", network, "attachments", name), nil, nil)
}

// Publishes are all published ports.
func (c *Client) Publishes(ctx context.Context) (v []Publish, err error) {
	return v, c.get(ctx, place("publishes"), &v)
}

// AddPublish opens host ports.
func (c *Client) AddPublish(ctx context.Context, network, attachment string, spec PublishSpec) (v Publish, err error) {
	return v, c.do(ctx, http.MethodPost, place("networks", network, "attachments", attachment, "publishes"), spec, &v)
}

// RemovePublish closes them.
func (c *Client) RemovePublish(ctx context.Context, id string) error {
	return c.do(ctx, http.MethodDelete, place("publishes", id), nil, nil)
}

// Peers are those of one network, or of all with "".
func (c *Client) Peers(ctx context.Context, network string) (v []Peer, err error) {
	p := place("peers")
	if network != "" {
		p += "?" + url.Values{"network": {network}}.Encode()
	}
	return v, c.get(ctx, p, &v)
}

// AddPeer makes a peer.
func (c *Client) AddPeer(ctx context.Context, network string, spec PeerSpec) (v Peer, err error) {
	return v, c.do(ctx, http.MethodPost, place("networks", network, "peers"), spec, &v)
}

// RemovePeer removes the peer HOST or HOST:PORT.
func (c *Client) RemovePeer(ctx context.Context, network, peer string) error {
	return c.do(ctx, http.MethodDelete, place("networks", network, "peers", peer), nil, nil)
}

// AddPeerFDB makes a static entry of a peer.
func (c *Client) AddPeerFDB(ctx context.Context, network, peer string, mac wire.MAC) (v Peer, err error) {
	return v, c.do(ctx, http.MethodPost, place("networks", network, "peers", peer, "fdb"), FDBSpec{MAC: mac}, &v)
}

// RemovePeerFDB takes it back.
func (c *Client) RemovePeerFDB(ctx context.Context, network, peer string, mac wire.MAC) (v Peer, err error) {
	return v, c.do(ctx, http.MethodDelete, place("networks", network, "peers", peer, "fdb", mac.String()), nil, &v)
}

// FDB is what a network's switch knows.
func (c *Client) FDB(ctx context.Context, network string) (v []FDBEntry, err error) {
	return v, c.get(ctx, place("networks", network, "fdb"), &v)
}

// Drops are those of one network, or of all with "".
func (c *Client) Drops(ctx context.Context, network string) (v []DropCount, err error) {
	if network == "" {
		return v, c.get(ctx, place("drops"), &v)
	}
	return v, c.get(ctx, place("networks", network, "drops"), &v)
}

// Capture is a live pcapng stream, until ctx ends, the caller closes it or the capture's count is reached. It returns when the capture has begun. A capture that the node ends
// early is an error of Read in place of io.EOF.
func (c *Client) Capture(ctx context.Context, network string, spec CaptureSpec) (io.ReadCloser, error) {
	q := url.Values{}
	for name, v := range map[string]string{"attachment": spec.Attachment, "filter": spec.Filter} {
		if v != "" {
			q.Set(name, v)
		}
	}
	for name, v := range map[string]int{"snaplen": spec.SnapLen, "count": spec.Count} {
		if v != 0 {
			q.Set(name, strconv.Itoa(v))
		}
	}
	resp, err := c.request(ctx, http.MethodGet, place("networks", network, "capture")+"?"+q.Encode(), nil)
	if err != nil {
		return nil, err
	}
	return &captureStream{resp}, nil
}

type captureStream struct{ resp *http.Response }

func (s *captureStream) Close() error { return s.resp.Body.Close() }

func (s *captureStream) Read(b []byte) (int, error) {
	n, err := s.resp.Body.Read(b)
	if errors.Is(err, io.EOF) {
		if t := s.resp.Trailer.Get(captureError); t != "" {
			err = readRefusal(s.resp.Status, []byte(t))
		}
	}
	return n, err
}

// Resolve finds the attachment that ref, NAME or NETWORK/NAME, means. A NAME that several networks have is CodeConflict and lists them.
func (c *Client) Resolve(ctx context.Context, ref string) (network, name string, err error) {
	if net, n, full := strings.Cut(ref, "/"); full {
		if err := errors.Join(CheckName(net), CheckName(n)); err != nil {
			return "", "", Errorf(CodeInvalid, "write NAME or NETWORK/NAME", "%q is no attachment", abbreviate(ref))
		}
		a, err := c.Attachment(ctx, net, n)
		return a.Network, a.Name, err
	}
	if err := CheckName(ref); err != nil {
		return "", "", err
	}
	all, err := c.Attachments(ctx, "")
	if err != nil {
		return "", "", err
	}
	var found []string
	for _, a := range all {
		if strings.EqualFold(a.Name, ref) {
			network, name = a.Network, a.Name
			found = append(found, a.Network+"/"+a.Name)
		}
	}
	switch len(found) {
	case 0:
		return "", "", Errorf(CodeNotFound, "`patchbay ps` lists them", "there is no attachment %q", ref)
	case 1:
		return network, name, nil
	}
	return "", "", Errorf(CodeConflict, "name one of "+strings.Join(found, ", "), "%d networks have an attachment %q", len(found), ref)
}

// place is the path of a route, its parts escaped.
func place(parts ...string) string {
	var b strings.Builder
	b.WriteString(Prefix)
	for _, p := range parts {
		b.WriteByte('/')
		b.WriteString(url.PathEscape(p))
	}
	return b.String()
}

func (c *Client) get(ctx context.Context, path string, v any) error {
	return c.do(ctx, http.MethodGet, path, nil, v)
}

func (c *Client) text(ctx context.Context, path string) ([]byte, error) {
	resp, err := c.request(ctx, http.MethodGet, path, nil)
	if err != nil {
		return nil, err
	}
	return c.body(resp)
}

// do sends body as JSON, if any, and reads the answer into v, if any.
func (c *Client) do(ctx context.Context, method, path string, body, v any) error {
	resp, err := c.request(ctx, method, path, body)
	if err != nil {
		return err
	}
	b, err := c.body(resp)
	if err != nil || v == nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil { // not strictly: a newer node may say more
		return c.nonsense(fmt.Errorf("%s %s: %w", method, path, err))
	}
	return nil
}

func (c *Client) body(resp *http.Response) ([]byte, error) {
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	switch {
	case err != nil:
		return nil, c.noNode(err)
	case len(b) > maxAnswer:
		return nil, c.nonsense(fmt.Errorf("an answer of more than %d bytes", maxAnswer))
	}
	return b, nil
}

// request is answered with success, or it is an error.
func (c *Client) request(ctx context.Context, method, path string, body any) (*http.Response, error) {
	req, err := newRequest(ctx, method, path, body)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		var u *url.Error // wraps with a method and a URL that mean nothing to anybody
		if errors.As(err, &u) {
			err = u.Err
		}
		if ctx.Err() != nil {
			return nil, fmt.Errorf("node at %s: %w", c.socket, err)
		}
		return nil, c.noNode(err)
	}
	if resp.StatusCode/100 == 2 {
		return resp, nil
	}
	b, err := c.body(resp)
	if err != nil {
		return nil, err
	}
	return nil, readRefusal(resp.Status, b)
}

func newRequest(ctx context.Context, method, path string, body any) (*http.Request, error) {
	var r io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return nil, Errorf(CodeInvalid, "", "request: %w", err)
		}
		r = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://patchbay"+path, r)
	if err == nil && body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	return req, err
}

// readRefusal is the Error in b, or one that says what came instead.
func readRefusal(status string, b []byte) error {
	var r refusal
	if err := json.Unmarshal(b, &r); err != nil || r.Error == nil || r.Error.Message == "" {
		return Errorf(CodeInternal, "is it a patchbay node that listens there?", "the node answered %s: %q", status, abbreviate(strings.TrimSpace(string(b))))
	}
	return r.Error
}

// noNode explains a connection that failed.
func (c *Client) noNode(err error) error {
	return &Error{
		Code: CodeUnavailable, Message: fmt.Sprintf("%v at %s: %v", ErrNoNode, c.socket, reason(err)), Remedy: "start one with `patchbay daemon`",
		Err: fmt.Errorf("%w: %w", ErrNoNode, err),
	}
}

func (c *Client) nonsense(err error) error {
	return Errorf(CodeInternal, "is it a patchbay node of this version that listens there?", "the node at %s answered what cannot be read: %w", c.socket, err)
}

// reason is err without the operation and address that net puts around it.
func reason(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		err = op.Err
	}
	var errno syscall.Errno
	if errors.As(err, &errno) { // without the "connect:" in front
		return errno
	}
	return err
}
