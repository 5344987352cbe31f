package testbed

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// outerBed is the outermost process's side: the temporary directory, the files that the tests may not write themselves, and the service that
// builds binaries as the user who called go test.
type outerBed struct {
	dir  string
	root bool
	exe  string
	args []string
	env  []string
	back map[string]string // file inside dir → where go test wants it

	mu    sync.Mutex
	built map[string]buildReply
}

func newOuter() (*outerBed, error) {
	// Short, because unix socket paths below it have 107 bytes.
	tmp := os.TempDir()
	if os.Geteuid() == 0 && !worldReadable(tmp) {
		tmp = "/tmp"
	}
	dir, err := os.MkdirTemp(tmp, "pb")
	if err != nil {
		return nil, err
	}
	o := &outerBed{dir: dir, root: os.Geteuid() == 0, exe: self(), built: map[string]buildReply{}, back: map[string]string{}}
	for _, d := range []string{"bin", "ns", "out", "h", "t", "src"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			o.cleanup()
			return nil, err
		}
	}
	if err := o.prepare(); err != nil {
		o.cleanup()
		return nil, err
	}
	return o, nil
}

func (o *outerBed) cleanup() { _ = os.RemoveAll(o.dir) }

// prepare computes the arguments and environment of the next stage.
func (o *outerBed) prepare() error {
	o.env = setenv(os.Environ(), envDir, o.dir)
	for _, a := range os.Args {
		// Without this log go test does not cache the result: what these tests depend on is the machine.
		if strings.HasPrefix(a, "-test.testlogfile=") {
			continue
		}
		if o.root {
			a = o.reroute(a)
		}
		o.args = append(o.args, a)
	}
	if !o.root {
		return nil
	}
	if err := os.Chmod(o.dir, 0o755); err != nil {
		return err
	}
	for _, d := range []string{"ns", "out", "h", "t"} {
		if err := os.Chown(filepath.Join(o.dir, d), nobody, nobody); err != nil && !errors.Is(err, syscall.EINVAL) {
			return err
		}
	}
	if err := os.Chmod(filepath.Join(o.dir, "t"), 0o777|os.ModeSticky); err != nil { // as /tmp is: NewUser's users write there too
		return err
	}
	// go test puts the binary into a directory that only root may enter.
	exe := filepath.Join(o.dir, "bin", filepath.Base(o.exe))
	if err := copyFile(exe, o.exe, 0o755); err != nil {
		return err
	}
	o.exe = exe
	o.env = setenv(o.env, "HOME", filepath.Join(o.dir, "h"))
	o.env = setenv(o.env, "TMPDIR", filepath.Join(o.dir, "t"))
	for _, k := range []string{"XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "SUDO_USER", "SUDO_UID", "SUDO_GID"} {
		o.env = setenv(o.env, k, "")
	}
	wd, err := os.Getwd()
	if err != nil {
		return err
	}
	o.env = setenv(o.env, "PWD", wd)
	if !worldReadable(wd) {
		o.env = setenv(o.env, envBind, moduleRoot(wd)+"\x1f"+filepath.Join(o.dir, "src"))
	}
	return nil
}

// reroute lets the tests write profiles into our directory; run copies them back to where go test wants them.
func (o *outerBed) reroute(arg string) string {
	name, val, ok := strings.Cut(arg, "=")
	if !ok || val == "" {
		return arg
	}
	switch strings.TrimLeft(name, "-") {
	case "test.coverprofile", "test.cpuprofile", "test.memprofile", "test.blockprofile", "test.mutexprofile", "test.trace":
	case "test.gocoverdir", "test.outputdir":
	default:
		return arg
	}
	// -test.outputdir is where relative names go; having made them absolute we can forget it.
	in := filepath.Join(o.dir, "out", strings.TrimPrefix(strings.TrimLeft(name, "-"), "test."))
	if strings.HasSuffix(name, "outputdir") {
		return name + "=" + filepath.Join(o.dir, "out")
	}
	if !filepath.IsAbs(val) {
		val = filepath.Join(outputDir(), val)
	}
	if strings.HasSuffix(name, "gocoverdir") {
		_ = os.Mkdir(in, 0o777)
		_ = os.Chown(in, nobody, nobody)
	}
	o.back[in] = val
	return name + "=" + in
}

func outputDir() string {
	for _, a := range os.Args {
		if v, ok := strings.CutPrefix(strings.TrimLeft(a, "-"), "test.outputdir="); ok {
			return v
		}
	}
	wd, _ := os.Getwd()
	return wd
}

// run starts the next stage and waits for its end. A reason means that the tests have not run.
func (o *outerBed) run(pidns bool) (code int, reason string) {
	sp, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err.Error()
	}
	theirs := os.NewFile(uintptr(sp[1]), "control")
	ours := os.NewFile(uintptr(sp[0]), "control")
	failed := make(chan string, 1)
	go func() { failed <- o.serve(ours) }()

	env := setenv(o.env, envPIDNS, map[bool]string{true: "1", false: "0"}[pidns])
	if o.root {
		code, err = o.startDrop(theirs, env)
	} else {
		code, err = startInit(pidns, false, theirs, o.exe, o.args, env)
	}
	theirs.Close()
	// Everybody who held the other end is gone, or soon will be; a stage's last words come before that.
	_ = unix.Shutdown(sp[0], unix.SHUT_WR)
	if err != nil {
		ours.Close()
		<-failed
		return 0, err.Error()
	}
	reason = <-failed
	ours.Close()
	for in, want := range o.back {
		copyBack(want, in)
	}
	return code, reason
}

