package kernel

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// TUNPath is the device every TAP comes from.
const TUNPath = "/dev/net/tun"

// TUN opens /dev/net/tun and asks it what it is.
func TUN() Result { return tun(TUNPath) }

func tun(path string) Result {
	r := Result{Name: "tun", Need: "Linux 2.6"}
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err == nil {
		defer unix.Close(fd)
		if _, err := unix.IoctlGetUint32(fd, unix.TUNGETFEATURES); err != nil {
			return fail(r, fmt.Sprintf("%s is not the TUN driver (%v)", path, err), "sudo rm it and: sudo mknod -m 0666 "+path+" c 10 200")
		}
		return ok(r, path+" can be opened")
	}
	detail := fmt.Sprintf("open %s: %v: containers get a packet socket instead, which is slower", path, err)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fail(r, detail, "sudo modprobe tun; inside a container, start it with --device "+TUNPath)
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return fail(r, detail, "the kernel has no tun driver: sudo modprobe tun, or use a kernel with CONFIG_TUN")
	case errors.Is(err, unix.EACCES):
		return fail(r, detail, "sudo chmod 0666 "+path+`; for good: a udev rule KERNEL=="tun", MODE="0666"`)
	case errors.Is(err, unix.EPERM):
		return fail(r, detail, "the sandbox's device rules forbid it: start it with --device "+TUNPath)
	}
	return fail(r, detail, "see whether it is a character device with number 10, 200")
}

// insideProbes are the results of Inside, from wherever it can run.
func insideProbes(c Config) []Result {
	if rs, err := inThread(); err == nil {
		return rs
	}
	if c.Child == nil {
		return notTried("not tried: needs a network namespace of its own", "run `patchbay doctor`")
	}
	rs, err := inChild(c)
	if err != nil {
		return notTried(fmt.Sprintf("not tried: %v", err), "make user namespaces work first")
	}
	return rs
}

// inThread runs the probes on a thread in a fresh network namespace, which only root can make like this. The thread ends with it.
func inThread() ([]Result, error) {
	type answer struct {
		rs  []Result
		err error
	}
	done := make(chan answer)
	go func() {
		runtime.LockOSThread() // and never unlock: the runtime then ends the thread, and with it the namespace
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- answer{err: err}
			return
		}
		done <- answer{rs: inside()}
	}()
	a := <-done
	return a.rs, a.err
}

// inChild runs Inside in a child in fresh user and network namespaces.
func inChild(c Config) ([]Result, error) {
	if c.Timeout == 0 {
		c.Timeout = 10 * time.Second
	}
	ctx, cancel := context.WithTimeout(context.Background(), c.Timeout)
	defer cancel()
	cmd := c.Child()
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	a := cmd.SysProcAttr
	a.Cloneflags |= unix.CLONE_NEWUSER | unix.CLONE_NEWNET
	a.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
	a.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	a.Pdeathsig = unix.SIGKILL
	runtime.LockOSThread() // Pdeathsig follows the thread
	defer runtime.UnlockOSThread()
	stop := context.AfterFunc(ctx, func() {
		if cmd.Process != nil {
			_ = cmd.Process.Kill()
		}
	})
	defer stop()
	out, err := cmd.Output()
	if err != nil {
		var ee *exec.ExitError
		if errors.As(err, &ee) && len(ee.Stderr) > 0 {
			return nil, fmt.Errorf("probe child: %w: %.200s", err, ee.Stderr)
		}
		return nil, fmt.Errorf("probe child: %w", err)
	}
	var rs []Result
	if err := json.Unmarshal(out, &rs); err != nil {
		return nil, fmt.Errorf("probe child: %w", err)
	}
	return rs, nil
}

// Inside probes what a TAP and its substitute can do, in the network namespace the caller is in and may configure, and writes the results to w as JSON. It is
// what Config.Child is to run.
func Inside(w io.Writer) error { return json.NewEncoder(w).Encode(inside()) }

