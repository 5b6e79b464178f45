package main

import (
	"testing"

	"qmchain/cmd/internal/jsondoc"
)

// What the tests' calls print with --json is compared with the same page.
func TestJSONPage(t *testing.T) {
	t.Parallel()
	page := jsondoc.Load(t)
	page.Type(t, "qmchain-hook install, remove", []outcome{})
	page.Type(t, "qmchain-hook show", []state{})
	_, described, _ := newRig(t).call("--describe")
	page.Complete(t, []byte(described))
}
