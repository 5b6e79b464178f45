package backup_test

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"qmchain/backup"
	"qmchain/chain"
	"qmchain/internal/testenv"
	"qmchain/qmp/qmptest"
)

// scriptedAgent is an agent that goes wrong as told.
type scriptedAgent struct {
	freeze, thaw func(context.Context) error
	asked        bool
	thaws        atomic.Int64
}

func (a *scriptedAgent) Freeze(ctx context.Context) (bool, error) { return a.asked, a.freeze(ctx) }

func (a *scriptedAgent) Thaw(ctx context.Context) error {
	a.thaws.Add(1)
	if a.thaw == nil {
		return nil
	}
	return a.thaw(ctx)
}

func (r *rig) runWith(change func(*backup.Config)) (*backup.Result, error) {
	r.t.Helper()
	cfg := r.config(backup.Auto)
	cfg.FreezeLimit = 300 * time.Millisecond
	change(&cfg)
	return backup.Run(r.t.Context(), cfg)
}

func TestFreezeGoesWrong(t *testing.T) {
	t.Parallel()
	r := newRig(t, testenv.Host(t), testenv.Throttle)
	r.run(chain.Full)
	good := func(context.Context) error { return nil }
	bad := func(context.Context) error { return errors.New("the agent said no") }
	hang := func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
	for _, test := range []struct {
		what        string
		agent       *scriptedAgent
		consistency chain.Consistency
		warning     string
		thaws       bool
	}{
		{"it works", &scriptedAgent{freeze: good, asked: true}, chain.Frozen, "", true},
		{"no agent", &scriptedAgent{freeze: bad}, chain.Instant, "said no", false},
		{"it refuses", &scriptedAgent{freeze: bad, asked: true}, chain.Instant, "said no", true},
		{"it hangs", &scriptedAgent{freeze: hang, asked: true}, chain.Instant, "deadline", true},
	} {
		r.write(5)
		result, err := r.runWith(func(c *backup.Config) { c.Agent = test.agent })
		if err != nil {
			t.Errorf("%s: %v", test.what, err)
			continue
		}
		if result.Point.Consistency != test.consistency || result.StillFrozen {
			t.Errorf("%s: %s, still frozen: %v", test.what, result.Point.Consistency, result.StillFrozen)
		}
		if text := strings.Join(result.Warnings, "; "); (text == "") != (test.warning == "") || !strings.Contains(text, test.warning) {
			t.Errorf("%s: warnings %q", test.what, result.Warnings)
		}
		if (test.agent.thaws.Load() > 0) != test.thaws {
			t.Errorf("%s: %d thaws", test.what, test.agent.thaws.Load())
		}
		r.check(result.Point, r.ledger.Now(), r.ledger.Now())
		r.clean(1)
	}

	// A paused guest's agent can't answer; it is not even asked.
	r.vm.Execute("stop", nil, nil)
	agent := &scriptedAgent{freeze: bad, asked: true}
	result, err := r.runWith(func(c *backup.Config) { c.Agent = agent })
	if err != nil || result.Point.Consistency != chain.Instant || agent.thaws.Load() != 0 || len(result.Warnings) != 1 {
		t.Errorf("paused: %+v, %v", result, err)
	}
	r.clean(1)
}

// An interrupted or failing run thaws the guest all the same.
func TestThawAfterFailure(t *testing.T) {
	t.Parallel()
	r := newRig(t, testenv.Host(t), testenv.Throttle)
	r.run(chain.Full)
	ctx, interrupt := context.WithCancel(t.Context())
	agent := &scriptedAgent{asked: true, freeze: func(context.Context) error { interrupt(); return nil }}
	cfg := r.config(backup.Auto)
	cfg.Agent, cfg.FreezeLimit = agent, time.Second
	if _, err := backup.Run(ctx, cfg); !errors.Is(err, context.Canceled) || agent.thaws.Load() == 0 {
		t.Errorf("interrupted: %v, %d thaws", err, agent.thaws.Load())
	}
	r.clean(1)

	agent = &scriptedAgent{asked: true, freeze: func(context.Context) error { return nil }}
	cfg.Agent = agent
	var proxy atomic.Pointer[qmptest.Proxy]
	proxy.Store(qmptest.NewProxy(t, r.vm.Socket, qmptest.Hooks{
		After: func(_ int, cmd qmptest.CommandSeen, _ json.RawMessage) {
			if cmd.Name == "blockdev-reopen" && agent.thaws.Load() == 0 {
				proxy.Load().Drop()
			}
		},
	}))
	cfg.Addr = proxy.Load().Addr()
	if _, err := backup.Run(t.Context(), cfg); err == nil || agent.thaws.Load() == 0 {
		t.Errorf("connection lost: %v, %d thaws", err, agent.thaws.Load())
	}
	r.clean(1)
	r.run(chain.Inc)
}

