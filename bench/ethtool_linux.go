package bench

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Of include/uapi/linux/ethtool.h; x/sys has the commands only.
const (
	ethSSFeatures   = 4  // the string set that names features
	ethStringLength = 32 // ETH_GSTRING_LEN
)

// offloadPrefixes choose among some sixty features those that change what a frame is.
var offloadPrefixes = []string{"tx-tcp", "tx-udp", "tx-checksum", "rx-checksum", "tx-generic-segmentation", "tx-scatter-gather", "rx-gro", "rx-lro"}

// offloads reads back which offloads are active on an interface of the calling thread's network namespace.
func offloads(iface string) ([]string, error) {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(s)
	// struct ethtool_sset_info with room for one length.
	info := make([]byte, 20)
	binary.NativeEndian.PutUint32(info, unix.ETHTOOL_GSSET_INFO)
	binary.NativeEndian.PutUint64(info[8:], 1<<ethSSFeatures)
	if err := ethtool(s, iface, info); err != nil {
		return nil, err
	}
	n := int(binary.NativeEndian.Uint32(info[16:]))
	if n > 1024 {
		return nil, fmt.Errorf("offloads of %s: %d features are not believable", iface, n)
	}
	names := make([]byte, 12+n*ethStringLength)
	binary.NativeEndian.PutUint32(names, unix.ETHTOOL_GSTRINGS)
	binary.NativeEndian.PutUint32(names[4:], ethSSFeatures)
	binary.NativeEndian.PutUint32(names[8:], uint32(n))
	if err := ethtool(s, iface, names); err != nil {
		return nil, err
	}
	blocks := (n + 31) / 32
	feats := make([]byte, 8+16*blocks)
	binary.NativeEndian.PutUint32(feats, unix.ETHTOOL_GFEATURES)
	binary.NativeEndian.PutUint32(feats[4:], uint32(blocks))
	if err := ethtool(s, iface, feats); err != nil {
		return nil, err
	}
	return activeOffloads(names[12:], feats[8:]), nil
}

// activeOffloads picks the active ones; blocks are quadruples of words: available, requested, active, never changed.
func activeOffloads(names, blocks []byte) []string {
	out := []string{}
	for i := range min(len(names)/ethStringLength, len(blocks)*2) {
		active := binary.NativeEndian.Uint32(blocks[16*(i/32)+8:])
		name := unix.ByteSliceToString(names[i*ethStringLength : (i+1)*ethStringLength])
		if active&(1<<(i%32)) != 0 && slices.ContainsFunc(offloadPrefixes, func(p string) bool { return strings.HasPrefix(name, p) }) {
			out = append(out, name)
		}
	}
	return out
}

func ethtool(s int, iface string, data []byte) error {
	var req struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte // struct ifreq is longer than a pointer
	}
	copy(req.name[:unix.IFNAMSIZ-1], iface)
	req.data = unsafe.Pointer(unsafe.SliceData(data))
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(s), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req))); e != 0 {
		return fmt.Errorf("offloads of %s: %w", iface, e)
	}
	return nil
}
