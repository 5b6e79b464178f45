package proxmox

import (
	"crypto/sha1"
	"encoding/hex"
	"maps"
	"net/url"
	"regexp"
	"slices"
	"strings"
)

// Options are those of one section, by name. Values are as they stand in the file.
type Options map[string]string

// Config is a VM's configuration.
type Config struct {
	VMID        VMID
	Digest      string // SHA-1 of the file, in hex
	Description string // decoded
	Options     Options
	// Pending are the options that change at the next start, PendingDelete those that go.
	Pending       Options
	PendingDelete []string
	Snapshots     []Snapshot         // in the order of the file
	Special       map[string]Options // [special:NAME]: cloudinit, fleecing
}

// Snapshot is a snapshot of a VM: its configuration at that moment.
type Snapshot struct {
	Name        string
	Description string
	Options     Options // with parent, snaptime and, with the state of the memory, vmstate
}

var (
	// Perl's \s has the vertical tab too, which Go's has not.
	sectionLine = regexp.MustCompile(`^\[([^\]]*)\][\s\v]*$`)
	snapshotRE  = regexp.MustCompile(`^[a-zA-Z][a-zA-Z0-9_-]+$`)
	argsLine    = regexp.MustCompile(`^args:[\s\v]*(.*[^\s\v])[\s\v]*$`)
	optionLine  = regexp.MustCompile(`^([a-z][a-z_-]*\d*):[\s\v]*(.+?)[\s\v]*$`)
)

// ParseConfig reads a configuration file as PVE does. Lines that it does not understand are ignored, as PVE ignores
// them; so there is no error.
func ParseConfig(vmid VMID, text []byte) *Config {
	digest := sha1.Sum(text)
	c := &Config{VMID: vmid, Digest: hex.EncodeToString(digest[:]), Options: Options{}, Pending: Options{}, Special: map[string]Options{}}
	section, description := c.Options, &c.Description
	pending := false
	for line := range strings.SplitSeq(string(text), "\n") {
		if m := sectionLine.FindStringSubmatch(line); m != nil {
			section, description = Options{}, new(string)
			special, isSpecial := strings.CutPrefix(strings.ToLower(m[1]), "special:")
			pending = strings.EqualFold(m[1], "pending")
			switch {
			case pending: // of two sections PVE keeps the second, of pending changes as of a snapshot
				c.Pending, c.PendingDelete = section, nil
			case isSpecial:
				c.Special[special] = section
			case snapshotRE.MatchString(m[1]):
				c.Snapshots = append(c.Snapshots, Snapshot{Name: m[1], Options: section})
				description = &c.Snapshots[len(c.Snapshots)-1].Description
			}
			continue
		}
		if comment, found := strings.CutPrefix(line, "#"); found {
			addLine(description, comment)
			continue
		}
		var key, value string
		if m := argsLine.FindStringSubmatch(line); m != nil {
			key, value = "args", m[1]
		} else if m := optionLine.FindStringSubmatch(line); m != nil {
			key, value = m[1], m[2]
		} else {
			continue
		}
		switch {
		case key == "description":
			addLine(description, value)
		case key == "delete":
			if pending { // it has no meaning elsewhere
				c.PendingDelete = pendingDelete(value)
			}
		case key == "cdrom": // the name that ide2 once had
			section["ide2"] = value
		default:
			section[key] = value
		}
	}
	c.Description = strings.TrimRight(c.Description, whitespace)
	for i, s := range c.Snapshots {
		c.Snapshots[i].Description = strings.TrimRight(s.Description, whitespace)
	}
	return c
}

// whitespace is Perl's.
const whitespace = " \t\n\v\f\r"

// addLine adds a line of a description, which PVE writes with URL's escapes.
func addLine(description *string, line string) {
	if text, err := url.PathUnescape(line); err == nil {
		line = text
	}
	*description += line + "\n"
}

