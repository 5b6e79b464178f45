package proxmox

import (
	"context"
	"os/exec"
	"testing"
	"time"

	"qmchain/internal/child"
)

// TestCutOff: only qm's own refusal proves that it has set no lock.
func TestCutOff(t *testing.T) {
	t.Parallel()
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for _, test := range []struct {
		what   string
		ctx    context.Context
		limit  time.Duration
		script string
		want   bool
	}{
		{"done", t.Context(), time.Minute, ":", false},
		{"refused", t.Context(), time.Minute, "exit 255", false},
		{"took too long", t.Context(), 50 * time.Millisecond, "exec sleep 60", true},
		{"killed", t.Context(), time.Minute, "kill -9 $$", true},
		{"interrupted", ended, time.Minute, "exec sleep 60", true},
	} {
		_, err := child.Run(test.ctx, test.limit, "sh", "-c", test.script)
		if got := cutOff(err); got != test.want {
			t.Errorf("%s: %v for %v", test.what, got, err)
		}
	}
	if _, err := child.Run(t.Context(), time.Minute, "/nowhere/qm"); err == nil || cutOff(err) {
		t.Errorf("not started: %v", err)
	}
	if !cutOff(exec.ErrWaitDelay) {
		t.Error("its output was held open")
	}
}
