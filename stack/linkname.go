package stack

import (
	"unsafe"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/seqnum"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// The functions below are netstack's own, reached by name because it does not export them. They are what its processor goroutines
// (tcp/dispatcher.go) and its Forwarder (tcp/forwarder.go, tcp/accept.go) run. Calling them here saves a goroutine hand-off for every segment, a wake-up
// of a sleeping core at worst, and a goroutine and a wake-up for every connection.
//
// A version of gVisor without one of these names fails to link, and TestNetstackVersion fails on a version nobody has looked at.
// What was checked at the version that test names:
//
//   - newIncomingSegment clones pkt; the caller keeps its own reference to it and owns the segment.
//   - enqueueSegment takes a reference of its own.
//   - handleConnecting, handleConnected and handleTimeWait take the endpoint's lock with TryLock and return without doing anything when they
//     do not get it. Whoever has it then looks at the queue when letting it go: UnlockUser, timerHandler and processor.start.
//   - startHandshake registers the endpoint with the demuxer before it sends the SYN-ACK.
//   - the first field of handshake is its endpoint.
//   - receiveMemUsed is one atomic load; receiveBufferUsed and the send queue's lock are held for a few instructions, and nothing is called under them.

//go:linkname newIncomingSegment gvisor.dev/gvisor/pkg/tcpip/transport/tcp.newIncomingSegment
func newIncomingSegment(id gstack.TransportEndpointID, clock tcpip.Clock, pkt *gstack.PacketBuffer) (unsafe.Pointer, error)

//go:linkname segmentDecRef gvisor.dev/gvisor/pkg/tcpip/transport/tcp.(*segment).DecRef
func segmentDecRef(s unsafe.Pointer)

//go:linkname enqueueSegment gvisor.dev/gvisor/pkg/tcpip/transport/tcp.(*Endpoint).enqueueSegment
func enqueueSegment(ep *tcp.Endpoint, s unsafe.Pointer) bool

//go:linkname drainClosingSegmentQueue gvisor.dev/gvisor/pkg/tcpip/transport/tcp.(*Endpoint).drainClosingSegmentQueue
func drainClosingSegmentQueue(ep *tcp.Endpoint)

//go:linkname transitionToStateCloseLocked gvisor.dev/gvisor/pkg/tcpip/transport/tcp.(*Endpoint).transitionToStateCloseLocked
func transitionToStateCloseLocked(ep *tcp.Endpoint)

//go:linkname handleConnecting gvisor.dev/gvisor/pkg/tcpip/transport/tcp.handleConnecting
func handleConnecting(ep *tcp.Endpoint)

//go:linkname handleConnected gvisor.dev/gvisor/pkg/tcpip/transport/tcp.handleConnected
func handleConnected(ep *tcp.Endpoint)

//go:linkname handleTimeWait gvisor.dev/gvisor/pkg/tcpip/transport/tcp.handleTimeWait
func handleTimeWait(ep *tcp.Endpoint)

//go:linkname protocolFromStack gvisor.dev/gvisor/pkg/tcpip/transport/tcp.protocolFromStack
func protocolFromStack(s *gstack.Stack) unsafe.Pointer

//go:linkname newListenContext gvisor.dev/gvisor/pkg/tcpip/transport/tcp.newListenContext
func newListenContext(s *gstack.Stack, protocol unsafe.Pointer, listenEP *tcp.Endpoint, rcvWnd seqnum.Size, v6Only bool, netProto tcpip.NetworkProtocolNumber) unsafe.Pointer

//go:linkname startHandshake gvisor.dev/gvisor/pkg/tcpip/transport/tcp.(*listenContext).startHandshake
func startHandshake(l, s unsafe.Pointer, opts header.TCPSynOptions, queue *waiter.Queue, owner tcpip.PacketOwner) (unsafe.Pointer, tcpip.Error)

//go:linkname parseSynSegmentOptions gvisor.dev/gvisor/pkg/tcpip/transport/tcp.parseSynSegmentOptions
func parseSynSegmentOptions(s unsafe.Pointer) header.TCPSynOptions

//go:linkname receiveMemUsed gvisor.dev/gvisor/pkg/tcpip/transport/tcp.(*Endpoint).receiveMemUsed
func receiveMemUsed(ep *tcp.Endpoint) int

//go:linkname receiveBufferUsed gvisor.dev/gvisor/pkg/tcpip/transport/tcp.(*Endpoint).receiveBufferUsed
func receiveBufferUsed(ep *tcp.Endpoint) int

//go:linkname sendQueueLock gvisor.dev/gvisor/pkg/tcpip/transport/tcp.(*sndQueueMutex).Lock
func sendQueueLock(m unsafe.Pointer)

//go:linkname sendQueueUnlock gvisor.dev/gvisor/pkg/tcpip/transport/tcp.(*sndQueueMutex).Unlock
func sendQueueUnlock(m unsafe.Pointer)

// handshakeEndpoint reads the first field of a *handshake.
func handshakeEndpoint(h unsafe.Pointer) *tcp.Endpoint { return *(**tcp.Endpoint)(h) }
