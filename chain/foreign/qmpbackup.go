package foreign

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"qmchain/chain"
	"qmchain/chain/image"
	"qmchain/chain/qcow2"
)

var (
	uuidPattern  = regexp.MustCompile(`^[0-9A-Fa-f-]{36}$`)
	monthPattern = regexp.MustCompile(`^[0-9]{4}-[0-9]{2}$`)
	// The name of a disk can be anything, so the rest of the file's name is told by
	// its beginning.
	imagePattern = regexp.MustCompile(`^(FULL|INC|COPY)-([0-9]{1,12})-(.+)$`)
)

const (
	uuidFile     = "uuid"
	configSuffix = ".config"
	partSuffix   = ".partial"

	maxSnapshots = 4096

	// What `qmprestore snapshotrebase` calls its internal snapshots: the full, and
	// the times of the increments.
	fullSnapshot = "FULL-BACKUP"
	snapshotTime = "2006-01-02-15:04:05"
)

// UTCSnapshots is the identity (see qcow2.SetIdentity) of a full whose snapshots are
// called by UTC: those that were not made by qmprestore but by package standard.
const UTCSnapshots = "qmchain: snapshots are named by UTC"

// target is a directory that qmpbackup was given, or a month of it.
type target struct {
	d       *dir
	rel     string // "." or the month's folder
	entries []entry
	configs map[string]entry // by disk
	chains  []*lineage
	parts   map[string]bool // disks of which there is a DISK.partial
	part    string          // one of them
}

// lineage is all that a folder has of one disk.
type lineage struct {
	t      *target
	disk   string
	folder string
	dated  []dated
	bare   *entry // DISK
	// Names that say what bare is, or was: FULL-DISK, COPY-DISK.
	fullLink, copyLink bool
}

// dated is an image with a time stamp in its name.
type dated struct {
	entry entry
	level chain.Level
	epoch int64
}

// isQmpbackup tells whether a directory is a target of qmpbackup, or holds months.
func isQmpbackup(d *dir) (bool, error) {
	targets, err := qmpbackupTargets(d)
	return len(targets) > 0, err
}

// qmpbackupTargets returns the targets in a directory: itself, and those of months.
func qmpbackupTargets(d *dir) ([]*target, error) {
	top, err := readTarget(d, ".")
	if err != nil {
		return nil, err
	}
	var targets []*target
	if top.isTarget() {
		targets = append(targets, top)
	}
	for _, e := range top.entries {
		if _, disk := top.configs[e.name]; disk || !e.isDir() || !monthPattern.MatchString(e.name) {
			continue
		}
		month, err := readTarget(d, e.name)
		if err != nil {
			return nil, err
		}
		if month.isTarget() {
			targets = append(targets, month)
		}
	}
	return targets, nil
}

// isTarget: dated images are enough. Without any, it may be that a first run failed, or
// that nothing has a time stamp; but anybody may have files X and X.config.
func (t *target) isTarget() bool {
	for _, c := range t.chains {
		if len(c.dated) > 0 || c.bare != nil && (c.fullLink || c.copyLink) {
			return true
		}
	}
	e, ok := find(t.entries, uuidFile)
	if len(t.configs) == 0 || !ok || !e.isFile() {
		return false
	}
	text, err := t.d.text(path.Join(t.rel, uuidFile), e)
	return err == nil && uuidPattern.MatchString(strings.TrimSpace(string(text)))
}

// readTarget finds out which images are where.
func readTarget(d *dir, rel string) (*target, error) {
	t := &target{d: d, rel: rel, configs: map[string]entry{}, parts: map[string]bool{}}
	var err error
	if t.entries, err = d.list(rel); err != nil {
		return nil, err
	}
	for _, e := range t.entries {
		if disk, ok := strings.CutSuffix(e.name, configSuffix); ok && disk != "" && e.isFile() {
			t.configs[disk] = e
		}
	}
	t.find(rel, t.entries, "")
	for _, e := range t.entries {
		if !e.isDir() || rel == "." && monthPattern.MatchString(e.name) && !t.isDisk(e.name) {
			continue
		}
		entries, err := d.list(path.Join(rel, e.name))
		if err != nil && t.isDisk(e.name) {
			return nil, err
		}
		t.find(path.Join(rel, e.name), entries, e.name)
	}
	return t, nil
}

func (t *target) isDisk(name string) bool {
	_, ok := t.configs[name]
	return ok
}

