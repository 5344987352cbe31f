package bench

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"patchbay/bench/load"
)

// The congestion control of TCP is the same for all contenders, and not whatever the machine has: with BBR each stream is paced by a model of the bandwidth, and a measurement is the model's. Most
// distributions have cubic.
const (
	congestionDefault = "cubic"
	congestionAlways  = "reno" // in every kernel, and allowed to everybody
	// congestionMachine leaves everything as the machine has it.
	congestionMachine = "machine"
)

// Below /proc/sys/net/ipv4.
const (
	congestionSysctl    = "/proc/sys/net/ipv4/tcp_congestion_control"
	congestionAvailable = "/proc/sys/net/ipv4/tcp_available_congestion_control"
)

// chooseCongestion is what is to be used by the name that the user asks for, empty for the default; available is what there is.
func chooseCongestion(name string, available []string) (string, error) {
	switch {
	case name == "" && !slices.Contains(available, congestionDefault):
		return congestionAlways, nil
	case name == "":
		return congestionDefault, nil
	case name != congestionMachine && !slices.Contains(available, name):
		return "", fmt.Errorf("congestion control %q is not there; use %s, or %s", name, strings.Join(available, ", "), congestionMachine)
	}
	return name, nil
}

// availableCongestion is what this kernel has loaded.
func availableCongestion() ([]string, error) {
	b, err := os.ReadFile(congestionAvailable)
	return strings.Fields(string(b)), err
}

// Congestion is TCP's congestion control on one side of a measurement, read back.
type Congestion struct {
	Sockets   string `json:"sockets"`           // of the generator
	Namespace string `json:"namespace"`         // of every other socket there, such as iperf3's and a contender's
	Refused   string `json:"refused,omitempty"` // why the generator's is not what was asked for
}

// settleCongestion has this thread's namespace use the congestion control of that name, or reno where the kernel does not let a namespace have it, and says which one the generator's sockets can have,
// which CAP_NET_ADMIN lets use every one that is loaded. Sockets that there are keep theirs. An empty name changes nothing.
func settleCongestion(name string) (c Congestion, err error) {
	if name != "" {
		err := os.WriteFile(congestionSysctl, []byte(name), 0)
		if err != nil && name != congestionAlways { // the machine's administrator has not allowed it to everybody
			err = os.WriteFile(congestionSysctl, []byte(congestionAlways), 0)
		}
		if err != nil {
			return c, fmt.Errorf("congestion control of a namespace: %w", err)
		}
	}
	b, err := os.ReadFile(congestionSysctl)
	if err != nil {
		return c, fmt.Errorf("congestion control of a namespace: %w", err)
	}
	c.Namespace = strings.TrimSpace(string(b))
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return c, err
	}
	defer unix.Close(fd)
	err = load.SetCongestion(fd, name)
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOENT) {
		c.Refused = err.Error()
		err = load.SetCongestion(fd, congestionAlways)
	}
	if err != nil {
		return c, err
	}
	c.Sockets, err = load.Congestion(fd)
	return c, err
}

// congestionText says in the report what was used.
func congestionText(c Congestion) string {
	switch {
	case c == Congestion{}: // rows of before have none
		return ""
	case c.Sockets == c.Namespace:
		return "TCP congestion control " + c.Sockets
	}
	return fmt.Sprintf("TCP congestion control %s on the generator's sockets and %s on all others", c.Sockets, c.Namespace)
}

// otherwise says which side of a contender had another congestion control than the bench's own namespaces; empty for none.
func (r Row) otherwise() (text string) {
	for _, side := range []struct {
		name string
		has  Congestion
	}{{"near", r.Near}, {"far", r.Far}} {
		if side.has == (Congestion{}) || side.has.Sockets == r.Congestion.Sockets && side.has.Namespace == r.Congestion.Namespace {
			continue
		}
		text += fmt.Sprintf("; on the %s side %s", side.name, congestionText(side.has))
		if side.has.Refused != "" {
			text += " (" + side.has.Refused + ")"
		}
	}
	return text
}
