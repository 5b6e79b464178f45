package ui

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// onTerminal returns a UI whose standard output is a terminal of that size, and what reads what is on it.
func onTerminal(t *testing.T, columns, rows uint16, env map[string]string) (*UI, func() string) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = master.Close() })
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetWinsize(int(master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: columns}); err != nil {
		t.Fatal(err)
	}
	u, err := New(slave, io.Discard, func(name string) string { return env[name] }, Options{})
	if err != nil {
		t.Fatal(err)
	}
	return u, func() string {
		_ = slave.Close()
		text, _ := io.ReadAll(master) // ends with an error when the last one has closed the terminal
		return string(bytes.ReplaceAll(text, []byte("\r"), nil))
	}
}

const manyWords = "one two three four five six"

func sampleTable(w io.Writer) error {
	_, err := fmt.Fprintf(w, "NAME\tREMARK\nthe first\tshort\nthe second\t%s\nno table: %s, and nothing is broken\n", manyWords, manyWords)
	return err
}

// The last column goes on below itself; what is no table stays as it is.
func TestTableOnTerminal(t *testing.T) {
	t.Parallel()
	for columns, want := range map[uint16]string{
		30: `
NAME        REMARK
the first   short
the second  one two three four
            five six
no table: one two three four five six, and nothing is broken
`,
		20: `
NAME        REMARK
the first   short
the second
    one two three
    four five six
no table: one two three four five six, and nothing is broken
`,
		80: `
NAME        REMARK
the first   short
the second  one two three four five six
no table: one two three four five six, and nothing is broken
`,
	} {
		u, seen := onTerminal(t, columns, 24, nil)
		if err := u.Result(false, nil, sampleTable); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, "\n"+seen()); diff != "" {
			t.Errorf("%d columns (-want +got)\n%s", columns, diff)
		}
	}
}

// COLUMNS goes before what the terminal says; one that does not know its size is taken for a usual one; and where there is
// none, nothing is broken.
func TestWidth(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		columns uint16
		env     string
		want    int
	}{{100, "", 100}, {100, "40", 40}, {100, "-1", 100}, {100, "wide", 100}, {0, "", 80}} {
		u, _ := onTerminal(t, c.columns, 24, map[string]string{"COLUMNS": c.env})
		if got := u.Width(); got != c.want {
			t.Errorf("%+v: %d", c, got)
		}
	}
	u, err := New(io.Discard, io.Discard, func(string) string { return "40" }, Options{})
	if err != nil || u.Width() != 0 {
		t.Errorf("no terminal: %d, %v", u.Width(), err)
	}
	if _, err := u.Page(); err == nil {
		t.Error("a page without a terminal")
	}
}

func TestUnicode(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		env  map[string]string
		want bool
	}{
		{nil, false},
		{map[string]string{"LANG": "de_DE.UTF-8"}, true},
		{map[string]string{"LANG": "C.utf8"}, true},
		{map[string]string{"LANG": "de_DE.UTF-8", "LC_ALL": "C"}, false},
		{map[string]string{"LANG": "C", "LC_CTYPE": "C.UTF-8"}, true},
	} {
		u, err := New(io.Discard, io.Discard, func(name string) string { return c.env[name] }, Options{})
		if err != nil || u.Unicode() != c.want {
			t.Errorf("%v: %t, %v", c.env, u.Unicode(), err)
		}
	}
}

// A page shows the end of what does not fit, and nothing that has power over the terminal.
func TestPage(t *testing.T) {
	t.Parallel()
	u, seen := onTerminal(t, 12, 5, map[string]string{"TERM": "xterm"})
	page, err := u.Page()
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"one\ntwo\n", "one\ntwo\nthree\nfour and more and more\nf\x1b[31mve\n"} {
		if err := page.Draw("the heading", text); err != nil {
			t.Fatal(err)
		}
	}
	page.Close()
	want := "\x1b[?1049h\x1b[?25l" +
		"\x1b[Hthe heading\x1b[K\n\x1b[K\none\x1b[K\ntwo\x1b[K\x1b[J" +
		"\x1b[Hthe heading\x1b[K\n\x1b[K\n(3 more lin+\x1b[K\nfour and mo+\x1b[K\nf\ufffd[31mve\x1b[K\x1b[J" +
		"\x1b[?25h\x1b[?1049l"
	if diff := cmp.Diff(want, seen()); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	u, _ = onTerminal(t, 80, 24, map[string]string{"TERM": "dumb"})
	if _, err := u.Page(); err == nil {
		t.Error("a page on a dumb terminal")
	}
}
