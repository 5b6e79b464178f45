package fusefs

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"qmchain/fusefs/tree"
)

// statsName is a file in the mount's root with the counters. It is not listed, so that nobody copies it by accident, and no
// guest can have its name.
const statsName = ".stats"

// readKind is what bytes were read of.
type readKind int

const (
	kindDisk readKind = iota
	kindPartition
	kindFile
	readKinds
)

func (k readKind) String() string { return [readKinds]string{"disk", "partition", "file"}[k] }

// operation is a kind of request of the kernel.
type operation int

const (
	opLookup operation = iota
	opGetattr
	opReaddir
	opReadlink
	opOpen
	opRead
	opLseek
	opGetxattr
	opListxattr
	opStatfs
	operations
)

func (o operation) String() string {
	return [operations]string{"lookup", "getattr", "readdir", "readlink", "open", "read", "lseek", "getxattr", "listxattr", "statfs"}[o]
}

// stats count what a mount does.
type stats struct {
	started time.Time
	ops     [operations]struct{ requests, nanoseconds, underWay atomic.Int64 }
	bytes   [readKinds]atomic.Int64

	mu     sync.Mutex
	errors map[opError]uint64
}

type opError struct {
	op    operation
	errno syscall.Errno
}

func newStats(now time.Time) *stats { return &stats{started: now, errors: map[opError]uint64{}} }

func (s *stats) read(k readKind, n int) { s.bytes[k].Add(int64(n)) }

// count is called when a request begins; what it returns, when it has an answer.
func (s *stats) count(op operation) func(fuse.Status) fuse.Status {
	o := &s.ops[op]
	o.underWay.Add(1)
	began := time.Now()
	return func(status fuse.Status) fuse.Status {
		o.nanoseconds.Add(int64(time.Since(began)))
		o.requests.Add(1)
		o.underWay.Add(-1)
		if status != fuse.OK {
			s.mu.Lock()
			s.errors[opError{op, syscall.Errno(status)}]++
			s.mu.Unlock()
		}
		return status
	}
}

// Stats returns what the mount has done until now, in the text format of Prometheus. It can be called when it has ended,
// too.
func (m *Mounted) Stats() []byte {
	select {
	case <-m.gone:
		return m.fsys.statsText(0)
	default:
		return m.fsys.statsText(1)
	}
}

// statsText writes the counters. up is 1 as long as the mount is there.
func (f *fileSystem) statsText(up int) []byte {
	var b bytes.Buffer
	metric := func(name, kind, help string) {
		fmt.Fprintf(&b, "# HELP qmchain_fuse_%s %s\n# TYPE qmchain_fuse_%s %s\n", name, help, name, kind)
	}
	value := func(name string, v any, labels ...string) {
		b.WriteString("qmchain_fuse_" + name + "{mount=" + quoteLabel(f.dir))
		for i := 0; i < len(labels); i += 2 {
			b.WriteString("," + labels[i] + "=" + quoteLabel(labels[i+1]))
		}
		fmt.Fprintf(&b, "} %v\n", v)
	}
	s := f.stats
	metric("up", "gauge", "Whether the mount is there.")
	value("up", up, "repository", f.catalog.home.dir)
	metric("repository_reachable", "gauge", "Whether the repository was there when it was last looked at.")
	reachable := 1
	if f.catalog.home.isAway.Load() {
		reachable = 0
	}
	value("repository_reachable", reachable)
	metric("start_time_seconds", "gauge", "When it was mounted, in seconds since 1970.")
	value("start_time_seconds", s.started.Unix())
	metric("requests_total", "counter", "Requests of the kernel that were answered.")
	for op := range operations {
		value("requests_total", s.ops[op].requests.Load(), "op", op.String())
	}
	metric("request_seconds_total", "counter", "The time that they took.")
	for op := range operations {
		value("request_seconds_total", time.Duration(s.ops[op].nanoseconds.Load()).Seconds(), "op", op.String())
	}
	metric("requests_under_way", "gauge", "Requests that have no answer yet.")
	for op := range operations {
		value("requests_under_way", s.ops[op].underWay.Load(), "op", op.String())
	}
	metric("errors_total", "counter", "Answers that were errors. ENOENT, ENODATA, ENXIO and ERANGE are everyday ones.")
	for _, e := range s.sortedErrors() {
		value("errors_total", e.n, "op", e.op.String(), "errno", errnoName(e.errno))
	}
	metric("read_bytes_total", "counter", "Bytes that were read. What the kernel has in its cache, or reads without us, is not among them.")
	for k := range readKinds {
		value("read_bytes_total", s.bytes[k].Load(), "kind", k.String())
	}
	metric("open_files", "gauge", "Files of disks and partitions that are open in the mount.")
	value("open_files", f.disks.inUse())
	metric("open_disks", "gauge", "Disks of points whose images are open.")
	value("open_disks", f.disks.count())
	metric("disks_opened_total", "counter", "Disks whose images were opened; again: anew, because they could not be read.")
	value("disks_opened_total", f.disks.opened.Load(), "how", "first")
	value("disks_opened_total", f.disks.reopened.Load(), "how", "again")
	metric("cache_requests_total", "counter", "Looks at a guest's points and at partition tables; hit: what was known did.")
	value("cache_requests_total", f.catalog.kept.Load(), "cache", "points", "result", "hit")
	value("cache_requests_total", f.catalog.looks.Load(), "cache", "points", "result", "miss")
	value("cache_requests_total", f.tables.kept.Load(), "cache", "partitions", "result", "hit")
	value("cache_requests_total", f.tables.reads.Load(), "cache", "partitions", "result", "miss")
	return b.Bytes()
}

