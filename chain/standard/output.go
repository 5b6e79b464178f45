package standard

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/dustin/go-humanize"
	"golang.org/x/sys/unix"

	"qmchain/chain"
	"qmchain/chain/export"
	"qmchain/chain/image"
	"qmchain/chain/repo"
	"qmchain/chain/source"
	"qmchain/internal/durable"
)

const (
	stagingFolder = ".qmchain-partial"
	namesFile     = ".qmchain-names"
	lockFile      = ".lock"
)

// output is the folder that the result goes to.
type output struct {
	fs   durable.FS
	dir  string // absolute
	path string // of the staging folder
	made bool   // dir, by us
	lock *os.File
	// names of the files, in the order in which they get their place: what a link leads to before the link.
	names []string
	// need is the most that is written, in bytes; cloned the part of it that sharing blocks with a file of the set saves.
	need, cloned int64
	probe        string // such a file
	open         []*os.File
}

func (j *Job) openOutput(ctx context.Context) error {
	dir, err := filepath.Abs(j.req.Output)
	if err != nil {
		return err
	}
	j.out = &output{fs: j.req.FS, dir: dir, path: filepath.Join(dir, stagingFolder)}
	if err := j.out.find(j.req.Set.Dir()); err != nil {
		return fmt.Errorf("output %s: %w", dir, err)
	}
	if err := j.lockRepository(ctx); err != nil {
		return err
	}
	if err := j.look(); err != nil {
		return err
	}
	if err := j.checkFinished(); err != nil {
		return err
	}
	for _, d := range j.disks {
		switch j.req.Command {
		case Rebase:
			err = j.planRebase(ctx, d)
		case Commit:
			err = j.planCommit(ctx, d)
		default:
			err = j.planSnapshots(ctx, d)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// find looks at what is there of the folder.
func (o *output) find(set string) error {
	info, err := os.Stat(o.dir)
	exists := err == nil
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if info, err = os.Stat(filepath.Dir(o.dir)); err != nil {
			return err
		}
		fallthrough
	case exists:
		if !info.IsDir() {
			return fmt.Errorf("%w: it is a file", ErrExists)
		}
	default:
		return err
	}
	if inside, err := within(o.dir, set); err != nil || inside {
		return errors.Join(err, ErrInside)
	}
	if !exists {
		return nil
	}
	return o.checkEmpty(nil)
}

// checkEmpty makes sure that there is nothing in the folder but what an earlier call has left unfinished, and files of these
// names if it was about to finish.
func (o *output) checkEmpty(names []string) error {
	entries, err := os.ReadDir(o.dir)
	if err != nil {
		return err
	}
	finishing := slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return e.Name() == namesFile })
	for _, e := range entries {
		name := e.Name()
		// lost+found is there in every new ext4.
		ours := name == stagingFolder || name == namesFile || strings.HasPrefix(name, ".tmp-"+namesFile) || name == "lost+found"
		if !ours && (!finishing || names != nil && !slices.Contains(names, name)) {
			return fmt.Errorf("%w: %s is there", ErrExists, name)
		}
	}
	return nil
}

// within reports whether a folder, which need not be there, is another one or lies in it, by whatever names.
func within(dir, top string) (bool, error) {
	want, err := os.Stat(top)
	if err != nil {
		return false, err
	}
	if whole, err := filepath.EvalSymlinks(dir); err == nil {
		dir = whole
	} else if whole, err := filepath.EvalSymlinks(filepath.Dir(dir)); err == nil {
		dir = whole
	}
	for {
		info, err := os.Stat(dir)
		if err != nil {
			return false, err
		}
		if os.SameFile(info, want) {
			return true, nil
		}
		up := filepath.Dir(dir)
		if up == dir {
			return false, nil
		}
		dir = up
	}
}

// lockRepository keeps images from being merged while their files are read one by one. Who can't write there can't lock, and
// finds out at the end that something has changed.
func (j *Job) lockRepository(ctx context.Context) error {
	r := source.Repository(j.req.Set)
	if r == nil || j.req.DryRun || j.req.Command == Commit {
		return nil
	}
	g, err := r.Guest(j.guest.Name())
	if err != nil {
		return err
	}
	lock, err := g.LockPrune(ctx, j.req.LockWait)
	switch {
	case err == nil:
		j.release = append(j.release, lock.Unlock)
	case errors.Is(err, repo.ErrLocked), ctx.Err() != nil:
		return err
	default:
		j.req.Log.Debugf("not locked: %v", err)
	}
	return nil
}

// final is the path that a file gets in the end.
func (o *output) final(name string) string { return filepath.Join(o.dir, name) }

// staged is where it is made.
func (o *output) staged(name string) string { return filepath.Join(o.path, name) }

// add takes up the name of a file that is to be made.
func (o *output) add(name string) error {
	if slices.Contains(o.names, name) {
		return fmt.Errorf("two files would be called %s: choose one of the disks", name)
	}
	o.names = append(o.names, name)
	return nil
}

