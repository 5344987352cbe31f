package secure

// WindowSize is how many sequence numbers behind the newest a message may arrive and still be told from a repetition.
const WindowSize = 4096

const (
	windowWords = 128 // a power of two, and more bits than WindowSize by at least a word (RFC 6479 §3)
	wordBits    = 64
)

// window remembers which sequence numbers were seen: a ring of bits that is cleared a word at a time as it moves (RFC 6479). The zero value has seen none.
type window struct {
	next uint64 // one above the highest that was seen
	bits [windowWords]uint64
}

// fresh reports whether seq is new, without remembering it.
func (w *window) fresh(seq uint64) bool {
	if seq >= w.next {
		return true
	}
	if w.next-seq > WindowSize {
		return false
	}
	return w.bits[seq/wordBits%windowWords]&(1<<(seq%wordBits)) == 0
}

// mark remembers seq and reports whether it was new. Only what has been authenticated may be marked.
func (w *window) mark(seq uint64) bool {
	if !w.fresh(seq) {
		return false
	}
	if seq >= w.next {
		// Words of the ring that the highest enters hold bits from one turn ago. Before the first mark they are zero.
		if w.next > 0 {
			last, word := (w.next-1)/wordBits, seq/wordBits
			for i := uint64(1); i <= min(word-last, windowWords); i++ {
				w.bits[(last+i)%windowWords] = 0
			}
		}
		w.next = seq + 1
	}
	w.bits[seq/wordBits%windowWords] |= 1 << (seq % wordBits)
	return true
}
