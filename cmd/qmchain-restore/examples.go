package main

import "qmchain/cmd/internal/cli"

// Examples of all commands, which --help and the manual page show. A test sees that they can be typed so.

func (*grammar) Examples() []cli.Example {
	return []cli.Example{
		{For: "what there is", Line: "list --repo /mnt/backup/qmchain"},
		{For: "a VM, with the VMID that it had", Line: "vm 110/latest --repo /mnt/backup/qmchain"},
		{For: "a disk to a file", Line: "image 110/latest --disk scsi0 --output /srv/scsi0.raw --repo /mnt/backup/qmchain"},
	}
}

func (*verifyCmd) Examples() []cli.Example {
	return []cli.Example{
		{For: "all of it", Line: "verify"},
		{For: "the newest point of a guest, and read it", Line: "verify 110/latest --deep"},
	}
}

func (*imageCmd) Examples() []cli.Example {
	return []cli.Example{
		{For: "a disk to a device", Line: "image 110/latest --disk scsi0 --output /dev/vg/disk"},
		{For: "all disks of a point to a folder, as qcow2", Line: "image 110/20261117 --output /srv/restored --format qcow2"},
	}
}

func (*vmCmd) Examples() []cli.Example {
	return []cli.Example{
		{For: "the commands that would be run", Line: "vm 110/latest --dry-run"},
		{For: "a copy beside the VM, on another storage", Line: "vm 110/latest --vmid 910 --unique --storage local-lvm"},
		{For: "in place of the VM, which is stopped", Line: "vm 110/latest --force"},
	}
}

func (*nbdCmd) Examples() []cli.Example {
	return []cli.Example{
		{For: "for clients on this host", Line: "nbd 110/latest --socket unix:/run/110.nbd"},
	}
}

func (*drillCmd) Examples() []cli.Example {
	return []cli.Example{
		{For: "until its agent answers", Line: "drill 110/latest"},
		{For: "until it says so, with a picture of the screen", Line: "drill web/latest --text 'login:' --screenshot /tmp/web.png"},
	}
}

func (*noteDrillCmd) Examples() []cli.Example {
	return []cli.Example{{For: "after `drill 110/latest --result 110.json` on a machine that can only read", Line: "note-drill 110 110.json"}}
}

func (*sendCmd) Examples() []cli.Example {
	return []cli.Example{
		{For: "to another host, with only what is not there yet", Line: "send 110/latest --have have.json | ssh host qmchain-restore receive --repo /srv/qmchain"},
		{For: "all of two guests, into a file", Line: "send --all 110 --all web > guests.tar"},
	}
}

func (*receiveCmd) Examples() []cli.Example {
	return []cli.Example{
		{For: "from a file", Line: "receive < guests.tar"},
		{For: "what is there, for send --have", Line: "receive --list > have.json"},
	}
}

func (*importCmd) Examples() []cli.Example {
	return []cli.Example{
		{For: "a set of qmpbackup's", Line: "import /mnt/backup/web --name web"},
		{For: "and compare every byte", Line: "import /mnt/backup/web --name web --verify"},
	}
}

func (*rebaseCmd) Examples() []cli.Example {
	return []cli.Example{
		{For: "a copy of the chain", Line: "rebase web --output /srv/web"},
	}
}

func (*commitCmd) Examples() []cli.Example {
	return []cli.Example{
		{For: "all up to a point, in one image", Line: "commit 110 --until 20261117 --output /srv/110"},
	}
}

func (*snapshotsCmd) Examples() []cli.Example {
	return []cli.Example{
		{For: "the last month in one image", Line: "snapshots 110 --disk scsi0 --output /srv/110"},
	}
}

func (*reportCmd) Examples() []cli.Example {
	return []cli.Example{
		{For: "a page about all backups", Line: "report --html /srv/backups.html"},
		{For: "the guests that somebody should look at", Line: `report --json | jq -r '.guests[] | select(.state != "good") | .guest'`},
	}
}
