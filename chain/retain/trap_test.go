package retain_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"qmchain/chain"
	"qmchain/chain/image"
	"qmchain/chain/repo"
	"qmchain/chain/repo/repotest"
	"qmchain/chain/retain"
	"qmchain/internal/testenv"
)

// Nothing outside of the repository is removed, whatever links lie in it.
func TestLinksAreNotFollowed(t *testing.T) {
	t.Parallel()
	for _, name := range []string{".x.removed", ".20261120T101523Z-3f9c.removed", ".20261120T101523Z-3f9c.partial", repo.ImagesFolder, ".prune.lock"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := newGuest(t)
			g.Add(repotest.Disk{Name: "scsi0", Size: size})
			g.Add(repotest.Disk{Name: "scsi0", Size: size, Full: true})
			all := g.points()
			outside := t.TempDir()
			precious := filepath.Join(outside, "folder", "20261120T101523Z-3f9c.scsi0.qcow2")
			link := filepath.Join(g.Dir, name)
			to := filepath.Dir(precious)
			switch name {
			case repo.ImagesFolder:
				testenv.Output(t, "mv", g.ImagesDir(), to)
			case ".prune.lock":
				to = filepath.Join(outside, "made")
			default:
				testenv.Output(t, "mkdir", to)
			}
			if name != ".prune.lock" {
				testenv.Output(t, "touch", precious)
			}
			before := testenv.Output(t, "find", outside)
			if err := os.Symlink(to, link); err != nil {
				t.Fatal(err)
			}
			_, _ = g.remove(t.Context(), all[0].ID) // whether it succeeds depends on the link
			ids, err := g.Partials()
			if err != nil {
				t.Error(err)
			}
			for _, id := range ids {
				_ = g.RemovePartial(id)
			}
			if after := testenv.Output(t, "find", outside); after != before {
				t.Errorf("outside there was\n%s, and is\n%s", before, after)
			}
		})
	}
}

// A base's folder beside the point itself, as in a repository that was copied over another state of itself: the images are
// the point's.
func TestPointAndBaseOfOneID(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	g.fill(3)
	for _, m := range g.points() {
		testenv.Output(t, "cp", "-a", g.PointDir(m.ID), filepath.Join(g.Dir, "."+string(m.ID)+".base"))
	}
	if kept := g.points().Kept(); len(kept) != 3 {
		t.Errorf("%d points", len(kept))
	}
	if _, err := g.sweep(); err != nil {
		t.Error(err)
	}
	g.check("swept")
}

// What is damaged already is not merged: nobody could tell afterwards.
func TestDamageIsNotMerged(t *testing.T) {
	t.Parallel()
	const large = 64 << 20
	for what, damage := range map[string]func(base, child string){
		"the child": func(_, child string) {
			info, err := os.Stat(child)
			if err != nil {
				t.Fatal(err)
			}
			repotest.Flip(t, child, info.Size()-1000)
		},
		"what is read together with what is written": func(base, _ string) { repotest.Flip(t, base, 42<<20) },
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			g := newGuest(t)
			g.Add(repotest.Disk{Name: "scsi0", Size: large, Write: []repotest.Write{{Len: large, Fill: 1}}})
			g.Add(repotest.Disk{Name: "scsi0", Write: []repotest.Write{{Off: 40 << 20, Len: 1 << 20, Fill: 2}}})
			all := g.points()
			damage(g.ImagePath(all[0].ID, "scsi0"), g.ImagePath(all[1].ID, "scsi0"))
			left, err := g.remove(t.Context(), all[0].ID)
			if !errors.Is(err, chain.ErrDamaged) || len(left) != 1 {
				t.Errorf("left: %v, %v", left, err)
			}
			if d := g.points().Latest().Disks[0]; d.Level != chain.Inc || d.Generation != 0 {
				t.Errorf("%+v", d)
			}
		})
	}
}

// Another chain that is damaged keeps no chain from being merged.
func TestOneBadChain(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	g.fill(2)
	g.Add(repotest.Disk{Name: "scsi0", Full: true, Size: size}, repotest.Disk{Name: "scsi1", Full: true, Size: size})
	g.Add(repotest.Disk{Name: "scsi0"}, repotest.Disk{Name: "scsi1"})
	all := g.points()
	if err := os.Truncate(g.ImagePath(all[1].ID, "scsi0"), 100000); err != nil {
		t.Fatal(err)
	}
	left, err := g.remove(t.Context(), all[0].ID, all[2].ID)
	if !errors.Is(err, chain.ErrDamaged) || len(left) != 1 || left[0].ID != all[0].ID {
		t.Errorf("left: %v, %v", left, err)
	}
}

