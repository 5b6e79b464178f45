package backup_test

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"qmchain/backup"
	"qmchain/chain"
	"qmchain/internal/testenv"
	"qmchain/qmp"
	"qmchain/qmp/qmptest"
)

// proxyAfter returns the address of a proxy that calls f once, after the first command of that name.
func (r *rig) proxyAfter(command string, f func()) string {
	var done atomic.Bool
	return qmptest.NewProxy(r.t, r.vm.Socket, qmptest.Hooks{
		After: func(_ int, cmd qmptest.CommandSeen, _ json.RawMessage) {
			if cmd.Name == command && done.CompareAndSwap(false, true) {
				f()
			}
		},
	}).Addr()
}

// runVia takes a point through a proxy and checks it against the whole time of the run.
func (r *rig) runVia(hooks qmptest.Hooks, level chain.Level) {
	r.t.Helper()
	cfg := r.config(backup.Auto)
	cfg.Addr = qmptest.NewProxy(r.t, r.vm.Socket, hooks).Addr()
	from := r.ledger.Now()
	result, err := backup.Run(r.t.Context(), cfg)
	if err != nil {
		r.t.Fatal(err)
	}
	if result.Point.Level() != level {
		r.t.Fatalf("level is %s: %s", result.Point.Level(), result.Point.Disks[0].Reason)
	}
	r.check(result.Point, from, r.ledger.Now())
}

// A guest's request before and after every single command of a run: the point is of one instant, and the next points
// hold every request.
func TestWritesAtEveryCommand(t *testing.T) {
	t.Parallel()
	each(t, testenv.Styles, func(t *testing.T, q testenv.QEMU, style testenv.Style) {
		r := newRig(t, q, style)
		r.write(80)
		hooks := qmptest.Hooks{
			Before: func(int, []qmptest.CommandSeen) qmptest.Verdict { r.write(1); return qmptest.Verdict{} },
			After:  func(int, qmptest.CommandSeen, json.RawMessage) { r.write(1) },
		}
		r.runVia(hooks, chain.Full)
		for range 4 {
			r.runVia(hooks, chain.Inc)
		}
		r.run(chain.Inc)
		r.clean(1)
	})
}

// Requests right after the switch, and until long after it: the copying meets clusters that were overwritten, zeroed and
// discarded before it came to them.
func TestPointTakenUnderWrites(t *testing.T) {
	t.Parallel()
	each(t, []testenv.Style{testenv.Drive, testenv.Throttle}, func(t *testing.T, q testenv.QEMU, style testenv.Style) {
		r := newRig(t, q, style)
		r.write(80)
		level := chain.Full
		for range 15 {
			r.runVia(qmptest.Hooks{
				After: func(_ int, cmd qmptest.CommandSeen, _ json.RawMessage) {
					if cmd.Name == "blockdev-reopen" {
						r.write(30)
					}
				},
			}, level)
			level = chain.Inc
		}
	})
}

// Somebody pauses or resumes the guest at any moment: that is how it stays, and the point is right.
func TestSomebodyStopsAndResumes(t *testing.T) {
	t.Parallel()
	each(t, []testenv.Style{testenv.Drive, testenv.Throttle}, func(t *testing.T, q testenv.QEMU, style testenv.Style) {
		r := newRig(t, q, style)
		r.write(40)
		r.run(chain.Full)
		for at := 1; ; at++ {
			r.ledger.Forget()
			r.write(3)
			r.vm.Execute("cont", nil, nil)
			paused := at%2 == 0
			if paused {
				r.vm.Execute("stop", nil, nil)
			}
			var reached atomic.Bool
			r.runVia(qmptest.Hooks{
				Before: func(n int, _ []qmptest.CommandSeen) qmptest.Verdict {
					switch {
					case n != at:
					case paused:
						r.vm.Execute("cont", nil, nil)
						r.write(1)
						reached.Store(true)
					default:
						r.vm.Execute("stop", nil, nil)
						reached.Store(true)
					}
					return qmptest.Verdict{}
				},
			}, chain.Inc)
			want := map[bool]string{true: "running", false: "paused"}[paused == reached.Load()]
			if got := r.vm.Status(); got != want {
				t.Fatalf("command %d: the guest is %s, not %s", at, got, want)
			}
			if !reached.Load() {
				break
			}
			at += 2
		}
	})
}

