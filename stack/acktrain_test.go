package stack

import (
	"encoding/binary"
	"slices"
	"testing"

	"patchbay/internal/wire"
)

// sent has the segments that the gateway sends noted: where each begins and ends.
func (h *byHandConn) sent() *[][2]uint32 {
	var list [][2]uint32
	h.sink.onSend = func() { list = append(list, [2]uint32{h.sink.seq, h.sink.end}) }
	return &list
}

// acks are segments that acknowledge up to the numbers given.
func (h *byHandConn) acks(upTo ...uint32) (list [][]byte) {
	for _, n := range upTo {
		h.ack = n
		list = append(list, h.segment(nil))
	}
	return list
}

// Acknowledgements that come together open the window at once: what it lets through goes in superframes, and not in a piece for each.
func TestACKTrain(t *testing.T) {
	const mss = 1460
	h := newByHandConn(t)
	sent := h.sent()
	una := h.ack
	if n, err := h.c.TryWrite(make([]byte, SuperPayload)); n != SuperPayload || err != nil {
		t.Fatal(n, err)
	}
	if want := [][2]uint32{{una, una + 10*mss}}; !slices.Equal(*sent, want) {
		t.Fatalf("first %v, want the initial window %v", *sent, want)
	}
	*sent = nil
	var each []uint32
	for i := range uint32(10) {
		each = append(each, una+(i+1)*mss)
	}
	send(h.g, h.acks(each...)...)
	una += 10 * mss
	if want := [][2]uint32{{una, una + 20*mss}}; !slices.Equal(*sent, want) {
		t.Fatalf("ten acknowledgements let out %v, want one superframe %v", *sent, want)
	}
	// Duplicates are loss, and what they tell of is sent again.
	*sent = nil
	send(h.g, h.acks(una, una, una, una)...)
	if !slices.ContainsFunc(*sent, func(s [2]uint32) bool { return s[0] == una }) {
		t.Fatalf("after duplicates %v, want a segment from %d on", *sent, una)
	}
}

// Data between acknowledgements stays between them.
func TestACKsAroundData(t *testing.T) {
	h := newByHandConn(t)
	var got []byte
	h.c.Pump(tryFunc(func(p []byte) (int, error) { got = append(got, p...); return len(p), nil }), func(error) {})
	una := h.ack
	if n, err := h.c.TryWrite(make([]byte, 3000)); n != 3000 || err != nil {
		t.Fatal(n, err)
	}
	batch := h.acks(una + 1460)
	batch = append(batch, h.segment([]byte("one")))
	h.seq += 3
	batch = append(batch, h.acks(una+1460, una+2920)...)
	batch = append(batch, h.segment([]byte("two")))
	h.seq += 3
	batch = append(batch, h.acks(una+3000)...)
	send(h.g, batch...)
	if string(got) != "onetwo" || sendUsed(h.c.ep) != 0 {
		t.Errorf("%q has arrived, and %d bytes are not acknowledged", got, sendUsed(h.c.ep))
	}
}

func TestBareACK(t *testing.T) {
	ack := tcpSegment(1, 2, 7, 1000, tcpACK, nil)
	stamped := tcpSegment(1, 2, 7, 1000, tcpACK, []byte{1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2})
	stamped[12] = 8 << 4
	sack := slices.Clone(stamped)
	copy(sack[wire.TCPLen:], []byte{1, 1, 5, 10})
	longer := append(slices.Clone(stamped), 'x')
	for _, c := range []struct {
		name string
		l4   []byte
		want bool
	}{
		{"plain", ack, true},
		{"with a timestamp", stamped, true},
		{"with SACK blocks", sack, false},
		{"with data", longer, false},
		{"with data and no option", append(slices.Clone(ack), 'x'), false},
		{"FIN", tcpSegment(1, 2, 7, 1000, tcpACK|tcpFIN, nil), false},
		{"RST", tcpSegment(1, 2, 7, 1000, tcpACK|tcpRST, nil), false},
		{"PSH", tcpSegment(1, 2, 7, 1000, tcpACK|tcpPSH, nil), false},
		{"ECE", tcpSegment(1, 2, 7, 1000, tcpACK|0x40, nil), false},
	} {
		if got := bareACK(c.l4); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
	for _, c := range []struct {
		seq, ack uint32
		want     bool
	}{{7, 1001, true}, {7, 1000, false}, {7, 999, false}, {8, 1001, false}} {
		if got := supersedes(tcpSegment(1, 2, c.seq, c.ack, tcpACK, nil), ack); got != c.want {
			t.Errorf("%+v: %v", c, got)
		}
	}
	wrapped := slices.Clone(ack)
	binary.BigEndian.PutUint32(wrapped[8:], 0xffffff00)
	if !supersedes(ack, wrapped) {
		t.Error("numbers wrap around")
	}
}
