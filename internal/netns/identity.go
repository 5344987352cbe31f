package netns

// Identity tells a namespace from one that has its pid or path later. It is a plain value and marshals to JSON.
type Identity struct {
	NetDev    uint64 `json:"netDev"` // of the network namespace, as stat(2) on its nsfs file gives them
	NetIno    uint64 `json:"netIno"`
	PID       int    `json:"pid,omitempty"`       // the process it was named by, or 0
	StartTime uint64 `json:"startTime,omitempty"` // of that process: field 22 of /proc/PID/stat, in clock ticks since boot
}
