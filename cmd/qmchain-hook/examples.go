package main

import "qmchain/cmd/internal/cli"

// Examples of all commands, which --help and the manual page show. A test sees that they can be typed so.

func (*grammar) Examples() []cli.Example {
	return []cli.Example{
		{For: "what is to be done when a VM starts and stops", Line: "install 110"},
	}
}

func (*installCmd) Examples() []cli.Example {
	return []cli.Example{
		{For: "one VM, with the script on a storage that all nodes have", Line: "install 110 --storage nfs"},
		{For: "what would be changed", Line: "install --all --dry-run"},
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

func (*guestCmd) Examples() []cli.Example {
	return []cli.Example{
		{For: "as Proxmox VE does it", Line: "guest 110 post-start"},
	}
}

func (*vzdumpCmd) Examples() []cli.Example {
	return []cli.Example{
		{For: "as vzdump does it", Line: "vzdump backup-start snapshot 110"},
	}
}
