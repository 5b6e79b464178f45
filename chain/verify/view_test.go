package verify

import (
	"errors"
	"fmt"
	"io/fs"
	"os/exec"
	"testing"

	"qmchain/chain"
)

func TestReason(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		err  error
		file string
		want string
	}{
		{fmt.Errorf("110/x: disk scsi0: %w: 110/images/a: %w: it is another", chain.ErrDamaged, chain.ErrDamaged), "110/images/a", "it is another"},
		{fmt.Errorf("110/x: %w: manifest has no seal", chain.ErrDamaged), "110/x/point.json", "manifest has no seal"},
		{fmt.Errorf("a: %w", fmt.Errorf("it needs b, which is missing: %w", chain.ErrDamaged)), "a", "it needs b, which is missing"},
		{fmt.Errorf("a: %w", &fs.PathError{Op: "open", Path: "/a", Err: fs.ErrNotExist}), "a", "it is missing"},
		{errors.New("input/output error"), "a", "input/output error"},
	} {
		if got := reason(test.err, test.file); got != test.want {
			t.Errorf("%v: %q, want %q", test.err, got, test.want)
		}
	}
}

func TestRanges(t *testing.T) {
	t.Parallel()
	const b = 4 << 20
	for _, test := range []struct {
		blocks []int64
		size   int64
		want   string
	}{
		{[]int64{0}, 100, "bytes 0 to 100"},
		{[]int64{0, 1, 3}, 4*b - 5, "bytes 0 to 8388608, 12582912 to 16777211"},
		{[]int64{0, 2, 4, 6, 8}, 9 * b, "bytes 0 to 4194304, 8388608 to 12582912, 16777216 to 20971520, those of 2 other ranges"},
	} {
		if got := ranges(test.blocks, test.size); got != test.want {
			t.Errorf("%v: %q, want %q", test.blocks, got, test.want)
		}
	}
}

// What qemu-img says, by its exit codes.
func TestChecked(t *testing.T) {
	t.Parallel()
	failed := func(code int, text string) error {
		err := exec.Command("sh", "-c", fmt.Sprintf("exit %d", code)).Run()
		return fmt.Errorf("%w: %s", err, text)
	}
	for _, test := range []struct {
		err  error
		want fault
	}{
		{failed(2, "ERROR one\nERROR two\nERROR three"), fault{Damage, "a", "qemu-img check: ERROR one; ERROR two; and 1 more lines"}},
		{failed(3, "Leaked cluster 5 refcount=1 reference=0\nLeaked cluster 6 refcount=1 reference=0"), fault{Leak, "a", "2 clusters are leaked: they take space for nothing"}},
		{failed(1, `qemu-img: Could not open 'json:{}': Failed to get shared "write" lock`), fault{BeingMerged, "a", "another program writes to it"}},
		{failed(1, "qemu-img: Could not open 'json:{}': no"), fault{Unreadable, "a", "qemu-img check: qemu-img: Could not open 'a': no"}},
		{errors.New("qemu-img: not done within 1s"), fault{Unreadable, "a", "qemu-img check: qemu-img: not done within 1s"}},
	} {
		if got := checked(test.err, "json:{}", "a"); got != test.want {
			t.Errorf("%v: %+v, want %+v", test.err, got, test.want)
		}
	}
}
