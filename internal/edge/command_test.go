package edge

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"patchbay/internal/testbed"
	"patchbay/tap"
)

func write(t *testing.T, path, content string, perm os.FileMode) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), perm); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, perm); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestExitStatus(t *testing.T) {
	testbed.Leaks(t)
	dir := t.TempDir()
	write(t, dir+"/plain", "echo never\n", 0o644)
	write(t, dir+"/noshebang", "echo by the shell $1\n", 0o755)
	write(t, dir+"/nointerp", "#!/no/such/interpreter\n", 0o755)
	write(t, dir+"/hello", "#!/bin/sh\necho hello\nexit 3\n", 0o755)
	path := func(p string) []string { return []string{"PATH=" + p} }
	for _, c := range []struct {
		name string
		spec Spec
		code int
		out  string // part of the output, or "" for none at all
	}{
		{"zero", Spec{Argv: []string{"true"}}, 0, ""},
		{"its own", Spec{Argv: sh("exit 7")}, 7, ""},
		{"255", Spec{Argv: sh("exit 255")}, 255, ""},
		{"its own 127", Spec{Argv: sh("exit 127")}, 127, ""},
		{"SIGTERM", Spec{Argv: sh("kill -TERM $$")}, 143, ""},
		{"SIGKILL", Spec{Argv: sh("kill -KILL $$")}, 137, ""},
		{"SIGSEGV", Spec{Argv: sh("kill -SEGV $$")}, 139, ""},
		{"not found", Spec{Argv: []string{"no-such-command"}}, 127, "patchbay: run: \"no-such-command\": command not found in PATH; install it"},
		{"path not found", Spec{Argv: []string{"/no/such/command"}}, 127, "no such file or directory; check the path"},
		{"not executable", Spec{Argv: []string{dir + "/plain"}}, 126, "permission denied; make it executable"},
		{"not executable in PATH", Spec{Argv: []string{"plain"}, Env: path(dir)}, 126, "permission denied; make " + dir + "/plain executable"},
		{"directory", Spec{Argv: []string{dir}}, 126, "it is a directory"},
		{"interpreter missing", Spec{Argv: []string{dir + "/nointerp"}}, 127, "the interpreter that it names in its first line"},
		{"script without interpreter", Spec{Argv: []string{dir + "/noshebang", "x"}}, 0, "by the shell x"},
		{"found behind one not executable", Spec{Argv: []string{"hello"}, Env: path("/nowhere:" + dir)}, 3, "hello"},
		{"relative to Dir", Spec{Argv: []string{"./hello"}, Dir: dir}, 3, "hello"},
		{"empty PATH element is Dir", Spec{Argv: []string{"hello"}, Dir: dir, Env: path(":/bin")}, 3, "hello"},
		{"no PATH at all", Spec{Argv: []string{"true"}, Env: []string{"A=b"}}, 0, ""},
		{"bad Dir", Spec{Argv: []string{"true"}, Dir: "/no/such/dir"}, 125, "working directory \"/no/such/dir\": no such file or directory; name a directory"},
		{"no command", Spec{}, 125, "no command was given"},
		{"bad mode", Spec{Net: "bridged", Argv: []string{"true"}}, 125, "use private, none, host or container:NAME"},
		{"zero byte", Spec{Argv: []string{"true", "a\x00b"}}, 125, "zero byte"},
		{"long host name", Spec{Argv: []string{"true"}, Hostname: strings.Repeat("x", 65)}, 125, "choose a shorter one"},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, pid := range []bool{false, true} {
				s := c.spec
				s.PID = pid
				if s.Net == "" {
					s.Net = NetNone
				}
				code, out := finish(t, run(t, s))
				if code != c.code {
					t.Errorf("PID %v: exit status %d, want %d; output: %s", pid, code, c.code, out)
				}
				if (c.out == "" && out != "") || !strings.Contains(out, c.out) {
					t.Errorf("PID %v: output %q, want %q", pid, out, c.out)
				}
				if strings.Count(out, "\n") > 1 {
					t.Errorf("PID %v: more than one line: %q", pid, out)
				}
			}
		})
	}
}

