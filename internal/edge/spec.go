package edge

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"syscall"

	"patchbay/internal/netns"
	"patchbay/internal/wire"
	"patchbay/tap"
)

// Net is which network a container gets.
type Net string

// The modes of Spec.Net.
const (
	NetPrivate Net = "private" // a new network namespace with the interfaces of the Spec
	NetNone    Net = "none"    // a new network namespace with lo alone
	NetHost    Net = "host"    // the caller's own network namespace
	// NetContainer joins the user, network and UTS namespaces of Spec.Join.
	NetContainer Net = "container"
)

// Limits of a Spec.
const (
	MaxInterfaces = 64
	maxHostname   = 64 // bytes; Linux __NEW_UTS_LEN
	maxFile       = 1 << 20
	maxQueues     = 64 // an SCM_RIGHTS message carries at most 253 descriptors
)

// Spec says what the container is to be. The zero value of each field but Argv is a usable default.
type Spec struct {
	// Net is the network mode; "" means NetPrivate.
	Net Net
	// Join is whose namespaces NetContainer means, opened by a process id. It is the caller's.
	Join *netns.Target `json:"-"`
	// PID gives the container a PID namespace and a /proc of its own, with the edge process as PID 1.
	PID bool
	// KeepID keeps the caller's uid and gid instead of showing them as root; COMMAND then has no capabilities, whoever the caller is.
	KeepID bool
	// Hostname of the UTS namespace, at most 64 bytes; "" keeps the host's.
	Hostname string
	// Interfaces are made in order, in NetPrivate only.
	Interfaces []Interface
	// Bypass has COMMAND's connections stop until whoever has called Process.TakeBypass lets them go on; see package bypass. In NetPrivate only.
	Bypass bool
	// ResolvConf and Hosts, when not nil, are what the container reads in /etc/resolv.conf and /etc/hosts; at most 1 MiB each.
	ResolvConf []byte
	Hosts      []byte
	// Pause lets the container live without a COMMAND, until a signal or its parent's end. Argv is not looked at.
	Pause bool
	// Argv is COMMAND and its arguments. Argv[0] is looked up in the PATH of Env unless it has a slash. Bytes are passed on as they are.
	Argv []string
	// Env is COMMAND's environment; nil is the caller's.
	Env []string
	// Dir is COMMAND's working directory; "" is the caller's.
	Dir string
}

// Interface is one TAP of the container.
type Interface struct {
	// Name in the container, "eth0" for instance.
	Name string `json:"name"`
	// MAC of the container's side; zero lets the kernel choose.
	MAC wire.MAC `json:"mac"`
	// MTU in bytes of IP packet; 0 means tap.DefaultMTU.
	MTU int `json:"mtu,omitempty"`
	// GSOMaxSize is tap.IfConfig's; 0 keeps the kernel's own.
	GSOMaxSize int `json:"gsoMaxSize,omitempty"`
	// Queues is how many descriptors to open; 0 means 1.
	Queues int `json:"queues,omitempty"`
	// TxQueueLen is how many frames wait for the switch before the kernel drops; 0 keeps the kernel's own.
	TxQueueLen int `json:"txQueueLen,omitempty"`
	// Addrs are the addresses with their prefix length.
	Addrs []netip.Prefix `json:"addrs,omitempty"`
	// Gateway4 and Gateway6 become default routes when valid.
	Gateway4 netip.Addr `json:"gateway4,omitzero"`
	Gateway6 netip.Addr `json:"gateway6,omitzero"`
	// Routes are added after the default routes.
	Routes []tap.Route `json:"routes,omitempty"`
	// AcceptRA lets router advertisements configure the interface.
	AcceptRA bool `json:"acceptRA,omitempty"`
	// Persist says that the interface is to outlive its last descriptor. Whoever gets it from OpenIn sees to that, once he will not forget it; OpenIn notes where it cannot be.
	Persist bool `json:"persist,omitempty"`
	// Reopen takes over the persistent interface of that name and MAC which an earlier node left, as it is. OpenIn alone heeds it.
	Reopen bool `json:"reopen,omitempty"`
	// Kind is how the interface reaches the switch: a TAP, a packet socket where /dev/net/tun is not to be had, or whichever works.
	Kind tap.Kind `json:"kind"`
	// ForcePlain opens the TAP without virtio header and so without offloads.
	ForcePlain bool `json:"forcePlain,omitempty"`
}

func (s *Spec) mode() Net {
	if s.Net == "" {
		return NetPrivate
	}
	return s.Net
}

