package qmp

import (
	"encoding/json"
	"errors"
	"io"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

func TestDecode(t *testing.T) {
	tests := []struct {
		in   string
		want message
	}{
		{
			`{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "p"}, "capabilities": ["oob"]}}`,
			message{greeting: &greeting{Version: versionInfo{QEMU: struct {
				Major int `json:"major"`
				Minor int `json:"minor"`
				Micro int `json:"micro"`
			}{7, 2, 22}, Package: "p"}}},
		},
		{`{"return": {}, "id": "a-1"}`, message{reply: &reply{id: "a-1", result: json.RawMessage(`{}`)}}},
		{`{"return": [], "id": 7}`, message{reply: &reply{result: json.RawMessage(`[]`)}}},
		{`{"return": null}`, message{reply: &reply{result: json.RawMessage(`null`)}}},
		{
			`{"id": "x", "error": {"class": "DeviceNotFound", "desc": "Device 'd' not found"}}`,
			message{reply: &reply{id: "x", err: &Error{Class: "DeviceNotFound", Desc: "Device 'd' not found"}}},
		},
		{
			`{"timestamp": {"seconds": 3, "microseconds": 5}, "event": "STOP"}`,
			message{event: &Event{Name: "STOP", Time: time.Unix(3, 5000)}},
		},
		{
			`{"timestamp": {"seconds": -1, "microseconds": -1}, "event": "E", "data": {"return": 1}}`,
			message{event: &Event{Name: "E", Data: json.RawMessage(`{"return": 1}`), Time: time.Unix(-1, -1000)}},
		},
	}
	for _, tt := range tests {
		got, err := decode([]byte(tt.in))
		if err != nil || !reflect.DeepEqual(got, tt.want) {
			t.Errorf("decode(%s) = %+v, %v", tt.in, got, err)
		}
	}

	for _, in := range []string{
		``, `{}`, `[]`, `7`, `null`, `"QMP"`, `{"QMP": 5}`, `{"QMP": null}`, `{"event": 1}`, `{"event": ""}`, `{"error": "no"}`,
		`{"error": {"class": 1}}`, `{"return": {}`, `{"return": {}} {}`, `{"id": "x"}`,
		`{"QMP": {"version": {"qemu": {"major": "7"}}}}`, `{"event": "E", "timestamp": 5}`,
	} {
		if got, err := decode([]byte(in)); err == nil {
			t.Errorf("decode(%s) = %+v, want an error", in, got)
		}
	}
}

// FuzzDecode feeds the decoder, both as a message and as a stream, with what a peer may send.
func FuzzDecode(f *testing.F) {
	for _, seed := range []string{
		`{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}`,
		`{"return": {}, "id": "a-1"}`,
		`{"return": [{"device": "x", "inserted": {"image": {"virtual-size": 1}}}], "id": 7}`,
		`{"id": "x", "error": {"class": "GenericError", "desc": "no"}}`,
		`{"timestamp": {"seconds": 3, "microseconds": 5}, "event": "JOB_STATUS_CHANGE", "data": {"status": "created", "id": "j"}}`,
		"{\"return\":\n  {}\n}\r\n{\"event\": \"STOP\"}\r\n",
		`SSH-2.0-OpenSSH_9.2p1`,
		`{"event": "E", "timestamp": {"seconds": 9223372036854775807, "microseconds": 9223372036854775807}}`,
		`{"return": "\ud800", "id": "\u0000"}`,
		strings.Repeat(`[`, 20000),
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		parts := func(m message) (n int) {
			for _, there := range []bool{m.greeting != nil, m.event != nil, m.reply != nil} {
				if there {
					n++
				}
			}
			return n
		}
		if m, err := decode(data); err == nil && parts(m) != 1 {
			t.Fatalf("%d parts in %q", parts(m), data)
		}

		messages := newMessageReader(strings.NewReader(string(data)), 1<<16)
		for i := 0; ; i++ {
			m, raw, err := messages.next()
			if err != nil {
				if !errors.Is(err, ErrNotQMP) && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
					t.Fatalf("unexpected kind of error: %v", err)
				}
				break
			}
			if parts(m) != 1 || !json.Valid(raw) {
				t.Fatalf("message %q: %d parts", raw, parts(m))
			}
			if i > len(data) {
				t.Fatal("more messages than bytes")
			}
			if m.event != nil {
				monitorEvent(*m.event)
			}
		}
	})
}

func TestMessageReader(t *testing.T) {
	event := func(n int) string { return `{"event": "E", "data": "` + strings.Repeat("x", n) + `"}` }

	t.Run("byte by byte, over lines, and several in a read", func(t *testing.T) {
		// Longer in all than one message may be.
		stream := "{\r\n \"event\":\n\"A\"}\r\n" + event(1000) + event(1000) + "\n"
		for _, r := range []io.Reader{strings.NewReader(stream), iotest.OneByteReader(strings.NewReader(stream))} {
			messages := newMessageReader(r, 1100)
			for i := range 3 {
				if m, _, err := messages.next(); err != nil || m.event == nil {
					t.Fatalf("message %d: %+v, %v", i, m, err)
				}
			}
			if _, _, err := messages.next(); !errors.Is(err, io.EOF) {
				t.Fatalf("at the end: %v", err)
			}
		}
	})

	t.Run("too long", func(t *testing.T) {
		messages := newMessageReader(io.MultiReader(strings.NewReader(event(10)), strings.NewReader(event(5000))), 1000)
		if _, _, err := messages.next(); err != nil {
			t.Fatal(err)
		}
		if _, _, err := messages.next(); !errors.Is(err, ErrNotQMP) || !strings.Contains(err.Error(), "1000 bytes") {
			t.Fatalf("got %v", err)
		}
	})

	t.Run("the stream's own error", func(t *testing.T) {
		broken := errors.New("broken")
		for _, begun := range []string{"", `{"event": `} {
			messages := newMessageReader(io.MultiReader(strings.NewReader(begun), iotest.ErrReader(broken)), 1000)
			if _, _, err := messages.next(); !errors.Is(err, broken) || errors.Is(err, ErrNotQMP) {
				t.Fatalf("after %q: %v", begun, err)
			}
		}
	})
}
