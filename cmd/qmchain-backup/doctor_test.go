package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"qmchain/chain"
	"qmchain/internal/testenv"
)

// bitmaps lists the bitmaps in the images of the stopped guest.
func (b *bench) bitmaps() string {
	b.t.Helper()
	var all string
	for _, id := range []string{"scsi0", "virtio1"} {
		all += testenv.Output(b.t, b.vm.Config().QEMU.Img, "info", "-f", "qcow2", b.vm.Disk(id).Path)
	}
	return all
}

func (b *bench) images() []string {
	return []string{"--offline", b.vm.Disk("scsi0").Path, "--offline", b.vm.Disk("virtio1").Path}
}

func TestDoctorOfAStoppedGuest(t *testing.T) {
	t.Parallel()
	b := newBench(t, testenv.Host(t), testenv.Drive)
	b.write(10)
	b.point(chain.Full)
	b.vm.Restart()
	b.vm.Kill()
	args := append([]string{"doctor", "--name", "web", "--repo", b.repo, "--fleece-dir", b.fleece}, b.images()...)
	code, stdout, stderr := call(t, args...)
	if code != 6 || strings.Count(stdout, "inconsistent") != 2 {
		t.Errorf("exit code %d: %s%s", code, stdout, stderr)
	}
	if code, stdout, stderr := call(t, append(args, "--fix")...); code != 0 {
		t.Errorf("exit code %d: %s%s", code, stdout, stderr)
	}
	if all := b.bitmaps(); strings.Contains(all, "qmchain:") {
		t.Errorf("left: %s", all)
	}
	if code, _, stderr := call(t, "doctor", "--name", "web", "--repo", b.repo, "--socket", b.vm.Socket, "--offline", "x"); code != 80 {
		t.Errorf("exit code %d: %s", code, stderr)
	}
}

// After cleanup a snapshot can be loaded, and the next run takes a full.
func TestCleanup(t *testing.T) {
	t.Parallel()
	b := newBench(t, testenv.Host(t), testenv.Drive)
	b.vm.HMP("savevm before")
	b.write(10)
	b.point(chain.Full)
	b.point(chain.Inc)
	if out := b.vm.HMP("loadvm before"); !strings.Contains(out, "bitmap") {
		t.Errorf("a snapshot is loaded in spite of bitmaps: %q", out)
	}
	if code, _, stderr := call(t, "cleanup"); code != 80 {
		t.Errorf("exit code %d: %s", code, stderr)
	}
	code, stdout, stderr := call(t, "cleanup", "--socket", b.vm.Socket)
	if code != 0 || strings.Count(stdout, "qmchain:") != 2 {
		t.Errorf("exit code %d: %s%s", code, stdout, stderr)
	}
	if out := b.vm.HMP("loadvm before"); out != "" {
		t.Errorf("the snapshot is not loaded: %q", out)
	}
	// Disks with snapshots are tracked in memory if nothing else is asked for.
	cmd, errs := b.command(0, append(b.args(b.vm.Socket), "--bitmaps", "persistent")...)
	if err := cmd.Run(); err == nil || cmd.ProcessState.ExitCode() != 4 || !strings.Contains(errs.String(), "no bitmap records") {
		t.Errorf("%v: %s", err, errs)
	}

	b.vm.Quit()
	if !strings.Contains(b.bitmaps(), "qmchain:") {
		t.Error("no bitmap is stored")
	}
	if code, stdout, stderr := call(t, append([]string{"cleanup", "--repo", b.repo}, b.images()...)...); code != 0 || strings.Count(stdout, "qmchain:") != 2 {
		t.Errorf("exit code %d: %s%s", code, stdout, stderr)
	}
	if all := b.bitmaps(); strings.Contains(all, "qmchain:") {
		t.Errorf("left: %s", all)
	}
}

// What is left of a manifest that was being written is told of and removed, but not while somebody may be writing it.
func TestDoctorFindsTemporaryFiles(t *testing.T) {
	t.Parallel()
	dir, web, _ := pruneRepo(t)
	left := filepath.Join(web.PointDir(web.Points[2].ID), ".tmp-point.json-123")
	if err := os.WriteFile(left, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"doctor", "--name", "web", "--repo", dir, "--fleece-dir", t.TempDir()}
	lock, err := web.LockPrune(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	if code, stdout, stderr := call(t, args...); code != 0 {
		t.Errorf("while points are removed: exit code %d: %s%s", code, stdout, stderr)
	}
	if code, stdout, stderr := call(t, append(args, "--fix", "--lock-wait=0s")...); code != 3 {
		t.Errorf("fix while points are removed: exit code %d: %s%s", code, stdout, stderr)
	}
	lock.Unlock()
	if code, stdout, stderr := call(t, args...); code != 6 || !strings.Contains(stdout, ".tmp-point.json-123") {
		t.Errorf("exit code %d: %s%s", code, stdout, stderr)
	}
	if _, err := os.Stat(left); err != nil {
		t.Error(err)
	}
	if code, stdout, stderr := call(t, append(args, "--fix")...); code != 0 {
		t.Errorf("fix: exit code %d: %s%s", code, stdout, stderr)
	}
	if _, err := os.Stat(left); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it is still there: %v", err)
	}
}