// A look at the images that fails, just when it matters which one is there, changes nothing.
func TestHiccupAfterTheRename(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	g.Add(repotest.Disk{Name: "scsi0", Size: size, Write: []repotest.Write{{Len: size, Fill: 1}}})
	g.Add(repotest.Disk{Name: "scsi0", Write: []repotest.Write{{Len: 1 << 20, Fill: 2}}})
	all := g.points()
	child := g.ImagePath(all[1].ID, "scsi0")
	renamed, away := false, false
	g.before = func(op, path string) error {
		switch {
		case op == "rename" && path == child:
			renamed = true
		case renamed && !away && op == "syncdir":
			away = true
			return os.Rename(child, child+".away")
		}
		return nil
	}
	if _, err := g.remove(t.Context(), all[0].ID); err == nil || !away {
		t.Errorf("error is %v, away %t", err, away)
	}
	g.before = nil
	if err := os.Rename(child+".away", child); err != nil {
		t.Fatal(err)
	}
	g.check("there again")
	left, err := g.sweep()
	g.done(left, err, 1)
	g.check("swept")
}

// A merge that was begun and had to wait goes on with whatever child there is then.
func TestWaitingMergeGetsAnotherChild(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	g.Add(repotest.Disk{Name: "scsi0", Size: size, Write: []repotest.Write{{Len: size, Fill: 1}}})
	g.Add(repotest.Disk{Name: "scsi0", Size: 2 * size, Write: []repotest.Write{{Len: 1 << 20, Fill: 2}}})
	g.Add(repotest.Disk{Name: "scsi0", Write: []repotest.Write{{Off: 1 << 20, Len: 1 << 20, Fill: 3}}})
	g.Add(repotest.Disk{Name: "scsi0", Write: []repotest.Write{{Off: 2 << 20, Len: 1 << 20, Fill: 4}}})
	all := g.points()
	reader, err := g.OpenDisk(image.NewPool(image.PoolOptions{}), all, all[3], "scsi0")
	if err != nil {
		t.Fatal(err)
	}
	for i := range 2 {
		if _, err := g.remove(t.Context(), all[i].ID); err != nil {
			t.Fatal(err)
		}
	}
	// That it waits is not what a crash leaves.
	if found, err := retain.Unfinished(g.Guest.Guest); err != nil || len(found) > 0 {
		t.Errorf("unfinished: %q, %v", found, err)
	}
	if err := reader.Close(); err != nil {
		t.Error(err)
	}
	base := g.ImagePath(all[0].ID, "scsi0")
	g.before = func(op, path string) error {
		if op == "sync" && path == base {
			return errDied
		}
		return nil
	}
	if _, err := g.sweep(); !errors.Is(err, errDied) {
		t.Errorf("error is %v", err)
	}
	g.before = nil
	g.check("died")
	left, err := g.sweep()
	g.done(left, err, 2)
	g.check("swept")
}

// Whoever copied the repository by hard links keeps what he has.
func TestHardLinks(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	g.fill(3)
	testenv.Output(t, "cp", "-al", g.ImagesDir(), filepath.Join(t.TempDir(), "copy"))
	left, err := g.remove(t.Context(), g.points()[0].ID)
	if err != nil || len(left) != 1 || !strings.Contains(left[0].Why, "hard link") {
		t.Errorf("left: %v, %v", left, err)
	}
	g.check("with hard links")
}