// QEMU refuses every single command in turn: the run fails and undoes all, or it is good; the next one is an increment.
func TestEveryCommandFails(t *testing.T) {
	t.Parallel()
	each(t, []testenv.Style{testenv.Drive, testenv.Throttle}, func(t *testing.T, q testenv.QEMU, style testenv.Style) {
		r := newRig(t, q, style)
		r.write(40)
		r.run(chain.Full)
		r.atEveryCommand(func(cfg backup.Config, at int) bool {
			var reached atomic.Bool
			cfg.Addr = qmptest.NewProxy(t, r.vm.Socket, qmptest.Hooks{
				Before: func(n int, cmds []qmptest.CommandSeen) qmptest.Verdict {
					if n != at {
						return qmptest.Verdict{}
					}
					reached.Store(true)
					return qmptest.Verdict{Fail: &qmp.Error{Class: qmp.ClassGeneric, Desc: "made-up failure of " + cmds[0].Name}}
				},
			}).Addr()
			_, err := backup.Run(t.Context(), cfg)
			if err != nil && !strings.Contains(err.Error(), "made-up failure") && !errors.Is(err, qmp.ErrNotQMP) {
				t.Errorf("command %d: %v", at, err)
			}
			if errors.Is(err, backup.ErrUndo) {
				t.Errorf("command %d: %v", at, err)
			}
			return reached.Load()
		})
	})
}

// The connection is lost at every single command in turn.
func TestConnectionLostAtEveryCommand(t *testing.T) {
	t.Parallel()
	each(t, []testenv.Style{testenv.Drive, testenv.Throttle}, func(t *testing.T, q testenv.QEMU, style testenv.Style) {
		r := newRig(t, q, style)
		r.write(40)
		r.run(chain.Full)
		r.atEveryCommand(func(cfg backup.Config, at int) bool {
			var reached atomic.Bool
			var proxy atomic.Pointer[qmptest.Proxy]
			proxy.Store(qmptest.NewProxy(t, r.vm.Socket, qmptest.Hooks{
				Before: func(n int, _ []qmptest.CommandSeen) qmptest.Verdict {
					if n == at {
						reached.Store(true)
					}
					return qmptest.Verdict{Drop: n == at && at%2 == 0}
				},
				After: func(n int, _ qmptest.CommandSeen, _ json.RawMessage) {
					if n == at && at%2 == 1 { // QEMU has executed it, and nobody learns
						proxy.Load().Drop()
					}
				},
			}))
			cfg.Addr = proxy.Load().Addr()
			_, err := backup.Run(t.Context(), cfg)
			if reached.Load() && err != nil && !errors.Is(err, qmp.ErrDisconnected) || errors.Is(err, backup.ErrUndo) {
				t.Errorf("command %d: %v", at, err)
			}
			return reached.Load()
		})
	})
}

// The run is interrupted at every single command in turn.
func TestInterruptedAtEveryCommand(t *testing.T) {
	t.Parallel()
	each(t, []testenv.Style{testenv.Drive, testenv.Throttle}, func(t *testing.T, q testenv.QEMU, style testenv.Style) {
		r := newRig(t, q, style)
		r.write(40)
		r.run(chain.Full)
		r.atEveryCommand(func(cfg backup.Config, at int) bool {
			ctx, interrupt := context.WithCancel(t.Context())
			defer interrupt()
			var reached atomic.Bool
			cfg.Addr = qmptest.NewProxy(t, r.vm.Socket, qmptest.Hooks{
				Before: func(n int, _ []qmptest.CommandSeen) qmptest.Verdict {
					if n == at {
						reached.Store(true)
						interrupt()
					}
					return qmptest.Verdict{}
				},
			}).Addr()
			result, err := backup.Run(ctx, cfg)
			if reached.Load() && err == nil && result.Point == nil || err != nil && !errors.Is(err, context.Canceled) || errors.Is(err, backup.ErrUndo) {
				t.Errorf("command %d: %v", at, err)
			}
			return reached.Load()
		})
	})
}

