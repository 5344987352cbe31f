package api

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
)

// Code is what kind of refusal an Error is; each has one HTTP status.
type Code string

// The codes.
const (
	CodeInvalid     Code = "invalid"     // 400: what was asked for makes no sense
	CodeForbidden   Code = "forbidden"   // 403: another user's
	CodeNotFound    Code = "not-found"   // 404: there is no such network, attachment, publish or route
	CodeMethod      Code = "method"      // 405: the route exists, and does not know the request's method
	CodeConflict    Code = "conflict"    // 409: a name, address, port or subnet is taken, or the network is in use
	CodeExhausted   Code = "exhausted"   // 409: a pool or limit is used up
	CodeTooLarge    Code = "too-large"   // 413: the body is longer than MaxBody
	CodeUnavailable Code = "unavailable" // 503: the node is starting, ending or being taken over
	CodeInternal    Code = "internal"    // 500: everything else
)

// Status is the code's HTTP status; 500 for a code that this version does not know.
func (c Code) Status() int {
	switch c {
	case CodeInvalid:
		return http.StatusBadRequest
	case CodeForbidden:
		return http.StatusForbidden
	case CodeNotFound:
		return http.StatusNotFound
	case CodeMethod:
		return http.StatusMethodNotAllowed
	case CodeConflict, CodeExhausted:
		return http.StatusConflict
	case CodeTooLarge:
		return http.StatusRequestEntityTooLarge
	case CodeUnavailable:
		return http.StatusServiceUnavailable
	}
	return http.StatusInternalServerError
}

// Error is a refusal as the contract words it.
type Error struct {
	Code    Code   `json:"code"`
	Message string `json:"message"`          // names the object and the reason
	Remedy  string `json:"remedy,omitempty"` // what to do about it
	Err     error  `json:"-"`                // the cause, on the node's side
}

// Error is one line: the message, then the remedy.
func (e *Error) Error() string {
	if e.Remedy == "" {
		return e.Message
	}
	return e.Message + "; " + e.Remedy
}

// Unwrap is the cause.
func (e *Error) Unwrap() error { return e.Err }

// Errorf makes an Error. format may wrap a cause with %w.
func Errorf(code Code, remedy, format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	return &Error{Code: code, Message: err.Error(), Remedy: remedy, Err: errors.Unwrap(err)}
}

// CodeOf is the code of the first Error in err's chain, or CodeInternal.
func CodeOf(err error) Code {
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return CodeInternal
}

// refusal is how an Error travels: {"error":{"code","message","remedy"}}.
type refusal struct {
	Error *Error `json:"error"`
}

// asError is err as it is answered. What somebody has put around an Error goes into the message.
func asError(err error) *Error {
	var e *Error
	if !errors.As(err, &e) {
		return &Error{Code: CodeInternal, Message: err.Error(), Err: err}
	}
	msg := err.Error()
	if e.Remedy != "" {
		msg = strings.TrimSuffix(msg, "; "+e.Remedy)
	}
	return &Error{Code: e.Code, Message: msg, Remedy: e.Remedy, Err: err}
}

// ErrNoNode is in the chain when nobody answers at the socket, or whoever did has gone.
var ErrNoNode = errors.New("no node answers")
