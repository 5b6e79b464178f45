package hooks

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"qmchain/internal/durable"
	"qmchain/proxmox"
)

// What can be in the way of an installation.
var (
	// ErrForeign: a file that is not ours has the name that ours has to have.
	ErrForeign = errors.New("not one of ours")
	// ErrScript: the hook script of a VM can't be called.
	ErrScript = errors.New("no script that can be called")
)

// Installer gives VMs our hook script, and takes it away.
type Installer struct {
	host    proxmox.Host
	fs      durable.FS
	program string
	dirs    map[string]string // of the snippets of storages: asking for one takes Perl's time
}

// NewInstaller returns one for a host's VMs. Program is qmchain-hook, as snippets call it: an absolute path.
func NewInstaller(host proxmox.Host, program string) *Installer {
	return &Installer{host: host, program: program, dirs: map[string]string{}}
}

// snippet is the file of a snippet, which need not be there.
func (i *Installer) snippet(ctx context.Context, volume string) (string, error) {
	storage, name, _ := strings.Cut(volume, snippetsDir)
	if dir := i.dirs[storage]; dir != "" && name != "" && !strings.Contains(name, "/") {
		return filepath.Join(dir, name), nil
	}
	path, err := i.host.SnippetPath(ctx, volume)
	if err == nil {
		i.dirs[storage] = filepath.Dir(path)
	}
	return path, err
}

// Change is what was done, or would be, about a VM's hook script.
type Change struct {
	VMID          proxmox.VMID
	Name          string
	Before, After string // the volume of its hook script; "" if there is none
	Path          string // the file of our snippet
	Calls         string // the volume of the script that our snippet calls; "" if it calls none
	Written       bool   // the file of our snippet was missing or another, and is written
	Removed       bool   // it is removed, as nobody needs it any more
	Notes         []string
	Partly        bool // a note tells of what is not quite as asked
}

// Changed tells whether the VM's option, or the file, was to be changed.
func (c Change) Changed() bool { return c.Before != c.After || c.Written }

// attempts bounds how often a change is made anew because somebody else came first.
const attempts = 5

// Install sees to it that the VM has our hook script, and that the one it had is called by it. Ours is on the storage of theirs, or,
// where they have none, on the given one. With dry, it only tells what it would do. Its errors are ErrForeign, ErrScript, and those
// of proxmox.Host's Set.
func (i *Installer) Install(ctx context.Context, vmid proxmox.VMID, storage string, dry bool) (Change, error) {
	return retry(func() (Change, error) { return i.install(ctx, vmid, storage, dry) })
}

// Remove puts back the hook script that the VM had before ours. One that is not ours stays.
func (i *Installer) Remove(ctx context.Context, vmid proxmox.VMID, dry bool) (Change, error) {
	return retry(func() (Change, error) { return i.remove(ctx, vmid, dry) })
}

func retry(change func() (Change, error)) (c Change, err error) {
	for range attempts {
		if c, err = change(); !errors.Is(err, proxmox.ErrChanged) {
			return c, err
		}
	}
	return c, err
}

func (i *Installer) install(ctx context.Context, vmid proxmox.VMID, storage string, dry bool) (Change, error) {
	change := Change{VMID: vmid}
	c, err := i.host.Config(vmid)
	if err != nil {
		return change, err
	}
	change.Name, change.Before = c.Name(), c.Hookscript()
	theirs, ours := unwrap(change.Before)
	change.Calls, change.After = theirs, change.Before
	if !ours {
		change.Calls, change.After = change.Before, wrap(change.Before, storage)
	}
	if change.Path, err = i.snippet(ctx, change.After); err != nil {
		return change, fmt.Errorf("VM %s: %w", vmid, err)
	}
	if change.Calls != "" {
		if _, err := i.callable(ctx, change.Calls); err != nil {
			return change, fmt.Errorf("VM %s: its hook script: %w", vmid, err)
		}
	}
	text := script(i.program, change.Calls)
	present, err := look(change.Path)
	switch {
	case err != nil:
		return change, fmt.Errorf("VM %s: %w", vmid, err)
	case present.there && !present.ours:
		return change, fmt.Errorf("VM %s: %s is in the way: %w", vmid, change.Path, ErrForeign)
	}
	change.Written = present.text != text || !present.executable
	change.Notes = i.notes(c, change)
	if change.Before != change.After && c.Lock() != "" {
		return change, fmt.Errorf("VM %s is %w (%s)", vmid, proxmox.ErrLocked, c.Lock())
	}
	if dry {
		return change, nil
	}
	if change.Written {
		if err := i.write(change.Path, text); err != nil {
			return change, fmt.Errorf("VM %s: %w", vmid, err)
		}
	}
	if change.Before != change.After {
		err = i.host.SetHookscript(ctx, c, change.After)
	}
	return change, err
}