func inside() []Result {
	if r := TUN(); !r.OK {
		return append(tapNotTried("TUN cannot be opened", r.Remedy), packetDevice())
	}
	return append(tryTAP(), packetDevice())
}

func notTried(detail, remedy string) []Result {
	return append(tapNotTried(detail, remedy), fail(packetResult, detail, remedy))
}

// tapProbes are the properties of a TAP that matter. flags are added to TUNSETIFF, offload is given to TUNSETOFFLOAD.
var tapProbes = [...]struct {
	name, need string
	flags      uint16
	offload    int
	without    string
}{
	{"tap", "Linux 2.6", 0, 0, "containers get a packet socket instead, which is slower"},
	{"tap-vnet-hdr", "Linux 2.6.27", unix.IFF_VNET_HDR, 0, "no offloads: a tenth of the throughput"},
	{"tap-checksum", "Linux 2.6.27", unix.IFF_VNET_HDR, unix.TUN_F_CSUM, "no checksum offload"},
	{"tap-tso", "Linux 2.6.27", unix.IFF_VNET_HDR, unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6 | unix.TUN_F_TSO_ECN,
		"no TCP superframes: a tenth of the throughput"},
	{"tap-uso", "Linux 6.2", unix.IFF_VNET_HDR, unix.TUN_F_CSUM | unix.TUN_F_USO4 | unix.TUN_F_USO6, "no UDP superframes: UDP (QUIC) costs more"},
	{"tap-multi-queue", "Linux 3.8", unix.IFF_MULTI_QUEUE, 0, "one core a container"},
}

func tapNotTried(detail, remedy string) (rs []Result) {
	for _, p := range tapProbes {
		rs = append(rs, fail(Result{Name: p.name, Need: p.need}, detail, remedy))
	}
	return rs
}

func tryTAP() (rs []Result) {
	for _, p := range tapProbes {
		r := Result{Name: p.name, Need: p.need}
		if err := tryTAPWith(p.flags, p.offload); err != nil {
			rs = append(rs, fail(r, fmt.Sprintf("%v: %s", err, p.without), "use "+p.need+" or later; a sandbox kernel may lack it at any version"))
			continue
		}
		rs = append(rs, ok(r, "works"))
	}
	return rs
}

func tryTAPWith(flags uint16, offload int) error {
	fd, err := unix.Open(TUNPath, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: TUNPath, Err: err}
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("probe%d")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | flags)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		return fmt.Errorf("TUNSETIFF: %w", err)
	}
	if flags&unix.IFF_VNET_HDR != 0 {
		if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, 10); err != nil {
			return fmt.Errorf("TUNSETVNETHDRSZ: %w", err)
		}
		if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, offload); err != nil {
			return fmt.Errorf("TUNSETOFFLOAD: %w", err)
		}
	}
	if flags&unix.IFF_MULTI_QUEUE != 0 {
		fd2, err := unix.Open(TUNPath, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return &fs.PathError{Op: "open", Path: TUNPath, Err: err}
		}
		defer unix.Close(fd2)
		if err := unix.IoctlIfreq(fd2, unix.TUNSETIFF, ifr); err != nil {
			return fmt.Errorf("TUNSETIFF for a second queue: %w", err)
		}
	}
	return nil
}

// packetResult is what packetDevice fills in; it is never written to.
var packetResult = Result{Name: "packet-device", Need: "Linux 2.6.27"}

// packetDevice opens a packet socket with a virtio header, which stands in for a TAP where /dev/net/tun cannot be had.
func packetDevice() Result {
	const without = "no interface for a container where /dev/net/tun cannot be opened"
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fail(packetResult, fmt.Sprintf("packet socket: %v: %s", err, without), "use a kernel with CONFIG_PACKET; a sandbox kernel may lack it")
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1); err != nil {
		return fail(packetResult, fmt.Sprintf("PACKET_VNET_HDR: %v: %s", err, without), "use Linux 2.6.27 or later; a sandbox kernel may lack it at any version")
	}
	return ok(packetResult, "works")
}
