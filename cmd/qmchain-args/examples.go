package main

import "qmchain/cmd/internal/cli"

// Examples of all commands, which --help and the manual page show. A test sees that they can be typed so.

func (*grammar) Examples() []cli.Example {
	return []cli.Example{
		{For: "a socket for a VM, which is there after a stop and start", Line: "add 110"},
		{For: "what is still missing, of all VMs", Line: "check --all"},
	}
}

func (*addCmd) Examples() []cli.Example {
	return []cli.Example{
		{For: "two VMs", Line: "add 110 111"},
		{For: "all VMs but one: first only look", Line: "add --all --exclude 900 --dry-run"},
	}
}

func (*removeCmd) Examples() []cli.Example {
	return []cli.Example{
		{For: "before the package is removed", Line: "remove --all"},
	}
}

func (*showCmd) Examples() []cli.Example {
	return []cli.Example{
		{For: "one VM", Line: "show 110"},
	}
}

func (*checkCmd) Examples() []cli.Example {
	return []cli.Example{
		{For: "all VMs with a tag", Line: "check --tag backup"},
		{For: "for scripts: those that are not ready", Line: "check --all --json | jq -r '.[] | select(.ready | not) | .vmid'"},
	}
}
