package durable

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// recorder notes all steps, and fails at one of them.
type recorder struct {
	steps  []string
	failAt int
}

func (r *recorder) fs() FS {
	return FS{Before: func(op, path string) error {
		r.steps = append(r.steps, op+" "+filepath.Base(path))
		if len(r.steps) == r.failAt {
			return syscall.ENOSPC
		}
		return nil
	}}
}

func TestWriteFileSyncsBeforeItRenames(t *testing.T) {
	dir := t.TempDir()
	var r recorder
	if err := r.fs().WriteFile(filepath.Join(dir, "f"), []byte("new"), 0o600); err != nil {
		t.Fatal(err)
	}
	want := []string{"create f", "write f", "sync f", "rename f", "syncdir " + filepath.Base(dir)}
	if !slices.Equal(r.steps, want) {
		t.Errorf("steps are %q, not %q", r.steps, want)
	}
	info, err := os.Stat(filepath.Join(dir, "f"))
	if err != nil || info.Mode().Perm() != 0o600 || info.Size() != 3 {
		t.Errorf("%v, %v", info, err)
	}
}

func TestWriteFileFailsWhole(t *testing.T) {
	for failAt := 1; failAt <= 5; failAt++ {
		dir := t.TempDir()
		path := filepath.Join(dir, "f")
		if err := os.WriteFile(path, []byte("old"), 0o600); err != nil {
			t.Fatal(err)
		}
		r := recorder{failAt: failAt}
		if err := r.fs().WriteFile(path, []byte("new"), 0o600); !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("step %d: %v", failAt, err)
		}
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		// Only the last step, the sync of the folder, comes after the change.
		if want := map[bool]string{true: "new", false: "old"}[failAt == 5]; string(text) != want {
			t.Errorf("step %d: the file has %q", failAt, text)
		}
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) != 1 {
			t.Errorf("step %d: left behind: %v, %v", failAt, entries, err)
		}
	}
}

func TestRemoveAllFollowsNoLink(t *testing.T) {
	dir, other := t.TempDir(), t.TempDir()
	keep := filepath.Join(other, "keep")
	if err := os.WriteFile(keep, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	top := filepath.Join(dir, "top")
	if err := os.MkdirAll(filepath.Join(top, "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{
		os.Symlink(other, filepath.Join(top, "link")),
		os.WriteFile(filepath.Join(top, "sub", "f"), nil, 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	var r recorder
	for range 2 { // gone already is no error
		if err := r.fs().RemoveAll(top); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(top); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if _, err := os.Stat(keep); err != nil {
		t.Error(err)
	}
	if text := strings.Join(r.steps, ","); !strings.Contains(text, "remove f") || !strings.Contains(text, "remove link") {
		t.Errorf("steps: %s", text)
	}
}

func TestMkdirIsExclusive(t *testing.T) {
	path := filepath.Join(t.TempDir(), "d")
	if err := (FS{}).Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := (FS{}).Mkdir(path, 0o700); !errors.Is(err, fs.ErrExist) {
		t.Error(err)
	}
}

func TestWriteNewReplacesNothing(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	if err := (FS{}).WriteNew(path, []byte("first"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := (FS{}).WriteNew(path, []byte("second"), 0o600); !errors.Is(err, fs.ErrExist) {
		t.Errorf("error is %v", err)
	}
	for i, move := range moves {
		from, to := filepath.Join(dir, "from"), filepath.Join(dir, "to")
		if err := os.WriteFile(from, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := move(from, path); !errors.Is(err, fs.ErrExist) {
			t.Errorf("way %d: error is %v", i, err)
		}
		if err := move(from, to); err != nil {
			t.Errorf("way %d: %v", i, err)
		}
		if _, err := os.Stat(from); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("way %d: the old name stays: %v", i, err)
		}
		if err := os.Remove(to); err != nil {
			t.Error(err)
		}
	}
	if text, err := os.ReadFile(path); err != nil || string(text) != "first" {
		t.Errorf("%q, %v", text, err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("left: %v, %v", left, err)
	}
}
