package stream

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/chain/repo/repotest"
	"qmchain/internal/durable"
)

// small has two points of one disk.
func small(t repotest.TB, dir string) *repotest.Guest {
	g := repotest.NewGuest(t, repotest.New(t, dir), "110", start)
	g.SetFiles(map[string][]byte{"110.conf": []byte("memory: 512\n")})
	for i := range byte(2) {
		g.Add(repotest.Disk{Name: "scsi0", Size: 1 << 20, Write: []repotest.Write{{Off: int64(i) << 16, Len: 3 << 16, Fill: 7 + i}}})
	}
	return g
}

// file is a file of an archive.
type file struct {
	tar.Header
	data []byte
}

func unpack(t testing.TB, stream []byte) (files []file) {
	t.Helper()
	for r := tar.NewReader(bytes.NewReader(stream)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, file{*h, data})
	}
}

func pack(t testing.TB, files []file) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		h := f.Header
		h.Format = tar.FormatUnknown
		if h.Size == 0 || h.Typeflag == tar.TypeReg {
			h.Size = int64(len(f.data))
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(f.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// edit changes a manifest and seals it anew.
func edit(t testing.TB, f *file, change func(*chain.Manifest)) {
	t.Helper()
	m, err := chain.DecodeManifest(f.data)
	if err != nil {
		t.Fatal(err)
	}
	change(m)
	if f.data, err = m.Encode(); err != nil {
		t.Fatal(err)
	}
}

// outside makes a folder for a repository, and a function that fails if anything beside it has changed.
func outside(t testing.TB) (dir string, same func()) {
	t.Helper()
	top := t.TempDir()
	dir = filepath.Join(top, "a", "repo")
	if err := errors.Join(os.MkdirAll(dir, 0o700), os.WriteFile(filepath.Join(top, "precious"), []byte("x"), 0o600)); err != nil {
		t.Fatal(err)
	}
	return dir, func() {
		t.Helper()
		for d, want := range map[string]string{top: "[a precious]", filepath.Join(top, "a"): "[repo]"} {
			entries, err := os.ReadDir(d)
			var names []string
			for _, e := range entries {
				names = append(names, e.Name())
			}
			if err != nil || fmt.Sprint(names) != want {
				t.Errorf("%s holds %v, %v", d, names, err)
			}
		}
	}
}

// Whatever is done to a stream, it is refused with a clear error, what came before it is whole, nothing else is there, and
// the right stream can be received after it.
func TestHostileStreams(t *testing.T) {
	t.Parallel()
	g := small(t, t.TempDir())
	good := send(t, g.Repo, nil)
	// 0 the head; 1 manifest, 2 sums, 3 110.conf, 4 image; 5 manifest, 6 sums, 7 110.conf, 8 image
	if n := len(unpack(t, good)); n != 9 {
		t.Fatalf("%d files", n)
	}
	remove := func(i int) func([]file) []file {
		return func(f []file) []file { return slices.Delete(f, i, i+1) }
	}
	name := func(i int, from, to string) func([]file) []file {
		return func(f []file) []file {
			f[i].Name = strings.Replace(f[i].Name, from, to, 1)
			return f
		}
	}
	swap := func(i, j int) func([]file) []file {
		return func(f []file) []file {
			f[i], f[j] = f[j], f[i]
			return f
		}
	}
	manifest := func(i int, change func(*chain.Manifest)) func([]file) []file {
		return func(f []file) []file {
			edit(t, &f[i], change)
			return f
		}
	}
	insert := func(i int, h tar.Header, data string) func([]file) []file {
		return func(f []file) []file { return slices.Insert(f, i, file{h, []byte(data)}) }
	}
	text := func(i int, data string) func([]file) []file {
		return func(f []file) []file {
			f[i].data = []byte(data)
			return f
		}
	}
	dir2 := "110/" + string(g.Points[1].ID)
	for what, test := range map[string]struct {
		change func([]file) []file
		whole  int // points that are there then
		err    string
	}{
		"no head":                      {remove(0), 0, "begins with"},
		"the head later":               {swap(0, 1), 0, "begins with"},
		"a head of a newer format":     {text(0, `{"format":2}`), 0, "format 2"},
		"a head that is garbage":       {text(0, `{"format":`), 0, headFile},
		"a negative number of points":  {text(0, `{"format":1,"points":-1}`), 0, "-1 points"},
		"a huge head":                  {text(0, strings.Repeat(" ", maxHead+1)), 0, "more than"},
		"more points than it says":     {text(0, `{"format":1,"points":1}`), 1, "behind its 1 points"},
		"fewer points than it says":    {text(0, `{"format":1,"points":3}`), 2, "1 of its 3 points are missing"},
		"no manifest":                  {remove(1), 0, "instead of a point's point.json"},
		"no second manifest":           {remove(5), 1, "instead of a point's point.json"},
		"no sums":                      {remove(2), 0, "instead of"},
		"no image":                     {remove(4), 0, "instead of"},
		"no last image":                {remove(8), 1, "ends in the middle of"},
		"sums after the image":         {swap(2, 4), 0, "instead of"},
		"the child first":              {func(f []file) []file { return slices.Concat(f[:1], f[5:], f[1:5]) }, 0, "missing"},
		"a guest's file twice":         {func(f []file) []file { return slices.Insert(f, 3, f[3]) }, 0, "out of order"},
		"an image twice":               {func(f []file) []file { return slices.Insert(f, 4, f[4]) }, 1, "instead of a point's"},
		"another point's image":        {func(f []file) []file { f[8].data = f[4].data; return f }, 1, "not those that its check sums are of"},
		"another guest's image":        {name(4, "110/", "111/"), 0, "instead of"},
		"a name with dots":             {name(4, "110/images", "110/../110/images"), 0, "instead of"},
		"an absolute name":             {name(1, "110/", "/110/"), 0, "instead of"},
		"a way out":                    {name(1, "110/", "../"), 0, "instead of"},
		"a guest's name with dots":     {name(1, "110/", "../110/"), 0, "instead of"},
		"a guest's file with dots":     {name(3, "110.conf", ".."), 0, "can't be the name"},
		"a guest's file that leads up": {name(3, "110.conf", "../../x"), 0, "can't be the name"},
		"a guest's file in a folder":   {name(3, "110.conf", "a/b"), 0, "can't be the name"},
		"a hidden file":                {name(3, "110.conf", ".lock"), 0, "can't be the name"},
		"a file with control codes":    {name(3, "110.conf", "a\x1b[2J"), 0, "can't be the name"},
		"a huge file":                  {text(3, strings.Repeat("x", maxGuestFile+1)), 0, "too large"},
		"a symbolic link":              {insert(4, tar.Header{Typeflag: tar.TypeSymlink, Name: "110/images/x", Linkname: "/etc/passwd"}, ""), 0, "no plain file"},
		"a link for the image":         {insert(4, tar.Header{Typeflag: tar.TypeSymlink, Name: "110/images/" + string(g.Points[0].ID) + ".scsi0.qcow2", Linkname: "/etc/passwd"}, ""), 0, "no plain file"},
		"a hard link":                  {insert(4, tar.Header{Typeflag: tar.TypeLink, Name: "x", Linkname: "110/images/x"}, ""), 0, "no plain file"},
		"a folder":                     {insert(1, tar.Header{Typeflag: tar.TypeDir, Name: "110/"}, ""), 0, "no plain file"},
		"a device":                     {insert(4, tar.Header{Typeflag: tar.TypeBlock, Name: "110/images/x", Devmajor: 8}, ""), 0, "no plain file"},
		"a pipe":                       {insert(4, tar.Header{Typeflag: tar.TypeFifo, Name: "110/images/x"}, ""), 0, "no plain file"},
		"a global header":              {insert(1, tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "x", PAXRecords: map[string]string{"path": "y"}}, ""), 0, "no plain file"},
		"attributes":                   {func(f []file) []file { f[4].PAXRecords = map[string]string{"SCHILY.xattr.user.x": "y"}; return f }, 0, "SCHILY"},
		"a long GNU name": {func(f []file) []file {
			f[4].Name = strings.Repeat("x", 300)
			return f
		}, 0, "instead of"},
		"a sealed manifest of another id": {manifest(1, func(m *chain.Manifest) {
			m.ID = "20261120T101524Z-0000"
			m.Disks[0].File = chain.ImageFile(m.ID, "scsi0")
		}), 0, "it is that of"},
		"a manifest of another guest":    {manifest(1, func(m *chain.Manifest) { m.Guest.Name = "111" }), 0, "it is that of"},
		"another image's size":           {manifest(1, func(m *chain.Manifest) { m.Disks[0].Bytes += 512 }), 0, "are of"},
		"an image of exabytes":           {manifest(1, func(m *chain.Manifest) { m.Disks[0].Bytes = 1<<63 - 1 }), 0, "instead of"},
		"another size of the disk":       {manifest(1, func(m *chain.Manifest) { m.Disks[0].VirtualSize += 512 }), 0, "virtual size"},
		"other sums":                     {manifest(1, func(m *chain.Manifest) { m.Disks[0].Sums.SHA256 = strings.Repeat("0", 64) }), 0, "not those of its manifest"},
		"another uuid":                   {manifest(1, func(m *chain.Manifest) { m.UUID = repo.NewUUID() }), 0, "not the image of disk"},
		"a full that is none":            {manifest(5, func(m *chain.Manifest) { m.Disks[0].Level, m.Disks[0].Parent = chain.Full, nil }), 1, "backing file"},
		"a parent that never was":        {manifest(5, func(m *chain.Manifest) { m.Disks[0].Parent.UUID = repo.NewUUID() }), 1, "another point"},
		"a disk that its parent has not": {manifest(5, func(m *chain.Manifest) { m.Disks[0].Parent.Disk = "scsi1" }), 1, "which is missing"},
		"a smaller disk than before":     {manifest(5, func(m *chain.Manifest) { m.Disks[0].VirtualSize = 512 }), 1, "less than"},
		"a merge under way": {manifest(5, func(m *chain.Manifest) {
			r := m.Ref("x")
			m.Disks[0].Merging = &r
		}), 1, "middle of a merge"},
		"a manifest without a seal":       {func(f []file) []file { f[1].data[20] ^= 1; return f }, 0, "damaged"},
		"a manifest that is none":         {text(5, "{}"), 1, "seal"},
		"a changed byte of the image":     {func(f []file) []file { f[8].data[len(f[8].data)-1] ^= 1; return f }, 1, "not those that its check sums are of"},
		"a changed header of the image":   {func(f []file) []file { f[4].data[30] ^= 1; return f }, 0, "not those that its check sums are of"},
		"an image with a file of its own": {otherFile(t), 0, "data file"},
		"sums that are none": {func(f []file) []file {
			f[2].data = bytes.Repeat([]byte("x"), len(f[2].data))
			return f
		}, 0, "not those of its manifest"},
		"one more file":  {insert(9, tar.Header{Typeflag: tar.TypeReg, Name: "x"}, "y"), 2, "behind its 2 points"},
		"as a base":      {func(f []file) []file { return renamed(f, dir2, "110/.."+dir2[4:]+".base") }, 1, "instead of"},
		"as a partial":   {func(f []file) []file { return renamed(f, dir2, "110/."+dir2[4:]+".partial") }, 1, "instead of"},
		"as no id":       {func(f []file) []file { return renamed(f, dir2, "110/latest") }, 1, "instead of"},
		"as another one": {func(f []file) []file { return renamed(f, dir2, "110/20261120T111524Z-0000") }, 1, "it is that of"},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			bad := pack(t, test.change(unpack(t, good)))
			dir, same := outside(t)
			list, err := receiver(dir, durable.FS{}).Receive(t.Context(), bytes.NewReader(bad))
			if err == nil || !strings.Contains(err.Error(), test.err) || !errors.Is(err, ErrStream) && !errors.Is(err, chain.ErrDamaged) {
				t.Errorf("error %v, want %q", err, test.err)
			}
			same()
			if len(fresh(list)) != test.whole {
				t.Errorf("%d points are said to be there", len(list))
			}
			check(t, dir, g, ids(g)[:test.whole]...)
			if got := receive(t, dir, good); len(got) != 2-test.whole {
				t.Errorf("received %v", got)
			}
			check(t, dir, g, ids(g)...)
		})
	}
}

