package hooks

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"qmchain/internal/testenv"
)

func TestWrap(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ theirs, storage, ours string }{
		{"", "local", "local:snippets/qmchain-hook"},
		{"", "cephfs", "cephfs:snippets/qmchain-hook"},
		{"nfs:snippets/gpu.pl", "local", "nfs:snippets/qmchain-hook-gpu.pl"},
		{"local:snippets/hook", "local", "local:snippets/qmchain-hook-hook"},
		{"local:snippets/qmchain-hooks", "local", "local:snippets/qmchain-hook-qmchain-hooks"},
	} {
		if got := wrap(test.theirs, test.storage); got != test.ours {
			t.Errorf("wrap %q: %q", test.theirs, got)
		}
		if theirs, ours := unwrap(test.ours); theirs != test.theirs || !ours {
			t.Errorf("unwrap %q: %q, %t", test.ours, theirs, ours)
		}
	}
	for _, volume := range []string{"", "local:snippets/gpu.pl", "local:snippets/qmchain-hook-", "local:iso/qmchain-hook", "local:snippets/qmchain-hooks"} {
		if theirs, ours := unwrap(volume); ours || theirs != "" {
			t.Errorf("unwrap %q: %q, %t", volume, theirs, ours)
		}
	}
}

// TestScript runs scripts of ours, in the shell that PVE's node has.
func TestScript(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "a 'b' $c")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := testenv.WriteProgram(path, text); err != nil {
			t.Fatal(err)
		}
		return path
	}
	program := write("qmchain hook's", "#!/bin/sh\necho \"ours $*\"\nexit 3\n")
	const name = `it's "theirs" $HOME.sh`
	write(name, "#!/bin/sh\necho \"theirs $0 $*\"\nexit 5\n")
	for _, test := range []struct {
		what, text, phase, want string
		code                    int
	}{
		{"alone", script(program, ""), "pre-start", "ours guest 110 pre-start\n", 0},
		{"with theirs", script(program, "local:snippets/"+name), "pre-start", "ours guest 110 pre-start\ntheirs " + dir + "/" + name + " 110 pre-start\n", 5},
		{"uninstalled", script("/nowhere/qmchain-hook", "local:snippets/"+name), "pre-start", "theirs " + dir + "/" + name + " 110 pre-start\n", 5},
		{"uninstalled and alone", script("/nowhere/qmchain-hook", ""), "pre-start", "", 0},
		{"theirs is gone", script("/nowhere/qmchain-hook", "local:snippets/gone"), "post-start", "", 127},
		{"before a stop", script(program, "local:snippets/"+name), "pre-stop", "theirs " + dir + "/" + name + " 110 pre-stop\nours guest 110 pre-stop\n", 5},
		{"theirs is gone before a stop", script(program, "local:snippets/gone"), "pre-stop", "ours guest 110 pre-stop\n", 127},
	} {
		if !isOurs([]byte(test.text)) {
			t.Errorf("%s: not known as ours", test.what)
		}
		cmd := exec.Command(write("script-"+strings.ReplaceAll(test.what, " ", "-"), test.text), "110", test.phase)
		cmd.Env = []string{}
		out, _ := cmd.Output() // the exit code tells
		if string(out) != test.want || cmd.ProcessState.ExitCode() != test.code {
			t.Errorf("%s: exit code %d, %q; want %d, %q", test.what, cmd.ProcessState.ExitCode(), out, test.code, test.want)
		}
	}
	for _, text := range []string{"", mark, mark + "\n", "#!/bin/sh\n# qmchain: calls\n", "#!/bin/sh\necho\n" + mark + "\n"} {
		if isOurs([]byte(text)) {
			t.Errorf("%q is taken for ours", text)
		}
	}
}
