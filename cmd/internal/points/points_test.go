package points

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"qmchain/chain"
	"qmchain/chain/foreign/foreigntest"
	"qmchain/chain/image"
	"qmchain/chain/repo"
	"qmchain/chain/repo/repotest"
	"qmchain/cmd/internal/cli"
	"qmchain/internal/ui"
)

// sample makes a repository with the guests 110, of one point, and webserver, of two.
func sample(t *testing.T) (dir string, ids []string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "repository")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	r := repotest.New(t, dir)
	repotest.NewGuest(t, r, "110", time.Date(2026, 11, 20, 10, 0, 0, 0, time.UTC)).Add(repotest.Disk{Name: "scsi0", Size: 1 << 20})
	g := repotest.NewGuest(t, r, "webserver", time.Date(2026, 11, 21, 10, 0, 0, 0, time.UTC))
	for range 2 {
		m := g.Add(repotest.Disk{Name: "scsi0", Size: 1 << 20}, repotest.Disk{Name: "virtio1", Size: 1 << 20})
		ids = append(ids, string(m.ID))
	}
	return dir, ids
}

func TestOpen(t *testing.T) {
	t.Parallel()
	dir, ids := sample(t)
	p, err := Open(dir, "webserver/latest", image.PoolOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if p.Name() != "webserver/"+ids[1] {
		t.Error(p.Name())
	}
	names, err := p.Choose(nil)
	if err != nil || strings.Join(names, " ") != "scsi0 virtio1" {
		t.Errorf("%q, %v", names, err)
	}
	disks, closeAll, err := p.OpenDisks(names)
	if err != nil {
		t.Fatal(err)
	}
	defer closeAll()
	if len(disks) != 2 || disks[1].Name != "virtio1" || disks[1].Size() != 1<<20 {
		t.Errorf("%v", disks)
	}
	if _, err := p.Choose([]string{"scsi0", "scsi0"}); ui.ExitCode(err) != ui.ExitUsage {
		t.Errorf("a disk that is given twice: %v", err)
	}
	if _, err := p.Choose([]string{"scis0"}); !errors.Is(err, chain.ErrNoPoint) || ui.HintOf(err) != "did you mean scsi0?" {
		t.Errorf("a misspelt disk: %v, %q", err, ui.HintOf(err))
	}
}

// Who misspells a name is asked whether he means another.
func TestMeant(t *testing.T) {
	t.Parallel()
	dir, ids := sample(t)
	parent := filepath.Dir(dir)
	for _, c := range []struct {
		dir, name string
		is        error
		hint      string
	}{
		{dir, "webservr/latest", chain.ErrNoPoint, "did you mean webserver?"},
		{dir, "111/latest", chain.ErrNoPoint, "did you mean 110?"},
		{dir, "mail/latest", chain.ErrNoPoint, "there is 110, webserver"},
		{dir, "webserver/lates", chain.ErrNoPoint, "did you mean latest?"},
		{dir, "webserver/" + ids[0][:len(ids[0])-1] + "!", chain.ErrNoPoint, "did you mean " + ids[0] + "?"},
		{dir, "webserver/1999", chain.ErrNoPoint, ""},
		{dir, "webserver", nil, "webserver/latest is the newest point of guest webserver"},
		{filepath.Join(parent, "repositry"), "110/latest", os.ErrNotExist, "did you mean " + dir + "?"},
		{filepath.Join(parent, "elsewhere"), "110/latest", os.ErrNotExist, "is the share mounted?"},
		{parent, "110/latest", repo.ErrNotRepository, "did you mean " + dir + "?"},
		{filepath.Join(dir, "110"), "110/latest", repo.ErrNotRepository, "did you mean " + dir + "?"},
		{filepath.Join(dir, "webserver", ids[0]), "110/latest", repo.ErrNotRepository, "did you mean " + dir + "?"},
		{t.TempDir(), "110/latest", repo.ErrNotRepository, ""},
	} {
		_, err := Open(c.dir, c.name, image.PoolOptions{})
		if err == nil || c.is != nil && !errors.Is(err, c.is) || ui.HintOf(err) != c.hint {
			t.Errorf("%s in %s: %v, %q, want %q", c.name, c.dir, err, ui.HintOf(err), c.hint)
		}
	}
}

// Sets of others are often in a folder for each guest.
func TestMeantForeign(t *testing.T) {
	t.Parallel()
	dir := foreigntest.Unpack(t, "virtnbdbackup/v1-chain/")
	parent := filepath.Join(dir, "virtnbdbackup")
	_, err := OpenSet(parent)
	if want := "did you mean " + filepath.Join(parent, "v1-chain") + "?"; ui.HintOf(err) != want {
		t.Errorf("%v: %q, want %q", err, ui.HintOf(err), want)
	}
}

// A point that can't be read is not passed over for the one before it.
func TestUnreadable(t *testing.T) {
	t.Parallel()
	dir, ids := sample(t)
	if err := os.Truncate(filepath.Join(dir, "webserver", ids[1], chain.ManifestFile), 10); err != nil {
		t.Fatal(err)
	}
	for name, readable := range map[string]bool{"latest": false, ids[1]: false, "2026": false, ids[0]: true} {
		p, err := Open(dir, "webserver/"+name, image.PoolOptions{})
		if (err == nil) != readable || !readable && !errors.Is(err, chain.ErrDamaged) {
			t.Errorf("%s: %v", name, err)
		}
		if err == nil {
			_ = p.Close()
		}
	}
}

func TestSources(t *testing.T) {
	t.Parallel()
	dir, ids := sample(t)
	sources := Sources()
	offered := func(kind, word string, args ...string) string {
		var words []string
		for _, o := range sources[kind](cli.NewLine(dir, word, args...)) {
			words = append(words, o.Word)
		}
		return strings.Join(words, " ")
	}
	for _, c := range []struct {
		kind, word string
		args       []string
		want       string
	}{
		{"guest", "", nil, "110 webserver"},
		{"guest|point", "webserver/", nil, "webserver/latest webserver/" + ids[0] + " webserver/" + ids[1]},
		{"point", "", nil, "110/ webserver/"},
		{"point", "w", nil, "webserver/latest webserver/" + ids[0] + " webserver/" + ids[1]},
		{"point", "mail/", nil, ""},
		{"point", "../x/", nil, ""},
		{"id", "", []string{"webserver"}, "latest " + ids[0] + " " + ids[1]},
		{"id", "", nil, ""},
		{"d", "", []string{"webserver/latest"}, "scsi0 virtio1"},
		{"d", "", []string{"webserver/" + ids[0]}, "scsi0 virtio1"},
		{"d", "", []string{"webserver/" + ids[0] + ":/etc"}, "scsi0 virtio1"},
		{"d", "", []string{"webserver/2026"}, ""}, // which of both?
		{"d", "", []string{"110"}, "scsi0"},
		{"d", "", []string{"mail"}, ""},
		{"d", "", nil, ""},
	} {
		if got := offered(c.kind, c.word, c.args...); got != c.want {
			t.Errorf("%s %q %q: %q, want %q", c.kind, c.word, c.args, got, c.want)
		}
	}
	dir = filepath.Join(foreigntest.Unpack(t, "virtnbdbackup/v1-chain/"), "virtnbdbackup", "v1-chain")
	if got := offered("point", ""); !strings.HasPrefix(got, "lab-v1-chain/latest lab-v1-chain/2") {
		t.Errorf("of others' backups: %q", got)
	}
	if got := offered("d", "", "lab-v1-chain/latest"); got != "sda vda" {
		t.Errorf("of others' backups: disks %q", got)
	}
	for _, dir = range []string{"", t.TempDir(), "/dev/null"} {
		if got := offered("point", ""); got != "" {
			t.Errorf("%q: %q", dir, got)
		}
	}
}
