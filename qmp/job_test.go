package qmp_test

import (
	"context"
	"encoding/json"
	"errors"
	"sync"
	"testing"
	"time"

	"qmchain/qmp"
	"qmchain/qmp/qmptest"
)

// jobs is the list of jobs of a Fake.
type jobs struct {
	mu        sync.Mutex
	list      []map[string]any
	queries   int
	dismissed []string
}

func newJobs(f *qmptest.Fake) *jobs {
	j := &jobs{}
	f.Handle("query-jobs", func(json.RawMessage) (any, error) {
		j.mu.Lock()
		defer j.mu.Unlock()
		j.queries++
		return append([]map[string]any{}, j.list...), nil
	})
	f.Handle("job-dismiss", func(args json.RawMessage) (any, error) {
		var a struct{ ID string }
		if err := json.Unmarshal(args, &a); err != nil {
			return nil, err
		}
		j.mu.Lock()
		defer j.mu.Unlock()
		j.dismissed = append(j.dismissed, a.ID)
		return nil, nil
	})
	return j
}

func (j *jobs) set(list ...map[string]any) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.list = list
}

// asked waits until query-jobs has come n times.
func (j *jobs) asked(t *testing.T, n int) {
	t.Helper()
	within(t, "query-jobs", func() {
		for {
			j.mu.Lock()
			queries := j.queries
			j.mu.Unlock()
			if queries >= n {
				return
			}
			time.Sleep(time.Millisecond)
		}
	})
}

func job(id, status, err string) map[string]any {
	m := map[string]any{"id": id, "type": "backup", "status": status, "current-progress": 5, "total-progress": 10}
	if err != "" {
		m["error"] = err
	}
	return m
}

func status(id, status string) map[string]string {
	return map[string]string{"id": id, "status": status}
}

func TestWaitJobAlreadyConcluded(t *testing.T) {
	t.Parallel()
	f := qmptest.NewFake(t)
	j := newJobs(f)
	j.set(job("other", "concluded", "not mine"), job("mine", "concluded", ""))
	c := dial(t, f.Addr())
	var seen []qmp.Job
	if err := c.WaitJob(t.Context(), "mine", func(job qmp.Job) { seen = append(seen, job) }); err != nil {
		t.Fatal(err)
	}
	want := qmp.Job{ID: "mine", Type: "backup", Status: "concluded", Current: 5, Total: 10}
	if len(seen) != 1 || seen[0] != want {
		t.Errorf("progress %+v", seen)
	}
	if len(j.dismissed) != 1 || j.dismissed[0] != "mine" {
		t.Errorf("dismissed %v", j.dismissed)
	}
}

