package points

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"qmchain/chain/repo"
	"qmchain/chain/source"
	"qmchain/cmd/internal/similar"
	"qmchain/internal/durable"
	"qmchain/internal/ui"
)

// OpenSet opens the set in a directory.
func OpenSet(dir string) (source.Set, error) {
	set, err := source.Open(dir)
	return set, MeantDir(err, dir)
}

// OpenSets opens the set in a directory, or those in its folders as one.
func OpenSets(dir string) (source.Set, error) {
	set, err := source.OpenAll(dir)
	return set, MeantDir(err, dir)
}

// OpenRepo opens the repository in a directory.
func OpenRepo(dir string, fsys durable.FS) (*repo.Repo, error) {
	r, err := repo.Open(dir, fsys)
	return r, MeantDir(err, dir)
}

// MeantDir gives an error, that there is no set in dir, the hint where one is: in a folder with a name like it, in a folder of
// it, or above it. A folder that is not there at all may be one of a share that is not mounted.
func MeantDir(err error, dir string) error {
	var near []string
	switch {
	case errors.Is(err, repo.ErrNotRepository):
		near = append(above(dir), below(dir)...)
	case errors.Is(err, fs.ErrNotExist):
		near = beside(dir)
	}
	switch {
	case len(near) == 0 && errors.Is(err, fs.ErrNotExist):
		return ui.Hint(err, "is the share mounted?")
	case len(near) == 0:
		return err
	}
	return ui.Hint(err, "did you mean "+strings.Join(near[:min(len(near), 3)], " or ")+"?")
}

// maxLooks bounds how many folders are looked into for a set.
const maxLooks = 50

func isSet(dir string) bool {
	set, err := source.Open(dir)
	if err != nil {
		return false
	}
	_ = set.Close()
	return true
}

// above are the repositories that a folder is in: of a guest or of a point, in place of the repository.
func above(dir string) []string {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil
	}
	for range 3 {
		parent := filepath.Dir(dir)
		if parent == dir {
			return nil
		}
		if _, err := repo.Open(parent, durable.FS{}); err == nil {
			return []string{parent}
		}
		dir = parent
	}
	return nil
}

// below are the sets in a folder, which holds one for each guest perhaps.
func below(dir string) (sets []string) {
	for _, name := range folders(dir) {
		if sub := filepath.Join(dir, name); isSet(sub) {
			sets = append(sets, sub)
		}
	}
	return sets
}

// beside are the folders whose names are like that of one that is not there.
func beside(dir string) (found []string) {
	parent := filepath.Dir(filepath.Clean(dir))
	for _, name := range similar.To(filepath.Base(dir), folders(parent)) {
		found = append(found, filepath.Join(parent, name))
	}
	return found
}

// folders are the first of those in a folder that are not hidden.
func folders(dir string) (names []string) {
	f, err := os.Open(dir)
	if err != nil {
		return nil
	}
	defer f.Close()
	entries, _ := f.ReadDir(20 * maxLooks)
	for _, e := range entries {
		if e.IsDir() && !strings.HasPrefix(e.Name(), ".") && len(names) < maxLooks {
			names = append(names, e.Name())
		}
	}
	return names
}
