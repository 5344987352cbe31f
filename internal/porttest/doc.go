// Package porttest is the conformance suite of a switch port: what vswitch.Port promises, as tests that every implementation runs.
//
//	func TestConformance(t *testing.T) {
//		porttest.Run(t, func(t *testing.T) *porttest.Harness {
//			ns := testbed.NewNS(t)
//			port := open(t, ns, …)
//			return &porttest.Harness{Port: port, Read: porttest.PacketReader(t, ns, "eth0"), Close: port.Close}
//		})
//	}
//
// # Theory of operation
//
// Each check opens a port of its own and sends UDP and TCP over both IP versions whose every byte follows from its position. What comes
// out at the far end may be cut, merged and checksummed on the way, as Caps and the device allow; the suite takes superframes apart again and
// compares payloads, order within a flow, checksums and lengths. That frames are lent is shown by scribbling over them as soon as Transmit is
// back, and by two goroutines that send the same bytes at once, which -race watches.
//
// # Limits
//
// A far end that loses frames because the suite reads too slowly fails the suite: at most inFlight frames are on their way at any time, except
// where nobody reads on purpose.
package porttest
