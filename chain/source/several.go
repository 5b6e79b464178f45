package source

import (
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
)

// ErrAway means that a set is not where it was.
var ErrAway = errors.New("the backups are out of reach")

// OpenAll opens the set in a directory, or, where there is none, those in its folders, as one set of the kind Several: a
// repository beside folders of qmpbackup, of which each has one guest. Sets that come and go are noticed when its guests
// are asked for. A guest has its own name, but FOLDER.NAME where sets have guests of the same name. Where a folder is there
// and its set is not any more, as of a share that is unmounted, its guests stay and can't be read: that wraps ErrAway. A
// directory without any set wraps repo.ErrNotRepository.
func OpenAll(dir string) (Set, error) {
	set, err := Open(dir)
	if !errors.Is(err, repo.ErrNotRepository) {
		return set, err
	}
	s := &several{dir: dir, now: time.Now, parts: map[string]*part{}, refused: map[string]refusal{}}
	if lookErr := s.look(); lookErr != nil {
		return nil, lookErr
	}
	if len(s.parts) == 0 {
		return nil, err
	}
	return s, nil
}

// several are the sets in the folders of a folder.
type several struct {
	dir string
	now func() time.Time

	looking sync.Mutex       // held while the folders are looked at, where a share among them can hang
	parts   map[string]*part // by their folders' names
	refused map[string]refusal

	mu     sync.Mutex
	guests map[string]member
}

// part is a set in a folder.
type part struct {
	Set
	at     identity
	guests []string // when it was looked at last
}

// there tells whether the directory that the set was opened in is still in its place.
func (p *part) there() bool {
	_, at, err := lookAt(p.Dir())
	return err == nil && at == p.at
}

// member is where a guest is.
type member struct {
	part *part
	name string // there
}

// refusal is a folder that was no set.
type refusal struct {
	at    identity
	mtime time.Time
	when  time.Time
}

// identity tells a directory from another one that takes its place: a share that is unmounted, and mounted again.
type identity struct{ dev, ino uint64 }

var _ Set = (*several)(nil)

func (s *several) Dir() string { return s.dir }
func (s *several) Kind() Kind  { return Several }

func (s *several) Close() error {
	s.looking.Lock()
	defer s.looking.Unlock()
	var errs []error
	for _, p := range s.parts {
		errs = append(errs, p.Close())
	}
	return errors.Join(errs...)
}

// Guests is what there was at the last look while another one is under way.
func (s *several) Guests() ([]string, error) {
	if s.looking.TryLock() {
		err := s.look()
		s.looking.Unlock()
		if err != nil {
			return nil, err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.guests)), nil
}

func (s *several) Guest(name string) (Guest, error) {
	m, ok := s.member(name)
	if !ok || !m.part.there() {
		s.looking.Lock()
		err := s.look()
		s.looking.Unlock()
		if err != nil {
			return nil, err
		}
		if m, ok = s.member(name); !ok {
			return nil, fmt.Errorf("guest %q: %w: no set in %s has backups of it", name, chain.ErrNoPoint, s.dir)
		}
		if !m.part.there() {
			return nil, fmt.Errorf("guest %q: %s: %w", name, m.part.Dir(), ErrAway)
		}
	}
	g, err := m.part.Guest(m.name)
	if err != nil || m.name == name {
		return g, err
	}
	return renamed{g, name}, nil
}

func (s *several) member(name string) (member, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m, ok := s.guests[name]
	return m, ok
}

// renamed is a guest under another name than its own.
type renamed struct {
	Guest
	name string
}

func (g renamed) Name() string { return g.name }

// look finds out which sets and guests there are now. The caller holds looking.
func (s *several) look() error {
	folders, err := foldersIn(s.dir)
	if err != nil {
		return err
	}
	for name, p := range s.parts {
		if !slices.Contains(folders, name) {
			_ = p.Close()
			delete(s.parts, name)
		}
	}
	for name := range s.refused {
		if !slices.Contains(folders, name) {
			delete(s.refused, name)
		}
	}
	for _, name := range folders {
		if p := s.parts[name]; p == nil || !p.there() {
			s.open(name)
		}
	}
	return s.name()
}

// open opens the set in a folder, if there is one.
func (s *several) open(name string) {
	dir := filepath.Join(s.dir, name)
	mtime, at, err := lookAt(dir)
	if err != nil {
		return // it has gone again
	}
	if r, ok := s.refused[name]; ok && r.at == at && r.mtime.Equal(mtime) && s.now().Sub(r.when) < lookAgain {
		return
	}
	set, err := Open(dir)
	if err != nil {
		s.refused[name] = refusal{at, mtime, s.now()}
		return
	}
	delete(s.refused, name)
	if p := s.parts[name]; p != nil {
		_ = p.Close() // who still uses it gets an error, as from the directory that it was in
	}
	s.parts[name] = &part{Set: set, at: at}
}

// name gives the guests of all sets their names.
func (s *several) name() error {
	type found struct {
		folder string
		member
	}
	byName := map[string][]found{}
	for folder, p := range s.parts {
		if p.there() {
			names, err := p.Guests()
			if err != nil {
				return err
			}
			p.guests = names
		}
		for _, n := range p.guests {
			byName[n] = append(byName[n], found{folder, member{p, n}})
		}
	}
	guests := map[string]member{}
	for name, all := range byName {
		for _, f := range all {
			if len(all) > 1 {
				guests[f.folder+"."+name] = f.member
			} else {
				guests[name] = f.member
			}
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.guests = guests
	return nil
}

// foldersIn returns the names of the folders in a directory, but for those that are hidden.
func foldersIn(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir) // sorted
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() && !strings.HasPrefix(e.Name(), ".") && len(names) < maxFolders {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// lookAt tells which directory is at a path now, and when something came or went in it.
func lookAt(dir string) (mtime time.Time, at identity, err error) {
	info, err := os.Lstat(dir)
	if err != nil {
		return time.Time{}, identity{}, err
	}
	if !info.IsDir() {
		return time.Time{}, identity{}, &fs.PathError{Op: "open", Path: dir, Err: syscall.ENOTDIR}
	}
	st := info.Sys().(*syscall.Stat_t)
	return info.ModTime(), identity{st.Dev, st.Ino}, nil
}
