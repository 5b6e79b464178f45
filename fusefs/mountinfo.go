package fusefs

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strings"
)

const mountinfoPath = "/proc/self/mountinfo"

// mountEntry is a line of /proc/self/mountinfo, proc_pid_mountinfo(5).
type mountEntry struct {
	id     string // unique among the mounts that there are; given to another one afterwards
	device string // MAJOR:MINOR
	point  string
	fsType string
	source string
}

// readMounts returns the mounts of this process's mount namespace. Of several at one path the last is on top.
func readMounts() ([]mountEntry, error) {
	f, err := os.Open(mountinfoPath)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return parseMounts(f)
}

func parseMounts(r io.Reader) ([]mountEntry, error) {
	var mounts []mountEntry
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20) // overlayfs has long lines
	for lines.Scan() {
		fields := strings.Split(lines.Text(), " ")
		sep := 6
		for sep < len(fields) && fields[sep] != "-" { // optional fields
			sep++
		}
		if sep+2 >= len(fields) {
			return nil, fmt.Errorf("%s: line %q", mountinfoPath, lines.Text())
		}
		mounts = append(mounts, mountEntry{
			id:     fields[0],
			device: fields[2],
			point:  unescapeMount(fields[4]),
			fsType: fields[sep+1],
			source: unescapeMount(fields[sep+2]),
		})
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("%s: %w", mountinfoPath, err)
	}
	return mounts, nil
}

// unescapeMount undoes what the kernel does to blanks, line feeds and backslashes: three octal digits.
func unescapeMount(s string) string {
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

// topMount returns what is mounted at path, the topmost.
func topMount(mounts []mountEntry, path string) (mountEntry, bool) {
	for i := len(mounts) - 1; i >= 0; i-- {
		if mounts[i].point == path {
			return mounts[i], true
		}
	}
	return mountEntry{}, false
}
