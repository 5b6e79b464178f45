package figures

import "regexp"

// section is a part of the page: the cases whose names match, and what has to be known about them.
type section struct {
	title string
	text  string
	cases *regexp.Regexp // the first group is what tells cases of the section apart
	plots []string       // files
}

var sections = []section{
	{
		title: "Reading through the mount, warm",
		text: `Points of chains of several lengths; each increment changes a hundredth of the disk. The image files are in the page cache, what the kernel
has of the mounts' own files is dropped before each turn. No block is read at random twice. "Again" is a second reading, with all in the page cache; Linux keeps files of FUSE in
single pages, and "in single pages" is a plain file that it keeps in the same way.`,
		cases: regexp.MustCompile(`^Mount/warm/(.*)`),
		plots: []string{"mount-sequential.svg", "mount-random-1.svg", "mount-random-16.svg"},
	},
	{
		title: "Reading through the mount, cold",
		text: `Neither the images nor the mounts' files are in the page cache of this machine; what a hypervisor below keeps can't be dropped. The servers run
already, and have read the images' tables. "The image files" are read by themselves, without a server but through the page cache as well, by as many
readers: one after the other, or at random in all of them.`,
		cases: regexp.MustCompile(`^Mount/cold/(.*)`),
	},
	{
		title: "Long chains",
		text: `The last point of a chain beside its first one, a single image, both through the mount. Warm, but for what is cold: the images are not in
the page cache then.`,
		cases: regexp.MustCompile(`^Mount/flat/(.*)`),
	},
	{
		title: "Opening",
		text: `From the server's start to the first byte of the last point; the memory it then has; and the list of all extents that hold data, by SEEK_DATA and
SEEK_HOLE on the mount, its start included. Warm, or with the images not in the page cache (cold). "Each open point" is what a hundred further points of the same chain take while they are open.`,
		cases: regexp.MustCompile(`^Mount/open/(.*)`),
		plots: []string{"mount-open.svg"},
	},
	{
		title: "A disk of 1 TiB",
		text: `200,000 clusters of data here and there, in one image; reads at random all over it, most of them of holes; memory after these; and the list of
all extents, for which the mount runs already. Warm.`,
		cases: regexp.MustCompile(`^Mount/(huge)$`),
	},
	{
		title: "Compressed fulls",
		text:  `Text, of which a third is left. Warm.`,
		cases: regexp.MustCompile(`^Mount/(compressed=.*)`),
	},
	{
		title: "tar of a mounted file system",
		text: `Ext4 on a disk of 20 points that is mounted by a loop device, packed with tar; beside the same on a raw file. Warm, the images and the raw file
are in the page cache, but not the mounts' files.`,
		cases: regexp.MustCompile(`^Mount/(tar)$`),
	},
	{
		title: "One file out of a guest's file system",
		text: `A small file in ext4. libguestfs starts a virtual machine for it, here as in guestmount; with --kernel the host reads the file system itself.
That machine is emulated here, without KVM, and most of the time is its start. Warm.`,
		cases: regexp.MustCompile(`^(Files)$`),
	},
	{
		title: "Restoring a disk",
		text: `qmchain-restore image to a raw file, which ends with a sync, beside the others and a sync; the backup is in the page cache. cp is of the restored
file, whose holes it keeps. A longer chain has more data. "Not synced" leaves the others' syncs out, but not ours. Processor time changes less with what else the machine does.`,
		cases: regexp.MustCompile(`^Restore/(.*)`),
		plots: []string{"restore.svg"},
	},
	{
		title: "Verifying",
		text: `qmchain-restore verify of all points of a chain reads every byte and compares SHA-256; with --deep it also reads every point as a restore would. "Check and compare" is
qemu-img check of each image, which looks at its tables alone, and qemu-img compare of the last point with a raw copy of the disk, which one would
need to have. sha256sum reads all images, one after the other, on one processor, and Debian's does without the processor's instructions for it; verify
uses these, and all processors. Warm.`,
		cases: regexp.MustCompile(`^Verify/(.*)`),
	},
	{
		title: "Backing up",
		text: `A whole run, from connecting to the committed point, beside the time in which QEMU's own jobs copied within that run. Of fulls, also beside cp of
as much data, and a sync. Neither the disk nor what is copied is in the page cache. Onto a fast target, and onto one that takes 5 MB/s. Increments
are of a tenth of the disk.`,
		cases: regexp.MustCompile(`^Backup/(.*)`),
	},
	{
		title: "An increment without changes",
		text:  `Two disks to which nobody has written since the last point. "qmchain's own" is what neither QEMU's commands nor its jobs took.`,
		cases: regexp.MustCompile(`^IdleIncrement/(.*)`),
	},
	{
		title: "Memory of a backup",
		text:  `The most that qmchain-backup has had during an increment.`,
		cases: regexp.MustCompile(`^PeakMemory/(.*)`),
	},
	{
		title: "The guest's own writes during a backup",
		text: `100 writes a second of 4 KiB at random, past the guest's page cache, most of which hit what is not copied yet. The repository takes 5 MB/s ("slow"), or is a local
folder ("fast").`,
		cases: regexp.MustCompile(`^GuestLatency/(.*)`),
		plots: []string{"latency.svg"},
	},
	{
		title: "Removing the oldest point",
		text: `qmchain-backup remove merges it into the next one. "Sent to the disk" is what the repository's disk was sent, beside the size of the full, which a
new full would cost at least.`,
		cases: regexp.MustCompile(`^(Merge)$`),
	},
	{
		title: "Large repositories",
		text:  `Listing all points, and planning what prune removes, beside cat of all their manifests. Warm.`,
		cases: regexp.MustCompile(`^List/(.*)`),
	},
	{
		title: "Large repositories, in detail",
		text: `Guests of 200 points each. Each command is a process, the repository is in the page cache after the first round. Memory is the most that the command
has had, or what the mount's server has after it.`,
		cases: regexp.MustCompile(`^Scale/(.*)`),
	},
}

