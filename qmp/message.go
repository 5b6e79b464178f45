package qmp

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"
)

// maxMessage bounds one message from QEMU, in bytes. The largest that a sane QEMU sends is the answer to
// query-qmp-schema, a few hundred KiB; the bound only keeps a broken peer from eating the memory.
const maxMessage = 256 << 20

// Event is an event as QEMU sent it.
type Event struct {
	Name string          // for example JOB_STATUS_CHANGE
	Data json.RawMessage // the event's data, an object; nil for an event without data
	Time time.Time       // by QEMU's host's clock
}

// message is whatever QEMU sends: exactly one of its parts is there.
type message struct {
	greeting *greeting
	event    *Event
	reply    *reply
}

type greeting struct {
	Version versionInfo `json:"version"`
}

type reply struct {
	id     string // empty where the id is not a string, and so not one of ours
	result json.RawMessage
	err    *Error // with no command's name yet
}

// decode takes one message apart. An error means that it is not QMP.
func decode(raw []byte) (message, error) {
	var m struct {
		QMP    *greeting       `json:"QMP"`
		ID     json.RawMessage `json:"id"`
		Return json.RawMessage `json:"return"`
		Error  *struct {
			Class string `json:"class"`
			Desc  string `json:"desc"`
		} `json:"error"`
		Event     string          `json:"event"`
		Data      json.RawMessage `json:"data"`
		Timestamp struct {
			Seconds      int64 `json:"seconds"`
			Microseconds int64 `json:"microseconds"`
		} `json:"timestamp"`
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		return message{}, err
	}

	switch {
	case m.Event != "":
		return message{event: &Event{
			Name: m.Event,
			Data: m.Data,
			Time: time.Unix(m.Timestamp.Seconds, 0).Add(time.Duration(m.Timestamp.Microseconds) * time.Microsecond),
		}}, nil
	case m.Error != nil || m.Return != nil:
		r := &reply{result: m.Return}
		if len(m.ID) > 0 && m.ID[0] == '"' {
			if err := json.Unmarshal(m.ID, &r.id); err != nil {
				return message{}, err
			}
		}
		if m.Error != nil {
			r.err = &Error{Class: m.Error.Class, Desc: m.Error.Desc}
		}
		return message{reply: r}, nil
	case m.QMP != nil:
		return message{greeting: m.QMP}, nil
	}
	return message{}, errors.New("neither a greeting nor a reply nor an event")
}

// messageReader cuts the stream into messages. It goes by the JSON values and not by the lines, because a
// monitor set to pretty=on spreads each message over many lines.
type messageReader struct {
	limit *limitReader
	dec   *json.Decoder
}

func newMessageReader(r io.Reader, limit int64) *messageReader {
	l := &limitReader{r: r, max: limit, left: limit}
	return &messageReader{limit: l, dec: json.NewDecoder(l)}
}

// next returns the next message and its text. The error wraps ErrNotQMP when what came is not a message,
// and is the stream's own otherwise.
func (m *messageReader) next() (message, []byte, error) {
	m.limit.left = m.limit.max
	var raw json.RawMessage
	if err := m.dec.Decode(&raw); err != nil {
		if syntax := new(json.SyntaxError); errors.As(err, &syntax) {
			err = fmt.Errorf("%w: %w", ErrNotQMP, err)
		}
		return message{}, nil, err
	}
	msg, err := decode(raw)
	if err != nil {
		return message{}, nil, fmt.Errorf("%w: %w in %s", ErrNotQMP, err, excerpt(raw, 200))
	}
	return msg, raw, nil
}

// limitReader fails once more than max bytes have come since left was last set.
type limitReader struct {
	r         io.Reader
	max, left int64
	total     int64 // bytes ever read
}

func (l *limitReader) Read(p []byte) (int, error) {
	if l.left <= 0 {
		return 0, fmt.Errorf("%w: a message of more than %d bytes", ErrNotQMP, l.max)
	}
	if int64(len(p)) > l.left {
		p = p[:l.left]
	}
	n, err := l.r.Read(p)
	l.left -= int64(n)
	l.total += int64(n)
	return n, err
}

// excerpt is the beginning of a message, for an error or a log line.
func excerpt(raw []byte, limit int) string {
	raw = bytes.TrimSpace(raw)
	if len(raw) <= limit {
		return string(raw)
	}
	return fmt.Sprintf("%s... (%d bytes)", raw[:limit], len(raw))
}
