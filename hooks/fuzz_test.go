package hooks

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// The name of a VM's hook script comes from its configuration, and goes into a script that root runs: the shell calls exactly the file
// of that name, and ours, with what it was given. A volume is known by its name again.
func FuzzSnippet(f *testing.F) {
	for _, s := range []string{
		"local:snippets/hook.pl", "local:snippets/a'; touch /tmp/x; '", "nas:snippets/$(reboot) \\", "local:snippets/qmchain-hook-x", "a:snippets/-n", "b:snippets/a\nb",
		"", "local:iso/x.iso", ":snippets/", "x:snippets/y:snippets/z",
	} {
		f.Add(s, byte(0))
		f.Add(s, byte(3))
	}
	dir := f.TempDir()
	program := filepath.Join(dir, "it's $qmchain")
	if err := os.WriteFile(program, []byte("#!/bin/sh\necho ours \"$@\"\n"), 0o700); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, theirs string, rc byte) {
		storage, name, found := strings.Cut(theirs, snippetsDir)
		if theirs != "" && (!found || name == "" || storage == "" || strings.ContainsAny(name, "/\x00") || len(name) > 100 || name == "." || name == "..") {
			return // PVE has no such hook script
		}
		text := script(program, theirs)
		if !isOurs([]byte(text)) {
			t.Error("it is not known as ours")
		}
		if back, ours := unwrap(wrap(theirs, "local")); !ours || back != theirs {
			t.Errorf("%q became %q", theirs, back)
		}
		folder := filepath.Join(dir, "snippets")
		if err := os.Mkdir(folder, 0o700); err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(folder)
		snippet := filepath.Join(folder, "our snippet")
		if name == filepath.Base(snippet) {
			return
		}
		if err := os.WriteFile(snippet, []byte(text), 0o700); err != nil {
			t.Fatal(err)
		}
		want, code := "ours guest 110 post-start\n", 0
		if theirs != "" {
			if err := os.WriteFile(filepath.Join(folder, name), fmt.Appendf(nil, "#!/bin/sh\necho theirs \"$@\"\nexit %d\n", rc), 0o700); err != nil {
				return // no name for a file
			}
			want, code = want+"theirs 110 post-start\n", int(rc)
		}
		cmd := exec.CommandContext(t.Context(), snippet, "110", "post-start")
		cmd.Env = []string{"PATH=/usr/bin:/bin"}
		var said bytes.Buffer
		cmd.Stdout, cmd.Stderr = &said, &said
		if err := cmd.Run(); cmd.ProcessState == nil {
			t.Fatal(err)
		}
		if said.String() != want || cmd.ProcessState.ExitCode() != code {
			t.Errorf("%q: %q, exit code %d, not %q, %d", theirs, said.String(), cmd.ProcessState.ExitCode(), want, code)
		}
	})
}
