package main

import (
	"bytes"
	"testing"

	"qmchain/cmd/internal/cli"
	"qmchain/cmd/internal/jsondoc"
	"qmchain/cmd/internal/listing"
	"qmchain/internal/durable"
	"qmchain/internal/report"
	"qmchain/proxmox"
)

// What the scripts' programs print with --json is compared with the same page.
func TestJSONPage(t *testing.T) {
	t.Parallel()
	page := jsondoc.Load(t)
	for section, printed := range map[string]any{
		"list":                      []listing.Point{},
		"verify":                    verified{},
		"image":                     restored{},
		"vm":                        restoredVM{},
		"nbd":                       serving{},
		"drill":                     drilled{},
		"receive":                   []receivedPoint{},
		"import":                    []importedPoint{},
		"rebase, commit, snapshots": standardPlan{},
		"report":                    report.Report{},
	} {
		page.Type(t, "qmchain-restore "+section, printed)
	}
	var described bytes.Buffer
	program(durable.FS{}, proxmox.Host{}).Run(t.Context(), []string{"--describe"}, cli.Env{Stdout: &described, Stderr: t.Output(), Getenv: func(string) string { return "" }})
	page.Complete(t, described.Bytes())
}
