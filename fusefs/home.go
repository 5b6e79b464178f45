package fusefs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/sirupsen/logrus"

	"qmchain/chain/repo"
	"qmchain/chain/source"
)

// home is the directory of the set, which can go away and come back: a share that is unmounted and mounted again is another
// directory, in which a set that was opened in the one before finds nothing.
type home struct {
	dir string
	log logrus.FieldLogger

	mu   sync.Mutex
	set  source.Set // as it was opened last
	kind source.Kind
	at   homeStamp
	own  bool  // set was opened here
	away error // what was said last; nil: it was there

	isAway atomic.Bool // the same, for who does not want to wait for the lock
}

// homeStamp tells a directory from another one that takes its place. Numbers of devices and mounts are given to the next
// one as soon as they are free, so of a repository its own file counts too. The zero stamp is that of none.
type homeStamp struct {
	dev, ino uint64
	file     stamp
}

func newHome(set source.Set, log logrus.FieldLogger) *home {
	h := &home{dir: set.Dir(), log: log, set: set, kind: set.Kind()}
	h.at, _ = h.stamp() // if not now, then later
	return h
}

func (h *home) stamp() (homeStamp, error) {
	info, err := os.Stat(h.dir)
	if err != nil {
		return homeStamp{}, err
	}
	st := info.Sys().(*syscall.Stat_t)
	s := homeStamp{dev: st.Dev, ino: st.Ino}
	if h.kind == source.Qmchain {
		if info, err = os.Lstat(filepath.Join(h.dir, repo.HeadFile)); err != nil {
			return homeStamp{}, err
		}
		s.file = stampOf(info)
	}
	return s, nil
}

// now returns the set, opened anew if another directory is in its place. Where the set is not there, the error wraps
// source.ErrAway; the log is told when that begins and ends.
func (h *home) now() (source.Set, error) {
	at, err := h.stamp() // without the lock: it may hang
	h.mu.Lock()
	defer h.mu.Unlock()
	if err == nil && h.at != at {
		err = h.open(at)
	}
	if err != nil {
		if h.away == nil {
			h.log.WithError(err).Warnf("%s: %v", h.dir, source.ErrAway)
		}
		h.isAway.Store(true)
		h.away = fmt.Errorf("%w: %v", source.ErrAway, err) //nolint:errorlint // fs.ErrNotExist, as it may be, would be taken for that of a file
		return nil, h.away
	}
	if h.away != nil {
		h.log.Infof("%s: the backups are there again", h.dir)
		h.away = nil
		h.isAway.Store(false)
	}
	return h.set, nil
}

// open opens the set that is there now. It must be the same one, as far as that can be told.
func (h *home) open(at homeStamp) error {
	set, err := source.OpenAll(h.dir)
	if err != nil {
		return err
	}
	if set.Kind() != h.kind || repositoryID(set) != repositoryID(h.set) {
		_ = set.Close()
		return errors.New("other backups have taken their place")
	}
	if h.own {
		_ = h.set.Close() // who still uses it gets an error, as from the directory that it was in
	}
	h.set, h.at, h.own = set, at, true
	return nil
}

func repositoryID(s source.Set) string {
	if r := source.Repository(s); r != nil {
		return r.ID
	}
	return ""
}

// doubt has the set opened anew next time if an error says that what was opened is not connected to anything any more.
func (h *home) doubt(err error) {
	if errors.Is(err, syscall.ESTALE) || errors.Is(err, syscall.ENOTCONN) {
		h.mu.Lock()
		h.at = homeStamp{}
		h.mu.Unlock()
	}
}

// end closes what was opened here.
func (h *home) end() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.own {
		_ = h.set.Close()
	}
}
