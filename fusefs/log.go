package fusefs

import (
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"qmchain/fusefs/tree"
)

// complainAgain is how long a message that repeats is not logged again: one bad cluster under a program that retries
// must not fill the log.
const complainAgain = time.Minute

// quietLog logs what requests run into, and the same thing not again and again.
type quietLog struct {
	log logrus.FieldLogger
	now func() time.Time

	mu   sync.Mutex
	said map[string]time.Time
}

func newQuietLog(log logrus.FieldLogger, now func() time.Time) *quietLog {
	return &quietLog{log: log, now: now, said: map[string]time.Time{}}
}

func (q *quietLog) error(fields logrus.Fields, text string) {
	if q.again(text) {
		q.log.WithFields(fields).Error(text)
	}
}

func (q *quietLog) warn(fields logrus.Fields, text string) {
	if q.again(text) {
		q.log.WithFields(fields).Warn(text)
	}
}

func (q *quietLog) again(text string) bool {
	now := q.now()
	q.mu.Lock()
	defer q.mu.Unlock()
	if last, ok := q.said[text]; ok && now.Sub(last) <= complainAgain {
		return false
	}
	if len(q.said) > 1000 {
		clear(q.said)
	}
	q.said[text] = now
	return true
}

// placeFields say where something in the tree is.
func placeFields(p tree.Place) logrus.Fields {
	f := logrus.Fields{}
	if p.Guest != "" {
		f["guest"] = p.Guest
	}
	if p.Point != "" {
		f["point"] = string(p.Point)
	}
	return f
}

func diskFields(p tree.Place, disk string) logrus.Fields {
	f := placeFields(p)
	f["disk"] = disk
	return f
}
