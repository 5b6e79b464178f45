package backup

import (
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"
)

func TestOwner(t *testing.T) {
	me, err := newOwner()
	if err != nil {
		t.Fatal(err)
	}
	if o, ok := lockOwner(lockPrefix + string(me)); !ok || o != me {
		t.Errorf("%s was read as %s, %v", me, o, ok)
	}
	if me.dead() {
		t.Error("this process is taken for dead")
	}

	// A process that has ended, under this very kernel.
	cmd := exec.Command("true")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	parts := strings.Split(string(me), "-")
	with := func(i int, value string) owner {
		changed := append([]string(nil), parts...)
		changed[i] = value
		return owner(strings.Join(changed, "-"))
	}
	const pidField, startField = 2, 3
	for what, test := range map[string]struct {
		o    owner
		dead bool
	}{
		"a process that has ended":          {with(pidField, strconv.Itoa(pid)), true},
		"a pid that was given out again":    {with(startField, "1"), true},
		"a process of another boot or host": {with(0, "00000000"), false},
		"of another pid namespace":          {with(1, "1"), false},
		"something else":                    {"x", false},
	} {
		if test.o.dead() != test.dead {
			t.Errorf("%s: dead is %v", what, !test.dead)
		}
	}
	zombie := exec.Command("true")
	if err := zombie.Start(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); !with(pidField, strconv.Itoa(zombie.Process.Pid)).dead(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Error("a process that has ended, and that nobody has waited for, is taken for alive")
			break
		}
	}
	_ = zombie.Wait()
	for _, id := range []string{"", "qmchain-run-", "qmchain-run-x", "throttle-drive-scsi0", lockPrefix + string(me) + "0g"} {
		if _, ok := lockOwner(id); ok {
			t.Errorf("%q was taken for a lock", id)
		}
	}
}
