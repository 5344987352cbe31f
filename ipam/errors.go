package ipam

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
)

// Sentinels that errors.Is finds in what Pool returns.
var (
	ErrExhausted = errors.New("every address is held")
	ErrTaken     = errors.New("the address is held by another attachment")
	ErrReserved  = errors.New("the address is not for containers")
	ErrNotInPool = errors.New("the address is outside the subnet")
	ErrHolds     = errors.New("the attachment holds another address")
)

// maxNamedHolders is how many holders an ExhaustedError spells out.
const maxNamedHolders = 5

// ExhaustedError says that a pool has no address left, and who holds them.
type ExhaustedError struct {
	Pool    string
	Prefix  netip.Prefix
	Holders []string // attachment ids in order of address; all of them
}

// Error names the pool, some holders and the remedy in one line.
func (e *ExhaustedError) Error() string {
	var who string
	switch n := len(e.Holders); {
	case n == 0:
		who = "reservations alone"
	case n <= maxNamedHolders:
		who = strings.Join(e.Holders, ", ")
	default:
		who = fmt.Sprintf("%s and %d more", strings.Join(e.Holders[:maxNamedHolders], ", "), n-maxNamedHolders)
	}
	return fmt.Sprintf("network %q: all addresses of %s are held, by %s: stop one of them, or make a network with a larger --subnet", e.Pool, e.Prefix, who)
}

// Is makes errors.Is(err, ErrExhausted) true.
func (e *ExhaustedError) Is(target error) bool { return target == ErrExhausted }
