package ui

import (
	"bytes"
	"encoding/json"
	"errors"
	"testing"
)

// A document is what encoding/json makes of all of it at once.
func TestDocument(t *testing.T) {
	t.Parallel()
	type element struct {
		Name  string            `json:"name"`
		Disks []string          `json:"disks"`
		More  map[string]string `json:"more,omitempty"`
	}
	for what, v := range map[string]any{
		"no list":         element{"a<b>&c", []string{"x"}, nil},
		"a list of none":  []element{},
		"no list at all":  []element(nil),
		"one":             []element{{"a", nil, nil}},
		"several":         []element{{"a", []string{}, nil}, {"b", []string{"x", "y"}, map[string]string{"k": "v\n"}}, {}},
		"of other things": []any{nil, 1, "a", []int{}, []int{1, 2}},
		"nothing":         nil,
	} {
		var got, want bytes.Buffer
		enc := json.NewEncoder(&want)
		enc.SetIndent("", "  ")
		enc.SetEscapeHTML(false)
		if err := errors.Join(document(&got, v), enc.Encode(v)); err != nil {
			t.Fatal(err)
		}
		if got.String() != want.String() {
			t.Errorf("%s:\n%s\nwant:\n%s", what, got.String(), want.String())
		}
	}
	if err := document(&bytes.Buffer{}, []any{1, func() {}}); err == nil {
		t.Error("a function was encoded")
	}
}

// broken is a pipe that nobody reads any more.
type broken struct{ writes int }

func (f *broken) Write(p []byte) (int, error) {
	if f.writes++; f.writes > 1 {
		return 0, errors.New("broken pipe")
	}
	return len(p), nil
}

// An error of writing is told, wherever in the document it comes, and ends it.
func TestDocumentFails(t *testing.T) {
	t.Parallel()
	f := &broken{}
	if err := document(f, make([]int, 100000)); err == nil || f.writes != 2 {
		t.Errorf("%v after %d writes", err, f.writes)
	}
	long := make([]byte, 200<<10)
	f = &broken{}
	u := &UI{stdout: f}
	if err := u.Result(true, []string{string(long), string(long)}, nil); err == nil {
		t.Error("what can't be written is no error")
	}
}
