package backup_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"qmchain/backup"
	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/internal/testenv"
)

// guard notes what it is asked for, and fails where it is told to.
type guard struct {
	calls []string
	peer  backup.Peer
	fail  string
	files []backup.File
}

func (g *guard) call(name string) error {
	g.calls = append(g.calls, name)
	if name == g.fail {
		return errors.New("made-up failure to " + name)
	}
	return nil
}

func (g *guard) Check(p backup.Peer) error {
	g.peer = p
	return g.call("check")
}

func (g *guard) Take(context.Context) (func(context.Context) error, error) {
	if err := g.call("take"); err != nil {
		return nil, err
	}
	return func(ctx context.Context) error {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return g.call("release")
	}, nil
}

func (g *guard) Files(context.Context) ([]backup.File, []string, error) {
	return g.files, []string{"a made-up warning"}, g.call("files")
}

// TestGuard: the guest is known before anything is changed, held from there on, and given back whatever happens.
func TestGuard(t *testing.T) {
	t.Parallel()
	r := newRig(t, testenv.Host(t), testenv.Throttle)
	r.write(10)
	run := func(g *guard, change func(*backup.Config)) (*backup.Result, error) {
		return r.runWith(func(c *backup.Config) {
			c.Guard = g
			if change != nil {
				change(c)
			}
		})
	}
	file := backup.File{Name: "110.conf", Data: []byte("name: web\n")}
	g := &guard{files: []backup.File{file}}
	result, err := run(g, nil)
	if err != nil || !slices.Equal(g.calls, []string{"check", "take", "files", "release"}) {
		t.Fatalf("%v, %v", err, g.calls)
	}
	if g.peer.PID != r.vm.Pid() || g.peer.Guest.UUID != r.vm.Config().UUID {
		t.Errorf("peer %+v", g.peer)
	}
	if !slices.Equal(result.Warnings, []string{"a made-up warning"}) {
		t.Errorf("warnings %q", result.Warnings)
	}
	data, err := os.ReadFile(filepath.Join(r.repo, result.Point.Guest.Name, string(result.Point.ID), repo.GuestFilesFolder, file.Name))
	if err != nil || string(data) != string(file.Data) {
		t.Errorf("%q, %v", data, err)
	}

	for fail, want := range map[string][]string{
		"check": {"check"}, "take": {"check", "take"}, "files": {"check", "take", "files", "release"},
	} {
		g := &guard{fail: fail}
		if _, err := run(g, nil); err == nil || !strings.Contains(err.Error(), "made-up failure") || !slices.Equal(g.calls, want) {
			t.Errorf("failure to %s: %v, %v", fail, err, g.calls)
		}
	}
	g = &guard{fail: "release"}
	if result, err := run(g, nil); err != nil || !strings.Contains(strings.Join(result.Warnings, " "), "is not given back") {
		t.Errorf("failure to release: %v", err)
	}
	g = &guard{files: []backup.File{{Name: "../110.conf"}}}
	if _, err := run(g, nil); err == nil || g.calls[len(g.calls)-1] != "release" {
		t.Errorf("a file outside: %v, %v", err, g.calls)
	}
	g = &guard{}
	if _, err := run(g, func(c *backup.Config) { c.Disks = []string{"scsi9"} }); !errors.Is(err, backup.ErrNotFound) || g.calls[len(g.calls)-1] != "release" {
		t.Errorf("an unknown disk: %v, %v", err, g.calls)
	}
	if _, err := run(&guard{}, func(c *backup.Config) { c.Skip = map[string]string{"scsi0": "left out", "none": "not there"} }); err != nil {
		t.Error(err)
	}
	r.run(chain.Inc)

	// A stopped guest is taken before its images are opened.
	r.vm.Quit()
	g = &guard{fail: "take"}
	offline := func(c *backup.Config) {
		c.Addr, c.Guard = "", g
		for _, d := range r.vm.Config().Disks {
			d = r.vm.Disk(d.ID)
			c.Offline = append(c.Offline, backup.OfflineImage{Disk: d.ID, Format: d.Format, Path: d.Path})
		}
	}
	if _, err := r.runWith(offline); err == nil || !slices.Equal(g.calls, []string{"take"}) {
		t.Errorf("%v, %v", err, g.calls)
	}
	g = &guard{}
	if _, err := r.runWith(offline); err != nil || !slices.Equal(g.calls, []string{"take", "files", "release"}) {
		t.Errorf("%v, %v", err, g.calls)
	}
	g = &guard{}
	if _, err := r.runWith(func(c *backup.Config) {
		offline(c)
		c.Identity = chain.GuestIdentity{UUID: "another"}
	}); !errors.Is(err, backup.ErrOtherGuest) || g.calls[len(g.calls)-1] != "release" {
		t.Errorf("another guest: %v, %v", err, g.calls)
	}
}
