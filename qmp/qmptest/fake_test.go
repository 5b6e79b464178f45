package qmptest_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"qmchain/qmp"
	"qmchain/qmp/qmptest"
)

// The Fake must be as strict as QEMU is: this runs against both.
func TestFakeIsLikeQEMU(t *testing.T) {
	t.Parallel()
	f := qmptest.NewFake(t)
	f.HandleValue("query-status", map[string]any{"status": "prelaunch", "running": false})
	f.Handle("object-del", func(json.RawMessage) (any, error) { return nil, errors.New("object 'none' not found") })
	q := qmptest.StartQEMU(t)
	for name, addr := range map[string]string{"fake": f.Addr(), "QEMU": q.Sockets[0]} {
		c := dial(t, addr)
		for command, want := range map[string]qmp.Error{
			"qmp_capabilities": {Class: qmp.ClassCommandNotFound, Desc: "Capabilities negotiation is already complete, command ignored"},
			"unknown":          {Class: qmp.ClassCommandNotFound, Desc: "The command unknown has not been found"},
			"object-del":       {Class: qmp.ClassGeneric, Desc: "object 'none' not found"},
		} {
			var args any
			if command == "object-del" {
				args = map[string]string{"id": "none"}
			}
			want.Command = command
			err := c.Execute(t.Context(), command, args, nil)
			if e := new(qmp.Error); !errors.As(err, &e) || *e != want {
				t.Errorf("%s: %s: got %#v", name, command, err)
			}
		}
		if got, err := c.QueryStatus(t.Context()); err != nil || got.Status != "prelaunch" {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
		_ = c.Close()
	}
}

func TestFakeRecords(t *testing.T) {
	t.Parallel()
	f := qmptest.NewFake(t)
	f.HandleValue("a", nil)
	f.Inject(qmptest.Fault{Command: "a", Nth: 2, Fail: &qmp.Error{Class: "X", Desc: "second a"}})
	f.Inject(qmptest.Fault{Nth: 3, Fail: &qmp.Error{Desc: "third of all"}, After: []qmptest.Event{{Name: "E"}}})
	c := dial(t, f.Addr())
	sub := c.Subscribe()

	var got []string
	for range 4 {
		text := "ok"
		if err := c.Execute(t.Context(), "a", map[string]int{"n": 1}, nil); err != nil {
			text = err.Error()
		}
		got = append(got, text)
	}
	if want := "ok|a: second a (X)|a: third of all|ok"; strings.Join(got, "|") != want {
		t.Errorf("got %v", got)
	}
	if events := sub.Pending(); len(events) != 1 || events[0].Name != "E" {
		t.Errorf("events %+v", events)
	}
	if cmds := f.Commands(); len(cmds) != 4 || cmds[0].Name != "a" || string(cmds[0].Args) != `{"n":1}` {
		t.Errorf("commands %+v", cmds)
	}
	// Greeting and negotiation are three lines, then four commands with a reply each, and an event.
	if lines := f.Transcript(); len(lines) != 3+8+1 || !strings.HasPrefix(lines[1], `-> {"execute":"qmp_capabilities"`) {
		t.Errorf("transcript:\n%s", strings.Join(lines, "\n"))
	}
}

// One client at a time: the second one is greeted when the first has left.
func TestFakeServesOneClient(t *testing.T) {
	t.Parallel()
	f := qmptest.NewFake(t)
	first := dial(t, f.Addr())
	greeted := make(chan error, 1)
	go func() {
		c, err := qmp.Dial(t.Context(), f.Addr())
		if err == nil {
			_ = c.Close()
		}
		greeted <- err
	}()
	f.Emit("E", nil)
	select {
	case err := <-greeted:
		t.Errorf("the second client was served too early: %v", err)
	default:
	}
	_ = first.Close()
	if err := <-greeted; err != nil {
		t.Error(err)
	}
}
