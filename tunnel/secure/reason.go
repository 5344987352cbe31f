package secure

import (
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

const (
	maxReason = 600              // bytes of why a handshake failed
	sayEvery  = 10 * time.Second // between two lines of the log about that, however many reasons there are
)

// reason is why a handshake failed, for the log and for listings. Part of it may be what somebody sent who is not known: it is one line, without what a terminal would act on, and at most maxReason bytes.
func reason(err error) string {
	s := strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(err.Error(), string(utf8.RuneError)))
	if len(s) <= maxReason {
		return s
	}
	end := maxReason - len("…")
	for !utf8.RuneStart(s[end]) {
		end--
	}
	return s[:end] + "…"
}

// said is the reason that was logged last, and when.
type said struct {
	msg string
	at  time.Time
}

// news reports whether msg is to be logged, and takes it that it is.
func (s *said) news(msg string, now time.Time) bool {
	if msg == s.msg || !s.at.IsZero() && now.Sub(s.at) < sayEvery {
		return false
	}
	*s = said{msg, now}
	return true
}
