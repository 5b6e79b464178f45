package pveguest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"qmchain/backup"
	"qmchain/proxmox"
	"qmchain/proxmox/pvetest"
)

// TestLockUnknown: where qm does not say what it has done, the lock may be ours. That stays on record until the admin has it
// given back, and is never taken for somebody else's.
func TestLockUnknown(t *testing.T) {
	t.Parallel()
	for what, test := range map[string]struct {
		after   string // what happens when qm has set the lock
		restore func(conf string) error
	}{
		"qm is killed": {after: "kill -9 $$"},
		"the configuration can't be read": {
			after:   `mv "$conf" "$conf.away"; mkdir "$conf"`,
			restore: func(conf string) error { return errors.Join(os.Remove(conf), os.Rename(conf+".away", conf)) },
		},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			n := pvetest.Install(t)
			n.AddVM(110, "scsi0: local:110/vm-110-disk-0.qcow2,size=1M")
			s := site(t, n)
			find := func() *VM {
				t.Helper()
				vm, err := s.Find(110)
				if err != nil {
					t.Fatal(err)
				}
				return vm
			}
			qm := filepath.Join(t.TempDir(), "qm")
			stand := func(script string) {
				t.Helper()
				script = fmt.Sprintf("#!/bin/sh\nconf='%s'\n%s\n", s.Host.ConfigPath(110), script)
				if err := os.WriteFile(qm, []byte(script), 0o700); err != nil {
					t.Fatal(err)
				}
			}
			broken := s
			broken.Host.Program = qm
			onRecord := func() bool {
				_, err := os.Stat(filepath.Join(s.Locks, "110.json"))
				return err == nil
			}
			take := func() error {
				t.Helper()
				vm, err := broken.Find(110)
				if err != nil {
					t.Fatal(err)
				}
				_, err = vm.Take(t.Context())
				return err
			}

			stand("echo no >&2; exit 255")
			if err := take(); err == nil || errors.Is(err, proxmox.ErrLockUnknown) || onRecord() {
				t.Fatalf("refused: %v, on record: %v", err, onRecord())
			}

			stand(fmt.Sprintf("'%s' \"$@\" || exit\n%s", n.Program, test.after))
			err := take()
			if !errors.Is(err, proxmox.ErrLockUnknown) || !errors.Is(err, backup.ErrNeedsDoctor) || errors.Is(err, proxmox.ErrLocked) || !onRecord() {
				t.Errorf("%v, on record: %v", err, onRecord())
			}
			if test.restore != nil {
				if err := test.restore(s.Host.ConfigPath(110)); err != nil {
					t.Fatal(err)
				}
			}
			if lock := find().Config.Lock(); lock != "backup" {
				t.Fatalf("lock %q", lock)
			}
			if _, err := find().Take(t.Context()); !errors.Is(err, proxmox.ErrNotOurs) || !onRecord() {
				t.Errorf("the next run: %v, on record: %v", err, onRecord())
			}
			if finding, err := find().Left(t.Context(), false); err != nil || finding == "" {
				t.Errorf("doctor: %q, %v", finding, err)
			}
			if finding, err := find().Left(t.Context(), true); err != nil || finding != "" {
				t.Errorf("doctor --fix: %q, %v", finding, err)
			}
			if lock := find().Config.Lock(); lock != "" || onRecord() {
				t.Errorf("lock %q, on record: %v", lock, onRecord())
			}
			release, err := find().Take(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if err := release(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}