func (o *outerBed) startDrop(ctl *os.File, env []string) (int, error) {
	runtime.LockOSThread() // Pdeathsig means the thread
	defer runtime.UnlockOSThread()
	cmd := exec.Command(o.exe)
	cmd.Args = o.args
	cmd.Env = setenv(env, envStage, stageDrop)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{ctl}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("root may not create a mount namespace here: %w; run the tests as an ordinary user, or give the container CAP_SYS_ADMIN", err)
	}
	stop := forwardSignals(cmd.Process.Pid)
	defer stop()
	return exitCode(cmd.Wait())
}

type buildRequest struct {
	GiveUp  string   `json:",omitempty"`
	Package string   `json:",omitempty"`
	Flags   []string `json:",omitempty"`
}

type buildReply struct{ Path, Err string }

// serve answers build requests until the other side is gone, and returns the reason with which a stage gave up, or "".
func (o *outerBed) serve(rw io.ReadWriter) string {
	dec, enc := json.NewDecoder(rw), json.NewEncoder(rw)
	for {
		var q buildRequest
		if err := dec.Decode(&q); err != nil {
			return ""
		}
		if q.GiveUp != "" {
			return q.GiveUp
		}
		_ = enc.Encode(o.build(q))
	}
}

func (o *outerBed) build(q buildRequest) buildReply {
	o.mu.Lock()
	defer o.mu.Unlock()
	key := strings.Join(append([]string{q.Package}, q.Flags...), " ")
	if r, ok := o.built[key]; ok {
		return r
	}
	r := goBuild(filepath.Join(o.dir, "bin", fmt.Sprintf("%d", len(o.built))), q.Package, q.Flags)
	o.built[key] = r
	return r
}

// goBuild builds a package of this module, named by its path below the module's root, into dir.
func goBuild(dir, pkg string, flags []string) buildReply {
	wd, err := os.Getwd()
	if err != nil {
		return buildReply{Err: err.Error()}
	}
	out := filepath.Join(dir, filepath.Base(pkg))
	cmd := exec.Command("go", append(append([]string{"build", "-o", out}, flags...), "./"+filepath.Clean(pkg))...)
	cmd.Dir = moduleRoot(wd)
	cmd.Env = setenv(os.Environ(), "PWD", cmd.Dir)
	if b, err := cmd.CombinedOutput(); err != nil {
		return buildReply{Err: fmt.Sprintf("go build ./%s: %v\n%s", pkg, err, b)}
	}
	_ = os.Chmod(dir, 0o755)
	return buildReply{Path: out}
}

// control is the inner processes' end of the socket to outer.
type control struct {
	mu  sync.Mutex
	rw  *os.File
	dec *json.Decoder
}

func newControl(fd int) *control {
	unix.CloseOnExec(fd)
	f := os.NewFile(uintptr(fd), "control")
	return &control{rw: f, dec: json.NewDecoder(f)}
}

func (c *control) giveUp(reason string) {
	_ = json.NewEncoder(c.rw).Encode(buildRequest{GiveUp: reason})
}

func (c *control) build(pkg string, flags []string) buildReply {
	c.mu.Lock()
	defer c.mu.Unlock()
	var r buildReply
	if err := json.NewEncoder(c.rw).Encode(buildRequest{Package: pkg, Flags: flags}); err != nil {
		return buildReply{Err: err.Error()}
	}
	if err := c.dec.Decode(&r); err != nil {
		return buildReply{Err: "the process that builds is gone: " + err.Error()}
	}
	return r
}

// moduleRoot is the nearest directory above dir that has a go.mod.
func moduleRoot(dir string) string {
	for d := dir; ; d = filepath.Dir(d) {
		if _, err := os.Stat(filepath.Join(d, "go.mod")); err == nil {
			return d
		}
		if d == filepath.Dir(d) {
			return dir
		}
	}
}

// worldReadable reports whether anybody may enter dir and all directories above it.
func worldReadable(dir string) bool {
	for d := dir; ; d = filepath.Dir(d) {
		if fi, err := os.Stat(d); err != nil || fi.Mode().Perm()&0o005 != 0o005 {
			return false
		}
		if d == filepath.Dir(d) {
			return true
		}
	}
}

func copyFile(dst, src string, perm os.FileMode) error {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(dst, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, perm)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		out.Close()
		return err
	}
	return out.Close()
}

// copyBack copies a file, or the files of a directory, to where go test expects them.
func copyBack(dst, src string) {
	fi, err := os.Stat(src)
	if err != nil {
		return
	}
	if !fi.IsDir() {
		if err := copyFile(dst, src, 0o644); err != nil {
			fmt.Fprintln(os.Stderr, "testbed:", err)
		}
		return
	}
	es, _ := os.ReadDir(src)
	for _, e := range es {
		if err := copyFile(filepath.Join(dst, e.Name()), filepath.Join(src, e.Name()), 0o644); err != nil {
			fmt.Fprintln(os.Stderr, "testbed:", err)
		}
	}
}
