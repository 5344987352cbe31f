package edge

import (
	"os"
	"strings"
	"testing"

	"patchbay/internal/testbed"
)

// TestFiles: the container reads its own resolv.conf and hosts, whatever the host's are; nothing is changed on disk.
func TestFiles(t *testing.T) {
	testbed.Leaks(t)
	unshare := testbed.Tool(t, "unshare")
	const cat = `cat /etc/resolv.conf /etc/hosts; cat /etc/os-release >/dev/null && echo rest; echo more >>/etc/hosts && tail -1 /etc/hosts
ls /tmp/marker; stat -Lc %a /etc/resolv.conf; grep -c . /etc/passwd; grep -c ' /tmp ' /proc/self/mountinfo; echo end`
	for _, c := range []struct{ name, etc string }{
		{"regular", "echo host >resolv.conf; echo host >hosts"},
		{"symlink", "rm -f resolv.conf; mkdir -p /run/x; echo host >/run/x/r; ln -s ../run/x/r resolv.conf"},
		{"symlink to a symlink", "rm -f resolv.conf; echo host >r1; ln -s r1 r2; ln -s /etc/r2 resolv.conf"},
		{"dangling", "rm -f resolv.conf; ln -s /run/nowhere/resolv.conf resolv.conf"},
		{"loop", "rm -f resolv.conf; ln -s resolv.conf resolv.conf"},
		{"absent", "rm -f resolv.conf"},
		{"both absent", "rm -f resolv.conf hosts"},
		{"directory", "rm -f resolv.conf; mkdir resolv.conf"},
		{"mount point", "echo host >r; mount --bind r resolv.conf"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := Spec{Net: NetNone, ResolvConf: []byte("nameserver 10.7.0.1\n"), Hosts: []byte("10.7.0.2 web\n"), Argv: sh(cat)}
			cmd := run(t, s)
			self, _ := os.Executable()
			cmd.SysProcAttr, cmd.Path = nil, unshare
			cmd.Args = []string{"unshare", "-m", "bash", "-c", `umask 022; exec 9<"$1"
mount -t tmpfs t /mnt; mkdir /mnt/etc; cp -a /etc/passwd /etc/os-release /etc/alternatives /mnt/etc/ 2>/dev/null
mount --bind /mnt/etc /etc; mount -t tmpfs run /run; mount -t tmpfs t /tmp; touch /tmp/marker
cd /etc; : >resolv.conf; : >hosts; ` + c.etc + `; cd / ; before=$(ls -lR /etc /tmp /run; cat /etc/resolv.conf 2>&1)
umask 077; (exec -a "$0" /proc/self/fd/9); code=$?
after=$(ls -lR /etc /tmp /run; cat /etc/resolv.conf 2>&1); [ "$before" = "$after" ] && echo untouched; exit $code`, runArg0, self}
			cmd.Env = append(cmd.Env, "TMPDIR=/")
			code, out := finish(t, cmd)
			want := "nameserver 10.7.0.1\n10.7.0.2 web\nrest\nmore\n/tmp/marker\n644\n"
			if code != 0 || !strings.HasPrefix(out, want) || !strings.HasSuffix(out, "\n1\nend\nuntouched\n") {
				t.Errorf("status %d, output:\n%s\nwant:\n%s", code, out, want)
			}
		})
	}
}

func TestFilesAsOrdinaryUser(t *testing.T) {
	for _, keep := range []bool{false, true} {
		s := Spec{Net: NetHost, KeepID: keep, ResolvConf: []byte("nameserver 10.7.0.1\n"), Argv: []string{"cat", "/etc/resolv.conf"}}
		if code, out := finish(t, run(t, s)); code != 0 || out != "nameserver 10.7.0.1\n" {
			t.Errorf("keep %v: status %d, output %q", keep, code, out)
		}
	}
	// And none of it when it is not asked for.
	want, err := os.ReadFile("/etc/resolv.conf")
	if err != nil {
		t.Fatal(err)
	}
	if code, out := finish(t, run(t, Spec{Net: NetNone, Argv: []string{"cat", "/etc/resolv.conf"}})); code != 0 || out != string(want) {
		t.Errorf("status %d, output %q", code, out)
	}
}

// TestHostResolverIsHidden: nss-resolve and nscd would answer from the host's resolver, past the container's resolv.conf.
func TestHostResolverIsHidden(t *testing.T) {
	unshare := testbed.Tool(t, "unshare")
	nc := testbed.Tool(t, "nc")
	s := Spec{Net: NetNone, ResolvConf: []byte("x\n"), Argv: sh(`[ -S /run/nscd/socket ] && echo socket; nc -U -w1 /run/nscd/socket </dev/null || echo refused`)}
	cmd := run(t, s)
	self, _ := os.Executable()
	cmd.SysProcAttr, cmd.Path = nil, unshare
	cmd.Args = []string{"unshare", "-m", "bash", "-c", `mount -t tmpfs t /run; mkdir /run/nscd; ` + nc + ` -lU /run/nscd/socket >/dev/null & nc=$!
for i in 1 2 3 4 5 6 7 8 9; do [ -S /run/nscd/socket ] && break; sleep 0.05; done; [ -S /run/nscd/socket ] && echo there; (exec -a "$0" "$1"); kill $nc`, runArg0, self}
	if code, out := finish(t, cmd); code != 0 || !strings.HasPrefix(out, "there\n") || !strings.Contains(out, "refused\n") || strings.Contains(out, "socket\n") {
		t.Errorf("status %d, output %q", code, out)
	}
}
