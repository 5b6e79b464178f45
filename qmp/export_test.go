package qmp

import "time"

// SetJobPoll sets how often WaitJob asks for the state of its job.
func (c *Client) SetJobPoll(d time.Duration) { c.jobPoll = d }
