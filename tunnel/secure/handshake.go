package secure

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pion/dtls/v3"
	"github.com/pion/logging"
)

const (
	handshakeTime = 10 * time.Second       // in all
	flightTime    = 250 * time.Millisecond // before a flight is repeated, doubled each time
	confirmTimes  = 3                      // that the initiator says that it has the keys
	confirmEvery  = 200 * time.Millisecond
	dtlsMTU       = 1100 // of what the library puts into a datagram, less two headers and a tag
)

// shake is one handshake, from its first datagram until its DTLS connection is closed. Its goroutine is in shakeHands; Run feeds it.
type shake struct {
	link   *Link
	head   header
	random random // of one that this node has started
	pipe   *pipe
	cancel context.CancelFunc
	began  time.Time
	made   atomic.Bool // it has made a session, and only waits for the other side to know

	mu     sync.Mutex
	last   []byte   // the initiator's last datagram, to repeat after a challenge
	held   [][]byte // the responder's last flight, until the session opens
	free   bool     // nothing is held any more
	answer bool     // a handshake message came
	alert  byte     // in clear, so no more than a hint

	err error // of the handshake; set before it is sent to Run
}

// newShake makes one. head is that of what this side sends.
func newShake(l *Link, head header) *shake {
	s := &shake{link: l, head: head, began: time.Now()}
	s.pipe = newPipe(s.write)
	return s
}

func newNumber() uint32 {
	for {
		if n := rand.Uint32() &^ fromResponder; n != 0 {
			return n
		}
	}
}

// write is called by the library with each datagram.
func (s *shake) write(b []byte) {
	s.mu.Lock()
	d := append(s.head.append(make([]byte, 0, HeaderLen+len(b))), b...)
	if s.head.responder && !s.free && sealedRecords(b) {
		// With this flight the initiator has the keys and may use them at once. It goes out when the session opens here.
		if s.held = append(s.held, d); len(s.held) > maxPipe {
			s.held = s.held[1:]
		}
		s.mu.Unlock()
		return
	}
	if !s.head.responder {
		s.last = d
	}
	s.mu.Unlock()
	_ = s.link.cfg.Send(d) // like loss
}

// release sends what was held.
func (s *shake) release() {
	s.mu.Lock()
	held := s.held
	s.held, s.free = nil, true
	s.mu.Unlock()
	for _, d := range held {
		_ = s.link.cfg.Send(d)
	}
}

// challenge is the responder's wish to see its cookie. It is heard until an answer came.
func (s *shake) challenge(cookie uint64) {
	s.mu.Lock()
	if s.answer || s.head.cookie == cookie || s.last == nil {
		s.mu.Unlock()
		return
	}
	s.head.cookie = cookie
	d := append(s.head.append(nil), s.last[HeaderLen:]...)
	s.last = d
	s.mu.Unlock()
	_ = s.link.cfg.Send(d)
}

// feed hands payload, which is kept, to the library, less what could end the handshake without being authenticated.
func (s *shake) feed(payload []byte) {
	kept, alert := sift(payload)
	s.mu.Lock()
	s.answer = s.answer || beginsInClear(kept)
	if alert != 0 {
		s.alert = alert
	}
	s.mu.Unlock()
	if len(kept) > 0 {
		s.pipe.push(kept)
	}
}

// suites are the cipher suites of handshakes: with perfect forward secrecy and an AEAD.
func (l *Link) suites() []dtls.CipherSuiteID {
	if l.psk != nil {
		return []dtls.CipherSuiteID{dtls.TLS_ECDHE_PSK_WITH_CHACHA20_POLY1305_SHA256}
	}
	return []dtls.CipherSuiteID{dtls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, dtls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384}
}

// options are those of both roles.
func (s *shake) options(initiator bool) []dtls.Option {
	l := s.link
	o := []dtls.Option{
		dtls.WithCipherSuites(l.suites()...),
		dtls.WithExtendedMasterSecret(dtls.RequireExtendedMasterSecret),
		dtls.WithSupportedProtocols(l.alpn),
		dtls.WithVerifyConnection(func(st *dtls.State) error { return l.verifyPeer(st, initiator) }),
		dtls.WithMTU(dtlsMTU),
		dtls.WithFlightInterval(flightTime),
		dtls.WithLoggerFactory(&logging.DefaultLoggerFactory{Writer: io.Discard, DefaultLogLevel: logging.LogLevelDisabled}),
	}
	if l.psk != nil {
		return append(o, dtls.WithPSKIdentityHint([]byte(l.cfg.Network)), dtls.WithPSK(func(hint []byte) ([]byte, error) {
			if string(hint) != l.cfg.Network {
				return nil, fmt.Errorf("the other side has the key of network %.70q", hint)
			}
			return l.psk, nil
		}))
	}
	// The library's own verification knows neither Config.Now nor IP addresses and networks; verifyPeer does all of it, in both roles.
	return append(o, dtls.WithCertificates(l.cfg.Identity.cert), dtls.WithInsecureSkipVerify(true))
}

