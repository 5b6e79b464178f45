package proxmox

import (
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// ErrConflict tells that other arguments use what the backup socket needs.
var ErrConflict = errors.New("in the way of the backup socket")

// Socket is the backup socket of a VM.
type Socket struct {
	VMID VMID
	Dir  string // the folder where it is: a host's Run
}

// Socket is the VM's backup socket on this host.
func (h Host) Socket(vmid VMID) Socket { return Socket{VMID: vmid, Dir: h.Run} }

// Path is the socket's path.
func (s Socket) Path() string { return filepath.Join(s.Dir, s.VMID.String()+"-backup.qmp") }

// id is the name of our character device. PVE's own monitors are made in the same way, with the names qmp and qmp-event.
// The name tells ours from others' wherever its socket is, which -qmp, without a name, would not; QEMU lists it too.
const id = "qmchain"

// earlier are names that documentation has told people to use.
var earlier = []string{"qmp-backup"}

// words are the arguments that make the socket.
func (s Socket) words() []string {
	path := strings.ReplaceAll(s.Path(), ",", ",,") // QEMU's escape
	return []string{"-chardev", "socket,id=" + id + ",path=" + path + ",server=on,wait=off", "-mon", "chardev=" + id + ",mode=control"}
}

// Finding is what an args option has of our backup sockets.
type Finding struct {
	// Present: there is something of ours. Right: exactly one whole backup socket, and it is this VM's.
	Present, Right bool
	// Faults say what is wrong where something is present and not right.
	Faults []string

	ours   []piece // what Remove takes away
	excess []piece // what Add takes away: all of ours but the right one
}

// piece is an option with its value, or half of that.
type piece struct{ start, end int }

// Look finds our backup sockets in an args option: character devices with our name, or with the path that backup
// sockets have, of whatever VM, and their monitors. The error is a *QuoteError.
func (s Socket) Look(args string) (Finding, error) {
	words, err := Shellwords(args)
	if err != nil {
		return Finding{}, err
	}
	return s.look(words), nil
}

// unit is a backup socket: a character device and its monitor, or -qmp, which is both in one.
type unit struct {
	id       string // of a character device
	pieces   []piece
	monitors int
	faults   []string
}

// argument is an option of QEMU's with its value.
type argument struct {
	piece
	option string // without dashes; "" for a value without an option
	value  string
	fields keyvals
}

func (s Socket) look(words []Word) Finding {
	args := arguments(words)
	var units []*unit
	theirs := map[string]bool{} // names of others' character devices
	for _, a := range args {
		if !a.isSocket() {
			continue
		}
		path := a.path()
		ofVM, known := s.backupPath(path)
		name := a.fields.get("id")
		if !known && (name != id || a.option == "qmp") {
			theirs[name] = true
			continue
		}
		u := &unit{id: name, pieces: []piece{a.piece}}
		units = append(units, u)
		switch {
		case !known:
			u.fault("its path is %s, not %s", path, s.Path())
		case ofVM != s.VMID:
			u.fault("it is that of VM %s", ofVM)
		case !samePath(path, s.Path()):
			u.fault("its path is %s, not %s", path, s.Path())
		}
		switch a.option {
		case "":
			u.fault("-chardev or -qmp is missing")
		case "qmp":
			u.monitors++
		}
		u.checkServer(a.fields)
	}
	for _, a := range args {
		name, control := a.monitorOf()
		if name == "" || theirs[name] {
			continue
		}
		i := slices.IndexFunc(units, func(u *unit) bool { return u.id == name })
		if i < 0 {
			if name != id && !slices.Contains(earlier, name) {
				continue
			}
			// A monitor of a device that is not there: QEMU would not start.
			units = append(units, &unit{id: name, monitors: 1, pieces: []piece{a.piece}, faults: []string{"-chardev is missing"}})
			continue
		}
		u := units[i]
		u.pieces = append(u.pieces, a.piece)
		u.monitors++
		if !control {
			u.fault("its monitor is not -mon with mode=control")
		}
	}
	var f Finding
	for _, u := range units {
		if u.monitors == 0 {
			u.fault("-mon is missing")
		}
		if u.monitors > 1 {
			u.fault("it has %d monitors", u.monitors)
		}
		if theirs[u.id] && u.id != "" {
			u.fault("its name %s is somebody else's too", u.id)
		}
		f.ours = append(f.ours, u.pieces...)
		f.Faults = append(f.Faults, u.faults...)
		if len(u.faults) == 0 && !f.Right {
			f.Right = true
			continue
		}
		f.excess = append(f.excess, u.pieces...)
	}
	if len(units) > 1 {
		f.Faults = append(f.Faults, fmt.Sprintf("there are %d", len(units)))
	}
	f.Present, f.Right = len(units) > 0, f.Right && len(units) == 1
	return f
}

func (u *unit) fault(format string, args ...any) {
	u.faults = append(u.faults, fmt.Sprintf(format, args...))
}

// checkServer looks at the options of a character device but its path. A server that waits for its client keeps the VM
// from starting.
func (u *unit) checkServer(fields keyvals) {
	if !fields.truth("server") {
		u.fault("server=on is missing")
	}
	if !fields.has("wait", "off") && !fields.has("nowait", "on") {
		u.fault("wait=off is missing")
	}
	for _, f := range fields {
		switch f.key {
		case "backend", "unix", "id", "path", "server", "wait", "nowait", "logfile", "logappend":
		default:
			u.fault("it has the option %s", f.key)
		}
	}
}

// Add returns args with exactly one backup socket: what is right stays, other sockets of ours go, and if none was right
// one is appended. All else stays as it is. The error is a *QuoteError or ErrConflict.
func (s Socket) Add(args string) (string, error) {
	f, err := s.Look(args)
	if err != nil {
		return "", err
	}
	rest := without(args, f.excess)
	if len(f.excess) == len(f.ours) { // none is right
		if err := s.conflict(rest); err != nil {
			return "", err
		}
		for _, word := range s.words() {
			rest = strings.TrimLeft(rest+" "+quoteWord(word), " ")
		}
	}
	return stable(rest), nil
}

// Remove returns args without our backup sockets. The error is a *QuoteError.
func (s Socket) Remove(args string) (string, error) {
	f, err := s.Look(args)
	if err != nil {
		return "", err
	}
	return stable(without(args, f.ours)), nil
}

// conflict looks for others' use of the socket's path.
func (s Socket) conflict(args string) error {
	words, err := Shellwords(args)
	if err != nil {
		return err
	}
	for i, w := range words {
		if i == len(words)-1 && slices.Contains([]string{"chardev", "mon", "qmp"}, optionName(w.Text)) {
			return fmt.Errorf("%s at the end of args has no value: %w", w.Text, ErrConflict)
		}
		if strings.Contains(w.Text, s.Path()) {
			return fmt.Errorf("args use %s for something else, %q: %w", s.Path(), w.Text, ErrConflict)
		}
	}
	return nil
}

// without takes pieces out of args, each with the space after it.
func without(args string, pieces []piece) string {
	pieces = slices.SortedFunc(slices.Values(pieces), func(a, b piece) int { return a.start - b.start })
	var b strings.Builder
	at := 0
	for _, p := range pieces {
		b.WriteString(args[at:p.start])
		at = p.end
		for at < len(args) && space(args[at]) {
			at++
		}
	}
	b.WriteString(args[at:])
	return strings.Trim(b.String(), whitespace) // as PVE does when it reads the option
}

// stable makes args something that PVE does not change when it writes it: it takes away quotes around the whole, even
// where they are those of two words. An empty pair of the other quotes before the first word means nothing.
func stable(args string) string {
	if len(args) > 1 && strings.HasPrefix(args, `"`) && strings.HasSuffix(args, `"`) {
		return "''" + args
	}
	return args
}

// arguments groups words into options and their values, as far as sockets are concerned.
func arguments(words []Word) []argument {
	var args []argument
	for i := 0; i < len(words); i++ {
		w := words[i]
		option := optionName(w.Text)
		switch option {
		case "chardev", "mon", "qmp":
			if i+1 < len(words) {
				i++
				value := words[i]
				args = append(args, argument{piece{w.Start, value.End}, option, value.Text, parseKeyvals(value.Text)})
			}
		case "":
			// The value of another option, or of none.
			if i == 0 || optionName(words[i-1].Text) == "" {
				args = append(args, argument{piece{w.Start, w.End}, "", w.Text, parseKeyvals(w.Text)})
			}
		}
	}
	return args
}

// optionName is the name of an option of QEMU's, which can have one dash or two; or "". What is done alike has one name.
func optionName(word string) string {
	name, isOption := strings.CutPrefix(word, "-")
	if !isOption || name == "" {
		return ""
	}
	name = strings.TrimPrefix(name, "-")
	if name == "qmp-pretty" {
		return "qmp"
	}
	return name
}

// isSocket tells whether it makes a Unix socket for a character device.
func (a argument) isSocket() bool {
	switch a.option {
	case "chardev":
		return true // names of others' devices matter, whatever they are
	case "qmp":
		return strings.HasPrefix(a.value, "unix:")
	case "":
		return strings.HasPrefix(a.value, "unix:") || strings.HasPrefix(a.value, "socket,")
	}
	return false
}

// path is that of the socket.
func (a argument) path() string {
	if path, found := strings.CutPrefix(a.fields.first(), "unix:"); found {
		return path
	}
	return a.fields.get("path")
}

// monitorOf is the name of the character device that it puts a monitor on, if it does, and whether that is QMP.
func (a argument) monitorOf() (name string, control bool) {
	switch a.option {
	case "mon":
		if name = a.fields.get("chardev"); name == "" {
			name = a.fields.first()
		}
		return name, a.fields.has("mode", "control")
	case "qmp":
		name, _ = strings.CutPrefix(a.value, "chardev:")
		if name == a.value {
			return "", false
		}
		return name, true
	case "": // all that is left of a -mon
		if strings.HasPrefix(a.value, "chardev=") {
			return a.fields.get("chardev"), false
		}
	}
	return "", false
}

var backupName = regexp.MustCompile(`^([1-9]\d{2,8})-backup\.qmp$`)

// backupPath tells whether a path is a backup socket's, and of which VM.
func (s Socket) backupPath(path string) (VMID, bool) {
	m := backupName.FindStringSubmatch(filepath.Base(path))
	if m == nil || !slices.ContainsFunc([]string{s.Dir, Local().Run}, func(dir string) bool { return samePath(filepath.Dir(path), dir) }) {
		return 0, false
	}
	vmid, err := ParseVMID(m[1])
	return vmid, err == nil
}

// samePath knows that /var/run is a link to /run.
func samePath(a, b string) bool {
	norm := func(p string) string {
		p = filepath.Clean(p)
		if rest, found := strings.CutPrefix(p, "/run/"); found {
			return "/var/run/" + rest
		}
		return p
	}
	return norm(a) == norm(b)
}

// keyvals is a value of QEMU's -chardev and the like: the kind, then key=value or a bare key, which means on.
type keyvals []keyval

type keyval struct {
	key, value string
	bare       bool
}

func parseKeyvals(text string) keyvals {
	var kvs keyvals
	for i, part := range splitCommas(text) {
		key, value, hasValue := strings.Cut(part, "=")
		kv := keyval{key: key, value: value, bare: !hasValue}
		switch {
		case i == 0 && (!hasValue || strings.HasPrefix(part, "unix:")):
			kv = keyval{key: "backend", value: part, bare: true}
		case !hasValue:
			kv.value = "on"
		}
		kvs = append(kvs, kv)
	}
	return kvs
}

// splitCommas splits at single commas; two of them are one in a value.
func splitCommas(text string) []string {
	var parts []string
	var part strings.Builder
	for i := 0; i < len(text); i++ {
		switch {
		case text[i] != ',':
			part.WriteByte(text[i])
		case i+1 < len(text) && text[i+1] == ',':
			part.WriteByte(',')
			i++
		default:
			parts = append(parts, part.String())
			part.Reset()
		}
	}
	return append(parts, part.String())
}

// first is the kind, or "".
func (k keyvals) first() string { return k.get("backend") }

// get is the last value of a key, as for QEMU; or "".
func (k keyvals) get(key string) string {
	for _, kv := range slices.Backward(k) {
		if kv.key == key {
			return kv.value
		}
	}
	return ""
}

func (k keyvals) has(key, value string) bool { return k.get(key) == value }

func (k keyvals) truth(key string) bool { return truth(k.get(key), false) }
