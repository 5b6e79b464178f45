#!/usr/bin/env bash
# Usage: guest.sh FOLDER
#
# Makes FOLDER/vmlinuz and FOLDER/initrd, a small Linux for tests: Debian 12's
# kernel, busybox, ext4 tools and the guest agent, all in memory. (Debian 13's
# kernel crashes on the emulated CPU of QEMU 7.2, once in four boots.) The disks are
# free for tests, under /dev/disk/ID (ID: the name in the test, such as scsi0).
# Needs neither root nor anything installed but apt. Does nothing when FOLDER
# is there.
set -euo pipefail

folder=$(realpath -m "$1")
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ -d $folder ]] && exit 0

# Two set-ups at once: the second waits, and then finds the work done.
mkdir -p "$(dirname "$folder")"
exec 9>"$folder.lock"
flock 9
[[ -d $folder ]] && exit 0
new=$folder.new
rm -rf "$new"
trap 'rm -rf "$new"' EXIT

echo "making a Linux guest in $folder"
debian=$new/debian root=$new/root
"$here/debs.sh" bookworm "$debian" linux-image-cloud-amd64 busybox-static e2fsprogs qemu-guest-agent
busybox=$debian/usr/bin/busybox
lib=usr/lib/x86_64-linux-gnu

mkdir -p "$root"/{bin,sbin,lib/modules,lib64,"$lib",dev,proc,sys,run,tmp,mnt,var/{run,log},etc/acpi/PWRF}
cp "$debian"/boot/vmlinuz-* "$new/vmlinuz"

# Programs and the libraries they need.
cp "$busybox" "$root/bin/busybox"
for applet in $("$busybox" --list); do
	[[ $applet == busybox ]] || ln -s busybox "$root/bin/$applet"
done
loader=$debian/$lib/ld-linux-x86-64.so.2
for program in mke2fs e2fsck tune2fs dumpe2fs resize2fs qemu-ga; do
	cp "$debian/usr/sbin/$program" "$root/sbin/"
	"$loader" --list --library-path "$debian/$lib" "$debian/usr/sbin/$program" |
		sed -n 's,.* => \(.*\) (0x.*,\1,p' | xargs -I{} cp -nL {} "$root/$lib/"
done
ln -s mke2fs "$root/sbin/mkfs.ext4"
ln -s e2fsck "$root/sbin/fsck.ext4"
ln -s "../$lib/ld-linux-x86-64.so.2" "$root/lib64/"

# Kernel modules, and a list of them in an order that loads.
declare -A loaded
load() {
	local module=$1 file need
	file=$(find "$debian/usr/lib/modules" -name "${module//_/[-_]}.ko")
	[[ -n ${loaded[$module]:-} || -z $file ]] && return # once; and not what is built in
	loaded[$module]=1
	# The module's own information: strings that end in a zero byte.
	for need in $(tr '\0' '\n' <"$file" | sed -n 's/^depends=//p' | tr , ' '); do
		load "${need//-/_}"
	done
	cp "$file" "$root/lib/modules/$module.ko"
	echo "$module" >>"$root/lib/modules/order"
}
for module in virtio_pci virtio_blk virtio_scsi virtio_console virtio_rng sd_mod sr_mod ata_piix nvme ext4 button evdev; do
	load "$module"
done

cat >"$root/init" <<'INIT'
#!/bin/sh
export PATH=/sbin:/bin HOME=/
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
while read -r module; do
	insmod /lib/modules/$module.ko
done </lib/modules/order
disks

# The first agent is the one that a host's tools know. The second is for
# tests: it answers while the first is frozen or in use.
n=0
for name in org.qemu.guest_agent.0 qmchain.test.0; do
	for port in /sys/class/virtio-ports/*; do
		[ "$(cat $port/name 2>/dev/null)" = $name ] || continue
		mkdir -p /run/agent$n
		qemu-ga -d -m virtio-serial -p /dev/${port##*/} -t /run/agent$n -f /run/agent$n/pid -l /run/agent$n/log
	done
	n=$((n + 1))
done
acpid

echo qmchain-guest-ready
while :; do
	setsid -c sh </dev/ttyS0 >/dev/ttyS0 2>&1
done
INIT

# Names for disks: the serial number that the test gave.
cat >"$root/sbin/disks" <<'DISKS'
#!/bin/sh
mkdir -p /dev/disk
for disk in /sys/block/*; do
	for serial in $disk/serial $disk/device/serial $disk/device/vpd_pg80; do
		[ -r $serial ] || continue
		id=$(tr -dc 'a-z0-9' <$serial)
		[ -n "$id" ] && ln -sf /dev/${disk##*/} /dev/disk/$id
		break
	done
done
DISKS

# What the agent runs for guest-shutdown, and acpid for the power button.
cat >"$root/sbin/shutdown" <<'SHUTDOWN'
#!/bin/sh
umount -a -r 2>/dev/null
sync
case $1 in
-r) reboot -f ;;
*) poweroff -f ;;
esac
SHUTDOWN
cp "$root/sbin/shutdown" "$root/etc/acpi/PWRF/00000080"
chmod +x "$root"/init "$root"/sbin/{disks,shutdown} "$root/etc/acpi/PWRF/00000080"

# Not compressed: the guest, whose CPU is emulated, would pay for it.
(cd "$root" && find . | "$busybox" cpio -o -H newc) >"$new/initrd" 2>/dev/null ||
	{ echo "guest.sh: no initrd" >&2; exit 1; }
rm -rf "$debian" "$root"
mv "$new" "$folder"
