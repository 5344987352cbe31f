package nat

import (
	"bufio"
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// flowPair is the i-th of many flows.
func flowPair(i int) (container, peer netip.AddrPort) {
	c := netip.AddrFrom4([4]byte{10, 88, byte(i >> 24), byte(i >> 16)})
	p := netip.AddrFrom4([4]byte{192, 0, 2, 1})
	if i%2 == 1 {
		c, p = netip.MustParseAddr("fd00:88::10"), netip.MustParseAddr("2001:db8::1")
	}
	return netip.AddrPortFrom(c, uint16(i)|1<<15), netip.AddrPortFrom(p, 443)
}

func openJournal(t testing.TB, dir string, slots int) *Journal {
	t.Helper()
	j, err := OpenJournal(dir, slots)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.Close() })
	return j
}

// taken are the orphans of the addresses of flowPair(0) and flowPair(1), as a set.
func taken(t testing.TB, j *Journal) map[orphan]bool {
	t.Helper()
	m := make(map[orphan]bool)
	for i := range 2 {
		c, _ := flowPair(i)
		os, err := j.take(c.Addr(), time.Now())
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range os {
			o.slot = 0
			m[o] = true
		}
	}
	return m
}

func files(t testing.TB, dir string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func TestJournalKeepsWhatLives(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "flows")
	j := openJournal(t, dir, 8)
	var slots []int32
	for i := range 6 {
		c, p := flowPair(i)
		slots = append(slots, j.put(c, p, time.Now()))
	}
	j.remove(slots[0])
	j.remove(slots[5])
	if len(taken(t, j)) != 0 {
		t.Fatal("flows of this process are its own orphans")
	}
	// A slot that was being written: the check is missing or belongs to what was there before.
	j.slots[slots[1]][4]++
	j.Freeze()
	j.remove(slots[2]) // ends after the freeze: stays for the next
	if st, err := os.Stat(j.file.Name()); err != nil || st.Mode().Perm() != 0o600 {
		t.Fatalf("%v, %v", st.Mode(), err)
	}
	j.Close()
	j.Close()

	// The next process dies before the containers are back.
	k := openJournal(t, dir, 8)
	if n := k.waiting(); n != 3 {
		t.Fatalf("%d orphans wait, want 3", n)
	}
	k.Close()
	k = openJournal(t, dir, 8)
	got := taken(t, k)
	for i := 2; i <= 4; i++ {
		c, p := flowPair(i)
		if !got[orphan{container: c, peer: p}] {
			t.Errorf("%s – %s is lost", c, p)
		}
	}
	if len(got) != 3 || k.waiting() != 0 {
		t.Errorf("orphans %v, %d still wait", got, k.waiting())
	}
	if n := len(files(t, dir)); n != 1 {
		t.Errorf("%d files", n)
	}
}

func TestJournalFull(t *testing.T) {
	dir := t.TempDir()
	os.Chmod(dir, 0o700)
	j := openJournal(t, dir, 2)
	now := time.Now()
	c, p := flowPair(0)
	a := j.put(c, p, now)
	j.put(c, p, now)
	if s := j.put(c, p, now); s != -1 || j.lost() != 1 {
		t.Fatalf("slot %d, %d lost", s, j.lost())
	}
	j.remove(-1)
	j.remove(a)
	if s := j.put(c, p, now); s != a {
		t.Fatalf("slot %d, want %d", s, a)
	}
	j.Close()
	// Orphans that nobody comes back for make room in the end, and at once when their container is forgotten.
	j = openJournal(t, dir, 2)
	if s := j.put(c, p, now); s != -1 {
		t.Fatalf("slot %d of an orphan", s)
	}
	if s := j.put(c, p, now.Add(2*orphanTTL)); s < 0 || j.waiting() != 0 {
		t.Fatalf("no slot after %v, %d wait", orphanTTL, j.waiting())
	}
	j.Close()
	j = openJournal(t, dir, 2)
	j.forget(c.Addr())
	j.Close()
	if n := len(files(t, dir)); n != 0 {
		t.Errorf("%d files are left though no flow is", n)
	}
	var none *Journal
	none.remove(none.put(c, p, now))
}

// TestJournalHandover holds that the flows of a process that lives are nobody's orphans until it ends, and then are.
func TestJournalHandover(t *testing.T) {
	dir := t.TempDir()
	os.Chmod(dir, 0o700)
	old := openJournal(t, dir, 8)
	c, p := flowPair(0)
	old.put(c, p, time.Now())
	j := openJournal(t, dir, 8)
	if got := taken(t, j); len(got) != 0 {
		t.Fatalf("orphans %v of a process that lives", got)
	}
	old.Freeze()
	old.Close()
	if got := taken(t, j); !got[orphan{container: c, peer: p}] || len(got) != 1 {
		t.Fatalf("orphans %v", got)
	}
}

