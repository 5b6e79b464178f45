package repo_test

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/chain/repo/repotest"
)

// TestMergedChecked has records name the image that has taken in another one, and all else stay as it is.
func TestMergedChecked(t *testing.T) {
	t.Parallel()
	const base, child, other = chain.ID("20261120T101523Z-0001"), chain.ID("20261120T111523Z-0002"), chain.ID("20261120T121523Z-0003")
	at := func(minutes int) time.Time { return checkedAt.Add(time.Duration(minutes) * time.Minute) }
	image := func(id chain.ID, disk string) chain.ImageRef {
		return chain.ImageRef{Point: id, UUID: "uuid of " + string(id), Disk: disk}
	}
	disk := func(name string, images ...chain.ImageRef) repo.DamagedDisk {
		return repo.DamagedDisk{Name: name, Images: images}
	}
	bad := func(minutes int, id chain.ID, disks ...repo.DamagedDisk) repo.Verified {
		return repo.Verified{Point: id, Time: at(minutes), Deep: true, Why: "bad", Disks: disks}
	}
	good := func(minutes int, id chain.ID) repo.Verified {
		return repo.Verified{Point: id, Time: at(minutes), Deep: true, Good: true}
	}
	from, to := image(base, "scsi0"), image(child, "sata0") // the disk has another name since
	for name, test := range map[string]struct{ found, want []repo.Verified }{
		"nothing": {nil, nil},
		"of the base, of one of two disks": {
			[]repo.Verified{bad(0, base, disk("scsi0", from), disk("scsi1", image(base, "scsi1")))},
			[]repo.Verified{bad(0, base, disk("scsi0", to), disk("scsi1", image(base, "scsi1")))},
		},
		"of the base, by an image below": {
			[]repo.Verified{bad(0, base, disk("scsi0", image(other, "scsi0")))},
			[]repo.Verified{bad(0, base, disk("scsi0", image(other, "scsi0"), to))},
		},
		"of points above": {
			[]repo.Verified{bad(0, child, disk("sata0", from, to)), bad(0, other, disk("scsi0", from, image(other, "scsi0")))},
			[]repo.Verified{bad(0, child, disk("sata0", to)), bad(0, other, disk("scsi0", image(other, "scsi0"), to))},
		},
		"of all of the base": {[]repo.Verified{bad(0, base)}, []repo.Verified{bad(0, base), bad(0, base, disk("scsi0", to))}},
		"of others":          {[]repo.Verified{bad(0, other), bad(0, child, disk("scsi0", image(base, "scsi1")))}, nil},
		"good since":         {[]repo.Verified{bad(0, other, disk("scsi0", from)), good(1, base)}, nil},
		"good before": {
			[]repo.Verified{bad(1, other, disk("scsi0", from)), good(0, base)},
			[]repo.Verified{bad(1, other, disk("scsi0", to)), good(0, base)},
		},
	} {
		g, err := repotest.New(t, t.TempDir()).Guest("110")
		if err != nil {
			t.Fatal(err)
		}
		text, err := json.Marshal(repo.Checked{Format: 1, Verified: test.found})
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(g.Dir, ".checked.json")
		if err := errors.Join(os.Mkdir(g.Dir, 0o700), os.WriteFile(path, text, 0o600)); err != nil {
			t.Fatal(err)
		}
		want, writes := test.want, 1
		if want == nil {
			want, writes = test.found, 0
		}
		for range 2 { // as after a crash
			before := stat(t, path)
			if err := g.MergedChecked(t.Context(), from, to); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			if written := !os.SameFile(before, stat(t, path)); written != (writes > 0) {
				t.Errorf("%s: written: %v", name, written)
			}
			writes--
			c, err := g.Checked()
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, c.Verified); diff != "" {
				t.Errorf("%s (-want +got):\n%s", name, diff)
			}
		}
	}
}

func stat(t *testing.T, path string) os.FileInfo {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info
}

// The file is made by no merge, and is not read over where it can't be understood.
func TestMergedCheckedFile(t *testing.T) {
	t.Parallel()
	g := checkedGuest(t)
	from, to := g.Points[0].Ref("scsi0"), g.Points[1].Ref("scsi0")
	files := func() (names []string) {
		t.Helper()
		found, err := filepath.Glob(filepath.Join(g.Dir, ".checked*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range found {
			names = append(names, filepath.Base(path))
		}
		return names
	}
	if err := g.MergedChecked(t.Context(), from, to); err != nil || len(files()) > 0 {
		t.Errorf("%v, and there are %v", err, files())
	}
	found := repo.Verified{Point: from.Point, Time: checkedAt, Why: "scsi0", Disks: []repo.DamagedDisk{{Name: "scsi0", Images: []chain.ImageRef{from}}}}
	if err := g.NoteChecked(t.Context(), repo.Checked{Verified: []repo.Verified{found}}); err != nil {
		t.Fatal(err)
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if err := g.MergedChecked(cancelled, from, to); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if err := g.MergedChecked(t.Context(), from, to); err != nil {
		t.Fatal(err)
	}
	found.Disks[0].Images[0] = to
	wantChecked(t, g.Guest, repo.Checked{Verified: []repo.Verified{found}, Drilled: []repo.Drilled{}})
	path := filepath.Join(g.Dir, ".checked.json")
	if err := os.WriteFile(path, []byte("?"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := g.MergedChecked(t.Context(), from, to); !errors.Is(err, chain.ErrDamaged) {
		t.Errorf("a record that is damaged: %v", err)
	}
	if text, err := os.ReadFile(path); err != nil || string(text) != "?" {
		t.Errorf("%q, %v", text, err)
	}
}
