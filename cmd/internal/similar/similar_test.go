package similar

import (
	"strings"
	"testing"
)

func TestTo(t *testing.T) {
	t.Parallel()
	guests := []string{"110", "111", "210", "mail", "webserver", "Web-2"}
	for name, want := range map[string]string{
		"webservr":  "webserver",
		"wbeserver": "webserver",
		"webs":      "webserver",
		"web-2":     "Web-2",
		"mial":      "mail",
		"112":       "110 111",
		"101":       "110 111", // swapped, or replaced
		"mail":      "",
		"database":  "",
		"":          "",
		"9999":      "",
	} {
		if got := strings.Join(To(name, guests), " "); got != want {
			t.Errorf("%q: %q, want %q", name, got, want)
		}
	}
	if got := To("x", []string{"w", "X", "xy"}); strings.Join(got, " ") != "X" {
		t.Errorf("%q are offered", got)
	}
	if got := To("20", []string{"21", "22", "23", "24"}); len(got) != most {
		t.Errorf("%q are offered", got)
	}
}

func TestQuestion(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]string{
		"scis0": "did you mean scsi0?",
		"scsi2": "did you mean scsi0 or scsi1?",
		"other": "",
	} {
		if got := Question(name, []string{"scsi0", "scsi1", "efidisk0"}); got != want {
			t.Errorf("%q: %q, want %q", name, got, want)
		}
	}
}

func TestDistance(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		a, b string
		want int
	}{
		{"", "", 0},
		{"", "abc", 3},
		{"abc", "", 3},
		{"abc", "abc", 0},
		{"abc", "acb", 1},
		{"abc", "ab", 1},
		{"kitten", "sitting", 3},
		{"päivä", "paiva", 2},
	} {
		if got := distance(c.a, c.b); got != c.want {
			t.Errorf("%q to %q: %d, want %d", c.a, c.b, got, c.want)
		}
	}
}