func (j *Job) runOutput(ctx context.Context) (err error) {
	o := j.out
	if err := o.begin(); err != nil {
		if o.made {
			_ = os.Remove(o.dir) // unless it is in use by now
		}
		return fmt.Errorf("output %s: %w", o.dir, err)
	}
	defer func() { err = errors.Join(err, o.end()) }()
	plan := j.digest()
	finishing, err := o.finishing(plan)
	if err != nil {
		return fmt.Errorf("output %s: %w", o.dir, err)
	}
	if !finishing {
		err := o.clear()
		if err == nil && j.req.Command == Rebase {
			err = o.checkLinks()
		}
		if err == nil {
			err = j.checkSpace()
		}
		if err == nil {
			err = j.runSteps(ctx)
		}
		if err == nil {
			err = j.checkSource()
		}
		if err == nil {
			err = o.sync(plan)
		}
		if err != nil {
			return errors.Join(err, o.discard())
		}
	}
	if err := o.finish(); err != nil {
		return fmt.Errorf("output %s: all is made, but not in its place yet: %w", o.dir, err)
	}
	return nil
}

// digest tells one plan from another. How many bytes there are to copy is not a part of it: that can change by itself.
func (j *Job) digest() string {
	h := sha256.New()
	fmt.Fprintln(h, j.req.Command, j.Plan.Guest, j.Plan.Until)
	for _, s := range j.Plan.Steps {
		fmt.Fprintf(h, "%q %q %q %q\n", s.Action, s.Disk, s.File, s.From)
	}
	for _, d := range j.disks {
		for _, l := range d.links {
			fmt.Fprintf(h, "%q %q %d\n", l.file.Name, l.Point.UUID, l.stamp.size)
		}
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

// begin makes the staging folder, and sees to it that nobody else has it.
func (o *output) begin() error {
	if _, err := os.Stat(o.dir); errors.Is(err, fs.ErrNotExist) {
		if err := o.fs.Mkdir(o.dir, dirMode); err != nil {
			return err
		}
		o.made = true
	}
	if err := o.checkEmpty(nil); err != nil {
		return err
	}
	if err := o.fs.Mkdir(o.path, dirMode); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	lock, err := takeLock(o.staged(lockFile))
	if err != nil {
		return err
	}
	o.lock = lock
	return nil
}

// takeLock makes a file and locks it. Who holds the lock may remove the file at any time: then the lock is one of a file that
// is away.
func takeLock(path string) (*os.File, error) {
	for range 10 {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, fileMode)
		if err != nil {
			return nil, err
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
			_ = f.Close()
			return nil, fmt.Errorf("%w: somebody else is at work (%s)", ErrBusy, path)
		} // else a file system without locks has none to give
		held, err := f.Stat()
		if err == nil {
			var now fs.FileInfo
			if now, err = os.Lstat(path); err == nil && os.SameFile(held, now) {
				return f, nil
			}
		}
		_ = f.Close()
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	return nil, fmt.Errorf("%w: others make and remove %s", ErrBusy, path)
}

// names is what the file of that name holds.
type names struct {
	Plan  string   `json:"plan"`
	Names []string `json:"names"`
}

// finishing reports whether an earlier call with this very plan has made everything, and only names are missing.
func (o *output) finishing(plan string) (bool, error) {
	text, err := os.ReadFile(o.final(namesFile))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	var n names
	if err := json.Unmarshal(text, &n); err != nil || n.Plan != plan || !slices.Equal(n.Names, o.names) {
		return false, fmt.Errorf("%w: what another call was about to finish is there", ErrExists)
	}
	return true, o.checkEmpty(o.names)
}

// clear removes what a killed call has left.
func (o *output) clear() error {
	entries, err := os.ReadDir(o.path)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() == lockFile {
			continue
		}
		if err := o.fs.Remove(o.staged(e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// checkLinks makes sure that the file system has symbolic links, which are made when all else is.
func (o *output) checkLinks() error {
	probe := o.staged(".probe")
	if err := os.Symlink("probe", probe); err != nil {
		return err
	}
	return os.Remove(probe)
}

// keep opens a file that was just made, until it is synced: so no error of writing it back is missed.
func (o *output) keep(path string) error {
	f, err := os.Open(path)
	if err == nil {
		o.open = append(o.open, f)
	}
	return err
}

// sync brings all to stable storage, and notes what gets its place now.
func (o *output) sync(plan string) error {
	for _, f := range o.open {
		if err := o.fs.Step("sync", f.Name()); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
	}
	if err := o.fs.SyncDir(o.path); err != nil {
		return err
	}
	text, err := json.Marshal(names{plan, o.names})
	if err != nil {
		return err
	}
	return o.fs.WriteFile(o.final(namesFile), append(text, '\n'), fileMode)
}

// finish gives everything its place. All of it can be done again.
func (o *output) finish() error {
	for _, name := range o.names {
		if err := o.fs.Step("rename", o.final(name)); err != nil {
			return err
		}
		err := unix.Renameat2(unix.AT_FDCWD, o.staged(name), unix.AT_FDCWD, o.final(name), unix.RENAME_NOREPLACE)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
			// A file system that can't: NFS, for one.
			if _, err = os.Lstat(o.final(name)); errors.Is(err, fs.ErrNotExist) {
				err = os.Rename(o.staged(name), o.final(name))
			} else if err == nil {
				err = unix.EEXIST
			}
		}
		if errors.Is(err, unix.ENOENT) {
			_, err = os.Lstat(o.final(name)) // by an earlier call
		}
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	if err := o.fs.SyncDir(o.dir); err != nil {
		return err
	}
	if err := o.fs.RemoveAll(o.path); err != nil {
		return err
	}
	return o.fs.Remove(o.final(namesFile))
}

// discard removes what was made.
func (o *output) discard() error {
	err := o.fs.Remove(o.final(namesFile))
	if err == nil {
		err = o.fs.RemoveAll(o.path)
	}
	if err == nil && o.made {
		err = o.fs.Remove(o.dir)
	}
	if err != nil {
		return fmt.Errorf("output %s: %w", o.dir, err)
	}
	return nil
}

func (o *output) end() error {
	var errs []error
	for _, f := range o.open {
		errs = append(errs, f.Close())
	}
	if o.lock != nil {
		// Closing alone would not give it back while a child that is being made has the descriptor too.
		_ = unix.Flock(int(o.lock.Fd()), unix.LOCK_UN)
		errs = append(errs, o.lock.Close())
	}
	return errors.Join(errs...)
}

// checkSpace makes sure that there is room for the output.
func (j *Job) checkSpace() error {
	o := j.out
	need := o.need
	if o.cloned > 0 && j.canClone() {
		need -= o.cloned
	}
	free, err := freeSpace(o.dir)
	if err != nil {
		return err
	}
	if need > free {
		return fmt.Errorf("output %s: %w: up to %s are needed, and %s are free", o.dir, ErrNoSpace, humanize.IBytes(uint64(need)), humanize.IBytes(uint64(free)))
	}
	return nil
}

func freeSpace(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, fmt.Errorf("%s: free space: %w", dir, err)
	}
	return int64(st.Bavail) * st.Bsize, nil
}

// canClone reports whether files of the output can share blocks with those of the set.
func (j *Job) canClone() bool {
	src, _, err := j.openFile(j.out.probe)
	if err != nil {
		return false
	}
	defer src.Close()
	dst, err := os.OpenFile(j.out.staged(".probe"), os.O_RDWR|os.O_CREATE|os.O_EXCL, fileMode)
	if err != nil {
		return false
	}
	defer os.Remove(dst.Name())
	defer dst.Close()
	return clone(dst, src)
}

// checkSource makes sure that nobody has changed what was read file by file.
func (j *Job) checkSource() error {
	if j.req.Command == Commit {
		return nil // its reader sees to it
	}
	for _, d := range j.disks {
		if err := j.unchanged(d.links); err != nil {
			return err
		}
	}
	return nil
}

// link adds the step that makes a symbolic link.
func (j *Job) linkStep(disk, name, target string) error {
	o := j.out
	if err := o.add(name); err != nil {
		return err
	}
	j.add(Step{Action: Link, Disk: disk, File: o.final(name), From: target}, func(context.Context, func(int64)) error {
		if err := o.fs.Step("symlink", o.staged(name)); err != nil {
			return err
		}
		return os.Symlink(target, o.staged(name))
	})
	return nil
}

// exportStep adds the step that writes a whole disk of a point to a new qcow2 image.
func (j *Job) exportStep(disk, name string, m *chain.Manifest, of string, size int64) error {
	o := j.out
	if err := o.add(name); err != nil {
		return err
	}
	const tables = 4 << 20
	o.need += size + size/64 + tables
	from := fmt.Sprintf("%s/%s/%s", j.guest.Name(), m.ID, of)
	j.add(Step{Action: Write, Disk: disk, File: o.final(name), From: from, Bytes: size}, func(ctx context.Context, progress func(int64)) error {
		img, err := j.points.OpenDisk(j.pool, m, of)
		if err != nil {
			return err
		}
		defer img.Close()
		return j.export(ctx, img, o.staged(name), progress)
	})
	return nil
}

func (j *Job) export(ctx context.Context, img image.Image, path string, progress func(int64)) (err error) {
	p, err := export.Look(ctx, limited{img, ctx, &j.limit}, path, export.Options{Format: export.Qcow2, FS: j.req.FS, QemuImg: j.req.QemuImg})
	if err != nil {
		return err
	}
	w, err := p.Start(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	if err := w.Write(ctx, increments(progress)); err != nil {
		return err
	}
	if err := w.Commit(ctx); err != nil {
		return err
	}
	return j.out.keep(path)
}

// dataOf is how much of a disk is not known to be zeroes.
func dataOf(ctx context.Context, img image.Image) (n int64, err error) {
	for e, err := range image.Walk(img, 0, img.Size()) {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return 0, err
		}
		if !e.Zero {
			n += e.Len
		}
	}
	return n, nil
}