// names are what figures are called on the page.
var names = map[string]string{
	"seq":             "sequential, 1 MiB",
	"again":           "sequential, again",
	"qd1":             "4 KiB at random, one at a time",
	"qd16":            "4 KiB at random, 16 at a time",
	"cpu":             "processor time, sequential",
	"first-byte":      "to the first byte",
	"first-byte-cold": "to the first byte, cold",
	"seq-cold":        "sequential, 1 MiB, cold",
	"opened":          "… of which the mount answers",
	"map":             "all extents",
	"memory":          "memory",
	"point":           "memory of each open point",
	"tar-warm":        "tar, warm",
	"tar-cold":        "tar, cold",
	"cat":             "one file, by libguestfs",
	"cat-kernel":      "one file, --kernel",
	"image":           "a raw file, synced",
	"nosync":          "a raw file, not synced",
	"per-GiB":         "for 1 GiB of data",
	"peak":            "memory at most",
	"sums":            "verify",
	"deep":            "verify --deep",
	"full":            "full",
	"inc":             "increment",
	"full-qmp":        "… full: QEMU's answers",
	"inc-qmp":         "… increment: QEMU's answers",
	"full-tool":       "… full: qmchain's own, check sums and syncs above all",
	"inc-tool":        "… increment: qmchain's own",
	"total":           "all of it",
	"tool":            "… qmchain's own",
	"qmp":             "… QEMU's answers",
	"copy":            "… QEMU's jobs",
	"images":          "… qmchain's own: making images",
	"commit":          "… qmchain's own: commit",
	"p50":             "half of the writes within",
	"p95":             "95 of 100 writes within",
	"p99":             "99 of 100 writes within",
	"written":         "sent to the disk",
	"remove":          "time",
	"increment":       "size of the next point",
	"list":            "list",
	"prune":           "prune --dry-run",
	"list-json":       "list --json",
	"list-one":        "list of one guest",
	"prune-one":       "prune --dry-run of one guest",
	"plan":            "run --dry-run of one guest",
	"mount":           "until the mount answers",
	"root":            "the first ls -l of the mount",
	"guest":           "the first ls -l of a guest",
	"second":          "the same again",
	"points":          "find: all points",
	"tree":            "find: every file of every point",
}

// peers are who is measured beside qmchain.
var peers = map[string]string{
	"daemon":        "qemu-storage-daemon, FUSE export",
	"nbdfuse":       "qemu-nbd, nbdfuse",
	"nbdkit":        "qemu-nbd, nbdkit, nbdfuse",
	"raw":           "a raw file",
	"pages":         "a raw file, in single pages",
	"backing":       "the image files",
	"one":           "a chain of one",
	"qemu-map":      "qemu-img map",
	"guestmount":    "guestmount",
	"qemu":          "qemu-img convert",
	"cp":            "cp",
	"sha256sum":     "sha256sum",
	"check-compare": "qemu-img check and compare",
	"job":           "QEMU's jobs in it",
	"none":          "no backup",
	"direct":        "a backup without fleecing",
	"full":          "the full",
	"cat":           "cat of all manifests",
}