// find adds the chains that are in one folder: of the disk only, if it is a disk's own.
func (t *target) find(folder string, entries []entry, only string) {
	byDisk := map[string]*lineage{}
	isDisk := func(name string) bool { return t.isDisk(name) && (only == "" || name == only) }
	of := func(disk string) *lineage {
		c := byDisk[disk]
		if c == nil {
			c = &lineage{t: t, disk: disk, folder: folder}
			byDisk[disk] = c
			t.chains = append(t.chains, c)
		}
		return c
	}
	for _, e := range entries {
		if f, disk, ok := parseImage(e); ok && (isDisk(disk) || disk == only) {
			c := of(disk)
			c.dated = append(c.dated, f)
			continue
		}
		// Links dangle when the set has moved, and are files in some copies of it. What
		// they say of DISK is in their names.
		if disk, ok := strings.CutPrefix(e.name, "FULL-"); ok && isDisk(disk) {
			of(disk).fullLink = true
		}
		if disk, ok := strings.CutPrefix(e.name, "COPY-"); ok && isDisk(disk) {
			of(disk).copyLink = true
		}
		if disk, ok := strings.CutSuffix(e.name, partSuffix); ok && isDisk(disk) {
			t.parts[disk], t.part = true, disk
		}
		if e.isFile() && isDisk(e.name) {
			of(e.name).bare = &e
		}
	}
}

// parseImage takes the name of a dated image apart. What a run left unfinished has
// another name, and so has its fleece.
func parseImage(e entry) (f dated, disk string, ok bool) {
	m := imagePattern.FindStringSubmatch(e.name)
	if m == nil || !e.isFile() {
		return dated{}, "", false
	}
	epoch, err := strconv.ParseInt(m[2], 10, 64)
	if err != nil || epoch > lastSecond {
		return dated{}, "", false
	}
	level := map[string]chain.Level{"FULL": chain.Full, "INC": chain.Inc, "COPY": chain.Copy}[m[1]]
	return dated{e, level, epoch}, m[3], true
}

// qmpbackupRuns returns all runs in a directory.
func qmpbackupRuns(d *dir) ([]*run, error) {
	targets, err := qmpbackupTargets(d)
	if err != nil {
		return nil, err
	}
	var runs []*run
	for _, t := range targets {
		b := &builder{t: t, runs: map[string]*run{}, has: map[ref]bool{}}
		for _, c := range t.chains {
			b.add(c)
		}
		for _, r := range b.runs {
			runs = append(runs, r)
		}
	}
	return runs, nil
}

// builder makes the runs of one target.
type builder struct {
	t    *target
	runs map[string]*run
	has  map[ref]bool // by key of a run and disk
}

// put puts s into the run of that time. Only a COPY is no part of a run that others of
// that second are of.
func (b *builder) put(s *stored, epoch int64) {
	what := fmt.Sprint(epoch)
	if epoch == bareEpoch {
		what = "bare"
	}
	if s.level == chain.Copy {
		what += " copy"
	}
	key := b.t.rel + "\x00" + what
	if b.has[ref{key, s.disk}] {
		key += "\x00" + s.file + "\x00" + s.snapshot
	}
	b.has[ref{key, s.disk}] = true
	r := b.runs[key]
	if r == nil {
		r = &run{key: key, time: time.Unix(max(0, epoch), 0).UTC()}
		if epoch == bareEpoch {
			r.note = "its files have no time stamps in their names: when it was made is not known"
		}
		b.runs[key] = r
	}
	s.run = r
	r.images = append(r.images, s)
}

// bareEpoch stands for the time of a file without one in its name. It is not known, so
// the point's id has the beginning of the epoch for it: before all that has a time.
const bareEpoch = -1

// add adds what is known of one disk in one folder.
func (b *builder) add(c *lineage) {
	slices.SortFunc(c.dated, func(x, y dated) int {
		return cmp.Or(cmp.Compare(x.epoch, y.epoch), strings.Compare(x.entry.name, y.entry.name)) // COPY, FULL, INC
	})
	var last, bare *stored // that the next increment is made on; that without a time stamp
	if c.bare != nil {
		s, _ := c.image(*c.bare, c.bareLevel())
		s.stable = fmt.Sprint(c.bare.info.Size(), c.bare.info.ModTime().UnixNano())
		if s.level == chain.Full {
			s.warnings = append(s.warnings, c.bareDoubts()...)
			last, bare = s, s
		}
		b.put(s, bareEpoch)
	}
	lastEpoch := int64(bareEpoch)
	var merged []int64
	exact := false // merged are of a known zone
	for _, f := range c.dated {
		s, h := c.image(f.entry, f.level)
		switch f.level {
		case chain.Full:
			last, merged = b.full(s, h, f.epoch)
			exact = h.utc
		case chain.Inc:
			s.parent = last
			if slices.ContainsFunc(merged, func(t int64) bool { return t == f.epoch || !exact && sameButZone(t, f.epoch) }) {
				s.refused = damaged("it was merged into %s already", short(last.file))
				b.put(s, f.epoch)
				continue
			}
			s.checkInc(f.epoch == lastEpoch, bare)
			b.put(s, f.epoch)
			last = s
		default:
			b.put(s, f.epoch)
			continue
		}
		lastEpoch = f.epoch
	}
}

