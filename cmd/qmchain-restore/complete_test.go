package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// complete asks the program what can come next: as a shell does, with the command __complete, or as that asks it, with __look.
func complete(t *testing.T, command, config string, words ...string) string {
	t.Helper()
	cmd := exec.Command(os.Args[0], append([]string{command}, words...)...)
	cmd.Args[0] = "qmchain-restore" // what TestMain goes by
	cmd.Env = []string{"QMCHAIN_CONFIG=" + config}
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

func TestComplete(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	g := makeRepo(t, dir)
	if got := complete(t, "__look", "", "image", "--repo", dir, "11"); !strings.Contains(got, "110/"+string(g.Points[1].ID)+"\t") {
		t.Errorf("points: %q", got)
	}
	if got := complete(t, "__look", "", "image", "--repo="+dir, "110/latest", "--disk", ""); got != "scsi0\tinc\nvirtio1\tinc\n" {
		t.Errorf("disks: %q", got)
	}
	if got := complete(t, "__look", "/no/such/file", "image", "--repo="+dir, "110/latest", "--disk", "v"); got != "virtio1\tinc\n" {
		t.Errorf("disks, with a configuration file that is wrong: %q", got)
	}
}

// Whatever hangs, the shell does not.
func TestCompleteHangs(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if got := complete(t, "__complete", fifo, "image", ""); got != "" {
		t.Errorf("%q", got)
	}
	if took := time.Since(began); took < 900*time.Millisecond || took > 30*time.Second {
		t.Errorf("it took %s", took)
	}
}
