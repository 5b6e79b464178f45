package main

import (
	"testing"

	"qmchain/cmd/internal/cli/clitest"
	"qmchain/internal/durable"
)

func TestCommandLine(t *testing.T) {
	t.Parallel()
	clitest.Check(t, program(durable.FS{}))
}
