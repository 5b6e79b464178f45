package bench

import (
	"io"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"qmchain/backup"
	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/internal/durable"
	"qmchain/internal/testenv"
)

// build builds a program of this module, static, so that it runs in the guest as well.
func build(b *testing.B, path, pkg string) {
	b.Helper()
	cmd := exec.CommandContext(b.Context(), "go", "build", "-o", path, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if out, err := cmd.CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, out)
	}
}

// styleOf is the way in which the Proxmox VE that has such a QEMU attaches disks.
func styleOf(q testenv.QEMU) testenv.Style {
	if q.AtLeast(10, 0) {
		return testenv.Throttle
	}
	return testenv.Drive
}

type silent struct{}

func (silent) Disk(string, int64, int64, int64) {}

// config is a run as the program makes it with default flags.
func config(addr, dir, fleece string, level chain.Level) backup.Config {
	log := logrus.New()
	log.SetOutput(io.Discard)
	return backup.Config{
		Request: backup.Request{Level: level},
		Guest:   "web", Addr: addr,
		Repo:     func() (*repo.Repo, error) { return repo.OpenOrCreate(dir, durable.FS{}) },
		Fleecing: backup.Fleecing{Dir: fleece}, LockWait: 2 * time.Second,
		Log: log, Progress: silent{}, Now: time.Now,
	}
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
