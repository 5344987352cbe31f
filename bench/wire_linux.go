package bench

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"time"

	"patchbay/frame"
	vswitch "patchbay/switch"
	"patchbay/tap"
)

// Roles between two TAPs: a wire, and a switch alone.

// tapEnd is where a TAP is to be.
type tapEnd struct {
	space space
	name  string
}

// tapsSpec is what such a role is told. The descriptors of the two devices are the first after standard error.
type tapsSpec struct {
	Infos [2]tap.Info
	Delay time.Duration // of a wire, each way
}

const tapsFD = 3

// wireQueue bounds the frames that are under way in one direction; more wait in the device, whose kernel drops them.
const wireQueue = 4096

// longWire joins two namespaces as veth does, with devices whose frames arrive half of rtt later. They are TAPs, and superframes stay whole.
func (s *site) longWire(a space, aName string, b space, bName string, rtt time.Duration) error {
	return s.betweenTAPs(roleWire, a, rtt/2, [2]tapEnd{{a, aName}, {b, bName}})
}

// betweenTAPs makes two TAPs, up, and starts a role between them in sp.
func (s *site) betweenTAPs(name string, sp space, wait time.Duration, ends [2]tapEnd) error {
	spec := tapsSpec{Delay: wait}
	var files []*os.File
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	for i, end := range ends {
		err := end.space.Do(func() error {
			h, err := tap.Open(tap.OpenConfig{Name: end.name})
			if err != nil {
				return err
			}
			files = append(files, os.NewFile(uintptr(h.FDs[0]), end.name))
			spec.Infos[i] = h.Info
			return nil
		})
		if err != nil {
			return err
		}
	}
	arg, err := argument(spec)
	if err != nil {
		return err
	}
	line := role(name, arg)
	cmd := exec.Command(line[0], line[1:]...)
	cmd.ExtraFiles = files
	return errors.Join(s.launch(sp, cmd, asRoot), ends[0].space.up(ends[0].name), ends[1].space.up(ends[1].name))
}

// openTAPs makes the two devices of a role's argument.
func openTAPs(args []string) (spec tapsSpec, ends [2]*tap.Device, err error) {
	if len(args) != 1 {
		return spec, ends, errors.New("want one argument")
	}
	if err := json.Unmarshal([]byte(args[0]), &spec); err != nil {
		return spec, ends, err
	}
	for i := range ends {
		if ends[i], err = tap.New(tap.Config{Info: spec.Infos[i], FDs: []int{tapsFD + i}}); err != nil {
			return spec, ends, err
		}
	}
	return spec, ends, nil
}

// wire carries frames between two devices until it is killed.
func wire(ctx context.Context, args []string) error {
	spec, ends, err := openTAPs(args)
	if err != nil {
		return err
	}
	ended := make(chan error, 2)
	for i := range ends {
		later := delay{after: spec.Delay, to: ends[1-i], queue: make(chan delayed, wireQueue)}
		go later.run()
		go func() { ended <- ends[i].Serve(ctx, 0, later) }()
	}
	return <-ended
}

// bareSwitch switches between two devices until it is killed.
func bareSwitch(ctx context.Context, args []string) error {
	_, ends, err := openTAPs(args)
	if err != nil {
		return err
	}
	sw := vswitch.New(vswitch.Config{MaxMACs: 1 << 18})
	ended := make(chan error, 2)
	for i, d := range ends {
		id, err := sw.AddPort(d, vswitch.PortConfig{Name: []string{"client", "server"}[i]})
		if err != nil {
			return err
		}
		go func() { ended <- d.Serve(ctx, 0, sw.Ingress(id)) }()
	}
	return <-ended
}

// delay is a frame.Sink that transmits later.
type delay struct {
	after time.Duration
	to    *tap.Device
	queue chan delayed
}

type delayed struct {
	frame.Frame
	due time.Time
}

// Forward copies fs. It waits where the queue is full: nothing else is read meanwhile, as on a wire.
func (d delay) Forward(fs []frame.Frame) {
	due := time.Now().Add(d.after)
	for _, f := range fs {
		d.queue <- delayed{frame.Frame{Hdr: f.Hdr, Data: append([]byte(nil), f.Data...)}, due}
	}
}

// run transmits for as long as the process lives.
func (d delay) run() {
	for f := range d.queue {
		time.Sleep(time.Until(f.due))
		d.to.Transmit([]frame.Frame{f.Frame})
	}
}
