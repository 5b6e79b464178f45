package main

import (
	"testing"

	"qmchain/cmd/internal/cli/clitest"
)

func TestCommandLine(t *testing.T) {
	t.Parallel()
	clitest.Check(t, program(site{}, func(string) string { return "" }))
}
