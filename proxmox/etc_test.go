package proxmox

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// TestHungClusterFS: a read that hangs is an error after a while, and so are more of them than there may be; when it goes on all is
// well. A FIFO that nobody writes to hangs.
func TestHungClusterFS(t *testing.T) {
	t.Parallel()
	h := Host{Etc: t.TempDir(), reads: newEtcReads(20 * time.Millisecond)}
	if err := os.Mkdir(filepath.Join(h.Etc, "qemu-server"), 0o700); err != nil {
		t.Fatal(err)
	}
	fifo := h.ConfigPath(110)
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for range maxReads + 3 {
		if _, err := h.Config(110); !errors.Is(err, ErrHung) {
			t.Fatalf("error is %v", err)
		}
	}
	if n := len(h.reads.slots); n != maxReads {
		t.Errorf("%d reads hang", n)
	}
	if _, err := h.Config(111); !errors.Is(err, ErrHung) || errors.Is(err, ErrNotFound) || errors.Is(err, ErrNoHost) {
		t.Errorf("another VM: %v", err)
	}
	end := func() bool { return len(h.reads.slots) == 0 }
	for deadline := time.Now().Add(time.Minute); !end(); time.Sleep(time.Millisecond) {
		f, err := os.OpenFile(fifo, os.O_WRONLY|syscall.O_NONBLOCK, 0)
		if err == nil {
			_ = f.Close()
		}
		if time.Now().After(deadline) {
			t.Fatal("the reads do not end")
		}
	}
	h.reads.patience = time.Minute
	if err := os.Remove(fifo); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Config(110); !errors.Is(err, ErrNotFound) {
		t.Errorf("error is %v", err)
	}
	if err := os.WriteFile(fifo, []byte("name: web\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if c, err := h.Config(110); err != nil || c.Name() != "web" {
		t.Errorf("%+v, %v", c, err)
	}
}

// TestFlocked: who waits for a lock has none, and neither has another file of that number.
func TestFlocked(t *testing.T) {
	t.Parallel()
	const text = `1: FLOCK  ADVISORY  WRITE 708 00:19:1153 0 EOF
1: -> FLOCK  ADVISORY  WRITE 709 00:19:1154 0 EOF
2: POSIX  ADVISORY  WRITE 700 00:19:1155 0 EOF
3: FLOCK  ADVISORY  READ 700 fd:00:1156 0 EOF
`
	const dev = 0x19
	for inode, want := range map[uint64]bool{1153: true, 1154: false, 1155: false, 1156: false, 115: false} {
		if got := flocked(text, dev, inode); got != want {
			t.Errorf("inode %d: %t", inode, got)
		}
	}
}
