package listing

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"qmchain/chain"
)

var now = time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)

// point is one whose disks are told as LEVEL/PARENT.
func point(guest, id string, age time.Duration, disks ...string) Point {
	p := Point{Guest: guest, ID: chain.ID(id), Time: now.Add(-age), Consistency: chain.Instant}
	for i, text := range disks {
		level, parent, _ := strings.Cut(text, "/")
		p.Disks = append(p.Disks, Disk{
			Name: "scsi" + string(rune('0'+i)), Level: chain.Level(level), Parent: chain.ID(parent), VirtualSize: 32 << 30, Bytes: 1 << 30,
		})
		switch p.Level {
		case "", chain.Level(level):
			p.Level = chain.Level(level)
		default:
			p.Level = chain.Mixed
		}
	}
	return p
}

func sample() listing {
	const day = 24 * time.Hour
	one := []Point{
		point("110", "A", 400*day, "full", "full"),
		point("110", "B", 30*day, "inc/A", "inc/A"),
		point("110", "C", 3*day, "full", "inc/B"),
		point("110", "D", 40*time.Hour, "copy", "copy"),
		point("110", "E", 90*time.Minute, "inc/C", "inc/C"),
	}
	one[1].Protected, one[1].Note = true, "before\nthe upgrade"
	one[4].VMName = "mail"
	return listing{
		points: append(one,
			point("web", "G", 50*time.Second, "inc/F"), // F was removed, and both are made on it
			point("web", "H", -time.Hour, "diff/F"),
			point("web", "J", 0, "full"),
		),
		problems: []problem{
			{guest: "web", point: "I", lost: true, text: "point I:\nno manifest"},
			{guest: "web", point: "H", text: "its disk is odd"},
			{guest: "zoo", point: "Z", lost: true, text: "gone"},
		},
	}
}

func printed(t *testing.T, long, unicode bool, width int) string {
	t.Helper()
	var b bytes.Buffer
	found := sample()
	if err := found.tree(now, long).print(&b, unicode, width); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestTree(t *testing.T) {
	t.Parallel()
	const want = `
POINT      AGE  LEVEL    SIZE   STORED  REMARK
110      90min         64 GiB   10 GiB  mail: 5 points in 2 chains
├─ A      400d  full   64 GiB  2.0 GiB  scsi0, scsi1
│  ├─ B    30d  inc    64 GiB  2.0 GiB  protected, before the upgrade
│  ├─ C     3d  mixed  64 GiB  2.0 GiB  scsi0 full, scsi1 inc
│  └─ E  90min  inc    64 GiB  2.0 GiB
└─ D       40h  copy   64 GiB  2.0 GiB  scsi0, scsi1
web         0s         32 GiB  3.0 GiB  4 points in 3 chains
├─ G       50s  inc    32 GiB  1.0 GiB  scsi0
│  └─ H     0s  diff   32 GiB  1.0 GiB
├─ I            ?                       point I: no manifest
└─ J        0s  full   32 GiB  1.0 GiB  scsi0
zoo                                0 B  1 point in 1 chain
└─ Z            ?                       gone
`
	if diff := cmp.Diff(want, "\n"+printed(t, false, true, 0)); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

// squeezed is a text without regard to the width of its columns.
func squeezed(text string) string {
	var lines []string
	for line := range strings.Lines(text) {
		lines = append(lines, strings.Join(strings.Fields(line), " "))
	}
	return strings.Join(lines, "\n")
}

func TestLongTree(t *testing.T) {
	t.Parallel()
	got := printed(t, true, true, 0)
	for _, want := range []string{
		"├─ A 400d full 64 GiB 2.0 GiB " + now.Add(-400*24*time.Hour).Local().Format("2006-01-02 15:04:05") + ", instant\n│ │ scsi0 full 32 GiB 1.0 GiB\n│ │ scsi1 full",
		"│ │ scsi1 inc 32 GiB 1.0 GiB since B",
		"│ └─ E",
		"│ scsi0 inc 32 GiB 1.0 GiB since C",
		"└─ D",
		"scsi1 copy 32 GiB 1.0 GiB\nweb",
	} {
		if !strings.Contains(squeezed(got), want) {
			t.Errorf("%q is not in\n%s", want, got)
		}
	}
}

func TestNarrowTree(t *testing.T) {
	t.Parallel()
	for width, want := range map[int]string{
		0:  "POINT AGE LEVEL SIZE STORED REMARK",
		60: "POINT AGE LEVEL SIZE STORED REMARK",
		50: "POINT AGE LEVEL STORED REMARK",
		40: "POINT AGE STORED REMARK",
		30: "POINT AGE REMARK",
	} {
		got := printed(t, false, false, width)
		heading, _, _ := strings.Cut(squeezed(got), "\n")
		if heading != want {
			t.Errorf("%d columns: %q, want %q", width, heading, want)
		}
		for line := range strings.Lines(got) {
			if width > 0 && len(line)-1 > width {
				t.Errorf("%d columns: %q", width, line)
			}
			for _, r := range line {
				if r > 127 {
					t.Errorf("no ASCII: %q", line)
				}
			}
		}
	}
}

func TestAge(t *testing.T) {
	t.Parallel()
	for d, want := range map[time.Duration]string{
		-time.Hour: "0s", 0: "0s", 119 * time.Second: "119s", 2 * time.Minute: "2min", 119 * time.Minute: "119min", 2 * time.Hour: "2h",
		47 * time.Hour: "47h", 48 * time.Hour: "2d", 999 * 24 * time.Hour: "999d", 1100 * 24 * time.Hour: "3y",
	} {
		if got := ageText(d); got != want {
			t.Errorf("%s: %q, want %q", d, got, want)
		}
	}
}
