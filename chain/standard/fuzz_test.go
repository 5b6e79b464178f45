package standard_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"qmchain/chain"
	"qmchain/chain/standard"
)

// FuzzJournal puts any note of what was begun into a set. What is planned after it is about images that the set has: of these no full
// goes, and nothing is written to but a full.
func FuzzJournal(f *testing.F) {
	const journalFile = ".qmchain-unfinished.json"
	dir := newSet(f, 2)
	r := request(f, dir, standard.Commit, "")
	const disk = `{"name":"a","base":"a/FULL-1795170000-a","merge":["a/INC-1795173600-a","a/INC-1795177200-a"],"next":"a/INC-1795177200-a"}`
	for _, text := range []string{
		`{"format":1,"command":"commit","asked":{"until":"","disks":null},"until":"20261120T111923Z-0000","disks":[` + disk + `]}`,
		`{"format":1,"command":"snapshots","asked":{},"disks":[` + disk + `,` + disk + `]}`,
		`{"format":1,"command":"commit","asked":{},"disks":[{"name":"a","base":"a/INC-1795173600-a","merge":["a/FULL-1795170000-a"]}]}`,
		`{"format":1,"command":"commit","asked":{},"disks":[{"name":"a","base":"a/FULL-1795170000-a","merge":["../../x","/etc/passwd","a/gone"]}]}`,
		`{"format":1,"command":"commit","asked":{"disks":["a"]}}`, `{"format":2}`, `null`, ``,
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		if err := os.WriteFile(filepath.Join(dir, journalFile), text, 0o600); err != nil {
			t.Fatal(err)
		}
		for _, command := range []standard.Command{standard.Commit, standard.Snapshots} {
			r := r
			r.Command = command
			j, err := standard.Open(t.Context(), r)
			if err != nil {
				if !strings.Contains(err.Error(), journalFile) && !errors.Is(err, standard.ErrUnfinished) && !errors.Is(err, chain.ErrDamaged) {
					t.Errorf("unexpected kind of error: %v", err)
				}
				continue
			}
			for _, s := range j.Plan.Steps {
				rel, err := filepath.Rel(dir, s.File)
				name := filepath.Base(rel)
				if err != nil || !filepath.IsLocal(rel) {
					t.Errorf("%+v", s)
				}
				switch s.Action {
				case standard.Remove:
					if !strings.HasPrefix(name, "INC-") {
						t.Errorf("%s would go", rel)
					}
				case standard.Merge, standard.Snapshot, standard.Mark, standard.Repair:
					if !strings.HasPrefix(name, "FULL-") {
						t.Errorf("%s would be written to: %+v", rel, s)
					}
				case standard.Backing, standard.Link:
				default:
					t.Errorf("%+v", s)
				}
			}
			j.Close()
		}
	})
}
