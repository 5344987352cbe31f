// Package tap is TAP devices.
package tap
