package source

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"qmchain/chain"
	"qmchain/chain/repo"
)

// Several is the kind of a folder that has sets in it.
const Several Kind = "several"

const (
	// maxFolders bounds how many folders in a folder are looked into.
	maxFolders = 4096
	// lookAgain is how long a folder that is no set is taken for none although something may have come in a folder of it.
	lookAgain = 30 * time.Second
	// lookPatience is how long a look waits for folders that don't answer. What is known of them holds until then.
	lookPatience = 2 * time.Second
)

// ErrAway means that a set is not where it was, or can't be opened.
var ErrAway = errors.New("the backups are out of reach")

// OpenAll opens the set in a directory, or, where there is none, those in its folders, as one set of the kind Several: a
// repository beside folders of qmpbackup, of which each has one guest. Sets that come and go are noticed when its guests
// are asked for.
//
// A guest has its own name. Where sets have guests of the same name, all have FOLDER.NAME. Where a folder is there and its set
// is not any more, as of a share that is unmounted, its guests stay and can't be read: that wraps ErrAway. So does a set that
// can't be opened, which stands there as a guest with its folder's name. A folder that hangs holds up the list of guests for a
// moment, and of guests only its own. A directory without any set wraps repo.ErrNotRepository.
func OpenAll(dir string) (Set, error) {
	set, err := Open(dir)
	if !errors.Is(err, repo.ErrNotRepository) {
		return set, err
	}
	s := &several{dir: dir, now: time.Now, parts: map[string]*part{}}
	if lookErr := s.look(); lookErr != nil {
		return nil, lookErr
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var broken error
	for _, p := range s.parts {
		if p.set != nil {
			return s, nil
		}
		if p.err != nil {
			broken = p.err
		} else if p.busy != nil {
			broken = fmt.Errorf("%s: %w: a folder in it does not answer", dir, ErrAway)
		}
	}
	return nil, cmp.Or(broken, err)
}

// several are the sets in the folders of a folder.
type several struct {
	dir string
	now func() time.Time

	mu     sync.Mutex // never held while a file system is asked
	parts  map[string]*part
	closed bool
}

// part is what is known of a folder.
type part struct {
	busy *inquiry // of who looks at it, and may hang; nil: nobody does

	set    Set // as it was opened last; nil: it never was a set
	id     string
	at     identity // of set, or of what was looked at last
	guests []string // when it was looked at last
	err    error    // why it can't be read

	refused time.Time // when it was no set; else zero
}

// inquiry is a look that is under way.
type inquiry struct {
	began time.Time
	done  chan struct{} // closed when it is through
}

// wait waits until the look is through, or is taken to hang.
func (i *inquiry) wait() {
	select {
	case <-i.done:
	case <-time.After(time.Until(i.began.Add(lookPatience))):
	}
}

// Hangs reports whether the guest is in one of several sets that did not answer when it was looked at last, and still doesn't:
// who asks more of it will have to wait.
func Hangs(s Set, guest string) bool {
	many, ok := s.(*several)
	return ok && many.named()[guest].hangs
}

// identity tells a directory from another one that takes its place: a share that is unmounted, and mounted again. Numbers of
// devices are given to the next one as soon as they are free, so of a repository its own file counts too.
type identity struct {
	dev, ino    uint64
	mtime       time.Time // of a folder that is no set
	head        uint64    // inode number of the repository's file
	headChanged time.Time
}

var _ Set = (*several)(nil)

func (s *several) Dir() string { return s.dir }
func (s *several) Kind() Kind  { return Several }

func (s *several) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	var errs []error
	for _, p := range s.parts {
		if p.set != nil {
			errs = append(errs, p.set.Close())
		}
	}
	return errors.Join(errs...)
}

func (s *several) Guests() ([]string, error) {
	if err := s.look(); err != nil {
		return nil, err
	}
	return slices.Sorted(maps.Keys(s.named())), nil
}

func (s *several) Guest(name string) (Guest, error) {
	m, ok := s.named()[name]
	if !ok || m.set == nil || !isThere(m.set, m.at) {
		if err := s.look(); err != nil {
			return nil, err
		}
		if m, ok = s.named()[name]; !ok {
			return nil, fmt.Errorf("guest %q: %w: no set in %s has backups of it", name, chain.ErrNoPoint, s.dir)
		}
		if m.err == nil && !isThere(m.set, m.at) {
			m.err = errors.New("it does not answer")
		}
		if m.err != nil {
			return nil, fmt.Errorf("guest %q: %s: %w: %v", name, filepath.Join(s.dir, m.folder), ErrAway, m.err) //nolint:errorlint // fs.ErrNotExist, as it may be, would be taken for that of a file
		}
	}
	g, err := m.set.Guest(m.guest)
	if err != nil || m.guest == name {
		return g, err
	}
	return renamed{g, name}, nil
}

// renamed is a guest under another name than its own.
type renamed struct {
	Guest
	name string
}

func (g renamed) Name() string { return g.name }

// member is where a guest is.
type member struct {
	folder, guest string
	set           Set // nil: it can't be opened
	at            identity
	hangs         bool
	err           error
}

