package jsondoc

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

const sample = `.SS qmchain\-sample take, put
.TP
.BR .[].name " (text)"
.TP
.BR .[].made " (time)"
.TP
.BR .[].parts[].bytes " (integer)"
.TP
.BR .[].remarks[] " (text?)"
.SS qmchain\-sample show: one
.TP
.BR .left\-out " (boolean)"
`

type part struct {
	Bytes int64 `json:"bytes"`
}

type taken struct {
	Name    string    `json:"name"`
	Made    time.Time `json:"made"`
	Parts   []part    `json:"parts"`
	Remarks []string  `json:"remarks,omitempty"`
	secret  int
	Hidden  int `json:"-"`
}

// failures is a test that goes on, and knows what was wrong.
type failures struct{ texts []string }

func (*failures) Helper()                        {}
func (f *failures) Fatalf(s string, args ...any) { f.Errorf(s, args...) }
func (f *failures) Errorf(s string, args ...any) { f.texts = append(f.texts, fmt.Sprintf(s, args...)) }

func (f *failures) expect(t *testing.T, part string) {
	t.Helper()
	all := strings.Join(f.texts, "\n")
	if part == "" && all != "" || !strings.Contains(all, part) {
		t.Errorf("%q, want %q", all, part)
	}
}

func parsed(t *testing.T, text string) *Page {
	t.Helper()
	page, err := parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return page
}

func TestParse(t *testing.T) {
	t.Parallel()
	for _, text := range []string{sample + sample, ".BR .x \" (text)\"\n", sample + ".BR .left\\-out \" (text)\"\n"} {
		if _, err := parse(text); err == nil {
			t.Errorf("no error for %q", text)
		}
	}
}

func TestType(t *testing.T) {
	t.Parallel()
	page := parsed(t, sample)
	for _, c := range []struct {
		section string
		printed any
		want    string
	}{
		{"qmchain-sample take, put", []taken{{secret: 1}}, ""},
		{"qmchain-sample take, put", []*taken{}, ""},
		{"qmchain-sample take, put", taken{}, ".name is \"text\", and \"\" in the page"},
		{"qmchain-sample take, put", []part{}, ".[].made is in the page alone"},
		{"qmchain-sample show: one", struct {
			LeftOut string `json:"left-out"`
		}{}, `.left-out is "text", and "boolean"`},
		{"qmchain-sample other", 1, "no section"},
	} {
		var f failures
		page.Type(&f, c.section, c.printed)
		f.expect(t, c.want)
	}
}

func TestOutput(t *testing.T) {
	t.Parallel()
	page := parsed(t, sample)
	for _, c := range []struct{ command, printed, want string }{
		{"qmchain-sample put", `[{"name": "a", "parts": [{"bytes": 1}], "remarks": ["x"]}] []`, ""},
		{"qmchain-sample take", `[{"name": 1}]`, ".[].name is number"},
		{"qmchain-sample take", `[{"parts": null}]`, ".[].parts is null"},
		{"qmchain-sample take", `[{"other": 1}]`, ".[].other is number"},
		{"qmchain-sample show", `{"left-out": true}`, ""},
		{"qmchain-sample show", `{"left-out": true`, "unexpected EOF"},
		{"qmchain-sample none", `{}`, "has nothing of"},
	} {
		var f failures
		page.Output(&f, c.command, []byte(c.printed))
		f.expect(t, c.want)
	}
}

func TestComplete(t *testing.T) {
	t.Parallel()
	page := parsed(t, sample)
	for text, want := range map[string]string{
		`{"name": "qmchain-sample", "commands": [{"name": "take", "flags": [{"name": "json"}]}, {"name": "put", "flags": [{"name": "json"}]}, {"name": "show", "flags": [{"name": "json"}]}, {"name": "quiet"}]}`: "",
		`{"name": "qmchain-sample", "commands": [{"name": "take", "flags": [{"name": "json"}]}, {"name": "put"}, {"name": "show", "flags": [{"name": "json"}]}]}`:                                                 "qmchain-sample put has --json: false",
		`{"name": "qmchain-sample", "commands": [{"name": "new", "flags": [{"name": "json"}]}]}`:                                                                                                                  "qmchain-sample new has --json: true",
		`{"name": "qmchain-sample", "commands": []}`: "there is no command qmchain-sample take",
	} {
		var f failures
		page.Complete(&f, []byte(text))
		f.expect(t, want)
	}
}
