package drill_test

import (
	"bytes"
	"context"
	"errors"
	"image/png"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"qmchain/chain/image"
	"qmchain/chain/repo/repotest"
	"qmchain/internal/drill"
	"qmchain/internal/testenv"
)

// rig is a point of disks that nothing boots from, and what a drill of it needs.
type rig struct {
	guest *repotest.Guest
	cfg   drill.Config
}

func newRig(t *testing.T, names ...string) *rig {
	t.Helper()
	r := &rig{guest: repotest.NewGuest(t, repotest.New(t, t.TempDir()), "110", time.Date(2026, 11, 20, 10, 15, 23, 0, time.UTC))}
	var disks []repotest.Disk
	for _, name := range names {
		disks = append(disks, repotest.Disk{Name: name, Size: 8 << 20, Write: repotest.RandomWrites(1, 10, 8<<20, 7)})
	}
	m := r.guest.Add(disks...)
	log := logrus.New()
	log.SetOutput(io.Discard)
	q := testenv.Host(t)
	r.cfg = drill.Config{
		Memory: 256, CPUs: 1, Accel: "tcg", Sign: drill.Text, Timeout: 2 * time.Minute,
		QEMU: q.System, QemuImg: q.Img, Log: log, Now: time.Now,
	}
	pool := image.NewPool(image.PoolOptions{})
	for _, name := range names {
		img, err := r.guest.OpenDisk(pool, r.guest.Points, m, name)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = img.Close() })
		r.cfg.Disks = append(r.cfg.Disks, drill.Disk{Name: name, Image: img})
	}
	return r
}

// linux has the test's guest start.
func (r *rig) linux(t *testing.T) {
	t.Helper()
	var err error
	if r.cfg.Kernel, r.cfg.Initrd, err = testenv.GuestFiles(); err != nil {
		t.Fatal(err)
	}
	r.cfg.CPU, r.cfg.Append = "max,-cx16", "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check"
}

// nothingLeft makes sure that no folder of a drill of this test is there. TMPDIR is the test's own.
func nothingLeft(t *testing.T) {
	t.Helper()
	left, err := filepath.Glob(filepath.Join(os.TempDir(), "qmchain-drill-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left: %q, %v", left, err)
	}
}

func TestPass(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	for _, sign := range []drill.Sign{drill.Agent, drill.Text} {
		r := newRig(t, "scsi0", "virtio1", "sata2", "sata3", "nvme0", "data")
		r.linux(t)
		before := testenv.Output(t, "sh", "-c", "find "+r.guest.Dir+" -type f | sort | xargs sha256sum")
		r.cfg.Sign, r.cfg.Text = sign, "qmchain-guest-ready"
		result, err := drill.Run(t.Context(), r.cfg)
		if err != nil || !result.Passed {
			t.Fatalf("%s: %+v, %v", sign, result, err)
		}
		if sign == drill.Text && !strings.Contains(result.Console, r.cfg.Text) {
			t.Errorf("console: %q", result.Console)
		}
		if after := testenv.Output(t, "sh", "-c", "find "+r.guest.Dir+" -type f | sort | xargs sha256sum"); after != before {
			t.Error("the backup was changed")
		}
		nothingLeft(t)
	}
}

// A guest that does not boot fails, and the screenshot shows why.
func TestFail(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	r := newRig(t, "ide0")
	r.cfg.Timeout = 8 * time.Second
	r.cfg.Sign = drill.Login
	r.cfg.Screenshot = filepath.Join(t.TempDir(), "shot.png")
	result, err := drill.Run(t.Context(), r.cfg)
	if err != nil || result.Passed || !strings.Contains(result.Why, "no sign of life") || result.Took < r.cfg.Timeout {
		t.Errorf("%+v, %v", result, err)
	}
	data, err := os.ReadFile(r.cfg.Screenshot)
	if err != nil {
		t.Fatal(err)
	}
	img, err := png.Decode(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	colours := map[any]bool{}
	for y := range img.Bounds().Dy() {
		for x := range img.Bounds().Dx() {
			colours[img.At(x, y)] = true
		}
	}
	if len(colours) < 2 {
		t.Error("the screenshot is empty")
	}
	nothingLeft(t)
}

func TestCannotStart(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	r := newRig(t, "scsi0")
	r.cfg.Text = "never said"
	r.cfg.Machine = "no-such-machine"
	if _, err := drill.Run(t.Context(), r.cfg); err == nil || !strings.Contains(err.Error(), "machine type") {
		t.Errorf("error is %v", err)
	}
	r.cfg.Machine = ""
	r.cfg.Disks[0].Name = "efidisk0"
	if _, err := drill.Run(t.Context(), r.cfg); err == nil || !strings.Contains(err.Error(), "firmware") {
		t.Errorf("error is %v", err)
	}
	nothingLeft(t)
}

func TestInterrupted(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	r := newRig(t, "scsi0")
	r.cfg.Text = "never said"
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	if _, err := drill.Run(ctx, r.cfg); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error is %v", err)
	}
	nothingLeft(t)
}
