package main

import (
	"testing"

	"qmchain/backup"
	"qmchain/cmd/internal/jsondoc"
	"qmchain/cmd/internal/listing"
)

// What the tests' calls print with --json is compared with the same page.
func TestJSONPage(t *testing.T) {
	t.Parallel()
	page := jsondoc.Load(t)
	for section, printed := range map[string]any{
		"run: progress":                    progressEvent{},
		"run: point":                       pointEvent{},
		"run: skipped":                     skippedEvent{},
		"run: error":                       errorEvent{},
		"run: summary":                     summaryEvent{},
		"estimate, run: of one guest":      []planned{},
		"estimate, run: of several guests": plannedGuest{},
		"list":                             []listing.Point{},
		"prune":                            []prunedPoint{},
		"remove":                           []prunedPoint{},
		"protect, unprotect":               []protectedPoint{},
		"info":                             backup.Info{},
		"check":                            []checked{},
		"doctor":                           []backup.Finding{},
		"cleanup":                          cleaned{},
	} {
		page.Type(t, "qmchain-backup "+section, printed)
	}
	_, described, _ := call(t, "--describe")
	page.Complete(t, []byte(described))
}
