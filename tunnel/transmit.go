package tunnel

import "patchbay/frame"

// Transmit sends fs to the peer and returns how many frames it took; the others are counted by reason in Drops. It never waits, and may be called from
// several goroutines at once. Frames are finished, and superframes cut, on the way.
func (p *Peer) Transmit(fs []frame.Frame) int {
	if p.gate.Add(1) < 0 {
		p.gate.Add(-1)
		p.drops.Add(frame.DropPortDown, len(fs))
		return 0
	}
	sent := p.transmit(fs)
	p.gate.Add(-1)
	return sent
}

func (p *Peer) transmit(fs []frame.Frame) int {
	if len(fs) == 0 {
		return 0
	}
	b, ok := p.v.sock.Batch(p.drops)
	if !ok {
		p.drops.Add(frame.DropPortDown, len(fs))
		return 0
	}
	lost := p.wire.send(p, b, p.path.Load(), fs)
	lost += b.Send()
	b.Release()
	p.txFrames.Add(uint64(len(fs) - lost))
	return len(fs) - lost
}
