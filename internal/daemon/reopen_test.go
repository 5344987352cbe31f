package daemon

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"patchbay/internal/api"
	"patchbay/internal/edge"
	"patchbay/internal/netns"
	"patchbay/internal/testbed"
	"patchbay/tap"
)

// inSpace starts a process that sleeps in namespaces of its own, or, given a process, in that one's. end ends it.
func inSpace(t *testing.T, of int) (pid int, end func()) {
	t.Helper()
	testbed.RequireTUN(t)
	cmd := exec.Command(testbed.Tool(t, "unshare"), "-Urn", testbed.Tool(t, "sleep"), "1000000")
	if of != 0 {
		cmd = exec.Command(testbed.Tool(t, "nsenter"), "-t", fmt.Sprint(of), "-U", "-n", "--preserve-credentials", testbed.Tool(t, "sleep"), "1000000")
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	end = func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Kill() // Wait tells of nothing else
			_ = cmd.Wait()
		}
	}
	t.Cleanup(end)
	pid = cmd.Process.Pid
	testbed.Eventually(t, 10*time.Second, func() bool {
		name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
		return string(name) == "sleep\n"
	})
	return pid, end
}

// openInside is edge.OpenIn of one interface in the namespaces of a process.
func openInside(t *testing.T, pid int, f edge.Interface) (*tap.Handle, *netns.Identity) {
	t.Helper()
	target, err := netns.OpenTarget(pid)
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	id, err := target.Identity()
	if err != nil {
		t.Fatal(err)
	}
	hs, _, err := edge.OpenIn(t.Context(), target, []edge.Interface{f})
	if err != nil {
		t.Fatal(err)
	}
	return hs[0], &id
}

func linksOf(t *testing.T, pid int) string {
	t.Helper()
	out, err := exec.Command(testbed.Tool(t, "nsenter"), "-t", fmt.Sprint(pid), "-U", "-n", "--preserve-credentials", testbed.Tool(t, "ip"), "-o", "link").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return string(out)
}

// attachInside attaches the namespaces of a process, as `patchbay attach` does.
func attachInside(t *testing.T, n *Node, pid int, name string) api.Attachment {
	t.Helper()
	at, err := n.Attach(t.Context(), "default", api.AttachmentSpec{Name: name, Lifetime: api.LifetimeNamespace, PID: pid}, self())
	if err != nil {
		t.Fatal(err)
	}
	h, id := openInside(t, pid, at.Plan().Interface)
	a, err := at.Plug(t.Context(), api.Device{Info: h.Info, FDs: h.FDs, PID: pid, Identity: id})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// stateOf is the state of an attachment, or "" when there is none.
func stateOf(t *testing.T, n *Node, name string) api.State {
	t.Helper()
	as, err := n.Attachments("default")
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range as {
		if a.Name == name {
			return a.State
		}
	}
	return ""
}

// TestReopen holds that a node which starts gives an attachment up only when its interface or namespace is no more.
func TestReopen(t *testing.T) {
	dir := t.TempDir()
	first := newTestNode(t, dir)
	if err := first.EnsureDefault(t.Context()); err != nil {
		t.Fatal(err)
	}
	busy, _ := inSpace(t, 0)
	held := attachInside(t, first, busy, "held")
	taken := attachInside(t, first, busy, "taken")
	heirless, _ := inSpace(t, 0)
	attachInside(t, first, heirless, "gone")
	left, end := inSpace(t, 0)
	attachInside(t, first, left, "heir")
	heir, _ := inSpace(t, left)
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	end()
	if out, err := exec.Command(testbed.Tool(t, "nsenter"), "-t", fmt.Sprint(heirless), "-U", "-n", "--preserve-credentials", testbed.Tool(t, "ip"), "link", "del", "eth0").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	// Somebody has two of the interfaces for a while: the kernel says EBUSY.
	var hs []*tap.Handle
	for _, a := range []api.Attachment{held, taken} {
		h, _ := openInside(t, busy, edge.Interface{Name: a.IfName, MAC: a.MAC, Reopen: true})
		hs = append(hs, h)
	}
	n := newTestNode(t, dir)
	testbed.Eventually(t, 10*time.Second, func() bool { return stateOf(t, n, "gone") == "" && stateOf(t, n, "heir") == api.StateUp })
	if a, err := n.Attachment("default", "heir"); err != nil || a.PID != heir {
		t.Errorf("the attachment is known by %d, want %d: %v", a.PID, heir, err)
	}
	for _, name := range []string{"held", "taken"} {
		if s := stateOf(t, n, name); s == "" || s == api.StateUp {
			t.Errorf("%s: state %q although its interface cannot be had", name, s)
		}
	}
	for _, h := range hs {
		h.Close()
	}
	// One that is taken away before it has come back leaves no interface.
	if err := n.Detach(t.Context(), "default", "taken"); err != nil {
		t.Error(err)
	}
	if l := linksOf(t, busy); strings.Contains(l, taken.IfName+":") || !strings.Contains(l, held.IfName+":") {
		t.Errorf("after the detach of %s:\n%s", taken.IfName, l)
	}
	testbed.Eventually(t, 20*time.Second, func() bool { return stateOf(t, n, "held") == api.StateUp })
}
