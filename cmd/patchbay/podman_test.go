package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"patchbay/internal/api"
	"patchbay/internal/testbed"
	"patchbay/internal/testbed/probe"
)

// envPodmanHost tells the test that it is on a host that script/podman-host made, and where outside of it a page is.
const envPodmanHost = "PATCHBAY_PODMAN_HOST"

// podman runs `podman ARGS…` and returns what it wrote.
func podman(t *testing.T, args ...string) string {
	t.Helper()
	out, err := podmanTry(args...)
	if err != nil {
		t.Fatalf("podman %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(out)
}

func podmanTry(args ...string) (string, error) {
	cmd := exec.Command("podman", args...)
	cmd.WaitDelay = 10 * time.Second // what podman leaves behind may hold the pipe
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// podmanImage makes an image that has busybox, without a registry.
func podmanImage(t *testing.T) string {
	t.Helper()
	home, err := os.UserHomeDir()
	if err != nil {
		t.Fatal(err)
	}
	conf := filepath.Join(home, ".config", "containers")
	if err := os.MkdirAll(conf, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(conf, "storage.conf"), []byte("[storage]\ndriver=\"vfs\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	script := `set -e; cd "$1"; mkdir -p bb/bin bb/etc bb/proc bb/sys bb/dev bb/tmp bb/www
cp "$(command -v busybox)" bb/bin/busybox
for a in sh sleep httpd nslookup ping ip env; do ln -s busybox bb/bin/$a; done
echo root:x:0:0:root:/root:/bin/sh >bb/etc/passwd; echo "I am web" >bb/www/index.html
tar -C bb -cf bb.tar .`
	dir := t.TempDir()
	if out, err := exec.Command("sh", "-c", script, "sh", dir).CombinedOutput(); err != nil {
		t.Fatalf("image: %v: %s", err, out)
	}
	podman(t, "import", "-q", filepath.Join(dir, "bb.tar"), "bb:1")
	return "localhost/bb:1"
}

// Rootless podman is the client: containers that it has started without a network, or with its own, are attached by their pid.
//
//	[web] eth0 ────────────┐ httpd on 80, published as 8080
//	[cli] eth0 ────────────┤ default ── daemon ── [host] ── [outside: 198.18.0.2, httpd on 8000]
//	[own] eth0, podman's ──┘
func TestPodman(t *testing.T) {
	outside := os.Getenv(envPodmanHost)
	if outside == "" {
		t.Skip("runs on a host of its own: script/podman-host, which make test calls")
	}
	d := (&daemonProc{t: t, plain: true}).begin()
	image, bin := podmanImage(t), probe.Binary(t)
	pid := func(name string) string { return podman(t, "inspect", "-f", "{{.State.Pid}}", name) }
	start := func(name string, args ...string) {
		t.Helper()
		podman(t, append([]string{"run", "-d", "--cap-add", "NET_RAW", "-v", bin + ":/probe:ro", "--name", name}, args...)...)
		t.Cleanup(func() { _, _ = podmanTry("rm", "-f", "-t", "0", "-i", name) })
	}
	start("web", "--network", "none", image, "/bin/httpd", "-f", "-p", "80", "-h", "/www")
	start("cli", "--network", "none", image, "/bin/sleep", "1000000")
	for _, name := range []string{"web", "cli"} {
		args := []string{"attach", "default", "--pid", pid(name), "--name", name}
		if name == "web" {
			args = append(args, "--alias", "www", "-p", "8080:80")
		}
		d.do(args...)
	}
	nw, err := d.client().Network(t.Context(), "default")
	if err != nil {
		t.Fatal(err)
	}
	web := d.inspect("default", "web")
	gateway := nw.Gateways[0].String()
	in := func(name string, argv ...string) string {
		t.Helper()
		return podman(t, append([]string{"exec", name}, argv...)...)
	}
	// podman has made a resolv.conf for a container without a network; whoever attaches it says where names are to be had.
	in("cli", "sh", "-c", "echo nameserver "+gateway+" >/etc/resolv.conf")

	reach := func(from string) {
		t.Helper()
		in(from, "ping", "-c", "1", "-W", "5", web.Addrs[0].String())
		in(from, "ping", "-c", "1", "-W", "5", web.Addrs[1].String())
		in(from, "ping", "-c", "1", "-W", "5", "web")
		for _, name := range []string{"web", "www"} {
			if got := in(from, "nslookup", name, gateway); !strings.Contains(got, web.Addrs[0].String()) {
				t.Errorf("%s: nslookup %s: %s", from, name, got)
			}
		}
		list := []probe.Attempt{{Net: "http", Addr: "web"}, {Net: "http", Addr: "www"}, {Net: "http", Addr: outside}}
		said := in(from, "env", probe.TryEnv(list...), "/probe")
		for i, o := range probe.Outcomes(t, []byte(said)) {
			if o.Said != []string{"I am web\n", "I am web\n", "I am outside\n"}[i] {
				t.Errorf("from %s: %v", from, o)
			}
		}
	}
	published := probe.Attempt{Net: "http", Addr: "127.0.0.1:8080"}
	reach("cli")
	if o := probe.Try(published); o.Said != "I am web\n" {
		t.Errorf("published port: %v", o)
	}

	t.Run("beside podman's own network", func(t *testing.T) {
		testbed.Tool(t, "slirp4netns")
		start("own", image, "/bin/sleep", "1000000")
		// busybox's ip shows all of them.
		defaults := func() (out []string) {
			for l := range strings.Lines(in("own", "ip", "route") + "\n") {
				if strings.HasPrefix(l, "default") {
					out = append(out, l)
				}
			}
			return out
		}
		routes := defaults()
		out, err := d.command("attach", "default", "--pid", pid("own"), "--name", "own").CombinedOutput()
		if err != nil || !strings.Contains(string(out), "default route") {
			t.Fatalf("attach: %v: %s", err, out)
		}
		if now := defaults(); !slices.Equal(now, routes) || len(routes) != 1 {
			t.Errorf("default routes were %q and are %q", routes, now)
		}
		in("own", "ping", "-c", "1", "-W", "5", web.Addrs[0].String())
		in("cli", "ping", "-c", "1", "-W", "5", "own")
	})
	t.Run("the daemon is killed", func(t *testing.T) {
		d.end(syscall.SIGKILL)
		d.start()
		testbed.Eventually(t, 10*time.Second, func() bool { return d.up("web") && d.up("cli") })
		if now := d.inspect("default", "web"); fmt.Sprint(now.Addrs, now.MAC) != fmt.Sprint(web.Addrs, web.MAC) {
			t.Errorf("web was %v and is %v", web, now)
		}
		reach("cli")
		if o := probe.Try(published); o.Said != "I am web\n" {
			t.Errorf("published port: %v", o)
		}
	})
	t.Run("podman rm", func(t *testing.T) {
		podman(t, "rm", "-f", "-t", "0", "web")
		d.gone("web")
		if o := probe.Try(published); o.Err != "ECONNREFUSED" {
			t.Errorf("the port is still published: %v", o)
		}
		if got, err := podmanTry("exec", "cli", "nslookup", "web", gateway); err == nil && strings.Contains(got, web.Addrs[0].String()) {
			t.Errorf("the name is still known: %s", got)
		}
		// Its place is free for the next one.
		start("next", "--network", "none", image, "/bin/httpd", "-f", "-p", "80", "-h", "/www")
		d.do("attach", "default", "--pid", pid("next"), "--name", "web", "--alias", "www", "--ip", web.Addrs[0].String(), "--ip", web.Addrs[1].String(), "-p", "8080:80")
		reach("cli")
		if got := d.inspect("default", "web"); got.State != api.StateUp {
			t.Errorf("state %s", got.State)
		}
	})
}