// TestInheritance compares what COMMAND finds with what it finds without patchbay.
func TestInheritance(t *testing.T) {
	script := `pwd; umask; ulimit -a; ulimit -H -n; ulimit -S -n; env | grep -v '^PWD=\|^_=\|^` + runEnv + `=' | sort
grep -E '^(Sig(Blk|Ign|Cgt)|ShdPnd|NoNewPrivs|Seccomp):' /proc/self/status
for fd in 3 5 9 17; do readlink /proc/self/fd/$fd; done; ls /proc/self/fd; printf '%s|' "$@"`
	dir := t.TempDir()
	file := write(t, dir+"/file", "", 0o644)
	args := []string{"", "a b", "\xff\xfe not UTF-8", "$x", "\n"}
	argv := sh(script, args...)
	// The shell around it arranges what is to be inherited: both get it from the same place.
	wrap := func(c *exec.Cmd) *exec.Cmd {
		s := fmt.Sprintf(`umask 031; ulimit -S -n 333; ulimit -S -c 7; exec 3<%[1]s 5>>%[1]s 17</dev/zero; trap '' TERM HUP; trap '' INT; cd %[2]s; exec "$@"`, file, dir)
		inner := c.Args
		c.Args = append([]string{"bash", "-c", s, "bash"}, inner...)
		if inner[0] == runArg0 {
			self, _ := os.Executable()
			c.Args = []string{"bash", "-c", strings.Replace(s, `exec "$@"`, `exec -a `+runArg0+` "$@"`, 1), "bash", self}
		}
		c.Path = testbed.Tool(t, "bash")
		c.Env = append(c.Env, "NOT_UTF8=\xfe\xff", "MULTI=a\nb", "EMPTY=")
		return c
	}
	for _, c := range []struct {
		name string
		spec Spec
	}{{"host", Spec{Net: NetHost}}, {"none", Spec{Net: NetNone}}, {"pid", Spec{Net: NetNone, PID: true}}, {"keep", Spec{Net: NetNone, KeepID: true}}} {
		t.Run(c.name, func(t *testing.T) {
			plain := exec.Command(argv[0], argv[1:]...)
			plain.Env = os.Environ()
			c1, want := finish(t, wrap(testbed.AsOrdinaryUser(plain)))
			c.spec.Argv = argv
			c2, got := finish(t, wrap(run(t, c.spec)))
			if c1 != 0 || c2 != 0 {
				t.Errorf("exit status %d with, %d without patchbay", c2, c1)
			}
			// SIGTERM ignored at the start is the one thing Go's runtime does not let a program find out.
			norm := func(s string) string {
				for _, l := range strings.Split(s, "\n") {
					if strings.HasPrefix(l, "SigIgn:") {
						var set uint64
						fmt.Sscanf(l, "SigIgn:\t%x", &set)
						set &^= bit(15)
						set &^= bit(3) // taken along with SIGINT
						s = strings.Replace(s, l, fmt.Sprintf("SigIgn: %x", set), 1)
					}
				}
				return s
			}
			if norm(got) != norm(want) {
				t.Errorf("with patchbay:\n%s\nwithout:\n%s", got, want)
			}
			if !strings.Contains(got, file) || !strings.Contains(got, "333") {
				t.Errorf("the test did not set up what it compares:\n%s", got)
			}
		})
	}
}

func TestIDs(t *testing.T) {
	const script = `id -u; id -g; grep -E '^Cap(Inh|Prm|Eff|Bnd|Amb):' /proc/self/status | sed 's/\t/ /'; cat /proc/self/setgroups`
	for _, asRoot := range []bool{false, true} {
		for _, keep := range []bool{false, true} {
			t.Run(fmt.Sprintf("root=%v keep=%v", asRoot, keep), func(t *testing.T) {
				cmd := run(t, Spec{Net: NetNone, KeepID: keep, Argv: sh(script), Hostname: "box", ResolvConf: []byte("x\n")})
				id := fmt.Sprint(testbed.OrdinaryUID)
				if asRoot {
					cmd.SysProcAttr = nil
					id = "0"
				}
				if !keep {
					id = "0"
				}
				code, out := finish(t, cmd)
				if code != 0 || !strings.HasPrefix(out, id+"\n"+id+"\n") {
					t.Fatalf("status %d, output %q, want id %s", code, out, id)
				}
				const none = "0000000000000000"
				for _, set := range []string{"Inh", "Amb"} {
					if !strings.Contains(out, "Cap"+set+": "+none) {
						t.Errorf("Cap%s is not empty: %s", set, out)
					}
				}
				for _, set := range []string{"Prm", "Eff", "Bnd"} {
					if empty := strings.Contains(out, "Cap"+set+": "+none); empty != keep {
						t.Errorf("Cap%s: empty %v, want %v: %s", set, empty, keep, out)
					}
				}
			})
		}
	}
	// Capabilities do not come back by way of a nested user namespace's privileges over the container's network.
	code, out := finish(t, run(t, Spec{Net: NetNone, KeepID: true, Argv: sh("ip link set lo mtu 1400 2>&1; unshare -Ur ip link set lo mtu 1400 2>&1; :")}))
	if code != 0 || strings.Count(out, "not permitted") != 2 {
		t.Errorf("status %d, output %q", code, out)
	}
}

// TestKeepIDOverPacketSocket: where there is no TAP to be had the edge process needs one capability more.
func TestKeepIDOverPacketSocket(t *testing.T) {
	spec := Spec{KeepID: true, Interfaces: []Interface{{Name: "eth0", Kind: tap.KindPacket}}, Argv: sh(`ls /sys/class/net; grep CapEff /proc/self/status`)}
	if code, out := finish(t, run(t, spec)); code != 0 || out != "eth0\nlo\nCapEff:\t0000000000000000\n" {
		t.Errorf("status %d, output %q", code, out)
	}
}

func TestPIDNamespace(t *testing.T) {
	testbed.Leaks(t)
	s := Spec{Net: NetNone, PID: true, Argv: sh(`echo pid $$; cat /proc/1/comm; ls /proc | grep -c '^[0-9]'; readlink /proc/self | grep -q '^[0-9][0-9]*$' && echo small
# an orphan that ends becomes PID 1's, who takes it in
(sh -c 'sleep 0.05 & echo $! >&3' 3>` + filepath.Join(t.TempDir(), "pid") + `); sleep 0.3; grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l`)}
	code, out := finish(t, run(t, s))
	f := strings.Fields(out)
	if code != 0 || len(f) != 6 || f[0] != "pid" || len(f[1]) > 2 || f[2] != edgeArg0 || len(f[3]) != 1 || f[4] != "small" || f[5] != "0" {
		t.Errorf("status %d, output %q", code, out)
	}
}

func TestHostname(t *testing.T) {
	before, _ := os.Hostname()
	if code, out := finish(t, run(t, Spec{Net: NetHost, Hostname: "web", Argv: []string{"uname", "-n"}})); code != 0 || out != "web\n" {
		t.Errorf("status %d, output %q", code, out)
	}
	if after, _ := os.Hostname(); after != before {
		t.Errorf("the host's name changed from %q to %q", before, after)
	}
}
