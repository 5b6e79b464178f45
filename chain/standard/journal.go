package standard

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"qmchain/chain"
)

// journalFile says, in a set, what was begun there.
const journalFile = ".qmchain-unfinished.json"

const maxJournal = 64 << 20

// journal is what is in it.
type journal struct {
	Format  int           `json:"format"`
	Command Command       `json:"command"`
	Asked   asked         `json:"asked"`
	Until   chain.ID      `json:"until"`
	Disks   []journalDisk `json:"disks"`
}

// asked is what the user said.
type asked struct {
	Until string   `json:"until"`
	Disks []string `json:"disks"`
}

// journalDisk is what is merged of a disk. Files are relative to the set.
type journalDisk struct {
	Name  string   `json:"name"`
	Base  string   `json:"base"`
	Merge []string `json:"merge"`          // the oldest first
	Next  string   `json:"next,omitempty"` // which is to name the base in its header
}

const journalFormat = 1

// readJournal returns nil if there is none.
func readJournal(dir string) (*journal, error) {
	f, err := os.OpenFile(filepath.Join(dir, journalFile), os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxJournal))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", journalFile, err)
	}
	var n journal
	if err := json.Unmarshal(text, &n); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", journalFile, chain.ErrDamaged, err)
	}
	if n.Format != journalFormat || n.Command != Commit && n.Command != Snapshots {
		return nil, fmt.Errorf("%s has format %d, command %q: this version does not know it", journalFile, n.Format, n.Command)
	}
	return &n, nil
}

// asks makes sure that a request is the one that was begun.
func (n *journal) asks(r Request) error {
	if n.Command == r.Command && n.Asked.Until == r.Until && slices.Equal(n.Asked.Disks, r.Disks) {
		return nil
	}
	args := []string{string(n.Command), r.Guest, "--in-place"}
	if n.Asked.Until != "" {
		args = append(args, "--until", n.Asked.Until)
	}
	for _, d := range n.Asked.Disks {
		args = append(args, "--disk", d)
	}
	return fmt.Errorf("%w: run `%s` first", ErrUnfinished, strings.Join(args, " "))
}

// checkFinished makes sure that what an output is made of is not in the midst of being changed in place.
func (j *Job) checkFinished() error {
	n, err := readJournal(j.req.Set.Dir())
	if n == nil || err != nil {
		return err
	}
	for _, d := range j.disks {
		if slices.ContainsFunc(n.Disks, func(o journalDisk) bool { return o.Base == d.links[0].file.Name }) {
			return n.asks(Request{Guest: j.req.Guest})
		}
	}
	return nil
}

func (j *Job) runInPlace(ctx context.Context) (err error) {
	p := j.place
	if len(j.steps) == 0 && p.begun == nil {
		return nil
	}
	lock, err := takeLock(filepath.Join(p.dir, setLockFile))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(lock.Name()), lock.Close()) }()
	if err := p.stillSo(); err != nil {
		return err
	}
	noted := false
	if p.begun == nil && len(p.merges) > 0 {
		if err := p.note(); err != nil {
			return err
		}
		noted = true
	}
	if err := j.runSteps(ctx); err != nil {
		// The first thing may have failed, or was not even begun.
		if p.begun == nil && p.untouched() && (!noted || j.req.FS.Remove(filepath.Join(p.dir, journalFile)) == nil) {
			return err
		}
		return fmt.Errorf("%w: %w", ErrUnfinished, err)
	}
	if p.begun != nil || noted {
		if err := j.req.FS.Remove(filepath.Join(p.dir, journalFile)); err != nil {
			return fmt.Errorf("%w: all is done, but for its note of that: %w", ErrUnfinished, err)
		}
	}
	return nil
}

// stillSo makes sure that nobody has changed anything between the look and the lock.
func (p *inPlace) stillSo() error {
	begun, err := readJournal(p.dir)
	if err != nil {
		return err
	}
	if (begun == nil) != (p.begun == nil) {
		return fmt.Errorf("%s was changed meanwhile: %w", p.dir, ErrBusy)
	}
	for _, d := range p.job.disks {
		if err := p.job.unchanged(d.links); err != nil {
			return err
		}
	}
	for _, m := range p.merges {
		if err := p.job.unchanged(append([]link{m.base}, m.links...)); err != nil {
			return err
		}
	}
	// What a dead call has left of writing its note.
	left, err := filepath.Glob(filepath.Join(escapeGlob(p.dir), ".tmp-"+journalFile+"-*"))
	for _, file := range left {
		err = errors.Join(err, os.Remove(file))
	}
	return err
}

func escapeGlob(path string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(path)
}

// untouched reports whether everything is as it was planned for.
func (p *inPlace) untouched() bool {
	for _, d := range p.job.disks {
		if p.job.unchanged(d.links) != nil {
			return false
		}
	}
	return true
}

// note writes down what is to be done.
func (p *inPlace) note() error {
	j := p.job
	n := journal{Format: journalFormat, Command: j.req.Command, Asked: asked{j.req.Until, j.req.Disks}, Until: j.Plan.Until}
	for _, m := range p.merges {
		if len(m.noted.Merge) > 0 {
			n.Disks = append(n.Disks, m.noted)
		}
	}
	text, err := json.MarshalIndent(n, "", "  ")
	if err != nil {
		return err
	}
	return j.req.FS.WriteFile(filepath.Join(p.dir, journalFile), append(text, '\n'), fileMode)
}