func renamed(files []file, from, to string) []file {
	for i := range files {
		files[i].Name = strings.Replace(files[i].Name, from, to, 1)
	}
	return files
}

// otherFile makes the first image one whose data is in another file, with everything sealed.
func otherFile(t testing.TB) func([]file) []file {
	return func(f []file) []file {
		img := bytes.Clone(f[4].data)
		img[79] |= 4 // incompatible feature: external data file
		f[4].data = img
		sums, err := repo.ComputeSums(t.Context(), bytes.NewReader(img), int64(len(img)), nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		f[2].data = sums.Text()
		edit(t, &f[1], func(m *chain.Manifest) { m.Disks[0].Sums.SHA256 = fmt.Sprintf("%x", sha256.Sum256(f[2].data)) })
		return f
	}
}

// Archives that archive/tar does not write.
func TestRawHostileStreams(t *testing.T) {
	t.Parallel()
	g := small(t, t.TempDir())
	good := send(t, g.Repo, nil)
	sparse := func() []byte {
		// GNU's sparse format 1.0: a map in front of the data, by which a small file has any size.
		files := unpack(t, good)[:4]
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, f := range files {
			f.Format = tar.FormatUnknown
			if err := errors.Join(w.WriteHeader(&f.Header), second(w.Write(f.data))); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
		record := func(k, v string) string {
			for n := len(k) + len(v) + 3; ; n++ {
				if s := fmt.Sprintf("%d %s=%s\n", n, k, v); len(s) == n {
					return s
				}
			}
		}
		pax := record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0") +
			record("GNU.sparse.name", unpack(t, good)[4].Name) + record("GNU.sparse.realsize", "1099511627776")
		raw := func(name string, kind byte, data string) {
			block := make([]byte, 512)
			copy(block, name)
			copy(block[100:], "0000600\x00")
			copy(block[124:], fmt.Sprintf("%011o\x00", len(data)))
			copy(block[136:], "00000000000\x00")
			block[156] = kind
			copy(block[257:], "ustar\x0000")
			copy(block[148:], "        ")
			sum := 0
			for _, c := range block {
				sum += int(c)
			}
			copy(block[148:], fmt.Sprintf("%06o\x00 ", sum))
			b.Write(block)
			b.WriteString(data)
			b.Write(make([]byte, (512-len(data)%512)%512))
		}
		raw("x", 'x', pax)
		raw("x", '0', "1\n1099511627775\n1\n"+strings.Repeat("\x00", 512-18)+"x")
		return append(b.Bytes(), make([]byte, 1024)...)
	}
	huge := slices.Clone(good[:512])
	for i := range 11 {
		huge[124+i] = '7' // a head of 8 GiB
	}
	for what, test := range map[string]struct {
		stream []byte
		err    string
	}{
		"nothing":                   {nil, "nothing in it"},
		"a text":                    {[]byte(strings.Repeat("Permission denied\n", 100)), "not a whole stream"},
		"a short text":              {[]byte("bash: qmchain-restore: command not found\n"), "not a whole stream"},
		"zeroes":                    {make([]byte, 1<<20), "nothing in it"},
		"a sparse file":             {sparse(), "GNU.sparse"},
		"a size that is not there":  {huge, "not a whole stream"},
		"two streams":               {slices.Concat(good, good), "more behind its end"},
		"garbage behind the end":    {append(slices.Clone(good), 1), "more behind its end"},
		"endless filling":           {slices.Concat(good, make([]byte, 2<<20)), "more behind its end"},
		"a compressed one":          {[]byte("\x28\xb5\x2f\xfd" + string(good[:5000])), "not a whole stream"},
		"headers without their own": {bytes.Repeat([]byte{0xff}, 4096), "not a whole stream"},
	} {
		dir, same := outside(t)
		_, err := receiver(dir, durable.FS{}).Receive(t.Context(), bytes.NewReader(test.stream))
		if !errors.Is(err, ErrStream) || !strings.Contains(err.Error(), test.err) {
			t.Errorf("%s: %v", what, err)
		}
		same()
		if _, err := os.Stat(filepath.Join(dir, "qmchain.json")); (err == nil) != (len(test.stream) >= len(good)) && what != "a sparse file" && what != "zeroes" && what != "endless filling" {
			t.Errorf("%s: a repository was made: %v", what, err)
		}
	}
	// As tar programs fill the last record.
	dir := t.TempDir()
	receive(t, dir, slices.Concat(good, make([]byte, 9216)))
	check(t, dir, g, ids(g)...)
}

func second(_ int, err error) error { return err }

// Cut anywhere, and with any byte changed, whole points are left, or none.
func TestCutAndChanged(t *testing.T) {
	t.Parallel()
	g := small(t, t.TempDir())
	good := send(t, g.Repo, nil)
	var ends []int // of whole points
	files := unpack(t, good)
	pos := 0
	for i, f := range files {
		pos += 512 + (len(f.data)+511)/512*512
		if i == 4 || i == 8 {
			ends = append(ends, pos-(512-len(f.data)%512)%512)
		}
	}
	rnd := rand.New(rand.NewPCG(1, 1))
	dir := t.TempDir() // one for all: what is left never stands in the way
	reset := func() {
		if err := errors.Join(os.RemoveAll(filepath.Join(dir, "110")), os.RemoveAll(filepath.Join(dir, "qmchain.json"))); err != nil {
			t.Fatal(err)
		}
	}
	try := func(what string, stream []byte, most, least int) {
		list, err := receiver(dir, durable.FS{}).Receive(t.Context(), bytes.NewReader(stream))
		if n := len(fresh(list)); n > most || n < least || err == nil && n < 2 {
			t.Errorf("%s: %d points, %v", what, n, err)
		}
		if len(list) > 0 || err == nil {
			check(t, dir, g, fresh(list)...)
		}
		reset()
	}
	for _, n := range append([]int{0, 1, 511, 512, 513, ends[0] - 1, ends[0], ends[0] + 1, ends[1] - 1}, rnd.Perm(len(good))[:8]...) {
		whole := 0
		for _, e := range ends {
			if n >= e {
				whole++
			}
		}
		try(fmt.Sprintf("cut at %d", n), good[:n], whole, whole)
	}
	for range 20 {
		bad := slices.Clone(good)
		at := rnd.IntN(len(bad))
		bad[at] ^= 1 << rnd.IntN(8)
		try(fmt.Sprintf("changed at %d", at), bad, 2, 0)
	}
}

// What is there under the same names is told, and stays.
func TestRefusals(t *testing.T) {
	t.Parallel()
	g := small(t, t.TempDir())
	stream := send(t, g.Repo, nil)
	p := ids(g)
	try := func(dir string, change func(*Receiver)) error {
		r := receiver(dir, durable.FS{})
		if change != nil {
			change(r)
		}
		_, err := r.Receive(t.Context(), bytes.NewReader(stream))
		return err
	}

	// The guest's files of a point decide nothing, another point of the same id does.
	dir := t.TempDir()
	receive(t, dir, stream)
	there := guestOf(t, dir)
	reseal := func(change func(*chain.Manifest)) {
		if err := there.Rewrite(repo.Folder{ID: p[1], Name: string(p[1])}, func(m *chain.Manifest) error { change(m); return nil }); err != nil {
			t.Fatal(err)
		}
	}
	uuid := g.Points[1].UUID
	reseal(func(m *chain.Manifest) { m.Protected, m.Note = true, "mine" })
	if err := try(dir, nil); err != nil {
		t.Error(err)
	}
	reseal(func(m *chain.Manifest) { m.UUID = repo.NewUUID() })
	for _, adopt := range []bool{false, true} {
		if err := try(dir, func(r *Receiver) { r.Adopt = adopt }); !errors.Is(err, ErrOtherPoint) {
			t.Errorf("another point: %v", err)
		}
	}
	if err := sendErr(t.Context(), g.Repo, io.Discard, have(t, dir)); !errors.Is(err, ErrOtherPoint) {
		t.Errorf("the sender goes on: %v", err)
	}
	reseal(func(m *chain.Manifest) { m.UUID = uuid; m.Disks[0].Sums.SHA256 = strings.Repeat("0", 64) })
	if err := try(dir, nil); !errors.Is(err, ErrOtherPoint) {
		t.Errorf("another image: %v", err)
	}
	// One that can't be read has its id all the same.
	repotest.Flip(t, filepath.Join(there.PointDir(p[1]), chain.ManifestFile), 100)
	if err := try(dir, nil); !errors.Is(err, repo.ErrTaken) {
		t.Errorf("an unreadable point: %v", err)
	}

	// Another guest of this name.
	dir = t.TempDir()
	other := repotest.NewGuest(t, open(t, dir, durable.FS{}), "110", start.Add(-time.Hour))
	theirs := other.Add(repotest.Disk{Name: "scsi0", Size: 1 << 20})
	err := other.Rewrite(repo.FolderOf(theirs), func(m *chain.Manifest) error { m.Guest.UUID = "other"; return nil })
	if err != nil {
		t.Fatal(err)
	}
	if err := try(dir, nil); !errors.Is(err, repo.ErrOtherGuest) {
		t.Errorf("another guest: %v", err)
	}
	check(t, dir, other, theirs.ID)
	if err := try(dir, func(r *Receiver) { r.Adopt = true }); err != nil {
		t.Error(err)
	}
	if err := try(dir, nil); err != nil { // what both have proves it
		t.Error(err)
	}

	// Locks.
	dir = t.TempDir()
	receive(t, dir, send(t, g.Repo, nil, string(p[0])))
	there = guestOf(t, dir)
	for what, take := range map[string]func(context.Context, time.Duration) (*repo.Lock, error){"a run": there.Lock, "a prune": there.LockPrune} {
		lock, err := take(t.Context(), 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := try(dir, func(r *Receiver) { r.LockWait = 0 }); !errors.Is(err, repo.ErrLocked) {
			t.Errorf("during %s: %v", what, err)
		}
		lock.Unlock()
	}
	// What a killed run has left is its; what a killed transfer has left goes.
	for id, mark := range map[chain.ID]string{"20261120T090000Z-0000": "", "20261120T090000Z-0001": ".incoming"} {
		partial := filepath.Join(there.Dir, "."+string(id)+".partial")
		if err := errors.Join(os.Mkdir(partial, 0o700), os.WriteFile(there.ImagePath(id, "x"), nil, 0o600)); err != nil {
			t.Fatal(err)
		}
		if mark != "" {
			if err := os.WriteFile(filepath.Join(partial, mark), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	// A file that nobody knows of is not written over.
	stray := there.ImagePath(p[1], "scsi0")
	if err := os.WriteFile(stray, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/passwd", filepath.Join(there.Dir, "x")); err != nil {
		t.Fatal(err)
	}
	// BeginIncoming takes it for what a killed transfer has left, as the point is not there.
	if err := try(dir, nil); err != nil {
		t.Error(err)
	}
	partials, err := there.Partials()
	if err != nil || len(partials) != 1 || partials[0] != "20261120T090000Z-0000" {
		t.Errorf("partials %v, %v", partials, err)
	}
	if err := there.RemovePartial(partials[0]); err != nil {
		t.Error(err)
	}
	check(t, dir, g, p...)
}

// A file that is not a repository's is no place for one.
func TestNoRepository(t *testing.T) {
	t.Parallel()
	stream := send(t, small(t, t.TempDir()).Repo, nil)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "thesis"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := receiver(dir, durable.FS{}).Receive(t.Context(), bytes.NewReader(stream)); !errors.Is(err, repo.ErrNotRepository) {
		t.Error(err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("%v", entries)
	}
}

// Whatever step fails, or is the last one before death, there are whole points, and the same stream again makes them all.
func TestEveryStep(t *testing.T) {
	t.Parallel()
	g := small(t, t.TempDir())
	if err := g.Hide(g.Points[0].ID); err != nil { // a base is one of them
		t.Fatal(err)
	}
	stream := send(t, g.Repo, nil)
	for _, dead := range []bool{false, true} {
		t.Run(fmt.Sprintf("dead %v", dead), func(t *testing.T) {
			t.Parallel()
			for failAt := 1; ; failAt++ {
				dir := t.TempDir()
				steps := 0
				last := ""
				fsys := durable.FS{Before: func(op, path string) error {
					if steps++; steps == failAt || dead && steps > failAt {
						if steps == failAt {
							last = op + " " + filepath.Base(path)
						}
						return syscall.EIO
					}
					return nil
				}}
				list, err := receiver(dir, fsys).Receive(t.Context(), bytes.NewReader(stream))
				if steps < failAt {
					if err != nil || steps < 60 {
						t.Errorf("%d steps: %v", steps, err)
					}
					return
				}
				// After a commit's rename nobody needs to know that the sync behind it had to be done twice.
				if !errors.Is(err, syscall.EIO) && (dead || !strings.HasPrefix(last, "syncdir")) {
					t.Errorf("step %d, %s: %v", failAt, last, err)
				}
				if !dead && exists(filepath.Join(dir, "110")) {
					var want []chain.ID
					if n := len(list); n == 2 {
						want = ids(g)[1:]
					}
					check(t, dir, g, want...)
				}
				receive(t, dir, stream)
				check(t, dir, g, ids(g)[1:]...)
				if points, _, _ := guestOf(t, dir).Points(); len(points) != 2 || !points[0].Base {
					t.Errorf("step %d, %s: %d points", failAt, last, len(points))
				}
			}
		})
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}

// When the file system is full nothing is left of the point, and there is room again.
func TestDiskFull(t *testing.T) {
	t.Parallel()
	g := small(t, t.TempDir())
	stream := send(t, g.Repo, nil)
	dir := t.TempDir()
	if err := unix.Mount("qmchain-test", dir, "tmpfs", 0, "size=900k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	list, err := receiver(dir, durable.FS{}).Receive(t.Context(), bytes.NewReader(stream))
	if !errors.Is(err, syscall.ENOSPC) || len(list) != 1 {
		t.Errorf("%v, %v", list, err)
	}
	check(t, dir, g, ids(g)[0])
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT, "size=20m"); err != nil {
		t.Fatal(err)
	}
	receive(t, dir, stream)
	check(t, dir, g, ids(g)...)
}

// A pipe that nothing comes out of, and one that nobody reads, hang nobody who wants to end.
func TestInterrupted(t *testing.T) {
	t.Parallel()
	g := small(t, t.TempDir())
	stream := send(t, g.Repo, nil)
	dir := t.TempDir()
	for _, n := range []int{0, 700, len(stream) / 2, len(stream) - 1500} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(300*time.Millisecond, cancel)
		go func() { _, _ = w.Write(stream[:n]) }()
		began := time.Now()
		if _, err := receiver(dir, durable.FS{}).Receive(ctx, r); !errors.Is(err, context.Canceled) || time.Since(began) > 10*time.Second {
			t.Errorf("after %d bytes: %v", n, err)
		}
		_, _ = w.Close(), r.Close()
		if n > 0 {
			if partials, err := guestOf(t, dir).Partials(); len(partials) > 0 || err != nil {
				t.Errorf("after %d bytes: left %v, %v", n, partials, err)
			}
		}
	}
	receive(t, dir, stream)
	check(t, dir, g, ids(g)...)

	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(300*time.Millisecond, cancel)
	if err := sendErr(ctx, g.Repo, w, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("a pipe that nobody reads: %v", err)
	}
	_ = w.Close()
	_, w, err = os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	r, w2, _ := os.Pipe()
	_ = r.Close()
	if err := sendErr(t.Context(), g.Repo, w2, nil); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("a broken pipe: %v", err)
	}
	_ = w2.Close()
}
