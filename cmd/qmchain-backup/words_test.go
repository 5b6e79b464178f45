package main

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"qmchain/chain"
	"qmchain/cmd/internal/cli"
	"qmchain/cmd/internal/conf"
	"qmchain/internal/durable"
	"qmchain/internal/ui"
)

func TestRemoveAndProtectInJSON(t *testing.T) {
	t.Parallel()
	dir, web, db := pruneRepo(t)
	name := func(id chain.ID) string { return "web/" + string(id) }
	for command, want := range map[string]bool{"protect": true, "unprotect": false} {
		code, stdout, stderr := call(t, command, "--json", "--repo", dir, name(web.Points[1].ID), name(web.Points[4].ID), "110/latest")
		var got []protectedPoint
		if err := json.Unmarshal([]byte(stdout), &got); code != 0 || err != nil {
			t.Fatalf("%s: exit code %d, %v: %s%s", command, code, err, stdout, stderr)
		}
		if !slices.Equal(got, []protectedPoint{{"web", web.Points[1].ID, want}, {"web", web.Points[4].ID, want}, {"110", db.Points[1].ID, want}}) {
			t.Errorf("%s: %v", command, got)
		}
	}
	code, stdout, stderr := call(t, "remove", "--json", "--repo", dir, name(web.Points[1].ID), name(web.Points[2].ID))
	var removed []prunedPoint
	if err := json.Unmarshal([]byte(stdout), &removed); code != 0 || err != nil || len(removed) != 2 {
		t.Fatalf("exit code %d, %v: %s%s", code, err, stdout, stderr)
	}
	for i, p := range removed {
		m := web.Points[i+1]
		if p.Guest != "web" || p.ID != m.ID || !p.Time.Equal(m.Time) || p.Bytes != m.Disks[0].Bytes || p.Keep || p.Reason != "" {
			t.Errorf("%+v", p)
		}
	}
	// One guest's point goes, the other's is protected.
	if code, _, stderr := call(t, "protect", "--repo", dir, "110/"+string(db.Points[0].ID)); code != 0 {
		t.Fatal(stderr)
	}
	code, stdout, stderr = call(t, "remove", "--json", "--repo", dir, name(web.Points[0].ID), "110/"+string(db.Points[0].ID))
	removed = nil
	if err := json.Unmarshal([]byte(stdout), &removed); code != ui.ExitFailed || err != nil || len(removed) != 1 || removed[0].ID != web.Points[0].ID {
		t.Errorf("exit code %d, %v: %s%s", code, err, stdout, stderr)
	}
	if code, stdout, _ := call(t, "remove", "--json", "--repo", dir, "110/"+string(db.Points[0].ID)); code != ui.ExitFailed || stdout != "" {
		t.Errorf("exit code %d, %s", code, stdout)
	}
}

// A settings file holds settings: with these a timer would remove nothing for ever, or print what nobody can read.
func TestNoSettings(t *testing.T) {
	t.Parallel()
	dir, _, _ := pruneRepo(t)
	file := filepath.Join(t.TempDir(), "config.toml")
	for text, want := range map[string]string{
		"[prune]\nkeep-last = 1\ndry-run = true": "[prune]: dry-run: --dry-run is for the command line only",
		"[prune]\nkeep-last = 1\njson = true":    "[prune]: json: --json is for the command line only",
		"[backup]\nin-hook = true":               "[backup]: in-hook: there is no flag --in-hook",
		"[backup]\nlock-wait = 5":                `[backup]: lock-wait: --lock-wait: "5" has no unit`,
		"[check]\nmax-age = \"0s\"":              `must be more than 0`,
		"[check]\nmax-age = \"520w\"":            "",
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		command := []string{"prune", "--repo", dir, "--keep-last", "100"}
		switch {
		case strings.HasPrefix(text, "[check]"):
			command = []string{"check", "--repo", dir}
		case strings.HasPrefix(text, "[backup]"):
			command = []string{"run", "100", "--repo", dir}
		}
		var errs bytes.Buffer
		code := program(durable.FS{}).Run(t.Context(), command, cli.Env{Stdout: io.Discard, Stderr: &errs, Getenv: func(name string) string {
			return map[string]string{conf.Variable: file}[name]
		}})
		if want != "" && (code != ui.ExitUsage || !strings.Contains(errs.String(), want)) || want == "" && code != ui.ExitOK {
			t.Errorf("%q: exit code %d, %s", text, code, errs.String())
		}
	}
}

type broken struct{ err error }

func (b broken) Write([]byte) (int, error) { return 0, b.err }

// The work is done, whoever reads of it.
func TestPruneUntold(t *testing.T) {
	t.Parallel()
	for err, want := range map[error]int{syscall.EPIPE: ui.ExitOK, syscall.ENOSPC: ui.ExitPartly} {
		dir, _, _ := pruneRepo(t)
		var errs bytes.Buffer
		env := cli.Env{Stdout: broken{err}, Stderr: &errs, Getenv: func(string) string { return "" }}
		if code := program(durable.FS{}).Run(t.Context(), []string{"prune", "--repo", dir, "--keep-last", "1"}, env); code != want {
			t.Errorf("%v: exit code %d, %s", err, code, errs.String())
		}
		if left := listedIDs(t, dir); len(left) > 4 { // a parent each is kept
			t.Errorf("%v: left are %q", err, left)
		}
	}
}

func TestNextSteps(t *testing.T) {
	t.Parallel()
	dir, _, _ := pruneRepo(t)
	for _, c := range []struct {
		code int
		want []string
		args []string
	}{
		{ui.ExitNotFound, []string{`hint="there is 110, web"`}, []string{"list", "nope", "--repo", dir}},
		{ui.ExitNotFound, []string{"hint=\"is the share mounted"}, []string{"list", "--repo", "/nope-at-all"}},
		{ui.ExitNotFound, []string{"hint=\"is the guest running"}, []string{"run", "--socket", "/nope-at-all", "--name", "web2", "--repo", dir}},
		{ui.ExitUsage, []string{"--keep-last: \"-1\" is less than nothing"}, []string{"prune", "--keep-last", "-1", "--repo", dir}},
	} {
		code, stdout, stderr := call(t, c.args...)
		for _, want := range c.want {
			if code != c.code || !strings.Contains(stderr, want) {
				t.Errorf("%q: exit code %d, %s%s; want %s", c.args, code, stdout, stderr, want)
			}
		}
	}
}
