package main

import "qmchain/cmd/internal/cli"

// Examples of all commands, which --help and the manual page show. A test sees that they can be typed so.

func (*grammar) Examples() []cli.Example {
	return []cli.Example{
		{For: "all points of all guests", Line: "mount /mnt/backup/qmchain /mnt/points"},
		{For: "a file out of a point", Line: "cp 110/latest:/etc/fstab /tmp --repo /mnt/backup/qmchain"},
	}
}

func (*mountCmd) Examples() []cli.Example {
	return []cli.Example{
		{For: "for this user", Line: "mount /mnt/backup/qmchain /mnt/points"},
		{For: "for all users", Line: "mount /mnt/backup/qmchain /mnt/points -o allow_other,umask=022"},
	}
}

func (*umountCmd) Examples() []cli.Example {
	return []cli.Example{
		{For: "as soon as nobody uses it", Line: "umount /mnt/points"},
	}
}

func (*filesCmd) Examples() []cli.Example {
	return []cli.Example{
		{For: "what a VM's fstab says is where", Line: "files 110/latest /mnt/files"},
		{For: "one partition", Line: "files 110/latest /mnt/files --disk scsi0 --part 2"},
	}
}

func (*lsCmd) Examples() []cli.Example {
	return []cli.Example{
		{For: "what is on the disks", Line: "ls 110/latest"},
		{For: "a folder", Line: "ls -l 110/latest:/etc"},
	}
}

func (*catCmd) Examples() []cli.Example {
	return []cli.Example{
		{For: "two files", Line: "cat 110/latest:/etc/hostname 110/latest:/etc/fstab"},
	}
}

func (*cpCmd) Examples() []cli.Example {
	return []cli.Example{
		{For: "a folder, with owners and modes", Line: "cp -rp 110/latest:/etc/nginx /srv/restored"},
	}
}