// The end is told by an event: with a poll that never comes, WaitJob must return all the same, and other
// jobs' events must not wake it.
func TestWaitJobByEvent(t *testing.T) {
	t.Parallel()
	f := qmptest.NewFake(t)
	j := newJobs(f)
	j.set(job("mine", "running", ""))
	c := dial(t, f.Addr())
	c.SetJobPoll(time.Hour)
	result := make(chan error, 1)
	go func() { result <- c.WaitJob(t.Context(), "mine", nil) }()
	j.asked(t, 1)

	f.Emit("JOB_STATUS_CHANGE", status("other", "concluded"))
	f.Emit("JOB_STATUS_CHANGE", status("mine", "paused"))
	f.Emit("BLOCK_JOB_COMPLETED", map[string]any{"device": "mine", "error": "not the end yet"})
	select {
	case err := <-result:
		t.Fatalf("returned too early: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	j.mu.Lock()
	if j.queries != 1 {
		t.Errorf("%d queries before the end", j.queries)
	}
	j.mu.Unlock()

	j.set(job("mine", "concluded", "No space left on device"))
	f.Emit("JOB_STATUS_CHANGE", status("mine", "concluded"))
	within(t, "WaitJob", func() {
		err := <-result
		if e := new(qmp.JobError); !errors.As(err, &e) || *e != (qmp.JobError{ID: "mine", Desc: "No space left on device"}) {
			t.Errorf("got %v", err)
		}
	})
	if len(j.dismissed) != 1 {
		t.Errorf("dismissed %v", j.dismissed)
	}
}

// An event that comes while WaitJob takes its first look must not be missed.
func TestWaitJobEventDuringLook(t *testing.T) {
	t.Parallel()
	f := qmptest.NewFake(t)
	j := newJobs(f)
	j.set(job("mine", "running", ""))
	f.Inject(qmptest.Fault{
		Command: "query-jobs", Nth: 1,
		Before: []qmptest.Event{{Name: "JOB_STATUS_CHANGE", Data: status("mine", "concluded")}},
	})
	c := dial(t, f.Addr())
	c.SetJobPoll(time.Hour)
	within(t, "WaitJob", func() {
		if err := c.WaitJob(t.Context(), "mine", func(qmp.Job) { j.set(job("mine", "concluded", "")) }); err != nil {
			t.Error(err)
		}
	})
}

func TestWaitJobByPoll(t *testing.T) {
	t.Parallel()
	f := qmptest.NewFake(t)
	j := newJobs(f)
	j.set(job("mine", "running", ""))
	c := dial(t, f.Addr())
	c.SetJobPoll(time.Millisecond)
	polls := 0
	err := c.WaitJob(t.Context(), "mine", func(qmp.Job) {
		if polls++; polls == 5 {
			j.set(job("mine", "concluded", ""))
		}
	})
	if err != nil || polls != 6 {
		t.Errorf("%d polls, %v", polls, err)
	}
}

func TestWaitJobFails(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		list []map[string]any
		then func(*qmptest.Fake, *jobs, context.CancelFunc) // once the job has been looked at
		want error                                          // nil: a *JobError
		any  bool                                           // any error will do
	}{
		"never there": {},
		"vanished": {
			list: []map[string]any{job("mine", "running", "")},
			then: func(f *qmptest.Fake, j *jobs, _ context.CancelFunc) {
				j.set(job("other", "running", ""))
				f.Emit("JOB_STATUS_CHANGE", status("mine", "null"))
			},
		},
		"waits for job-finalize": {list: []map[string]any{job("mine", "pending", "")}},
		"cancelled": {
			list: []map[string]any{job("mine", "running", "")},
			then: func(_ *qmptest.Fake, _ *jobs, cancel context.CancelFunc) { cancel() },
			want: context.Canceled,
		},
		"cancelled in a flood of events": {
			list: []map[string]any{job("mine", "running", "")},
			then: func(f *qmptest.Fake, _ *jobs, cancel context.CancelFunc) {
				for range 1000 {
					f.Emit("JOB_STATUS_CHANGE", status("other", "running"))
				}
				cancel()
			},
			want: context.Canceled,
		},
		"QEMU quits": {
			list: []map[string]any{job("mine", "running", "")},
			then: func(f *qmptest.Fake, _ *jobs, _ context.CancelFunc) {
				f.Emit("SHUTDOWN", map[string]any{"guest": true})
				f.Disconnect()
			},
			want: qmp.ErrDisconnected,
		},
		"QEMU quits right after the end": {
			list: []map[string]any{job("mine", "running", "")},
			then: func(f *qmptest.Fake, _ *jobs, _ context.CancelFunc) {
				f.Emit("JOB_STATUS_CHANGE", status("mine", "concluded"))
				f.Disconnect()
			},
			want: qmp.ErrDisconnected,
		},
		"garbage in the event": {
			list: []map[string]any{job("mine", "running", "")},
			then: func(f *qmptest.Fake, _ *jobs, _ context.CancelFunc) { f.Emit("JOB_STATUS_CHANGE", 5) },
			any:  true,
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := qmptest.NewFake(t)
			j := newJobs(f)
			j.set(tt.list...)
			c := dial(t, f.Addr())
			c.SetJobPoll(time.Hour)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			result := make(chan error, 1)
			go func() { result <- c.WaitJob(ctx, "mine", nil) }()
			if tt.then != nil {
				j.asked(t, 1)
				// WaitJob may not have got the answer yet; either way it must see what happens now.
				tt.then(f, j, cancel)
			}
			within(t, "WaitJob", func() {
				err := <-result
				switch e := new(qmp.JobError); {
				case tt.want == nil && !tt.any && (!errors.As(err, &e) || e.ID != "mine"):
					t.Errorf("got %v, want a JobError", err)
				case tt.any && err == nil:
					t.Error("no error")
				case tt.want != nil:
					wantErrorIs(t, "WaitJob", err, tt.want)
				}
			})
			if len(j.dismissed) != 0 {
				t.Errorf("dismissed %v", j.dismissed)
			}
		})
	}
}

func TestWaitJobDismissFails(t *testing.T) {
	t.Parallel()
	f := qmptest.NewFake(t)
	newJobs(f).set(job("good", "concluded", ""), job("bad", "concluded", "broken"))
	f.Handle("job-dismiss", func(json.RawMessage) (any, error) { return nil, errors.New("Job not found") })
	c := dial(t, f.Addr())
	if e := new(qmp.Error); !errors.As(c.WaitJob(t.Context(), "good", nil), &e) {
		t.Error("a dismissal that failed was hidden")
	}
	if e := new(qmp.JobError); !errors.As(c.WaitJob(t.Context(), "bad", nil), &e) || e.Desc != "broken" {
		t.Error("the job's own error was hidden")
	}
}