// A guest that a killed run has left frozen or paused is released by the next one; somebody else's pause is not undone.
func TestRecoveryReleasesTheGuest(t *testing.T) {
	t.Parallel()
	r := newRig(t, testenv.Host(t), testenv.Drive)
	mark := func(name string) {
		r.vm.Execute("object-add", map[string]any{"qom-type": "throttle-group", "id": name}, nil)
	}
	r.run(chain.Full)

	mark("qmchain-paused")
	r.vm.Execute("stop", nil, nil)
	r.run(chain.Inc)
	if got := r.vm.Status(); got != "running" {
		t.Errorf("left paused by a run of ours: %s", got)
	}
	r.vm.Execute("stop", nil, nil)
	r.run(chain.Inc)
	if got := r.vm.Status(); got != "paused" {
		t.Errorf("paused by somebody: %s", got)
	}
	r.vm.Execute("cont", nil, nil)

	mark("qmchain-frozen")
	if _, err := backup.Run(t.Context(), r.config(backup.Auto)); !errors.Is(err, backup.ErrNeedsDoctor) {
		t.Errorf("frozen, and no agent: %v", err)
	}
	agent := &scriptedAgent{freeze: func(context.Context) error { return nil }, asked: true}
	result, err := r.runWith(func(c *backup.Config) { c.Agent = agent })
	if err != nil || agent.thaws.Load() != 2 || result.Point.Level() != chain.Inc {
		t.Errorf("frozen: %+v, %v, %d thaws", result, err, agent.thaws.Load())
	}
	r.clean(1)
}

func TestPause(t *testing.T) {
	t.Parallel()
	each(t, []testenv.Style{testenv.Drive, testenv.Throttle}, func(t *testing.T, q testenv.QEMU, style testenv.Style) {
		r := newRig(t, q, style)
		r.run(chain.Full)
		pause := func(c *backup.Config) { c.Pause = true }
		at := func(command string, do string) func(*backup.Config) {
			var done atomic.Bool
			return func(c *backup.Config) {
				pause(c)
				c.Addr = qmptest.NewProxy(t, r.vm.Socket, qmptest.Hooks{
					Before: func(_ int, cmds []qmptest.CommandSeen) qmptest.Verdict {
						if cmds[0].Name == command && done.CompareAndSwap(false, true) {
							r.vm.Execute(do, nil, nil)
						}
						return qmptest.Verdict{}
					},
				}).Addr()
			}
		}
		for _, test := range []struct {
			what        string
			change      func(*backup.Config)
			before      string
			after       string
			consistency chain.Consistency // empty: it must fail
		}{
			{"running", pause, "running", "running", chain.Paused},
			{"paused by somebody", pause, "paused", "paused", chain.Instant},
			{"somebody pauses right before the switch", at("object-add", "stop"), "running", "paused", chain.Instant},
			{"somebody resumes in the switch", at("blockdev-reopen", "cont"), "running", "running", ""},
		} {
			r.write(5)
			r.vm.Execute(map[string]string{"running": "cont", "paused": "stop"}[test.before], nil, nil)
			result, err := r.runWith(test.change)
			switch {
			case test.consistency == "":
				if !errors.Is(err, backup.ErrBusy) {
					t.Errorf("%s: %v", test.what, err)
				}
			case err != nil:
				t.Errorf("%s: %v", test.what, err)
			case result.Point.Consistency != test.consistency:
				t.Errorf("%s: %s", test.what, result.Point.Consistency)
			default:
				r.check(result.Point, r.ledger.Now(), r.ledger.Now())
			}
			if got := r.vm.Status(); got != test.after {
				t.Errorf("%s: the guest is %s", test.what, got)
			}
			r.clean(1)
		}
	})
}