func (s *shake) conn() (*dtls.Conn, error) {
	if s.head.responder {
		var o []dtls.ServerOption
		for _, x := range s.options(false) {
			o = append(o, x)
		}
		if s.link.psk == nil {
			o = append(o, dtls.WithClientAuth(dtls.RequireAnyClientCert))
		}
		return dtls.ServerWithOptions(s.pipe, peerAddr{}, o...)
	}
	var o []dtls.ClientOption
	for _, x := range s.options(true) {
		o = append(o, x)
	}
	o = append(o, dtls.WithHelloRandomBytesGenerator(func() [28]byte { return s.random }))
	return dtls.ClientWithOptions(s.pipe, peerAddr{}, o...)
}

// shakeHands makes a session, or returns why there is none. made is called when the session opens, from this goroutine. It returns when the DTLS connection has done its duty.
func (s *shake) shakeHands(ctx context.Context, made func()) error {
	ctx, cancel := context.WithTimeout(ctx, handshakeTime)
	defer cancel()
	defer s.pipe.Close()
	conn, err := s.conn()
	if err != nil {
		return err
	}
	if err := conn.HandshakeContext(ctx); err != nil {
		conn.Close()
		return s.explain(err)
	}
	defer conn.Close()
	ses, err := s.session(conn)
	if err != nil {
		return err
	}
	if err := s.link.add(ses); err != nil {
		return err
	}
	s.made.Store(true)
	s.release()
	if s.head.responder {
		made()
		s.await(ctx, conn, ses)
		return nil
	}
	s.link.confirm(ses)
	made()
	for i := range confirmTimes {
		if i > 0 {
			select {
			case <-time.After(confirmEvery):
			case <-ses.over:
			case <-ctx.Done():
			}
		}
		_, _ = conn.Write([]byte{confirmByte}) // it may be lost; data says the same
	}
	return nil
}

const confirmByte = 1 // the whole of what is ever said inside DTLS: "I have the keys"

// session makes one of what the handshake exports.
func (s *shake) session(conn *dtls.Conn) (*Session, error) {
	st, ok := conn.ConnectionState()
	if !ok {
		return nil, errors.New("the connection has no state to export keys from")
	}
	b, err := st.ExportKeyingMaterial(s.link.label, nil, keysLen)
	if err != nil {
		return nil, fmt.Errorf("export keys: %w", err)
	}
	k, ok := parseKeys(b)
	if !ok {
		return nil, errors.New("export keys: too few")
	}
	ses, err := newSession(k, !s.head.responder, time.Now(), s.link.cfg.RekeyBytes, s.link.wake)
	if err == nil {
		ses.began = s.began
	}
	return ses, err
}

// await keeps the responder's connection, which repeats its last flight if that was lost, until the initiator is known to have the keys.
func (s *shake) await(ctx context.Context, conn *dtls.Conn, ses *Session) {
	go func() {
		select {
		case <-ses.sure:
		case <-ses.over:
		case <-ctx.Done():
		}
		_ = conn.SetReadDeadline(time.Unix(1, 0))
	}()
	var b [16]byte
	n, err := conn.Read(b[:])
	if err == nil && n == 1 && b[0] == confirmByte {
		s.link.confirm(ses)
	}
	select {
	case <-ses.sure:
	case <-ses.over:
	case <-ctx.Done():
	}
}

// explain words why a handshake failed, with what was seen of it.
func (s *shake) explain(err error) error {
	s.mu.Lock()
	answer, alert := s.answer, s.alert
	s.mu.Unlock()
	var he *dtls.HandshakeError
	if errors.As(err, &he) {
		err = he.Err
	}
	if errors.Is(err, context.Canceled) {
		return err
	}
	if !errors.Is(err, context.DeadlineExceeded) {
		return explainDTLS(err)
	}
	switch {
	case alert != 0:
		return fmt.Errorf("the other side refuses: %s (unauthenticated)", alertText(alert))
	case answer && s.link.psk != nil:
		return fmt.Errorf("it answers but the handshake does not end within %v: its pre-shared key is another one, or too much is lost on the way", handshakeTime)
	case answer:
		return fmt.Errorf("it answers but the handshake does not end within %v: too much is lost on the way, or changed", handshakeTime)
	}
	return fmt.Errorf("no answer within %v: the peer is down, does not seal this network or does not know this node as a peer of it", handshakeTime)
}

func explainDTLS(err error) error {
	msg := err.Error()
	for _, e := range []struct{ has, says string }{
		{"shared cipher suites", "the other side has no key of the same kind: one node has a certificate and the other a pre-shared key"},
		{"no CipherSuites satisfy", "the key cannot be used for sealing"},
		{"application protocol", "the other side seals another network, or this one under another name or VNI"},
	} {
		if strings.Contains(msg, e.has) {
			return fmt.Errorf("%s (%w)", e.says, err)
		}
	}
	return err
}

// alertText words the alerts that come of a node's configuration.
func alertText(alert byte) string {
	switch tls.AlertError(alert) {
	case 42, 43, 44, 45, 46, 48, 116:
		return "this node's certificate is not to its liking; its log says why"
	case 40, 71:
		return "no key of the same kind: one node has a certificate and the other a pre-shared key"
	case 120:
		return "it seals another network, or this one under another name or VNI"
	}
	return tls.AlertError(alert).Error()
}
