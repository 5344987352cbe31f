package edge

import (
	"os"
	"testing"
)

func TestSmoke(t *testing.T) {
	for _, net := range []Net{NetHost, NetNone, NetPrivate} {
		s := Spec{Net: net, Argv: sh("id -u; ls /sys/class/net; exit 7")}
		if net == NetPrivate {
			s.Interfaces = []Interface{{Name: "eth0"}}
		}
		cmd := run(t, s)
		cmd.Env = append(cmd.Env, "EDGE_TEST_TIMES=1")
		out, err := cmd.CombinedOutput()
		t.Logf("%s %v %s", net, err, out)
	}
	_ = os.Args
}
