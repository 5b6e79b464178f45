package qmp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

// defaultJobPoll is how often WaitJob asks how far a job has come. Its end is told by an event at once.
const defaultJobPoll = 500 * time.Millisecond

// Job is a background job, from query-jobs.
type Job struct {
	ID     string `json:"id"`
	Type   string `json:"type"`   // backup, mirror, ...
	Status string `json:"status"` // created, running, paused, ..., concluded
	Error  string `json:"error"`  // of a concluded job: why it failed; empty: it succeeded

	// Progress, in a unit that is up to the job (bytes, for a backup). Total can change on the way.
	Current int64 `json:"current-progress"`
	Total   int64 `json:"total-progress"`
}

// QueryJobs lists all jobs, concluded ones that were not dismissed included.
func (c *Client) QueryJobs(ctx context.Context) ([]Job, error) {
	return query[[]Job](ctx, c, "query-jobs", nil)
}

// BlockJob is a block job, from query-block-jobs.
type BlockJob struct {
	ID       string `json:"device"`
	Type     string `json:"type"`
	Status   string `json:"status"`
	IOStatus string `json:"io-status"` // ok, failed, nospace
	Paused   bool   `json:"paused"`
	Busy     bool   `json:"busy"`
	Speed    int64  `json:"speed"` // limit in bytes per second; 0: none
	Offset   int64  `json:"offset"`
	Len      int64  `json:"len"`
	Error    string `json:"error"`
}

// QueryBlockJobs lists all block jobs.
func (c *Client) QueryBlockJobs(ctx context.Context) ([]BlockJob, error) {
	return query[[]BlockJob](ctx, c, "query-block-jobs", nil)
}

// JobCancel tells a job to end without success, and does not wait for that. A job that is already
// concluded can't be cancelled, which is an Error.
//
// It is job-cancel: that one is always forced (since QEMU 6.2, and the same to this day), resumes a paused
// job to cancel it, and works for every kind of job. block-job-cancel does this only with force=true;
// without, it refuses a paused job and lets a mirror that is ready end in success.
func (c *Client) JobCancel(ctx context.Context, id string) error {
	return c.Execute(ctx, "job-cancel", idArgs{id}, nil)
}

// JobDismiss removes a concluded job from the list.
func (c *Client) JobDismiss(ctx context.Context, id string) error {
	return c.Execute(ctx, "job-dismiss", idArgs{id}, nil)
}

// JobError says that a job has failed.
type JobError struct {
	ID   string
	Desc string // QEMU's text, for people
}

func (e *JobError) Error() string { return fmt.Sprintf("job %s: %s", e.ID, e.Desc) }

// WaitJob awaits the end of a job and dismisses it. The job must have been started with auto-finalize true
// and auto-dismiss false, else its result would vanish with it. It may have ended before the call.
//
// A job that fails, is cancelled, or is no longer there gives a *JobError; QEMU's end gives an error that
// wraps ErrDisconnected. When the context ends, the job goes on. The progress function, if any, is called
// now and then, at most twice a second but for the end, and must not take long. A job may take any time;
// only a QEMU that no longer answers ends the wait by the command time-out.
func (c *Client) WaitJob(ctx context.Context, id string, progress func(Job)) error {
	// Subscribed before the first look, so that an end between two looks shows up as an event.
	events := c.Subscribe()
	defer events.Close()
	for {
		job, err := c.findJob(ctx, id)
		if err != nil {
			return err
		}
		if progress != nil {
			progress(job)
		}
		switch job.Status {
		case "concluded":
			dismissed := c.JobDismiss(ctx, id)
			if job.Error != "" {
				return &JobError{ID: id, Desc: job.Error}
			}
			return dismissed
		case "pending":
			// A job that finalizes itself is never seen in this state: waiting would be for ever.
			return &JobError{ID: id, Desc: "waits for job-finalize"}
		}
		if err := c.awaitChange(ctx, events, id); err != nil {
			return err
		}
	}
}

func (c *Client) findJob(ctx context.Context, id string) (Job, error) {
	jobs, err := c.QueryJobs(ctx)
	if err != nil {
		return Job{}, fmt.Errorf("job %s: %w", id, err)
	}
	for _, job := range jobs {
		if job.ID == id {
			return job, nil
		}
	}
	return Job{}, &JobError{ID: id, Desc: "the job is no longer there"}
}

// awaitChange returns when an event says that the job has ended, or when it is time to look at it again.
func (c *Client) awaitChange(ctx context.Context, events *Subscription, id string) error {
	poll, cancel := context.WithTimeout(ctx, c.jobPoll)
	defer cancel()
	for poll.Err() == nil { // asked for each event: a flood of them must not keep the poll or the caller waiting
		e, err := events.Next(poll)
		if errors.Is(err, ErrDisconnected) {
			return fmt.Errorf("job %s: %w", id, err)
		}
		if err != nil {
			break
		}
		if e.Name != "JOB_STATUS_CHANGE" {
			continue
		}
		var change struct {
			ID     string `json:"id"`
			Status string `json:"status"`
		}
		if err := json.Unmarshal(e.Data, &change); err != nil {
			return fmt.Errorf("job %s: event %s: %w", id, e.Name, err)
		}
		if change.ID == id && (change.Status == "concluded" || change.Status == "null") {
			return nil
		}
	}
	if ctx.Err() != nil {
		return fmt.Errorf("job %s: %w", id, contextError(ctx))
	}
	return nil
}