// aim is what the project wants: the least ratio (CASE NAME-x-PEER), or of what qmchain takes (CASE NAME-UNIT) the most
// where less is better, else the least.
type aim struct {
	figure string
	limit  float64
}

var aims = []aim{
	{"Mount/warm/points=1 seq-x-daemon", 3.5},
	{"Mount/warm/points=1 qd1-x-daemon", 1.5},
	{"Mount/warm/points=1 seq-x-raw", 0.35},
	{"Mount/warm/points=1 again-x-pages", 0.8},
	{"Mount/warm/points=200 seq-x-daemon", 10},
	{"Mount/warm/points=200 qd1-x-daemon", 12},
	{"Mount/warm/points=200 qd16-x-daemon", 30},
	{"Mount/cold/points=1 seq-x-backing", 0.95},
	{"Mount/cold/points=200 seq-x-backing", 0.95},
	{"Mount/cold/points=1 qd16-x-backing", 0.5},
	{"Mount/cold/points=200 qd16-x-backing", 0.5},
	{"Mount/flat/points=200 seq-x-one", 0.8},
	{"Mount/flat/points=200 qd16-x-one", 0.8},
	{"Mount/flat/points=365 seq-x-one", 0.8},
	{"Mount/flat/points=365 qd16-x-one", 0.8},
	{"Mount/open/points=200 first-byte-ms", 100},
	{"Mount/open/points=365 first-byte-ms", 100},
	{"Mount/huge memory-MB", 64},
	{"Mount/compressed=zstd seq-x-daemon", 1.5},
	{"Mount/compressed=zlib seq-x-daemon", 0.8},
	{"Mount/tar tar-warm-x-raw", 1 / 1.5},
	{"Mount/tar tar-cold-x-raw", 1 / 1.5},
	{"Restore/points=1 image-x-qemu", 1},
	{"Restore/points=30 image-x-qemu", 3},
	{"Restore/points=200 image-x-qemu", 3},
	{"Restore/points=365 image-x-qemu", 3},
	{"Restore/points=200 peak-MB", 200},
	{"Restore/points=365 peak-MB", 200},
	{"IdleIncrement/qemu=7.2 tool-ms", 150},
	{"IdleIncrement/qemu=10.0 tool-ms", 150},
	{"GuestLatency/target=slow p95-x-none", 0.5},
	{"GuestLatency/target=slow p99-x-none", 0.5},
	{"GuestLatency/target=slow p99-x-direct", 10},
	{"Scale/points=100000 list-s", 2},
	{"Scale/points=100000 list-MB", 200},
	{"Scale/points=100000 list-json-MB", 200},
	{"Scale/points=100000 prune-MB", 200},
	{"Scale/points=100000 mount-ms", 500},
	{"Scale/points=100000 points-MB", 200},
	{"Scale/points=100000 tree-MB", 200},
}

// claim is something that README.md says, in its words, and the ratios that show it: at least these.
type claim struct {
	words  string
	ratios []aim
}

var claims = []claim{
	{
		"A target or fleece that is too slow or full fails the backup, not the guest's own writes.",
		[]aim{
			{"GuestLatency/target=slow p95-x-none", 0.5},
			{"GuestLatency/target=slow p95-x-direct", 10},
			{"GuestLatency/target=slow p99-x-direct", 10},
		},
	},
	{"points are merged, so that one full is enough", []aim{{"Merge written-x-full", 10}}},
	{
		"At the end of a chain of 365 points a disk opens, and reads, several times as fast as through QEMU's own FUSE export",
		[]aim{
			{"Mount/open/points=365 first-byte-x-daemon", 4},
			{"Mount/open/points=365 first-byte-cold-x-daemon", 3},
			{"Mount/warm/points=365 seq-x-daemon", 4},
			{"Mount/warm/points=365 qd1-x-daemon", 4},
			{"Mount/warm/points=365 qd16-x-daemon", 4},
			{"Mount/cold/points=365 seq-x-daemon", 3},
			{"Mount/cold/points=365 qd1-x-daemon", 3},
			{"Mount/cold/points=365 qd16-x-daemon", 3},
		},
	},
	{
		"what is in the page cache it reads nearly as fast as at its beginning",
		[]aim{{"Mount/flat/points=365 seq-x-one", 0.75}, {"Mount/flat/points=365 qd16-x-one", 0.75}},
	},
	{
		"From the end of a long chain it is restored in less than half of the time that `qemu-img convert` takes.",
		[]aim{{"Restore/points=200 image-x-qemu", 2}},
	},
}
