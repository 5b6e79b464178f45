// Package mountinfo reads what is mounted where.
package mountinfo

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strings"
)

// Path is the kernel's list. Who polls it learns of changes, proc_pid_mountinfo(5).
const Path = "/proc/self/mountinfo"

// Entry is a line of the list.
type Entry struct {
	ID     string // unique among the mounts that there are; given to another one afterwards
	Device string // MAJOR:MINOR
	Point  string
	Type   string // of the file system
	Source string
	// Options are those of the mount and of the file system, with commas between.
	Options string
}

// Read returns the mounts of this process's mount namespace. Of several at one path the last is on top.
func Read() ([]Entry, error) {
	f, err := os.Open(Path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return parse(f)
}

func parse(r io.Reader) ([]Entry, error) {
	var mounts []Entry
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20) // overlayfs has long lines
	for lines.Scan() {
		fields := strings.Split(lines.Text(), " ")
		sep := 6
		for sep < len(fields) && fields[sep] != "-" { // optional fields
			sep++
		}
		if sep+3 >= len(fields) {
			return nil, fmt.Errorf("%s: line %q", Path, lines.Text())
		}
		mounts = append(mounts, Entry{
			ID:      fields[0],
			Device:  fields[2],
			Point:   unescape(fields[4]),
			Type:    fields[sep+1],
			Source:  unescape(fields[sep+2]),
			Options: fields[5] + "," + fields[sep+3],
		})
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("%s: %w", Path, err)
	}
	return mounts, nil
}

// unescape undoes what the kernel does to blanks, line feeds and backslashes: three octal digits.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) && isOctal(s[i+1]) && isOctal(s[i+2]) && isOctal(s[i+3]) {
			b.WriteByte((s[i+1]-'0')<<6 | (s[i+2]-'0')<<3 | (s[i+3] - '0'))
			i += 3
			continue
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

func isOctal(c byte) bool { return '0' <= c && c <= '7' }

// Top returns what is mounted at path, the topmost.
func Top(mounts []Entry, path string) (Entry, bool) {
	for i := len(mounts) - 1; i >= 0; i-- {
		if mounts[i].Point == path {
			return mounts[i], true
		}
	}
	return Entry{}, false
}
