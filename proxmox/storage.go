package proxmox

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// Storage is a storage that this node can use.
type Storage struct {
	Type string // dir, lvmthin, zfspool, …
	// Path is the folder where its volumes are files, or "".
	Path    string
	Content []string // images, iso, snippets, …
	Shared  bool     // all nodes see the same
}

// Images tells whether disks of VMs can be on it.
func (s Storage) Images() bool { return slices.Contains(s.Content, "images") }

// Storages reads the cluster's storages. Those that are switched off or belong to other nodes are left out. The error is
// ErrNoHost, or that of reading.
func (h Host) Storages() (map[string]Storage, error) {
	if err := h.check(); err != nil {
		return nil, err
	}
	text, err := h.readFile(filepath.Join(h.Etc, "storage.cfg"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("storages: %w", err)
	}
	return parseStorages(string(text), h.Node()), nil
}

// sharesDir is where PVE mounts the shares of storages that have no path of their own.
const sharesDir = "/mnt/pve"

var storageHeadShape = regexp.MustCompile(`^([^\s#]\S*):\s*(\S+)\s*$`) // PVE::SectionConfig

// storageHead reads the first line of a storage in storage.cfg. Both are "" for any other line.
func storageHead(line string) (kind, name string) {
	m := storageHeadShape.FindStringSubmatch(line)
	if m == nil {
		return "", ""
	}
	return m[1], m[2]
}

// parseStorages reads storage.cfg: a line "TYPE: NAME" for each, and below it its properties, indented.
func parseStorages(text, node string) map[string]Storage {
	all := map[string]Storage{
		// PVE has it even where nobody has configured it.
		"local": {Type: "dir", Path: "/var/lib/vz", Content: []string{"images", "rootdir", "vztmpl", "iso", "snippets", "backup"}},
	}
	name, props := "", map[string]string{}
	var kind string
	add := func() {
		if name == "" {
			return
		}
		_, off := props["disable"]
		nodes := fields(props["nodes"])
		if off || len(nodes) > 0 && !slices.Contains(nodes, node) {
			delete(all, name)
			return
		}
		s := Storage{Type: kind, Path: props["path"], Content: fields(props["content"]), Shared: truth(props["shared"], false)}
		if _, given := props["content"]; !given {
			s.Content = []string{"images", "rootdir"}
		}
		switch kind {
		case "nfs", "cifs", "cephfs", "glusterfs":
			s.Shared = true
			if s.Path == "" {
				s.Path = filepath.Join(sharesDir, name)
			}
		}
		all[name] = s
	}
	for line := range strings.Lines(text) {
		trimmed := strings.TrimSpace(line)
		if trimmed == "" || strings.HasPrefix(trimmed, "#") {
			continue
		}
		if line[0] == ' ' || line[0] == '\t' {
			key, value, _ := strings.Cut(trimmed, " ")
			props[key] = strings.TrimSpace(value)
			continue
		}
		add()
		kind, name = storageHead(line)
		props = map[string]string{}
	}
	add()
	return all
}

// VolumeFile is the file of an ISO image or a snippet, and "" for what is no file, or on a storage that is not among these.
// It says where the file belongs, not that it is there.
func VolumeFile(storages map[string]Storage, volume string) string {
	storage, name, named := strings.Cut(volume, ":")
	s := storages[storage]
	kind, file, _ := strings.Cut(name, "/")
	if !named || s.Path == "" || file == "" || file == "." || file == ".." || strings.Contains(file, "/") {
		return ""
	}
	switch kind {
	case "iso":
		return filepath.Join(s.Path, "template", kind, file)
	case "snippets":
		return filepath.Join(s.Path, kind, file)
	}
	return ""
}