func (i *Installer) write(path, text string) error {
	// PVE makes this folder; the one above it is missing only where a storage is not there.
	if err := os.Mkdir(filepath.Dir(path), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return i.fs.WriteFile(path, []byte(text), 0o755)
}

// notes are what the admin should know of an installation.
func (i *Installer) notes(c *proxmox.Config, change Change) (notes []string) {
	storage, _, _ := strings.Cut(change.After, ":")
	storages, err := i.host.Storages()
	nodes, nodesErr := i.host.Nodes()
	nodes = slices.DeleteFunc(nodes, func(name string) bool { return name == i.host.Node() })
	if err == nil && nodesErr == nil && len(nodes) > 0 && !storages[storage].Shared {
		notes = append(notes, fmt.Sprintf("storage %s is this node's alone: the VM starts on %s only where %s is too", storage, strings.Join(nodes, ", "), change.Path))
	}
	for _, s := range c.Snapshots {
		if s.Options["hookscript"] != change.After {
			notes = append(notes, fmt.Sprintf("snapshot %s is without our hook script, and so is the VM when it goes back to it", s.Name))
		}
	}
	return notes
}

// callable makes sure that PVE can call a script. The path is that of its file, as far as there is one to be named.
func (i *Installer) callable(ctx context.Context, volume string) (path string, err error) {
	path, err = i.snippet(ctx, volume)
	if err != nil {
		return "", err
	}
	fi, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return path, fmt.Errorf("%s: %w: there is no %s", volume, ErrScript, path)
	case err != nil:
		return path, fmt.Errorf("%s: %w", volume, err)
	case !fi.Mode().IsRegular() || fi.Mode()&0o111 == 0:
		return path, fmt.Errorf("%s: %w: %s is not executable", volume, ErrScript, path)
	}
	return path, nil
}

// file is a snippet as it is on its storage.
type file struct {
	there, ours, executable bool
	text                    string
}

// maxScript bounds what is read of a script: ours are small.
const maxScript = 64 << 10

func look(path string) (file, error) {
	fi, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return file{}, nil
	}
	if err != nil || !fi.Mode().IsRegular() || fi.Size() > maxScript {
		return file{there: true}, err
	}
	text, err := os.ReadFile(path)
	return file{there: true, ours: isOurs(text), executable: fi.Mode()&0o111 != 0, text: string(text)}, err
}

func (i *Installer) remove(ctx context.Context, vmid proxmox.VMID, dry bool) (Change, error) {
	change := Change{VMID: vmid}
	c, err := i.host.Config(vmid)
	if err != nil {
		return change, err
	}
	change.Name, change.Before = c.Name(), c.Hookscript()
	change.After = change.Before
	theirs, ours := unwrap(change.Before)
	if !ours {
		return change, nil
	}
	if change.Path, err = i.snippet(ctx, change.Before); err != nil {
		return change, fmt.Errorf("VM %s: %w", vmid, err)
	}
	present, err := look(change.Path)
	if err != nil {
		return change, fmt.Errorf("VM %s: %w", vmid, err)
	}
	if present.there && !present.ours {
		change.Notes = []string{change.Path + " has the name of ours and is not: it stays"}
		return change, nil
	}
	change.After = theirs
	if theirs != "" {
		if _, err := i.callable(ctx, theirs); err != nil {
			change.After, change.Partly = "", true
			change.Notes = append(change.Notes, fmt.Sprintf("the hook script that was there before can't be put back: %v", err))
		}
	}
	for _, s := range c.Snapshots {
		if s.Options["hookscript"] == change.Before {
			change.Notes = append(change.Notes, fmt.Sprintf("snapshot %s has our hook script, and so has the VM when it goes back to it", s.Name))
		}
	}
	if c.Lock() != "" {
		return change, fmt.Errorf("VM %s is %w (%s)", vmid, proxmox.ErrLocked, c.Lock())
	}
	if dry {
		return change, nil
	}
	if err := i.host.SetHookscript(ctx, c, change.After); err != nil {
		return change, err
	}
	change.Removed, err = i.drop(change.Before, change.Path, present.text)
	return change, err
}

// drop removes a snippet that nobody needs any more.
func (i *Installer) drop(volume, path, text string) (removed bool, err error) {
	users, err := i.host.HookscriptUsers(volume)
	if err != nil || len(users) > 0 {
		return false, err
	}
	if err := i.fs.Remove(path); err != nil {
		return false, err
	}
	// Who has been given it meanwhile could not start.
	if users, err = i.host.HookscriptUsers(volume); err != nil || len(users) > 0 {
		return false, errors.Join(err, i.write(path, text))
	}
	return true, nil
}

// State is a VM's hook script.
type State struct {
	VMID       proxmox.VMID
	Name       string
	Hookscript string // its volume; "" if there is none
	Ours       bool
	Calls      string // the volume of the script that ours calls; "" if it calls none
	Faults     []string
}

// Look tells which hook script the VM has, and what is wrong with it.
func (i *Installer) Look(ctx context.Context, vmid proxmox.VMID) (State, error) {
	s := State{VMID: vmid}
	c, err := i.host.Config(vmid)
	if err != nil {
		return s, err
	}
	s.Name, s.Hookscript = c.Name(), c.Hookscript()
	if s.Hookscript == "" {
		return s, nil
	}
	fault := func(err error) {
		if err != nil {
			s.Faults = append(s.Faults, err.Error())
		}
	}
	path, err := i.callable(ctx, s.Hookscript)
	fault(err)
	theirs, named := unwrap(s.Hookscript)
	if !named || path == "" {
		return s, nil
	}
	present, err := look(path)
	if err != nil {
		return s, fmt.Errorf("VM %s: %w", vmid, err)
	}
	if s.Ours = present.ours || !present.there; !s.Ours {
		return s, nil
	}
	s.Calls = theirs
	if theirs != "" {
		_, err := i.callable(ctx, theirs)
		fault(err)
	}
	if present.there && present.text != script(i.program, theirs) {
		s.Faults = append(s.Faults, "it is that of another version: `qmchain-hook install "+vmid.String()+"`")
	}
	return s, nil
}