// A full with compressed clusters under an increment with smaller ones is left as it is: a kill in mid-merge could lose
// data. Under clusters of the same size it is merged.
func TestCompressedFull(t *testing.T) {
	t.Parallel()
	const large = 4 << 20
	raw := make([]byte, large)
	random := rand.New(rand.NewPCG(1, 2))
	for i := range raw {
		if i%8192 < 2600 {
			raw[i] = byte(random.Uint32())
		}
	}
	path := filepath.Join(t.TempDir(), "raw")
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, clusters := range []int64{64 << 10, 4 << 10} {
		g := newGuest(t)
		g.Add(repotest.Disk{Name: "scsi0", Image: path, Compress: true})
		var writes []repotest.Write
		for off := int64(8192); off < large; off += 64 << 10 {
			writes = append(writes, repotest.Write{Off: off, Len: 4096, Fill: 9})
		}
		g.Add(repotest.Disk{Name: "scsi0", ClusterSize: clusters, Write: writes})
		left, err := g.remove(t.Context(), g.points()[0].ID)
		if clusters == 64<<10 {
			g.done(left, err, 1)
		} else if err != nil || len(left) != 1 || !strings.Contains(left[0].Why, "compressed") {
			t.Errorf("left: %v, %v", left, err)
		}
		g.check("compressed")
	}
}

// A manifest of a newer version is read, but not written anew with a loss.
func TestUnknownKeysAreNotLost(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	g.fill(1)
	m := g.points()[0]
	path := filepath.Join(g.PointDir(m.ID), chain.ManifestFile)
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	text = bytes.Replace(text, []byte(`"qemu": `), []byte(`"future": {"a": 1}, "qemu": `), 1)
	const key = `"seal": "sha256:`
	at := bytes.LastIndex(text, []byte(key)) + len(key)
	copy(text[at:], strings.Repeat("0", 64))
	sum := sha256.Sum256(text)
	hex.Encode(text[at:], sum[:])
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	g.check("with a key of the future")
	err = g.Rewrite(repo.FolderOf(m), func(m *chain.Manifest) error { m.Protected = true; return nil })
	if now, readErr := os.ReadFile(path); err == nil || readErr != nil || !bytes.Equal(now, text) {
		t.Errorf("error is %v; %v", err, readErr)
	}
}

// Increments never go on from a point that was removed.
func TestRemovedPointIsNotTracked(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	g.Add(repotest.Disk{Name: "scsi0", Size: size})
	for range 2 {
		g.Add(repotest.Disk{Name: "scsi0", Diff: true, Write: []repotest.Write{{Len: 1 << 20, Fill: 2}}})
	}
	all := g.points()
	if err := g.remover().Remove(all, true, all[0].ID); err != nil {
		t.Fatal(err)
	}
	if layer, why := g.points().Tracked(chain.BitmapName{Point: all[0].ID, Disk: "scsi0"}); layer != nil || !strings.Contains(why, "was removed") {
		t.Errorf("%v, %q", layer, why)
	}
}

// A base can be done with for one disk and stay for another's sake. Nothing is unfinished then.
func TestOneDiskIsDone(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	scsi0 := repotest.Disk{Name: "scsi0", Size: size, Write: []repotest.Write{{Len: 1 << 20, Fill: 1}}}
	scsi1 := repotest.Disk{Name: "scsi1", Size: size, Write: []repotest.Write{{Len: 1 << 20, Fill: 2}}}
	diff := scsi1
	diff.Diff = true
	g.Add(scsi0, scsi1)
	g.Add(scsi0, diff)
	g.Add(scsi0, scsi1)
	left, err := g.remove(t.Context(), g.points()[0].ID)
	if err != nil || len(left) != 1 || !strings.Contains(left[0].Why, "scsi1") {
		t.Errorf("left: %v, %v", left, err)
	}
	if _, err := os.Stat(g.ImagePath(g.points()[0].ID, "scsi0")); err == nil {
		t.Error("scsi0 was not merged")
	}
	if found, err := retain.Unfinished(g.Guest.Guest); err != nil || len(found) > 0 {
		t.Errorf("unfinished: %q, %v", found, err)
	}
	g.check("merged")
}

// What a kill has left of a manifest that was being written is told, and goes with the next sweep.
func TestTemporaryFilesGo(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	g.fill(2)
	if found, err := retain.Unfinished(g.Guest.Guest); err != nil || len(found) > 0 {
		t.Errorf("unfinished: %q, %v", found, err)
	}
	for _, m := range g.points() {
		if err := os.WriteFile(filepath.Join(g.PointDir(m.ID), ".tmp-point.json-123"), []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	found, err := retain.Unfinished(g.Guest.Guest)
	if err != nil || len(found) != 2 || !strings.Contains(found[0], ".tmp-point.json-123") {
		t.Errorf("unfinished: %q, %v", found, err)
	}
	left, err := g.sweep()
	g.done(left, err, 2)
}