// TestJournalOfTwoTakeovers holds that the flows of a process whose successor was itself replaced before it had ended are the third one's, which learns when there is nobody left to wait for;
// and that the second, which is frozen, leaves them to it.
func TestJournalOfTwoTakeovers(t *testing.T) {
	dir := t.TempDir()
	os.Chmod(dir, 0o700)
	left := func(j *Journal, want bool) {
		t.Helper()
		if got, err := j.Refresh(); err != nil || got != want {
			t.Fatalf("another process left: %v, %v; want %v", got, err, want)
		}
	}
	first := openJournal(t, dir, 8)
	c, p := flowPair(0)
	first.put(c, p, time.Now())
	left(first, false)
	second := openJournal(t, dir, 8)
	left(second, true)
	second.Freeze()
	third := openJournal(t, dir, 8)
	second.Close()
	left(third, true)
	first.Freeze()
	first.Close()
	if err := second.adopt(time.Now()); err != nil { // it had begun to look before it was frozen
		t.Fatal(err)
	}
	left(third, false)
	if n := third.waiting(); n != 1 {
		t.Errorf("%d orphans, want 1", n)
	}
	var none *Journal
	left(none, false)
}

func TestJournalRefuses(t *testing.T) {
	dir := t.TempDir()
	os.Chmod(dir, 0o777)
	if _, err := OpenJournal(dir, 0); err == nil || !strings.Contains(err.Error(), "chmod 700") {
		t.Errorf("a directory of everybody: %v", err)
	}
	others := t.TempDir()
	if os.Chown(others, 1, 1) != nil {
		others = "/" // of a user who is not in this namespace
	}
	if _, err := OpenJournal(others, 0); err == nil || !strings.Contains(err.Error(), "belongs to uid") {
		t.Errorf("a directory of somebody else: %v", err)
	}
	link := filepath.Join(t.TempDir(), "link")
	os.Symlink(t.TempDir(), link)
	if _, err := OpenJournal(link, 0); err == nil {
		t.Error("a symbolic link: no error")
	}
	if _, err := OpenJournal(t.TempDir(), maxJournalSlots+1); err == nil {
		t.Error("too many slots: no error")
	}
	// What is no journal has no flows, and is not in the way.
	os.Chmod(dir, 0o700)
	os.WriteFile(filepath.Join(dir, "flows-1-0"), []byte("pbflows1 and then nothing of use"), 0o600)
	os.WriteFile(filepath.Join(dir, "flows-2-0"), nil, 0o600)
	if j := openJournal(t, dir, 4); j.waiting() != 0 || len(files(t, dir)) != 1 {
		t.Errorf("%d orphans, files %v", j.waiting(), files(t, dir))
	}
}

// journalChurn is the process that TestJournalKill kills: it tells of 100 flows that stay and then opens and closes others without end.
func journalChurn(dir string) error {
	j, err := OpenJournal(dir, 256)
	if err != nil {
		return err
	}
	for i := range 100 {
		if c, p := flowPair(i); j.put(c, p, time.Now()) < 0 {
			return fmt.Errorf("flow %d found no slot", i)
		}
	}
	fmt.Println("ready")
	for i := 100; ; i++ {
		c, p := flowPair(100 + i%32768)
		j.remove(j.put(c, p, time.Now()))
	}
}

func TestJournalKill(t *testing.T) {
	for range 5 {
		dir := filepath.Join(t.TempDir(), "flows")
		cmd := exec.Command("/proc/self/exe", "journal-churn", dir)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		line, err := bufio.NewReader(out).ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		if line != "ready\n" {
			t.Fatalf("%q", line)
		}
		time.Sleep(10 * time.Millisecond)
		cmd.Process.Kill()
		cmd.Wait()
		j := openJournal(t, dir, 256)
		got := taken(t, j)
		for i := range 100 {
			c, p := flowPair(i)
			if !got[orphan{container: c, peer: p}] {
				t.Fatalf("flow %d is lost", i)
			}
		}
		// And at most the one that was open at that moment.
		if len(got) > 101 {
			t.Fatalf("%d orphans", len(got))
		}
	}
}

func FuzzJournal(f *testing.F) {
	f.Add([]byte(journalMagic))
	j := openJournal(f, filepath.Join(f.TempDir(), "flows"), 2)
	c, p := flowPair(0)
	j.put(c, p, time.Now())
	f.Add(bytes.Clone(j.mem))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, o := range parseJournal(b) {
			if !o.container.IsValid() || !o.peer.IsValid() || o.container.Port() == 0 || o.container.Addr().Is4() != o.peer.Addr().Is4() {
				t.Errorf("%+v", o)
			}
		}
	})
}

// BenchmarkJournal is what the journal costs a TCP flow in all.
func BenchmarkJournal(b *testing.B) {
	j := openJournal(b, filepath.Join(b.TempDir(), "flows"), 0)
	c, p := flowPair(0)
	now := time.Now()
	b.ReportAllocs()
	for b.Loop() {
		j.remove(j.put(c, p, now))
	}
}
