package nat

import (
	"strings"
	"testing"
)

func TestParseSpec(t *testing.T) {
	for in, want := range map[string]string{
		"8080:80":                            "8080:80/tcp",
		"8080:80/tcp":                        "8080:80/tcp",
		"53:53/UDP":                          "53:53/udp",
		"127.0.0.1:8080:80":                  "127.0.0.1:8080:80/tcp",
		"0.0.0.0:8080:80":                    "0.0.0.0:8080:80/tcp",
		"[::1]:8080:80":                      "[::1]:8080:80/tcp",
		"[::]:8080:80/udp":                   "[::]:8080:80/udp",
		"[fe80::1%eth0]:8080:80":             "[fe80::1%eth0]:8080:80/tcp",
		"[::ffff:127.0.0.1]:1:2":             "127.0.0.1:1:2/tcp",
		"127.0.0.1:5300-5309:5300-5309/udp":  "127.0.0.1:5300-5309:5300-5309/udp",
		"127.0.0.1:5300-5309:53/udp":         "127.0.0.1:5300-5309:53/udp",
		"1-65535:1-65535":                    "1-65535:1-65535/tcp",
		"8080-8080:80":                       "8080:80/tcp",
		"008080:80":                          "8080:80/tcp",
		"[2001:db8::1]:30000-30009:1-10/tcp": "[2001:db8::1]:30000-30009:1-10/tcp",
	} {
		s, err := ParseSpec(in)
		if err != nil || s.String() != want {
			t.Errorf("%q: %q, %v; want %q", in, s, err, want)
		}
	}
	for in, want := range map[string]string{
		"":                        "two ports",
		"80":                      "two ports",
		"8080:":                   "empty",
		":80":                     "empty",
		"a:80":                    "not a number",
		"80:-1":                   "empty",
		"0:80":                    "out of range",
		"80:65536":                "out of range",
		"99999999999999999999:80": "out of range",
		"+80:80":                  "not a number",
		"90-80:80-90":             "backwards",
		"80-90:80-81":             "same length",
		"80:80-90":                "same length",
		"80-90-99:1-2":            "not a number",
		"8080:80/sctp":            "/tcp or /udp",
		"8080:80/":                "/tcp or /udp",
		"localhost:80:80":         "not an IP address",
		"::1:80:80":               "brackets",
		"[::1:80:80":              "[ADDR]:HOSTPORT:PORT",
		"[127.0.0.1]:80:80":       "not an IPv6 address",
		"[::1]80:80":              "[ADDR]:HOSTPORT:PORT",
		"1.2.3.4:1:2:3":           "too many colons",
		"[::1]:1:2:3":             "too many colons",
		"224.0.0.1:80:80":         "not an address to listen on",
		"127.0.0.1::80":           "empty",
	} {
		_, err := ParseSpec(in)
		if err == nil || !strings.Contains(err.Error(), want) || !strings.HasPrefix(err.Error(), "publish ") || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v; want an error with %q", in, err, want)
		}
	}
}

// FuzzParseSpec holds that nothing panics, errors are one short line, and what is accepted is within bounds and prints as itself.
func FuzzParseSpec(f *testing.F) {
	for _, s := range []string{"8080:80", "127.0.0.1:5300-5309:53-62/udp", "[::1]:1:2/tcp", "[fe80::1%a/b]:1:2/udp", "::", "[", "1-:2", "x/y/z", "1:2\n"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, in string) {
		s, err := ParseSpec(in)
		if err != nil {
			if strings.ContainsAny(err.Error(), "\n\r") || len(err.Error()) > 1024 {
				t.Fatalf("error is not one short line: %q", err)
			}
			return
		}
		if s.HostPort == 0 || s.Port == 0 || s.Count < 1 || int(s.HostPort)+s.Count > 65536 || int(s.Port)+s.Count > 65536 || s.Host.Is4In6() {
			t.Fatalf("%q gives %+v", in, s)
		}
		again, err := ParseSpec(s.String())
		if err != nil || again != s {
			t.Fatalf("%q prints as %q, which gives %+v, %v", in, s, again, err)
		}
	})
}