// sameButZone reports whether two times can be the same, one of them in an unknown zone.
func sameButZone(a, b int64) bool {
	const quarter, most = 15 * 60, 14 * 3600
	d := max(a-b, b-a)
	return d <= most && d%quarter == 0
}

// checkInc looks for what contradicts that s, an increment, was made on its parent: that
// both are of the same second, for one, or that there is a full without a time stamp.
func (s *stored) checkInc(sameSecond bool, bare *stored) {
	p := s.parent
	switch {
	case s.refused != nil:
	case s.format == image.Raw:
		s.refused = damaged("a raw increment: what the guest zeroed can't be told from what it left alone")
	case p == nil:
		s.refused = damaged("there is no full before it")
	case sameSecond:
		s.refused = damaged("%s has the same time stamp: which of them was first is not known", short(p.file))
	case s.backing != "" && path.Base(s.backing) != short(p.file):
		s.refused = damaged("its header names the backing file %q, but by the time stamps it is made on %s", s.backing, short(p.file))
	}
	if bare != nil && p != bare && p.level == chain.Full {
		s.warnings = append(s.warnings, fmt.Errorf("%s: %w: it may be %s or %s", s.file, ErrOrder, short(p.file), short(bare.file)))
	}
}

// bareLevel is what the file without a time stamp is: a copy, if only the link of one
// names it and no increment needs it.
func (c *lineage) bareLevel() chain.Level {
	if c.copyLink && !c.fullLink {
		i := slices.IndexFunc(c.dated, func(f dated) bool { return f.level != chain.Copy })
		if i < 0 || c.dated[i].level == chain.Full {
			return chain.Copy
		}
	}
	return chain.Full
}

// bareDoubts says what hints at another run having replaced the file without a time
// stamp.
func (c *lineage) bareDoubts() (doubts []error) {
	file := path.Join(c.folder, c.bare.name)
	doubt := func(format string, args ...any) {
		doubts = append(doubts, fmt.Errorf("%s: %w: %s", file, ErrOrder, fmt.Sprintf(format, args...)))
	}
	if c.copyLink {
		doubt("a copy may have replaced the full, as COPY-%s is there", c.disk)
	}
	// A run that was to replace this disk's file too would have left its like.
	if len(c.t.parts) > 0 && !c.t.parts[c.disk] {
		doubt("a later full or copy, of which %s%s is left, may have replaced it", c.t.part, partSuffix)
	}
	for _, f := range c.dated {
		if f.level == chain.Inc && c.bare.mtime().Unix() > f.epoch {
			doubt("the file is newer than %s", f.entry.name)
			break
		}
	}
	return doubts
}

// config is what is read of DISK.config.
type config struct {
	Format      string `json:"format"`
	VirtualSize int64  `json:"virtual-size"`
}

// config reads what the guest's image was at the last run.
func (c *lineage) config() (config, error) {
	e, ok := c.t.configs[c.disk]
	if !ok {
		return config{}, damaged("%s%s is missing, so its format is not known", c.disk, configSuffix)
	}
	return look(c.t.d, "config", path.Join(c.t.rel, e.name), e, func(f *os.File) (config, error) {
		var j config
		text, err := readText(f)
		if err != nil {
			return j, err
		}
		if err := json.Unmarshal(text, &j); err != nil {
			return config{}, damaged("%s: %v", e.name, err)
		}
		if j.VirtualSize < 0 {
			return config{}, damaged("%s: virtual size %d", e.name, j.VirtualSize)
		}
		return j, nil
	})
}

// image reads what a file says of itself. What is wrong with it becomes part of it.
func (c *lineage) image(e entry, level chain.Level) (*stored, head) {
	s := &stored{disk: c.disk, level: level, file: path.Join(c.folder, e.name), bytes: e.info.Size()}
	h, err := c.read(s, e)
	s.refused = damage(err)
	return s, h
}

