package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/sirupsen/logrus"
)

// metricsEvery is how often the file with the counters is written: about as often as node_exporter is asked.
const metricsEvery = 15 * time.Second

// metricsFile writes a mount's counters to a file, until ctx ends, and once more then. Who reads the file sees it whole: the
// new one takes the place of the old.
type metricsFile struct {
	path  string
	stats func() []byte
	log   logrus.FieldLogger
}

// keep writes at once and then again and again. It returns when ctx has ended.
func (m metricsFile) keep(ctx context.Context) {
	tick := time.NewTicker(metricsEvery)
	defer tick.Stop()
	failed := false
	for {
		err := m.write()
		if err != nil && !failed {
			m.log.WithError(err).Warn("the counters can't be written")
		}
		failed = err != nil
		select {
		case <-ctx.Done():
			if err := m.write(); err != nil && !failed {
				m.log.WithError(err).Warn("the counters can't be written")
			}
			return
		case <-tick.C:
		}
	}
}

func (m metricsFile) write() error {
	// node_exporter reads what ends in .prom, so this is not read.
	f, err := os.CreateTemp(filepath.Dir(m.path), "."+filepath.Base(m.path)+".")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(m.stats())
	if err == nil {
		err = f.Chmod(0o644) // for another user's exporter; nothing in it is secret
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return fmt.Errorf("%s: %w", f.Name(), err)
	}
	return os.Rename(f.Name(), m.path)
}
