package mountinfo

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParse(t *testing.T) {
	const text = `25 30 0:23 / /sys rw,nosuid shared:7 - sysfs sysfs rw
36 35 98:0 /mnt1 /mnt/a\040b\134c rw,noatime - ext3 /dev/root rw,errors=continue
37 35 0:50 / /mnt/x ro,nosuid shared:8 master:1 - fuse.qmchain /srv/my\040repo ro,user_id=0
38 37 0:51 / /mnt/x rw - tmpfs cover rw
`
	got, err := parse(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	want := []Entry{
		{"25", "0:23", "/sys", "sysfs", "sysfs", "rw,nosuid,rw"},
		{"36", "98:0", `/mnt/a b\c`, "ext3", "/dev/root", "rw,noatime,rw,errors=continue"},
		{"37", "0:50", "/mnt/x", "fuse.qmchain", "/srv/my repo", "ro,nosuid,ro,user_id=0"},
		{"38", "0:51", "/mnt/x", "tmpfs", "cover", "rw,rw"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if top, ok := Top(got, "/mnt/x"); !ok || top.ID != "38" {
		t.Errorf("on top: %+v", top)
	}
	if _, ok := Top(got, "/mnt"); ok {
		t.Error("found what is not mounted")
	}
	for _, bad := range []string{"25 30 0:23 / /sys rw", "25 30 0:23 / /sys rw shared:1 -", "x\n"} {
		if _, err := parse(strings.NewReader(bad)); err == nil {
			t.Errorf("%q was read", bad)
		}
	}
	if _, err := Read(); err != nil {
		t.Error(err)
	}
}