// named gives the guests of all sets their names.
func (s *several) named() map[string]member {
	s.mu.Lock()
	var all []member
	for folder, p := range s.parts {
		hangs := p.busy != nil && time.Since(p.busy.began) >= lookPatience
		for _, g := range p.guests {
			all = append(all, member{folder, g, p.set, p.at, hangs, p.err})
		}
		if p.set == nil && p.err != nil {
			all = append(all, member{folder: folder, err: p.err})
		}
	}
	s.mu.Unlock()
	plain := map[string]int{}
	for _, m := range all {
		plain[m.plain()]++
	}
	names := make(map[string]member, len(all))
	slices.SortFunc(all, func(a, b member) int {
		return cmp.Or(strings.Compare(a.folder, b.folder), strings.Compare(a.guest, b.guest))
	})
	for _, m := range all {
		name := m.plain()
		if plain[name] > 1 && m.guest != "" {
			name = m.folder + "." + m.guest
		}
		if other, taken := names[name]; taken { // also by one that is called so by itself: neither may pass for the other
			other.set, other.err = nil, fmt.Errorf("guests in %s and %s would have the same name", other.folder, m.folder)
			names[name] = other
			continue
		}
		names[name] = m
	}
	return names
}

func (m member) plain() string { return cmp.Or(m.guest, m.folder) }

// look looks at all folders at once. For one that hangs it waits lookPatience at first, and no longer as long as that lasts.
func (s *several) look() error {
	type listed struct {
		names []string
		err   error
	}
	listing := make(chan listed, 1)
	go func() {
		names, err := foldersIn(s.dir)
		listing <- listed{names, err}
	}()
	var folders []string
	select {
	case l := <-listing:
		if l.err != nil {
			return l.err
		}
		folders = l.names
	case <-time.After(lookPatience):
		return fmt.Errorf("%s: %w: it does not answer", s.dir, ErrAway)
	}

	var looks []*inquiry
	s.mu.Lock()
	for name, p := range s.parts {
		if !slices.Contains(folders, name) && p.busy == nil { // it was removed
			if p.set != nil {
				_ = p.set.Close()
			}
			delete(s.parts, name)
		}
	}
	for _, name := range folders {
		p := s.parts[name]
		if p == nil {
			p = &part{}
			s.parts[name] = p
		}
		if p.busy == nil {
			p.busy = &inquiry{time.Now(), make(chan struct{})}
			was := *p
			go func() { s.settle(name, was.lookAgain(filepath.Join(s.dir, name), s.now())) }()
		}
		looks = append(looks, p.busy)
	}
	s.mu.Unlock()
	for _, l := range looks {
		l.wait()
	}
	return nil
}

// settle puts down what a look has found.
func (s *several) settle(name string, now part) {
	s.mu.Lock()
	defer s.mu.Unlock()
	was := s.parts[name]
	close(was.busy.done)
	was.busy = nil
	switch {
	case s.closed:
		if now.set != nil && now.set != was.set {
			_ = now.set.Close()
		}
		return
	case was.set != nil && was.set != now.set:
		_ = was.set.Close() // who still uses it gets an error, as from the directory that it was in
	}
	now.busy = nil
	*was = now
}

// lookAgain looks at the folder of which p is known. It may hang.
func (p part) lookAgain(dir string, now time.Time) part {
	if p.set != nil && isThere(p.set, p.at) {
		guests, err := p.set.Guests()
		if p.err = err; err == nil {
			p.guests = guests
		}
		return p
	}
	at, err := identify(dir, "")
	if err != nil {
		p.err = err
		return p
	}
	if p.set == nil && p.err == nil && p.at == at && now.Sub(p.refused) < lookAgain {
		return p
	}
	set, err := Open(dir)
	if p.set == nil && errors.Is(err, repo.ErrNotRepository) {
		return part{at: at, refused: now}
	}
	if err != nil {
		p.err = err
		return p
	}
	id := string(set.Kind())
	if r := Repository(set); r != nil {
		id += r.ID
	}
	if p.set != nil && p.id != id {
		_ = set.Close()
		p.err = errors.New("other backups have taken their place")
		return p
	}
	found := part{set: set, id: id}
	if found.at, err = identify(dir, set.Kind()); err == nil {
		found.guests, err = set.Guests()
	}
	found.err = err
	return found
}

// isThere tells whether the directory that the set was opened in is still in its place.
func isThere(set Set, at identity) bool {
	now, err := identify(set.Dir(), set.Kind())
	return err == nil && now == at
}

// identify tells which directory is at a path now.
func identify(dir string, kind Kind) (identity, error) {
	info, err := os.Lstat(dir)
	if err != nil {
		return identity{}, err
	}
	if !info.IsDir() {
		return identity{}, &fs.PathError{Op: "open", Path: dir, Err: syscall.ENOTDIR}
	}
	st := info.Sys().(*syscall.Stat_t)
	at := identity{dev: st.Dev, ino: st.Ino}
	switch kind {
	case "":
		at.mtime = info.ModTime()
	case Qmchain:
		if info, err = os.Lstat(filepath.Join(dir, repo.HeadFile)); err != nil {
			return identity{}, err
		}
		at.head, at.headChanged = info.Sys().(*syscall.Stat_t).Ino, info.ModTime()
	}
	return at, nil
}

// foldersIn returns the names of the folders in a directory, but for those that are hidden.
func foldersIn(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir) // sorted
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() && !strings.HasPrefix(e.Name(), ".") {
			names = append(names, e.Name())
		}
	}
	if len(names) > maxFolders {
		return nil, fmt.Errorf("%s has more than %d folders", dir, maxFolders)
	}
	return names, nil
}
