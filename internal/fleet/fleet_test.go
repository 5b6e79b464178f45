package fleet

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"qmchain/internal/ui"
)

func TestEach(t *testing.T) {
	t.Parallel()
	var guests []string
	for i := range 20 {
		guests = append(guests, fmt.Sprint(i))
	}
	var now, most atomic.Int32
	three := make(chan struct{}) // closed when there were three at once
	reached := sync.OnceFunc(func() { close(three) })
	outcomes := Each(t.Context(), guests, 3, func(_ context.Context, guest string) Outcome {
		n := now.Add(1)
		defer now.Add(-1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		if n == 3 {
			reached()
		}
		select {
		case <-three:
		case <-time.After(20 * time.Second):
		}
		time.Sleep(2 * time.Millisecond)
		if guest == "7" {
			return Outcome{Verdict: Failed, Code: ui.ExitBusy}
		}
		return Outcome{Verdict: Good}
	})
	for i, o := range outcomes {
		if o.Guest != guests[i] || (o.Verdict == Failed) != (o.Guest == "7") || o.Seconds <= 0 || o.Remarks == nil {
			t.Errorf("outcome %d: %+v", i, o)
		}
	}
	if most.Load() != 3 {
		t.Errorf("%d at once", most.Load())
	}

	ctx, cancel := context.WithCancel(t.Context())
	var done []string
	outcomes = Each(ctx, guests, 1, func(_ context.Context, guest string) Outcome {
		done = append(done, guest)
		if guest == "2" {
			cancel()
		}
		return Outcome{Verdict: Good}
	})
	if !slices.Equal(done, guests[:3]) || outcomes[3].Code != ui.ExitInterrupted || outcomes[3].Verdict != Failed || Code(outcomes) != ui.ExitInterrupted {
		t.Errorf("interrupted: %v, %+v", done, outcomes[3])
	}
	if got := Each(t.Context(), nil, 4, nil); len(got) != 0 || Code(got) != ui.ExitOK {
		t.Errorf("of nothing: %v", got)
	}
}

func TestCode(t *testing.T) {
	t.Parallel()
	good, warned, failed := Outcome{Verdict: Good}, Outcome{Verdict: Warning, Code: ui.ExitPartly}, Outcome{Verdict: Failed, Code: ui.ExitBusy}
	for _, test := range []struct {
		outcomes []Outcome
		code     int
	}{
		{[]Outcome{good, {Verdict: Skipped}}, ui.ExitOK},
		{[]Outcome{warned, good}, ui.ExitPartly},
		{[]Outcome{failed, warned}, ui.ExitSomeFailed},
		{[]Outcome{warned, failed, good}, ui.ExitSomeFailed},
		{[]Outcome{failed, failed}, ui.ExitSomeFailed},
		{[]Outcome{{Verdict: Warning, Code: ui.ExitNeedsDoctor}}, ui.ExitSomeFailed},
		{[]Outcome{failed, {Verdict: Failed, Code: ui.ExitInterrupted}}, ui.ExitInterrupted},
	} {
		if got := Code(test.outcomes); got != test.code {
			t.Errorf("%v: exit code %d, want %d", test.outcomes, got, test.code)
		}
	}
}

func report(outcomes ...Outcome) Report {
	return Report{
		Host: "pve1", Repo: "/mnt/backup", Began: time.Date(2026, 11, 20, 2, 0, 0, 0, time.UTC), Took: 90 * time.Second, Outcomes: outcomes,
	}
}

func TestReport(t *testing.T) {
	t.Parallel()
	r := report(
		Outcome{Guest: "110", Name: "web", Verdict: Good, Point: "20261120T020000Z-3f9c", Level: "inc", Size: 8 << 30, Stored: 5 << 20, Took: 1234 * time.Millisecond},
		Outcome{Guest: "111", Name: "bad\x1b[31m\nname", Verdict: Failed, Code: 3, Remarks: []string{"VM 111 is locked (snapshot)", "wait"}},
	)
	want := `qmchain-backup on pve1: 1 of 2 guests FAILED

GUEST  NAME           RESULT  LEVEL  SIZE     STORED   TIME  REMARK
110    web            ok      inc    8.0 GiB  5.0 MiB  1.2s  
111    bad�[31m name  failed  -      -        -        0s    exit code 3: VM 111 is locked (snapshot); wait

1 ok, 0 with warnings, 1 failed, 0 left out; 5.0 MiB stored in /mnt/backup
began 2026-11-20 02:00:00 UTC, took 1m30s
`
	if got := r.Text(); got != want {
		t.Errorf("got\n%q\nwant\n%q", got, want)
	}
}

func TestMail(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	sent := filepath.Join(dir, "sent")
	program := func(name, script string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script), 0o700); err != nil {
			t.Fatal(err)
		}
		return path
	}
	sendmail := program("sendmail", fmt.Sprintf("echo \"$*\" > %s; cat >> %[1]s", sent))
	good, bad := report(Outcome{Verdict: Good}), report(Outcome{Verdict: Failed, Code: 1})
	for _, test := range []struct {
		report Report
		when   When
		want   bool
	}{
		{good, OnFailure, false},
		{bad, OnFailure, true},
		{report(Outcome{Verdict: Warning, Code: 4}), OnFailure, true},
		{good, Always, true},
		{bad, Never, false},
	} {
		_ = os.Remove(sent)
		if err := test.report.Mail(t.Context(), sendmail, []string{"Ädmin <admin@example.org>", "root"}, test.when); err != nil {
			t.Fatal(err)
		}
		text, _ := os.ReadFile(sent)
		if got := len(text) > 0; got != test.want {
			t.Errorf("%s, %s: sent %v", test.report.Subject(), test.when, got)
		}
		if test.want && (!strings.HasPrefix(string(text), "-i -- admin@example.org root\nTo: admin@example.org, root\nSubject: qmchain-backup on pve1: ") || !strings.HasSuffix(string(text), test.report.Text())) {
			t.Errorf("mail: %s", text)
		}
	}
	for _, to := range []string{"", "-oQ/tmp", "a b", "x@y\nBcc: z@example.org"} {
		if err := bad.Mail(t.Context(), sendmail, []string{to}, Always); err == nil {
			t.Errorf("mailed to %q", to)
		}
	}
	if err := bad.Mail(t.Context(), program("failing", "echo no such user >&2; exit 67"), []string{"root"}, Always); err == nil || !strings.Contains(err.Error(), "no such user") {
		t.Errorf("a sendmail that fails: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := bad.Mail(ctx, program("hanging", "exec sleep 60"), []string{"root"}, Always); err == nil {
		t.Error("a sendmail that hangs has sent")
	}
}
