package backup_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"qmchain/backup"
	"qmchain/chain"
	"qmchain/internal/testenv"
)

// givenBack is a guard that tells of the giving back.
type givenBack struct {
	guard
	release func()
}

func (g *givenBack) Take(ctx context.Context) (func(context.Context) error, error) {
	release, err := g.guard.Take(ctx)
	return func(ctx context.Context) error {
		g.release()
		return release(ctx)
	}, err
}

// TestRepositoryHangs: where nothing can interrupt a call to the repository the guest is given back all the same, without our
// nodes in it; and once the repository answers again, what was begun is undone.
func TestRepositoryHangs(t *testing.T) {
	t.Parallel()
	for what, test := range map[string]struct {
		hangs     func(op, path string) bool
		fails     func(op, path string) bool
		interrupt bool
		offline   bool
	}{
		"in the undoing": {
			hangs: func(op, path string) bool { return op == "remove" && strings.HasSuffix(path, ".qcow2") },
			fails: func(op, path string) bool { return op == "sync" && strings.HasSuffix(path, ".qcow2") },
		},
		"in the undoing, of a stopped guest": {
			hangs:   func(op, path string) bool { return op == "remove" && strings.HasSuffix(path, ".qcow2") },
			fails:   func(op, path string) bool { return op == "sync" && strings.HasSuffix(path, ".qcow2") },
			offline: true,
		},
		"in the run, which is interrupted": {
			hangs:     func(op, path string) bool { return op == "sync" && strings.HasSuffix(path, ".qcow2") },
			fails:     func(string, string) bool { return false },
			interrupt: true,
		},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, testenv.Host(t), testenv.Throttle)
			r.write(10)
			r.run(chain.Full)
			r.write(10)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			g := &givenBack{release: func() {}}
			cfg := r.config(backup.Auto)
			cfg.Guard, cfg.UndoLimit = g, 3*time.Second
			if test.offline {
				r.vm.Quit()
				cfg.Addr = ""
				for _, d := range r.vm.Config().Disks {
					d = r.vm.Disk(d.ID)
					cfg.Offline = append(cfg.Offline, backup.OfflineImage{Disk: d.ID, Format: d.Format, Path: d.Path})
				}
				// Whoever may have the guest now can open its images.
				g.release = func() {
					for _, image := range cfg.Offline {
						testenv.Output(t, r.qemu.IO, "-f", "qcow2", "-c", "quit", image.Path)
					}
				}
			}

			answers := make(chan struct{})
			answer := sync.OnceFunc(func() { close(answers) })
			defer answer()
			defer time.AfterFunc(time.Minute, answer).Stop()
			r.fs.Before = func(op, path string) error {
				switch {
				case test.fails(op, path):
					return errors.New("made-up failure")
				case test.hangs(op, path):
					if test.interrupt {
						cancel()
					}
					<-answers
				}
				return nil
			}
			cfg.Repo = r.config(backup.Auto).Repo
			began := time.Now()
			_, err := backup.Run(ctx, cfg)
			if !errors.Is(err, backup.ErrUndo) || !strings.Contains(err.Error(), "the repository hangs") {
				t.Errorf("%v", err)
			}
			if took := time.Since(began); took > 40*time.Second {
				t.Errorf("it took %s", took)
			}
			if len(g.calls) == 0 || g.calls[len(g.calls)-1] != "release" {
				t.Errorf("calls %v", g.calls)
			}

			answer()
			r.fs.Before = nil
			if test.offline {
				r.vm.Restart()
			}
			var result *backup.Result
			for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Millisecond) {
				if result, err = r.runWith(func(*backup.Config) {}); err == nil || time.Now().After(deadline) {
					break
				}
			}
			if err != nil || result.Point.Level() != chain.Inc {
				t.Fatalf("the next run: %+v, %v", result, err)
			}
			r.check(result.Point, r.ledger.Now(), r.ledger.Now())
			r.clean(1)
		})
	}
}