// check refuses what can be seen to be wrong before any process is made.
func (s *Spec) check() error {
	switch s.mode() {
	case NetPrivate:
		if len(s.Interfaces) > MaxInterfaces {
			return fmt.Errorf("%d interfaces: a container has at most %d", len(s.Interfaces), MaxInterfaces)
		}
	case NetContainer:
		switch {
		case s.Join == nil:
			return fmt.Errorf("network mode %q: nobody says whose namespaces; name a container", s.Net)
		case s.PID:
			return fmt.Errorf("network mode %q has no PID namespace of its own: leave --pid out", s.Net)
		case s.KeepID:
			return fmt.Errorf("network mode %q has the ids of the container that is joined: leave --keep-id out", s.Net)
		case len(s.Interfaces) > 0:
			return fmt.Errorf("network mode %q has the interfaces of the container that is joined", s.Net)
		}
	case NetNone, NetHost:
		if len(s.Interfaces) > 0 {
			return fmt.Errorf("network mode %q has no interfaces: use %q", s.Net, NetPrivate)
		}
	default:
		return fmt.Errorf("network mode %q is unknown: use %s, %s, %s or %s:NAME", s.Net, NetPrivate, NetNone, NetHost, NetContainer)
	}
	if s.Bypass && s.mode() != NetPrivate {
		return fmt.Errorf("network mode %q has no network to bypass: use %q", s.Net, NetPrivate)
	}
	for i, f := range s.Interfaces {
		if f.Name == "" {
			return fmt.Errorf("interface %d has no name: call it eth%d", i, i)
		}
		if f.Queues < 0 || f.Queues > maxQueues {
			return fmt.Errorf("interface %q: %d queues: use 1 to %d", f.Name, f.Queues, maxQueues)
		}
	}
	if len(s.Hostname) > maxHostname {
		return fmt.Errorf("host name %q is longer than %d bytes: choose a shorter one", s.Hostname, maxHostname)
	}
	if len(s.ResolvConf) > maxFile || len(s.Hosts) > maxFile {
		return fmt.Errorf("resolv.conf of %d and hosts of %d bytes: at most %d each", len(s.ResolvConf), len(s.Hosts), maxFile)
	}
	if !s.Pause && (len(s.Argv) == 0 || s.Argv[0] == "") {
		return errors.New("no command was given: name one behind --")
	}
	for _, l := range [][]string{s.Argv, s.Env, {s.Dir}} {
		for _, v := range l {
			if strings.IndexByte(v, 0) >= 0 {
				return fmt.Errorf("%.40q contains a zero byte, which no program can be given", v)
			}
		}
	}
	return nil
}

// wireSpec is Spec as the edge process reads it, with what the parent knows about itself. Strings that need not be UTF-8 travel as bytes.
type wireSpec struct {
	Spec
	Task      task
	Argv, Env [][]byte
	Dir       []byte
	SigMask   uint64 // signals that were blocked when the parent started, bit n-1 for signal n
	Ignored   uint64 // signals that were ignored when the parent started
}

// task is what a re-executed program is to do.
type task string

const (
	taskRun  task = ""     // the life of a container
	taskOpen task = "open" // open Spec.Interfaces where it is, hand them over, end
)

func (w *wireSpec) encode() ([]byte, error) {
	w.Argv, w.Env, w.Dir = toBytes(w.Spec.Argv), toBytes(w.Spec.Env), []byte(w.Spec.Dir)
	return json.Marshal(w)
}

func (w *wireSpec) decode(b []byte) error {
	if err := json.Unmarshal(b, w); err != nil {
		return err
	}
	w.Spec.Argv, w.Spec.Env, w.Spec.Dir = toStrings(w.Argv), toStrings(w.Env), string(w.Dir)
	return nil
}

func toBytes(ss []string) [][]byte {
	out := make([][]byte, len(ss))
	for i, s := range ss {
		out[i] = []byte(s)
	}
	return out
}

func toStrings(bs [][]byte) []string {
	out := make([]string, len(bs))
	for i, b := range bs {
		out[i] = string(b)
	}
	return out
}

// Status is how COMMAND ended.
type Status struct {
	// Code is COMMAND's exit status, when Signal is 0.
	Code int
	// Signal is what killed COMMAND, or 0.
	Signal syscall.Signal
	// Left are processes of the container, as the edge process saw their ids, that could not be killed: they hang inside the kernel.
	Left []int
}

// ExitCode is what a shell would report: the command's own status, or 128 and the signal's number.
func (s Status) ExitCode() int {
	if s.Signal != 0 {
		return 128 + int(s.Signal)
	}
	return s.Code
}

func (s Status) String() string {
	if s.Signal != 0 {
		return fmt.Sprintf("killed by signal %d (%v)", int(s.Signal), s.Signal)
	}
	return fmt.Sprintf("exit status %d", s.Code)
}

// Exit statuses of patchbay's own, as container tools use them.
const (
	StatusFailed        = 125 // patchbay itself failed
	StatusNotExecutable = 126 // COMMAND was found and could not be executed
	StatusNotFound      = 127 // COMMAND was not found
)

// Error is a container that did not come to run, or whose edge process was lost.
type Error struct {
	// Status is what patchbay should exit with: one of the constants above.
	Status int
	// Err names the object, the reason and the remedy.
	Err error
}

func (e *Error) Error() string { return e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

func failed(format string, args ...any) *Error {
	return &Error{Status: StatusFailed, Err: fmt.Errorf(format, args...)}
}
