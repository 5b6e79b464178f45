package repo

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"qmchain/chain"
	"qmchain/internal/durable"
)

// An incoming point's images go with it, and those of a base under the same id do not.
func TestIncomingAborted(t *testing.T) {
	t.Parallel()
	g := testGuest(t, durable.FS{})
	l := lock(t, g)
	p, m := point(t, g, first)
	if err := p.Commit(l, "", m); err != nil {
		t.Fatal(err)
	}
	if err := g.Hide(first); err != nil {
		t.Fatal(err)
	}
	if _, err := g.BeginIncoming(Folder{ID: first, Name: string(first)}, NewUUID()); !errors.Is(err, ErrTaken) {
		t.Errorf("over a base: %v", err)
	}
	if err := os.Mkdir(g.partialDir(first), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := g.RemovePartial(first); err != nil || exists(g.partialDir(first)) || !exists(g.ImagePath(first, "scsi0")) {
		t.Errorf("a base's image was removed, or not the folder: %v", err)
	}
	in, err := g.BeginIncoming(Folder{ID: second, Name: string(second)}, NewUUID())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := in.CreateImage(t.Context(), "scsi0", 1<<20, nil, ImageOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := in.Abort(); err != nil || exists(g.ImagePath(second, "scsi0")) || exists(in.Dir) {
		t.Errorf("something is left: %v", err)
	}
	// What is cut off goes with the next one; what a run has left stays.
	if in, err = g.BeginIncoming(Folder{ID: second, Name: string(second)}, NewUUID()); err != nil {
		t.Fatal(err)
	}
	const third chain.ID = "20261120T140000Z-0003"
	if _, err := g.Begin(third); err != nil {
		t.Fatal(err)
	}
	if err := g.RemoveIncoming(); err != nil || exists(in.Dir) || !exists(g.partialDir(third)) {
		t.Errorf("%v", err)
	}
}

// Whatever step of its making fails, no folder is left.
func TestBeginIncomingFails(t *testing.T) {
	t.Parallel()
	for failAt := 1; ; failAt++ {
		steps, armed := 0, false
		g := testGuest(t, durable.FS{Before: func(string, string) error {
			if armed {
				steps++
			}
			if armed && steps == failAt {
				return syscall.ENOSPC
			}
			return nil
		}})
		lock(t, g)
		armed = true
		_, err := g.BeginIncoming(Folder{ID: first, Name: string(first)}, NewUUID())
		if steps < failAt {
			if err != nil || steps < 5 {
				t.Errorf("%d steps: %v", steps, err)
			}
			return
		}
		if partials, listErr := g.Partials(); !errors.Is(err, syscall.ENOSPC) || len(partials) > 0 || listErr != nil {
			t.Errorf("step %d: %v; left %v, %v", failAt, err, partials, listErr)
		}
	}
}

func TestHold(t *testing.T) {
	t.Parallel()
	g := testGuest(t, durable.FS{})
	l := lock(t, g)
	p, m := point(t, g, first)
	if err := p.Commit(l, "", m); err != nil {
		t.Fatal(err)
	}
	folder := FolderOf(m)
	release, err := g.Hold(t.Context(), folder, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := g.Claim(folder); !errors.Is(err, ErrLocked) {
		t.Errorf("claimed: %v", err)
	}
	// Removed, but held all the same.
	if err := g.Hide(first); err != nil {
		t.Fatal(err)
	}
	base := FolderOf(&chain.Manifest{ID: first, Base: true})
	if _, err := g.Claim(base); !errors.Is(err, ErrLocked) {
		t.Errorf("claimed as a base: %v", err)
	}
	if _, err := g.Hold(t.Context(), folder, 0); !errors.Is(err, chain.ErrNoPoint) {
		t.Errorf("held what is gone: %v", err)
	}
	release()
	claim, err := g.Claim(base)
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if _, err := g.Hold(t.Context(), base, 100*time.Millisecond); !errors.Is(err, ErrLocked) || time.Since(began) < 100*time.Millisecond {
		t.Errorf("held though it was claimed: %v", err)
	}
	time.AfterFunc(50*time.Millisecond, claim)
	if release, err = g.Hold(t.Context(), base, 20*time.Second); err != nil {
		t.Fatal(err)
	}
	release()
	if err := os.Remove(filepath.Join(g.FolderDir(base), readLockFile)); err != nil {
		t.Fatal(err)
	}
	if release, err = g.Hold(t.Context(), base, 0); err != nil {
		t.Errorf("without a lock file: %v", err)
	} else {
		release()
	}
}

// Zeroes become holes, wherever they are, and all else is written.
func TestWriteSparse(t *testing.T) {
	t.Parallel()
	for what, p := range map[string][]byte{
		"nothing":           {},
		"a byte":            {1},
		"a zero":            {0},
		"zeroes":            make([]byte, 5*holeSize+3),
		"data":              bytes.Repeat([]byte{7}, 5*holeSize+3),
		"a hole":            append(append(bytes.Repeat([]byte{7}, holeSize), make([]byte, 2*holeSize)...), 9),
		"data in the midst": append(append(make([]byte, 3*holeSize), bytes.Repeat([]byte{7}, 2*holeSize)...), make([]byte, 3*holeSize)...),
		"two holes":         append(append(make([]byte, holeSize), bytes.Repeat([]byte{7}, 100)...), make([]byte, 3*holeSize)...),
	} {
		f, err := os.Create(filepath.Join(t.TempDir(), "f"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		const off = 12345
		if err := errors.Join(writeSparse(f, p, off), f.Truncate(off+int64(len(p)))); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(p))
		if err := readBlock(f, got, off); err != nil || !bytes.Equal(got, p) {
			t.Errorf("%s: other content, %v", what, err)
		}
		var st syscall.Stat_t
		if err := syscall.Fstat(int(f.Fd()), &st); err != nil {
			t.Fatal(err)
		}
		if what == "zeroes" && st.Blocks > 0 {
			t.Errorf("%d blocks of zeroes", st.Blocks)
		}
	}
}

func TestCheckGuestFile(t *testing.T) {
	t.Parallel()
	for name, ok := range map[string]bool{
		"110.conf": true, "a b.config": true, "ä": true, strings.Repeat("x", 200): true,
		"": false, ".": false, "..": false, ".x": false, "a/b": false, "a\nb": false, "a\x00": false, "\xff": false, strings.Repeat("x", 201): false,
	} {
		if err := CheckGuestFile(name); (err == nil) != ok {
			t.Errorf("%q: %v", name, err)
		}
	}
}