type errorCount struct {
	opError
	n uint64
}

func (s *stats) sortedErrors() []errorCount {
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []errorCount
	for e, n := range s.errors {
		list = append(list, errorCount{e, n})
	}
	slices.SortFunc(list, func(a, b errorCount) int {
		if a.op != b.op {
			return int(a.op - b.op)
		}
		return int(a.errno) - int(b.errno)
	})
	return list
}

func errnoName(e syscall.Errno) string {
	if name := unix.ErrnoName(e); name != "" {
		return name
	}
	return strconv.Itoa(int(e))
}

// quoteLabel writes a label's value as the format has it: only these three are special, and all else is UTF-8.
func quoteLabel(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`).Replace(strings.ToValidUTF8(s, "\ufffd")) + `"`
}

// counted is go-fuse's file system with the requests counted.
type counted struct {
	fuse.RawFileSystem
	*stats
}

func (c counted) Lookup(cancel <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	return c.count(opLookup)(c.RawFileSystem.Lookup(cancel, h, name, out))
}

func (c counted) GetAttr(cancel <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	return c.count(opGetattr)(c.RawFileSystem.GetAttr(cancel, in, out))
}

func (c counted) ReadDir(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return c.count(opReaddir)(c.RawFileSystem.ReadDir(cancel, in, out))
}

func (c counted) ReadDirPlus(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return c.count(opReaddir)(c.RawFileSystem.ReadDirPlus(cancel, in, out))
}

func (c counted) Readlink(cancel <-chan struct{}, h *fuse.InHeader) ([]byte, fuse.Status) {
	done := c.count(opReadlink)
	text, status := c.RawFileSystem.Readlink(cancel, h)
	return text, done(status)
}

func (c counted) Open(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	return c.count(opOpen)(c.RawFileSystem.Open(cancel, in, out))
}

func (c counted) Read(cancel <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	done := c.count(opRead)
	result, status := c.RawFileSystem.Read(cancel, in, buf)
	return result, done(status)
}

func (c counted) Lseek(cancel <-chan struct{}, in *fuse.LseekIn, out *fuse.LseekOut) fuse.Status {
	return c.count(opLseek)(c.RawFileSystem.Lseek(cancel, in, out))
}

func (c counted) GetXAttr(cancel <-chan struct{}, h *fuse.InHeader, name string, dest []byte) (uint32, fuse.Status) {
	done := c.count(opGetxattr)
	n, status := c.RawFileSystem.GetXAttr(cancel, h, name, dest)
	return n, done(status)
}

func (c counted) ListXAttr(cancel <-chan struct{}, h *fuse.InHeader, dest []byte) (uint32, fuse.Status) {
	done := c.count(opListxattr)
	n, status := c.RawFileSystem.ListXAttr(cancel, h, dest)
	return n, done(status)
}

func (c counted) StatFs(cancel <-chan struct{}, h *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	return c.count(opStatfs)(c.RawFileSystem.StatFs(cancel, h, out))
}

// statsFile is the file with the counters, as they are when it is opened. Like the files of /proc it has no size.
type statsFile struct {
	fs.Inode
	fsys *fileSystem
}

var (
	_ fs.NodeGetattrer = (*statsFile)(nil)
	_ fs.NodeOpener    = (*statsFile)(nil)
)

func (x *folder) lookupStats(ctx context.Context, out *fuse.EntryOut) *fs.Inode {
	child := &statsFile{fsys: x.fsys}
	child.fill(&out.Attr)
	out.SetEntryTimeout(lasts)
	out.SetAttrTimeout(lasts)
	return x.NewInode(ctx, child, fs.StableAttr{Mode: syscall.S_IFREG, Ino: tree.StatsIno})
}

// fill lets everyone read the file who is let into the mount: it tells nothing of what is in the backups.
func (x *statsFile) fill(out *fuse.Attr) {
	x.fsys.fillAttr(out, tree.Node{
		Kind: tree.File, Ino: tree.StatsIno, Time: x.fsys.stats.started,
		Perm: tree.Perm{Mode: 0o444, UID: uint32(os.Geteuid()), GID: uint32(os.Getegid())},
	})
}

func (x *statsFile) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	x.fill(&out.Attr)
	out.SetTimeout(lasts)
	return 0
}

func (x *statsFile) Open(_ context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	if flags&syscall.O_ACCMODE != syscall.O_RDONLY || flags&syscall.O_TRUNC != 0 {
		return nil, 0, syscall.EROFS
	}
	return statsHandle(x.fsys.statsText(1)), fuse.FOPEN_DIRECT_IO | fuse.FOPEN_NOFLUSH, 0
}

type statsHandle []byte

var _ fs.FileReader = statsHandle(nil)

func (h statsHandle) Read(_ context.Context, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	n := copy(dest, h[min(off, int64(len(h))):])
	return fuse.ReadResultData(dest[:n]), 0
}
