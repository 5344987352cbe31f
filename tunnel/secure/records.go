package secure

import "encoding/binary"

// DTLS records (RFC 6347 §4.1) and what of them is told apart before the library sees them.
const (
	recordHeader = 13

	recordChangeCipherSpec = 20
	recordAlert            = 21
	recordHandshake        = 22
	recordApplication      = 23

	typeClientHello = 1

	minClientHello = 2 * HeaderLen // bytes; a real one has far more
)

// isClientHello reports whether d begins with a ClientHello. Fragmented ones count by their first fragment.
func isClientHello(d []byte) bool {
	return len(d) >= minClientHello && d[0] == recordHandshake && binary.BigEndian.Uint16(d[3:]) == 0 && d[recordHeader] == typeClientHello
}

// sift leaves in d, in place, the records that may matter to a handshake. What nobody has authenticated must not end it: alerts and data in clear are taken out, and alert is the
// last such alert's description, or 0. So are records that are cut short, of another type or of a later epoch.
func sift(d []byte) (kept []byte, alert byte) {
	kept = d[:0]
	for len(d) >= recordHeader {
		epoch, n := binary.BigEndian.Uint16(d[3:]), recordHeader+int(binary.BigEndian.Uint16(d[11:]))
		if n > len(d) {
			break
		}
		switch typ := d[0]; {
		case epoch > 1:
		case epoch == 0 && typ == recordAlert:
			if n == recordHeader+2 {
				alert = d[recordHeader+1]
			}
		case epoch == 0 && typ == recordApplication:
		case typ >= recordChangeCipherSpec && typ <= recordApplication && n > recordHeader:
			kept = append(kept, d[:n]...)
		}
		d = d[n:]
	}
	return kept, alert
}

// beginsInClear reports whether d begins with a handshake message in clear, as the other side's first datagrams do.
func beginsInClear(d []byte) bool {
	return len(d) >= recordHeader && d[0] == recordHandshake && binary.BigEndian.Uint16(d[3:]) == 0
}

// sealedRecords reports whether d has a record under keys: the last flight of a handshake, or what comes behind it.
func sealedRecords(d []byte) bool {
	for len(d) >= recordHeader {
		if binary.BigEndian.Uint16(d[3:]) > 0 {
			return true
		}
		d = d[min(len(d), recordHeader+int(binary.BigEndian.Uint16(d[11:]))):]
	}
	return false
}
