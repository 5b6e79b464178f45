package foreign

import (
	"bufio"
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"hash/adler32"
	"io"
	"os"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"qmchain/chain"
	"qmchain/chain/image"
	"qmchain/chain/virtnbd"
)

// Names of streams. libvirt's names of disks have no dots, so what is before the first
// is the disk's, whole.
var streamPattern = regexp.MustCompile(`^([A-Za-z0-9_-]+)\.(?:(full)|(copy)|inc\.([A-Za-z0-9._-]+)|diff\.([0-9]{1,12}))\.data$`)

const (
	sumSuffix        = ".chksum"
	cptSuffix        = ".cpt"
	checkpointFolder = "checkpoints"
	configName       = "vmconfig.%s.xml"
	firstCheckpoint  = "virtnbdbackup.0"

	streamBegin = "meta "
)

// stream is a file with a stream, by its name.
type stream struct {
	entry      entry
	disk       string
	level      chain.Level
	checkpoint string // of an increment
	epoch      int64  // of a diff
}

func parseStream(name string) (s stream, ok bool) {
	m := streamPattern.FindStringSubmatch(name)
	if m == nil {
		return stream{}, false
	}
	s.disk = m[1]
	switch {
	case m[2] != "":
		s.level = chain.Full
	case m[3] != "":
		s.level = chain.Copy
	case m[4] != "":
		s.level, s.checkpoint = chain.Inc, m[4]
	default:
		s.level = chain.Diff
		var err error
		if s.epoch, err = strconv.ParseInt(m[5], 10, 64); err != nil || s.epoch > lastSecond {
			return stream{}, false
		}
	}
	return s, true
}

// run names the run that the stream is of; its other files have that name too.
func (s stream) run() string {
	switch s.level {
	case chain.Inc:
		return s.checkpoint
	case chain.Diff:
		return fmt.Sprint(s.epoch)
	case chain.Copy:
		return "copy"
	}
	return firstCheckpoint
}

// isVirtnbd tells whether a directory holds streams, finished or not. Anybody may have a
// file of such a name, so it is looked into.
func isVirtnbd(d *dir) (bool, error) {
	entries, err := d.list(".")
	if err != nil {
		return false, err
	}
	for _, e := range entries {
		if _, ok := parseStream(strings.TrimSuffix(e.name, partSuffix)); !ok || !e.isFile() {
			continue
		}
		f, err := d.open(e.name, e)
		if err != nil {
			return false, err
		}
		begin := make([]byte, len(streamBegin))
		_, err = io.ReadFull(f, begin)
		_ = f.Close()
		if err == nil && string(begin) == streamBegin {
			return true, nil
		}
	}
	return false, nil
}

// domain is what is read of a domain's or a checkpoint's XML.
type domain struct {
	Name    string `xml:"name"`
	UUID    string `xml:"uuid"`
	Created int64  `xml:"creationTime"` // seconds, of a checkpoint
}

// readXML reads a file that the set can do without.
func readXML(d *dir, rel string, e entry, ok bool) domain {
	if !ok || !e.isFile() {
		return domain{}
	}
	out, err := look(d, "xml", rel, e, func(f *os.File) (domain, error) {
		var x domain
		text, err := readText(f)
		if err == nil && xml.Unmarshal(text, &x) != nil {
			x = domain{}
		}
		return x, err
	})
	if err != nil {
		return domain{}
	}
	return out
}

// virtnbdDomain returns the domain's name, "" if nothing tells it.
func virtnbdDomain(d *dir) (string, error) {
	entries, err := d.list(".")
	if err != nil {
		return "", err
	}
	name := ""
	for _, e := range entries {
		if domain, ok := strings.CutSuffix(e.name, cptSuffix); ok && e.isFile() && domain != "" {
			if name != "" {
				name = "" // two of them
				break
			}
			name = domain
		}
	}
	if name != "" {
		return name, nil
	}
	for _, e := range entries {
		if ok, _ := path.Match(fmt.Sprintf(configName, "*"), e.name); !ok {
			continue
		}
		if x := readXML(d, e.name, e, true); x.Name != "" {
			return x.Name, nil
		}
	}
	return "", nil
}

// virtnbdRuns returns all runs in a directory.
func virtnbdRuns(d *dir) ([]*run, error) {
	entries, err := d.list(".")
	if err != nil {
		return nil, err
	}
	checkpoints, err := d.list(checkpointFolder)
	if err != nil {
		checkpoints = nil // only times can be told worse without
	}
	var zeroes error
	if slices.ContainsFunc(entries, func(e entry) bool { return strings.HasSuffix(e.name, ".data"+sumSuffix) }) {
		zeroes = fmt.Errorf("increments of virtnbdbackup 2.x: %w", ErrZeroes)
	}
	runs := map[string]*run{}
	made := map[ref][]*stored{} // by checkpoint and disk: what can be a parent
	var all []*stored
	for _, e := range entries {
		f, ok := parseStream(e.name)
		if !ok || !e.isFile() {
			continue
		}
		f.entry = e
		s := readStream(d, f)
		if _, ok := find(entries, e.name+sumSuffix); ok {
			s.sum = e.name + sumSuffix
		}
		if f.level.Overlay() && zeroes != nil {
			s.warnings = append(s.warnings, zeroes)
		}
		all = append(all, s)
		if s.checkpoint = f.makes(s); s.checkpoint != "" {
			k := ref{s.checkpoint, f.disk}
			made[k] = append(made[k], s)
		}
		key := string(f.level) + "\x00" + f.run()
		r := runs[key]
		if r == nil {
			r = &run{key: key}
			r.describe(d, entries, f)
			runs[key] = r
		}
		s.run = r
		r.images = append(r.images, s)
		if t := f.time(s.meta, d, checkpoints); !t.IsZero() && (r.time.IsZero() || t.Before(r.time)) {
			r.time = t
		}
	}
	for _, s := range all {
		s.lineUp(made)
	}
	list := make([]*run, 0, len(runs))
	for _, r := range runs {
		if r.time.IsZero() {
			r.time = time.Unix(0, 0).UTC()
		}
		list = append(list, r)
	}
	return list, nil
}