func (c *lineage) read(s *stored, e entry) (head, error) {
	conf, err := c.config()
	if err != nil {
		return head{}, err
	}
	s.source, s.size = conf.Format, conf.VirtualSize
	switch conf.Format {
	case "qcow2":
		s.format = image.Qcow2
	case "raw":
		s.format = image.Raw
	default:
		return head{}, damaged("its format is %q: only raw and qcow2 can be read", conf.Format)
	}
	h, err := readHead(c.t.d, s.file, e)
	if err != nil {
		return head{}, err
	}
	if s.format == image.Qcow2 {
		if h.err != nil {
			return head{}, h.err
		}
		s.size, s.backing = h.size, h.backing
		if s.level != chain.Inc && s.backing != "" {
			return head{}, damaged("it has the backing file %q, though it is no increment", s.backing)
		}
		return h, nil
	}
	if h.qcow2 {
		return head{}, damaged("it begins like a qcow2 image, but %s%s says that it is raw", s.disk, configSuffix)
	}
	s.size = (s.bytes + 511) &^ 511 // as QEMU sees it
	if s.size != conf.VirtualSize {
		s.warnings = append(s.warnings, fmt.Errorf("%s: %w: it has %d bytes, and the guest's disk %d at the last run", s.file, ErrSize, s.bytes, conf.VirtualSize))
	}
	return head{}, nil
}

// head is what is read of an image file's beginning.
type head struct {
	qcow2     bool
	err       error // of a qcow2 file's header
	size      int64
	backing   string
	snapshots []qcow2.Snapshot
	same      bool // the newest snapshot is what the active disk is
	utc       bool // the names of snapshots are of UTC
}

func readHead(d *dir, rel string, e entry) (head, error) {
	return look(d, "head", rel, e, func(f *os.File) (head, error) {
		h, err := qcow2.ReadHeader(f, e.info.Size())
		if errors.Is(err, qcow2.ErrNotQcow2) {
			return head{err: err}, nil
		}
		out := head{qcow2: true}
		if err == nil {
			out.size, out.backing = h.VirtualSize, h.BackingFile
			out.utc = string(h.Identity()) == UTCSnapshots
			out.snapshots, out.same, err = readSnapshots(f, e.info.Size(), h)
		}
		if out.err = damage(err); err != nil && !errors.Is(out.err, chain.ErrDamaged) {
			return head{}, err
		}
		return out, nil
	})
}

// readSnapshots returns the snapshots that `qmprestore snapshotrebase` has made, oldest
// first, and whether the last one is what the active disk is.
func readSnapshots(f *os.File, size int64, h *qcow2.Header) ([]qcow2.Snapshot, bool, error) {
	if h.Snapshots == 0 {
		return nil, false, nil
	}
	if h.Snapshots > maxSnapshots {
		return nil, false, damaged("it has %d internal snapshots", h.Snapshots)
	}
	all, err := qcow2.ReadSnapshots(f, size, h)
	if err != nil || !slices.ContainsFunc(all, func(s qcow2.Snapshot) bool { return s.Name == fullSnapshot }) {
		return nil, false, err
	}
	all = slices.DeleteFunc(all, func(s qcow2.Snapshot) bool {
		_, err := time.Parse(snapshotTime, s.Name)
		return s.Name != fullSnapshot && err != nil
	})
	active, err := qcow2.Open(f, size, qcow2.Options{})
	if err != nil {
		return nil, false, err
	}
	last, err := qcow2.Open(f, size, qcow2.Options{Snapshot: all[len(all)-1].ID})
	if err != nil {
		return nil, false, err
	}
	same, err := active.SameTables(last)
	return all, same, err
}

// full puts a full with a time stamp into its run, and the increments that were merged
// into it, as snapshots, into theirs. It returns what the next increment is made on, and
// the times of those that were merged.
func (b *builder) full(s *stored, h head, epoch int64) (last *stored, merged []int64) {
	if len(h.snapshots) == 0 {
		b.put(s, epoch)
		return s, nil
	}
	at := epoch
	for i, snapshot := range h.snapshots {
		one := *s
		one.size, one.snapshot = snapshot.VirtualSize, snapshot.ID
		one.reason = fmt.Sprintf("merged into a full, as its snapshot %q", snapshot.Name)
		// Local time, of a zone that nothing tells, but for h.utc.
		if t, err := time.Parse(snapshotTime, snapshot.Name); err == nil {
			at = t.Unix()
			merged = append(merged, at)
		}
		if h.same && i == len(h.snapshots)-1 {
			one.size, one.snapshot = s.size, "" // so that it can be a layer below others
			last = &one
		}
		b.put(&one, at)
	}
	if last == nil {
		s.reason = "merged into a full, as it was left"
		s.warnings = append(s.warnings, fmt.Errorf("%s: %w: it was changed after its newest snapshot", s.file, ErrOrder))
		b.put(s, at+1)
		last = s
	}
	return last, merged
}
