package tunnel

// PeerState is what is known of a peer's being there.
type PeerState uint8

const (
	// PeerNew has neither sent anything nor answered a probe yet.
	PeerNew PeerState = iota
	// PeerHandshake is of a sealed network and has no keys yet. Nothing passes.
	PeerHandshake
	// PeerHeard has sent frames and answers no probes: a kernel, which has no way to. PeerStats.Heard says when it was last.
	PeerHeard
	// PeerUp answers probes.
	PeerUp
	// PeerDown answered probes once and does so no more. What was learned behind it is out of date.
	PeerDown
)

var stateNames = [...]string{PeerNew: "new", PeerHandshake: "handshake", PeerHeard: "heard", PeerUp: "up", PeerDown: "down"}

// String is the name in listings and in JSON.
func (s PeerState) String() string {
	if int(s) < len(stateNames) {
		return stateNames[s]
	}
	return "unknown"
}

// MarshalText is String.
func (s PeerState) MarshalText() ([]byte, error) { return []byte(s.String()), nil }