// describe adds what the domain's XML of the run says.
func (r *run) describe(d *dir, entries []entry, f stream) {
	name := fmt.Sprintf(configName, f.run())
	e, ok := find(entries, name)
	if !ok || !e.isFile() {
		return
	}
	x := readXML(d, name, e, ok)
	r.files = []string{name}
	r.guest.VMName, r.guest.UUID = x.Name, x.UUID
}

// readStream reads what a stream says of itself. What is wrong with it becomes part of it.
func readStream(d *dir, f stream) *stored {
	s := &stored{disk: f.disk, level: f.level, file: f.entry.name, format: image.Stream, bytes: f.entry.info.Size()}
	m, err := look(d, "stream", s.file, f.entry, func(file *os.File) (virtnbd.Meta, error) {
		m, err := virtnbd.ReadMeta(file, f.entry.info.Size())
		if err != nil {
			return virtnbd.Meta{}, damage(err)
		}
		return *m, nil
	})
	if err == nil {
		s.meta, s.source, s.size = m, m.DiskFormat, m.VirtualSize
		s.stable = fmt.Sprintf("%+v", m)
		err = f.agrees(m)
	}
	s.refused = damage(err)
	return s
}

// agrees checks what a stream says of itself against its name.
func (s stream) agrees(m virtnbd.Meta) error {
	switch {
	case m.Disk != s.disk:
		return damaged("it is of disk %q", m.Disk)
	case m.Incremental != s.level.Overlay():
		return damaged("its name says %s, but what is in it does not", s.level)
	case s.level == chain.Inc && m.Checkpoint != s.checkpoint:
		return damaged("it is of checkpoint %q", m.Checkpoint)
	case m.Incremental && m.Parent == "":
		return damaged("it does not say what it was made on")
	case !m.Incremental && m.Parent != "":
		return damaged("it was made on %q, though it is no increment", m.Parent)
	}
	return nil
}

// makes is the checkpoint that its run made, if what is in it is of: "" for a diff, though
// it names one, and a copy.
func (s stream) makes(of *stored) string {
	switch {
	case s.level == chain.Inc:
		return s.checkpoint
	case s.level == chain.Full && of.refused == nil && of.meta.Checkpoint != "":
		return of.meta.Checkpoint
	case s.level == chain.Full: // so that its increments can say what they lack
		return firstCheckpoint
	}
	return ""
}

// lineUp finds what s was made on. made has what can be, by checkpoint and disk.
func (s *stored) lineUp(made map[ref][]*stored) {
	if s.refused == nil && s.checkpoint != "" && len(made[ref{s.checkpoint, s.disk}]) > 1 {
		s.refused = damaged("there is another one of checkpoint %q", s.checkpoint)
	}
	if !s.level.Overlay() || s.meta.Parent == "" {
		return
	}
	parents := made[ref{s.meta.Parent, s.disk}]
	if len(parents) > 0 {
		s.parent = parents[0]
		return
	}
	if s.refused == nil {
		s.refused = damaged("it was made on checkpoint %q of %s, which is missing", s.meta.Parent, s.disk)
	}
}

// time is when the run was. A diff's name has it. All others have the local time of the
// host that wrote them; the zone is told by the time at which libvirt made the checkpoint,
// which is of the same minute and in UTC. It is zero if nothing tells it.
func (s stream) time(m virtnbd.Meta, d *dir, checkpoints []entry) time.Time {
	if s.level == chain.Diff {
		return time.Unix(s.epoch, 0).UTC()
	}
	t := m.Date
	if !t.IsZero() && !m.Zoned {
		name := s.run() + ".xml"
		e, ok := find(checkpoints, name)
		if created := readXML(d, path.Join(checkpointFolder, name), e, ok).Created; created > 0 && created <= lastSecond {
			const quarter, most = 15 * time.Minute, 14 * time.Hour
			if zone := t.Sub(time.Unix(created, 0)).Round(quarter); zone.Abs() <= most {
				t = t.Add(-zone)
			}
		}
	}
	return t.Truncate(time.Second)
}

// verify compares a stream with its check sum.
func (s *Set) verify(ctx context.Context, l *stored) error {
	read := func(rel string) (*os.File, error) {
		info, err := s.dir.root.Lstat(rel)
		if err != nil {
			return nil, err
		}
		if !info.Mode().IsRegular() {
			return nil, image.ErrNotRegular
		}
		return s.dir.open(rel, entry{rel, info})
	}
	f, err := read(l.sum)
	if errors.Is(err, image.ErrNotRegular) {
		return damaged("%s: %v", l.sum, err)
	}
	if err != nil {
		return err
	}
	text, err := readText(f)
	_ = f.Close()
	if err != nil {
		return err
	}
	want, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 32)
	if err != nil {
		return damaged("%s holds no check sum", l.sum)
	}
	data, err := read(l.file)
	if err != nil {
		return err
	}
	defer data.Close()
	sum := adler32.New()
	in := bufio.NewReaderSize(data, 1<<20)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		if _, err := io.CopyN(sum, in, 1<<20); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return err
		}
	}
	if got := uint64(sum.Sum32()); got != want {
		return damaged("its check sum is %d, not %d", got, want)
	}
	return nil
}
