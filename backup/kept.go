package backup

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"qmchain/chain"
	"qmchain/internal/durable"
)

// Kept is where the bitmaps of stopped guests are kept, a folder for each guest:
//
//	DIR/web/saved.json      what is kept, and the proof that will be asked for; written last
//	DIR/web/claimed.json    the same, from the moment on that somebody begins to merge it back
//	DIR/web/0.qcow2, …      the sidecar images: one for each disk, with its bitmaps and without data
//	DIR/web/refused.json    what could not be saved or merged back, and why, for the next run to tell
//
// It is local, and not in a repository: a guest that stops must not wait for a share, and a QEMU that can't open a file on a
// share that hangs waits with everything. It keeps the bitmaps of all repositories.
type Kept struct {
	Dir string
	FS  durable.FS
}

const (
	savedFile   = "saved.json"
	claimedFile = "claimed.json"
	refusedFile = "refused.json"
	sidecarExt  = ".qcow2"

	keptFormat = 1
	maxKept    = 16 << 20 // of saved.json, in bytes
)

// savedGuest is what was saved when a guest had stopped.
type savedGuest struct {
	Format int                 `json:"format"`
	Time   time.Time           `json:"time"`
	Guest  chain.GuestIdentity `json:"guest"`
	Disks  []savedDisk         `json:"disks"`
	Seal   string              `json:"seal"` // SHA-256 of all this with an empty seal
}

// savedDisk is the state of one disk.
type savedDisk struct {
	Node    string        `json:"node"` // for people: a disk is known by its volumes
	Driver  string        `json:"driver"`
	Window  string        `json:"window,omitempty"`
	Size    int64         `json:"size"` // bytes
	Volumes []volume      `json:"volumes"`
	Sidecar string        `json:"sidecar"`
	SHA256  string        `json:"sha256"` // of the sidecar
	Bitmaps []savedBitmap `json:"bitmaps"`
}

// path is that of the disk's own image; backing images come before it.
func (d savedDisk) path() string { return d.Volumes[len(d.Volumes)-1].Path }

type savedBitmap struct {
	Name        string `json:"name"`
	Granularity int64  `json:"granularity"` // bytes
	Count       int64  `json:"count"`       // bytes marked
}

func (k Kept) path(guest, name string) string { return filepath.Join(k.Dir, guest, name) }

// write puts down what was saved; the sidecars are on disk.
func (k Kept) write(guest string, g savedGuest) error {
	g.Format, g.Seal = keptFormat, ""
	text, err := json.Marshal(g)
	if err != nil {
		return err
	}
	sum := sha256.Sum256(text)
	g.Seal = hex.EncodeToString(sum[:])
	if text, err = json.MarshalIndent(g, "", "  "); err != nil {
		return err
	}
	return k.FS.WriteFile(k.path(guest, savedFile), text, 0o600)
}

// read reads what was saved, or was claimed.
func (k Kept) read(guest, name string) (*savedGuest, error) {
	path := k.path(guest, name)
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Size() > maxKept {
		return nil, fmt.Errorf("%s: %d bytes: %w", path, info.Size(), chain.ErrDamaged)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var g savedGuest
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&g); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", path, chain.ErrDamaged, err)
	}
	seal := g.Seal
	g.Seal = ""
	if text, err = json.Marshal(g); err != nil {
		return nil, err
	}
	if sum := sha256.Sum256(text); seal != hex.EncodeToString(sum[:]) || g.Format != keptFormat {
		return nil, fmt.Errorf("%s: its seal or its format %d is not right: %w", path, g.Format, chain.ErrDamaged)
	}
	for i, disk := range g.Disks {
		if !sidecarPattern.MatchString(disk.Sidecar) || len(disk.Volumes) == 0 {
			return nil, fmt.Errorf("%s: disk %d: %w", path, i, chain.ErrDamaged)
		}
	}
	return &g, nil
}

// claim takes what was saved for this caller alone. From here on nobody else uses it, also when the caller dies: a bitmap that
// is merged back late would lack what was written in between.
func (k Kept) claim(guest string) (*savedGuest, error) {
	g, err := k.read(guest, savedFile)
	if err != nil {
		return nil, err
	}
	cutOff := k.refusals(guest)
	for _, d := range g.Disks {
		for _, b := range d.Bitmaps {
			cutOff[b.Name] = "the merging back of what was saved when the guest stopped was cut off"
		}
	}
	if err := k.writeRefusals(guest, cutOff); err != nil {
		return nil, err
	}
	return g, k.FS.Rename(k.path(guest, savedFile), k.path(guest, claimedFile))
}