// pendingDelete splits a pending section's list of names. An exclamation mark forces PVE's hand at unplugging; it is no
// part of the name.
func pendingDelete(list string) []string {
	names := fields(list)
	for i := range names {
		names[i] = strings.TrimPrefix(names[i], "!")
	}
	return names
}

// fields splits a list the way PVE does.
func fields(list string) []string {
	return strings.FieldsFunc(list, func(r rune) bool { return r == ',' || r == ';' || r == 0 || r < 0x80 && space(byte(r)) })
}

// Next is an option's value after the next start: the pending one, if there is one.
func (c *Config) Next(key string) (value string, ok bool) {
	if value, ok := c.Pending[key]; ok {
		return value, true
	}
	if slices.Contains(c.PendingDelete, key) {
		return "", false
	}
	value, ok = c.Options[key]
	return value, ok
}

// Lock is what PVE has locked the VM for (backup, clone, create, migrate, rollback, snapshot, snapshot-delete,
// suspending, suspended), or "".
func (c *Config) Lock() string { return c.Options["lock"] }

// Name is the VM's name, or "".
func (c *Config) Name() string { return c.Options["name"] }

// Template tells whether it is a template, which never runs.
func (c *Config) Template() bool { return truth(c.Options["template"], false) }

// Tags are the VM's tags.
func (c *Config) Tags() []string { return fields(c.Options["tags"]) }

// UUID is the SMBIOS UUID, which tells one VM from another; or "".
func (c *Config) UUID() string { return properties(c.Options["smbios1"], "")["uuid"] }

// Agent are the settings of a VM's guest agent.
type Agent struct {
	Enabled bool
	Freeze  bool // its file systems are to be frozen for a backup
	Type    string
}

// Agent reads the option agent.
func (c *Config) Agent() Agent {
	p := properties(c.Options["agent"], "enabled")
	a := Agent{Enabled: truth(p["enabled"], false), Freeze: true, Type: p["type"]}
	if a.Type == "" {
		a.Type = "virtio"
	}
	// One setting under the names that it has had over time.
	for _, name := range []string{"freeze-fs-on-backup", "guest-fsfreeze", "freeze-fs"} {
		a.Freeze = truth(p[name], a.Freeze)
	}
	return a
}

// Portable is what a restore needs of the configuration: the main section, without what belongs to this moment of this
// VM (its lock, its snapshots' parent, volumes that it does not use). PVE's own backups hold the same.
func (c *Config) Portable() string {
	var b strings.Builder
	for line := range strings.Lines(c.Description) {
		b.WriteString("#" + encodeDescription(strings.TrimSuffix(line, "\n")) + "\n")
	}
	for _, key := range slices.Sorted(maps.Keys(c.Options)) {
		if key == "lock" || key == "parent" || strings.HasPrefix(key, "unused") {
			continue
		}
		b.WriteString(key + ": " + c.Options[key] + "\n")
	}
	return b.String()
}

// encodeDescription writes what addLine reads: as PVE, with escapes for control characters, %, : and what is not ASCII.
func encodeDescription(line string) string {
	var b strings.Builder
	for i := range len(line) {
		if c := line[i]; c < ' ' || c > '~' || c == '%' || c == ':' {
			b.WriteString("%" + strings.ToUpper(hex.EncodeToString([]byte{c})))
			continue
		}
		b.WriteByte(line[i])
	}
	return b.String()
}

// properties splits a value such as "1,freeze-fs=0". A part without a name is the one of the given name.
func properties(value, first string) Options {
	p := Options{}
	for part := range strings.SplitSeq(value, ",") {
		key, v, named := strings.Cut(part, "=")
		if !named {
			key, v = first, part
		}
		if key != "" && strings.TrimSpace(v) != "" {
			p[strings.TrimSpace(key)] = v
		}
	}
	return p
}

// truth reads one of PVE's booleans.
func truth(value string, otherwise bool) bool {
	switch strings.ToLower(value) {
	case "1", "on", "yes", "true":
		return true
	case "0", "off", "no", "false":
		return false
	}
	return otherwise
}
