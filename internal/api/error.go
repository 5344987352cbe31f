package api

import (
	"errors"
	"fmt"
)

// Code is what kind of refusal an Error is; each has one HTTP status.
type Code string

// The codes.
const (
	CodeInvalid     Code = "invalid"     // 400: what was asked for makes no sense
	CodeForbidden   Code = "forbidden"   // 403: another user's
	CodeNotFound    Code = "not-found"   // 404: there is no such network, attachment, publish or route
	CodeConflict    Code = "conflict"    // 409: a name, address, port or subnet is taken, or the network is in use
	CodeExhausted   Code = "exhausted"   // 409: a pool or limit is used up
	CodeUnavailable Code = "unavailable" // 503: the node is starting, ending or being taken over
	CodeInternal    Code = "internal"    // 500: everything else
)

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
