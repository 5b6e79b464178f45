package main

import (
	"testing"

	"qmchain/cmd/internal/jsondoc"
)

// What the tests' calls print with --json is compared with the same page.
func TestJSONPage(t *testing.T) {
	t.Parallel()
	page := jsondoc.Load(t)
	page.Type(t, "qmchain-args add, remove", []outcome{})
	page.Type(t, "qmchain-args show, check", []state{})
	_, described, _ := newRig(t).call(t.Context(), "--describe")
	page.Complete(t, []byte(described))
}