var every = flag.Int("every", 3, "tests of each command of a run try every so many, from a random one on; 1: all")

// atEveryCommand calls fail with numbers of commands until the run has fewer. After each, the guest must be clean
// and running, and the next run an increment that holds what was written meanwhile.
func (r *rig) atEveryCommand(fail func(cfg backup.Config, at int) bool) {
	r.t.Helper()
	stride := *every
	if r.qemu.AtLeast(9, 0) != (r.vm.Config().Style == testenv.Throttle) {
		stride *= 3 // it is the other version's style
	}
	for at := 2 + rand.IntN(stride); ; at += stride { // 1 is the handshake
		r.ledger.Forget()
		r.write(3)
		reached := fail(r.config(backup.Auto), at)
		if got := r.vm.Status(); got != "running" {
			r.t.Fatalf("command %d: the guest is %s", at, got)
		}
		r.clean(1)
		r.write(3)
		r.run(chain.Inc)
		if r.t.Failed() {
			r.t.Fatalf("at command %d", at)
		}
		if !reached {
			if at < 30 {
				r.t.Errorf("a run of %d commands", at)
			}
			return
		}
	}
}

// QEMU is killed, and the guest quits, in mid-run: an error in good time, and the next run is right.
func TestGuestEndsInMidRun(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(*testenv.VM){"quit": (*testenv.VM).Quit, "killed": (*testenv.VM).Kill} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			each(t, []testenv.Style{testenv.Drive}, func(t *testing.T, q testenv.QEMU, style testenv.Style) {
				r := newRig(t, q, style)
				r.write(30)
				r.run(chain.Full)
				r.vm.Restart()
				r.write(10)
				r.flush()
				for _, command := range []string{"transaction", "blockdev-reopen", "query-jobs"} {
					cfg := r.config(backup.Auto)
					var ended atomic.Bool
					cfg.Addr = r.proxyAfter(command, func() {
						ended.Store(true)
						end(r.vm)
					})
					began := time.Now()
					_, err := backup.Run(t.Context(), cfg)
					if err == nil || !ended.Load() || time.Since(began) > time.Minute {
						t.Fatalf("at %s: after %s: %v", command, time.Since(began), err)
					}
					r.vm.Restart()
					result, err := backup.Run(t.Context(), r.config(backup.Auto))
					if err != nil {
						t.Fatal(err)
					}
					if name == "quit" && result.Point.Level() != chain.Inc {
						t.Errorf("at %s: after a clean end: %s: %s", command, result.Point.Level(), result.Point.Disks[0].Reason)
					}
					r.check(result.Point, r.ledger.Now(), r.ledger.Now())
					r.clean(1)
				}
			})
		})
	}
}

// Somebody cancels our job: the run fails and the next one is an increment.
func TestJobIsCancelled(t *testing.T) {
	t.Parallel()
	r := newRig(t, testenv.Host(t), testenv.Drive)
	r.write(30)
	r.run(chain.Full)
	if err := r.ledger.Fill("scsi0", 0, diskSize, 0x77); err != nil {
		t.Fatal(err)
	}
	cfg := r.config(backup.Auto)
	var cancelled atomic.Bool
	cfg.Addr = qmptest.NewProxy(t, r.vm.Socket, qmptest.Hooks{
		Before: func(_ int, cmds []qmptest.CommandSeen) qmptest.Verdict {
			if cmds[0].Name == "query-jobs" && !cancelled.Load() {
				var jobs []struct{ ID string }
				r.vm.Execute("query-jobs", nil, &jobs)
				for _, j := range jobs {
					if r.vm.Try("block-job-cancel", map[string]any{"device": j.ID, "force": true}, nil) == nil {
						cancelled.Store(true)
					}
				}
			}
			return qmptest.Verdict{}
		},
	}).Addr()
	_, err := backup.Run(t.Context(), cfg)
	if cancelled.Load() && err == nil {
		t.Error("a cancelled job made a point")
	}
	t.Logf("cancelled: %v: %v", cancelled.Load(), err)
	r.clean(1)
	r.run(chain.Inc)
}
