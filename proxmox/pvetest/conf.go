package pvetest

import (
	"cmp"
	"crypto/sha1"
	"encoding/hex"
	"fmt"
	"maps"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// conf is a configuration file. It is read and written as PVE does it.
type conf struct {
	digest      string
	description string // encoded lines, each with a newline
	main        map[string]string
	pending     map[string]string // with "delete"
	special     string            // PVE's own sections, as they are
	snapshots   map[string]map[string]string
}

var (
	confArgs = regexp.MustCompile(`^args:\s*(.*\S)\s*$`)
	confSnap = regexp.MustCompile(`(?i)^\[([a-z][a-z0-9_-]+)\]\s*$`)
	confLine = regexp.MustCompile(`^([a-z][a-z_-]*\d*):\s*(.+?)\s*$`)
)

func parseConf(text string) *conf {
	sum := sha1.Sum([]byte(text))
	c := &conf{digest: hex.EncodeToString(sum[:]), main: map[string]string{}, pending: map[string]string{}, snapshots: map[string]map[string]string{}}
	section, name := c.main, ""
	for line := range strings.Lines(text) {
		trimmed := strings.TrimSuffix(line, "\n")
		if strings.HasPrefix(trimmed, "[") {
			section, name = nil, ""
			switch m := confSnap.FindStringSubmatch(trimmed); {
			case m == nil:
				c.special += "\n"
			case strings.EqualFold(m[1], "pending"):
				section = c.pending
			default:
				section, name = map[string]string{}, m[1]
				c.snapshots[name] = section
			}
		}
		if comment, found := strings.CutPrefix(trimmed, "#"); found && section != nil {
			if name == "" {
				c.description += comment + "\n"
			} else {
				section["#"] += comment + "\n"
			}
			continue
		}
		if section == nil {
			if trimmed != "" {
				c.special += line
			}
			continue
		}
		if m := confArgs.FindStringSubmatch(trimmed); m != nil {
			section["args"] = m[1]
		} else if m := confLine.FindStringSubmatch(trimmed); m != nil {
			section[m[1]] = m[2]
		}
	}
	return c
}

// String is the file's text.
func (c *conf) String() string {
	var b strings.Builder
	describe := func(text string) {
		for line := range strings.Lines(text) {
			b.WriteString("#" + line)
		}
	}
	describe(c.description)
	write := func(section map[string]string) {
		describe(section["#"])
		for _, key := range slices.Sorted(maps.Keys(section)) {
			if key == "#" {
				continue
			}
			section[key] = unquoted(key, section[key])
			b.WriteString(key + ": " + section[key] + "\n")
		}
	}
	write(c.main)
	if len(c.pending) > 0 {
		b.WriteString("\n[PENDING]\n")
		write(c.pending)
	}
	b.WriteString(c.special)
	for _, name := range slices.Sorted(maps.Keys(c.snapshots)) {
		b.WriteString("\n[" + name + "]\n")
		write(c.snapshots[name])
	}
	return b.String()
}

// unquoted is what PVE makes of a text without a format when it writes it: quotes around the whole go.
func unquoted(key, value string) string {
	if key == "args" && len(value) > 1 && strings.HasPrefix(value, `"`) && strings.HasSuffix(value, `"`) {
		return value[1 : len(value)-1]
	}
	return value
}

// next is the configuration with what is pending applied.
func (c *conf) next() map[string]string {
	all := maps.Clone(c.main)
	for _, key := range c.deletes() {
		delete(all, key)
	}
	for key, value := range c.pending {
		if key != "delete" {
			all[key] = value
		}
	}
	return all
}

// deletes are the options that are to go.
func (c *conf) deletes() []string {
	return strings.FieldsFunc(c.pending["delete"], func(r rune) bool { return r == ',' })
}

func (c *conf) setDeletes(names []string) {
	delete(c.pending, "delete")
	if len(names) > 0 {
		c.pending["delete"] = strings.Join(names, ",")
	}
}

// apply makes pending changes of the given options the active ones.
func (c *conf) apply(which func(key string) bool) {
	keep := slices.DeleteFunc(c.deletes(), func(key string) bool {
		if which(key) {
			delete(c.main, key)
		}
		return which(key)
	})
	c.setDeletes(keep)
	for key, value := range c.pending {
		if key != "delete" && which(key) {
			c.main[key] = value
			delete(c.pending, key)
		}
	}
}

// cleanup drops pending changes that change nothing.
func (c *conf) cleanup() {
	for key, value := range c.pending {
		if current, ok := c.main[key]; ok && key != "delete" && current == value {
			delete(c.pending, key)
		}
	}
	c.setDeletes(slices.DeleteFunc(c.deletes(), func(key string) bool { _, ok := c.main[key]; return !ok }))
}

// drive is a drive of a configuration.
type drive struct {
	id      string
	volume  string
	options []option
}

var driveID = regexp.MustCompile(`^(ide|scsi|virtio|sata|efidisk)(\d+)$`)

// drives are those of the main section, in the order in which PVE goes through them.
func (c *conf) drives() []drive {
	var all []drive
	for key, value := range c.main {
		if driveID.MatchString(key) {
			all = append(all, parseDrive(key, value))
		}
	}
	order := []string{"ide", "scsi", "virtio", "sata", "efidisk"}
	slices.SortFunc(all, func(a, b drive) int {
		return cmp.Or(
			slices.Index(order, a.bus())-slices.Index(order, b.bus()),
			a.number()-b.number())
	})
	return all
}

func parseDrive(id, value string) drive {
	d := drive{id: id}
	for i, part := range strings.Split(value, ",") {
		k, v, named := strings.Cut(part, "=")
		switch {
		case i == 0 && !named:
			d.volume = part
		case k == "file":
			d.volume = v
		default:
			d.options = append(d.options, option{k, v})
		}
	}
	return d
}

// String is the drive's value in a configuration.
func (d drive) String() string {
	text := d.volume
	for _, o := range d.options {
		text += "," + o.name + "=" + o.value
	}
	return text
}

func (d drive) get(name string) string {
	for _, o := range d.options {
		if o.name == name {
			return o.value
		}
	}
	return ""
}

func (d drive) bus() string { return driveID.FindStringSubmatch(d.id)[1] }

func (d drive) number() int {
	n, _ := strconv.Atoi(driveID.FindStringSubmatch(d.id)[2]) // digits
	return n
}

func (d drive) cdrom() bool    { return d.get("media") == "cdrom" }
func (d drive) iothread() bool { return d.get("iothread") == "1" }

// format is the volume's format, which its name tells.
func (d drive) format() string {
	if f := d.get("format"); f != "" {
		return f
	}
	if strings.HasSuffix(d.volume, ".qcow2") {
		return "qcow2"
	}
	return "raw"
}

// size is the drive's size in bytes.
func (d drive) size() (int64, error) {
	text := d.get("size")
	unit, ok := map[string]int64{"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[text[max(0, len(text)-1):]]
	n, err := strconv.ParseInt(strings.TrimRight(text, "KMG"), 10, 64)
	if err != nil || !ok {
		return 0, fmt.Errorf("%s: size %q is not such as 64M", d.id, text)
	}
	return n * unit, nil
}

// layout is where things are that a command line names.
type layout struct {
	run      string // /var/run/qemu-server
	events   string // /var/run/qmeventd.sock
	firmware string // /usr/share/pve-edk2-firmware//OVMF_CODE_4M.secboot.fd
	storage  string // /var/lib/vz
}

// volume is a volume's path. The storage local has folders; those of all others are flat, and their volumes are files here.
func (l layout) volume(id string) string {
	storage, name, named := strings.Cut(id, ":")
	switch {
	case !named:
		return id // a path
	case storage != "local":
		return filepath.Join(l.storage, "volumes", storage, name)
	case strings.HasPrefix(name, "iso/"):
		return filepath.Join(l.storage, "template", name)
	case strings.HasPrefix(name, "snippets/"):
		return filepath.Join(l.storage, name)
	}
	return filepath.Join(l.storage, "images", name)
}
