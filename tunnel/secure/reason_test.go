package secure

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestReasonsAreBounded: what an unknown sender can put into the reason why his handshake failed is neither long nor more than a line, wherever it is read.
func TestReasonsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := newTestCA(t)
		cfg := LinkConfig{Identity: ca.identity(t, "a.test", nil), Network: "lab", VNI: 42, Host: "b.test"}
		forged := newTestCA(t).identityFrom(t, "b.test", nil, func(c *x509.Certificate) {
			c.Subject = pkix.Name{CommonName: strings.Repeat("\x01x", 5000)}
		})
		good, bad := newNode(t, cfg), newNode(t, LinkConfig{Identity: ca.identity(t, "b.test", nil), Network: "lab", VNI: 42, Host: "a.test"})
		bad.link.cfg.Identity = forged
		b := connect(good, bad)
		defer b.end(t)
		good.start()
		bad.start()
		within(t, time.Minute, "a failure", func() bool { return good.link.Stats().Failed > 0 })
		why := good.link.Stats().LastError
		if len(why) > maxReason || !strings.Contains(why, "was not issued by the given CA") {
			t.Errorf("%d bytes: %.300s", len(why), why)
		}
		if log := good.log.String(); len(log) > 4*maxReason {
			t.Errorf("%d bytes in the log: %.300s", len(log), log)
		}
	})
	for in, want := range map[string]string{
		"plain": "plain", "two\nlines\x1b[31m": "two lines [31m", strings.Repeat("ä", maxReason): strings.Repeat("ä", (maxReason-3)/2) + "…", "\xff": "\uFFFD",
	} {
		if got := reason(errors.New(in)); got != want {
			t.Errorf("%.50q is %.50q, want %.50q", in, got, want)
		}
	}
}

// TestFailuresAreLoggedSeldom: somebody who has each of his handshakes fail for another reason does not fill the log, and a reason that lasts is told.
func TestFailuresAreLoggedSeldom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg, _ := pskConfigs(t)
		n := newNode(t, cfg)
		defer n.link.Close()
		r := newRunner(n.link)
		fail := func(err error) {
			r.in = newShake(n.link, header{vni: 42, number: 1, responder: true})
			r.in.err = err
			r.finish(r.in)
		}
		lines := func() int { return strings.Count(n.log.String(), "handshake failed") }
		for i := range 10000 {
			fail(fmt.Errorf("the other side has the key of network %d", i))
			time.Sleep(6 * time.Millisecond)
		}
		if k := lines(); k < 2 || k > 10 {
			t.Errorf("%d lines of a minute", k)
		}
		time.Sleep(time.Minute)
		before := lines()
		for range 100 {
			fail(errors.New("the same"))
			time.Sleep(time.Second)
		}
		if k := lines() - before; k != 1 {
			t.Errorf("%d lines of what stays the same", k)
		}
		if s := n.link.Stats(); s.Failed != 10100 || s.LastError != "the same" {
			t.Errorf("%+v", s)
		}
	})
}
