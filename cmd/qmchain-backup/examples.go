package main

import "qmchain/cmd/internal/cli"

// Examples of all commands, which --help and the manual page show. A test sees that they can be typed so.

func (*grammar) Examples() []cli.Example {
	return []cli.Example{
		{For: "the first point of a VM, and another", Line: "run 110 --repo /mnt/backup/qmchain"},
		{For: "what there is", Line: "list --repo /mnt/backup/qmchain"},
		{For: "keep a fortnight, a point a day", Line: "prune --keep-daily 14 --repo /mnt/backup/qmchain"},
	}
}

func (*runCmd) Examples() []cli.Example {
	return []cli.Example{
		{For: "a VM; the repository stands in the configuration file", Line: "run 110"},
		{For: "all VMs of the node, two at a time", Line: "run --all --jobs 2"},
		{For: "a guest of plain QEMU", Line: "run --socket /run/web-backup.qmp --name web --repo /mnt/backup/qmchain"},
		{For: "what would be copied", Line: "run 110 --dry-run"},
	}
}

func (*estimateCmd) Examples() []cli.Example {
	return []cli.Example{
		{For: "all VMs", Line: "estimate --all"},
	}
}

func (*pruneCmd) Examples() []cli.Example {
	return []cli.Example{
		{For: "what would be removed", Line: "prune --keep-last 3 --keep-daily 14 --keep-monthly 12 --dry-run"},
		{For: "one guest", Line: "prune web --keep-last 10"},
	}
}

func (*removeCmd) Examples() []cli.Example {
	return []cli.Example{
		{For: "one point", Line: "remove 110/20261120T111523Z-81aa"},
	}
}

func (*protectCmd) Examples() []cli.Example {
	return []cli.Example{
		{For: "the newest point, before an upgrade", Line: "protect 110/latest"},
	}
}

func (*unprotectCmd) Examples() []cli.Example {
	return []cli.Example{
		{For: "as it was before", Line: "unprotect 110/20261120T111523Z-81aa"},
	}
}

func (*keepCmd) Examples() []cli.Example {
	return []cli.Example{
		{For: "a VM, as qmchain-keep@110.service does", Line: "keep 110"},
		{For: "a guest of plain QEMU", Line: "keep --socket /run/web-backup.qmp --name web"},
	}
}

func (*infoCmd) Examples() []cli.Example {
	return []cli.Example{
		{For: "a VM", Line: "info 110"},
		{For: "a guest of plain QEMU", Line: "info --socket /run/web-backup.qmp"},
	}
}

func (*checkCmd) Examples() []cli.Example {
	return []cli.Example{
		{For: "for monitoring: is there a point of the last day?", Line: "check --max-age 26h"},
		{For: "the guests that have none", Line: `check --json | jq -r '.[] | select(.state != "ok") | .guest'`},
	}
}

func (*doctorCmd) Examples() []cli.Example {
	return []cli.Example{
		{For: "what a crash has left", Line: "doctor 110"},
		{For: "and put it right", Line: "doctor 110 --fix"},
	}
}

func (*cleanupCmd) Examples() []cli.Example {
	return []cli.Example{
		{For: "so that `qm rollback` works", Line: "cleanup 110"},
		{For: "a stopped guest of plain QEMU", Line: "cleanup --offline /images/web.qcow2"},
	}
}
