package main

import (
	"testing"

	"qmchain/cmd/internal/cli/clitest"
	"qmchain/proxmox"
)

func TestCommandLine(t *testing.T) {
	t.Parallel()
	clitest.Check(t, program(proxmox.Host{}))
}
