package main

import (
	"bytes"
	"testing"

	"qmchain/cmd/internal/cli"
	"qmchain/cmd/internal/jsondoc"
)

// What the scripts' programs print with --json is compared with the same page.
func TestJSONPage(t *testing.T) {
	t.Parallel()
	page := jsondoc.Load(t)
	page.Type(t, "qmchain-fuse ls: of a point", []volumeJSON{})
	page.Type(t, "qmchain-fuse ls: of a folder", []entryJSON{})
	var described bytes.Buffer
	program().Run(t.Context(), []string{"--describe"}, cli.Env{Stdout: &described, Stderr: t.Output(), Getenv: func(string) string { return "" }})
	page.Complete(t, described.Bytes())
}