// has reports whether there is something for a guest to merge back, or what a merging that was cut off has left.
func (k Kept) has(guest string) bool {
	return k.isThere(guest, savedFile) || k.isThere(guest, claimedFile)
}

func (k Kept) isThere(guest, name string) bool {
	if k.Dir == "" {
		return false
	}
	_, err := os.Stat(k.path(guest, name))
	return err == nil
}

// clear removes what was saved or claimed, the record first.
func (k Kept) clear(guest string) error {
	for _, name := range []string{savedFile, claimedFile} {
		if err := k.FS.Remove(k.path(guest, name)); err != nil {
			return err
		}
	}
	sidecars, err := filepath.Glob(k.path(guest, "*"+sidecarExt))
	for _, path := range sidecars {
		err = errors.Join(err, k.FS.Remove(path))
	}
	return err
}

// refusals say of each bitmap, by name, why it is not there any more.
type refusals map[string]string

func (k Kept) writeRefusals(guest string, r refusals) error {
	if len(r) == 0 {
		return k.FS.Remove(k.path(guest, refusedFile))
	}
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return k.FS.WriteFile(k.path(guest, refusedFile), text, 0o600)
}

// refusals reads why bitmaps are not there any more. They are for people: what can't be read is not there.
func (k Kept) refusals(guest string) refusals {
	r := make(refusals)
	if !k.isThere(guest, refusedFile) {
		return r
	}
	if text, err := os.ReadFile(k.path(guest, refusedFile)); err != nil || json.Unmarshal(text, &r) != nil || r == nil {
		return make(refusals)
	}
	return r
}

// folder makes the guest's folder.
func (k Kept) folder(guest string) error {
	if err := chain.CheckGuestName(guest); err != nil {
		return err
	}
	if err := k.FS.Mkdir(filepath.Join(k.Dir, guest), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

// Discard removes all that is kept of a guest, and returns the names of the bitmaps that go with it. The next run takes a full
// of their disks.
func (k Kept) Discard(guest string) (bitmaps []string, err error) {
	if err := chain.CheckGuestName(guest); err != nil {
		return nil, err
	}
	if k.Dir == "" {
		return nil, nil
	}
	if g, err := k.read(guest, savedFile); err == nil {
		for _, d := range g.Disks {
			for _, b := range d.Bitmaps {
				bitmaps = append(bitmaps, b.Name)
			}
		}
	}
	if _, err := os.Stat(filepath.Join(k.Dir, guest)); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return bitmaps, errors.Join(k.clear(guest), k.writeRefusals(guest, nil))
}

// findings are what is left over of a guest. While it is stopped, saved bitmaps are where they belong.
func (k Kept) findings(guest string, runs bool) (findings []Finding) {
	if k.Dir == "" {
		return nil
	}
	add := func(fixable bool, format string, args ...any) {
		findings = append(findings, Finding{"kept", fmt.Sprintf(format, args...), fixable})
	}
	_, err := k.read(guest, savedFile)
	saved := err == nil
	switch {
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		add(true, "saved bitmaps: %v", err)
	case saved && runs:
		add(true, "saved bitmaps that nobody has merged back into the running guest, in %s", filepath.Join(k.Dir, guest))
	}
	if k.isThere(guest, claimedFile) {
		add(true, "bitmaps whose merging back was cut off, in %s", filepath.Join(k.Dir, guest))
	} else if sidecars, _ := filepath.Glob(k.path(guest, "*"+sidecarExt)); len(sidecars) > 0 && !saved {
		add(true, "images of a saving that was cut off: %s", strings.Join(sidecars, ", "))
	}
	return findings
}

// tidy removes what a saving or merging that was cut off has left. What was saved well stays: the guest may be stopped.
func (k Kept) tidy(guest string) error {
	if _, err := os.Stat(filepath.Join(k.Dir, guest)); k.Dir == "" || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if _, err := k.read(guest, savedFile); err == nil {
		return k.FS.Remove(k.path(guest, claimedFile))
	}
	return k.clear(guest)
}

var sidecarPattern = regexp.MustCompile(`^[0-9]+\.qcow2$`)

func sidecarName(i int) string { return fmt.Sprintf("%d%s", i, sidecarExt) }
