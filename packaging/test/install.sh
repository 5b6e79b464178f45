#!/usr/bin/env bash
# On a machine of run.sh: install, first steps with a guest, upgrade in the
# midst of a backup, remove, purge. What is left at the end must be what was
# there at the beginning.
set -euo pipefail

deb=(/debs/qmchain_*_amd64.deb)
deb=${deb[0]}
guest=

fail() { echo "install.sh: $*" >&2; exit 1; }
say() { echo "-- $*"; }
finish() {
	if [[ $guest ]]; then kill -9 "$guest" 2>/dev/null || true; fi
}
trap finish EXIT
# apt-get, quiet unless it fails. What it asks, it gets Debian's default for: the admin's own settings stay.
apt() {
	apt-get -q -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold --yes "$@" >/tmp/apt.log 2>&1 || { cat /tmp/apt.log; fail "apt-get $*"; }
}
# Every file outside of what dpkg, apt and the kernel keep for themselves.
files() {
	find / -xdev \( -path /proc -o -path /sys -o -path /dev -o -path /debs -o -path /test -o -path /tmp -o -path /var/cache -o -path /var/lib/apt \
		-o -path /var/lib/dpkg -o -path /var/log -o -path /run \) -prune -o -print | sort
}

apt update
say "it asks for what it needs"
apt-get -s install "$deb" >/tmp/plan
for package in qemu-utils fuse3; do
	grep -q "^Inst $package " /tmp/plan || fail "$package would not be installed with it"
done
apt install --no-install-recommends qemu-utils fuse3 qemu-system-x86
files >/tmp/before

# An older version, whose default settings were others: at the upgrade dpkg has to decide.
dpkg-deb -R "$deb" /tmp/old
sed -i 's/^Version: .*/Version: 0~0-1/' /tmp/old/DEBIAN/control
echo '# as it once was' >>/tmp/old/etc/qmchain/config.toml
(cd /tmp/old && xargs -a <(cut -c 35- DEBIAN/md5sums) -d '\n' md5sum >/tmp/md5sums && mv /tmp/md5sums DEBIAN/md5sums)
dpkg-deb -Zgzip -z1 -b /tmp/old /tmp/old.deb >/dev/null

say "install"
apt install /tmp/old.deb
[[ -z $(dpkg --verify qmchain) ]] || fail "$(dpkg --verify qmchain)"
[[ -z $(dpkg --audit) ]] || fail "$(dpkg --audit)"
for program in args backup restore fuse hook; do
	[[ -x /usr/bin/qmchain-$program ]] || fail "there is no qmchain-$program"
done
for program in /usr/bin/qmchain-*; do
	"$program" --version >/dev/null
	# The best of some: what else goes on here is not the program's time.
	best=1000000
	for _ in {1..30}; do
		begin=${EPOCHREALTIME/./}
		"$program" --help >/dev/null
		took=$((${EPOCHREALTIME/./} - begin))
		((took < best)) && best=$took
	done
	echo "$program --help: $((best / 1000)).$((best % 1000 / 100)) ms"
	((best < 20000)) || fail "$program takes $best us to start"
done

say "first steps"
mkdir -p /srv/backup /mnt/points
qemu-img create -q -f qcow2 /srv/disk.qcow2 64M
qemu-io -c 'write -q -P 0x11 0 24M' /srv/disk.qcow2
# A machine that has a device for the disk, and is left paused: it needs no operating system to be backed up.
qemu-system-x86_64 -machine pc -accel tcg -m 64 -S -nodefaults -display none -monitor none -qmp unix:/run/web.qmp,server=on,wait=off \
	-drive file=/srv/disk.qcow2,format=qcow2,if=none,id=drive-virtio0 -device virtio-blk-pci,drive=drive-virtio0,id=virtio0 \
	>/tmp/guest.log 2>&1 </dev/null &
guest=$!
for _ in {1..100}; do
	[[ -S /run/web.qmp ]] && break
	sleep 0.1
done
[[ -S /run/web.qmp ]] || fail "no guest: $(cat /tmp/guest.log)"

echo 'repo = "/srv/backup"' >>/etc/qmchain/config.toml
web=(--socket /run/web.qmp --name web)
qmchain-backup -q run "${web[@]}" >/tmp/points
qmchain-backup -q run "${web[@]}" >>/tmp/points
[[ $(qmchain-restore list --repo /srv/backup --json | grep -o '"level": *"[a-z]*"' | sort | uniq -c | tr -s ' \n' ' ') == *full*inc* ]] ||
	fail "not a full and an increment: $(qmchain-restore list --repo /srv/backup)"
qmchain-restore -q verify --repo /srv/backup >/dev/null
qmchain-restore -q image web/latest --repo /srv/backup --output /tmp/restored.raw
cmp -n $((24 << 20)) /tmp/restored.raw <(head -c $((24 << 20)) /dev/zero | tr '\0' '\21')
mount -t fuse.qmchain /srv/backup /mnt/points
cmp /tmp/restored.raw /mnt/points/web/latest/virtio0.raw
grep -q ' /mnt/points fuse' /proc/self/mounts || fail "not mounted"

# The settings that the package suggests.
sed 's/^#\([a-z[]\)/\1/' /etc/qmchain/config.toml >/tmp/suggested.toml
grep -q '^keep-daily' /tmp/suggested.toml || fail "nothing is suggested"
QMCHAIN_CONFIG=/tmp/suggested.toml qmchain-backup -q prune --repo /srv/backup --dry-run >/dev/null

say "upgrade, in the midst of a backup and with a mount"
cp /etc/qmchain/config.toml /tmp/config
qmchain-backup -q run "${web[@]}" --level full --speed-limit 4MiB >/tmp/point &
backup=$!
for _ in {1..100}; do
	compgen -G '/srv/backup/web/.*.partial' >/dev/null && break
	sleep 0.1
done
compgen -G '/srv/backup/web/.*.partial' >/dev/null || fail "no backup is under way"
apt install "$deb"
kill -0 "$backup" || fail "the backup was over too soon to tell, or was ended: $(cat /tmp/apt.log)"
wait "$backup" || fail "the upgrade has broken a backup"
cmp /etc/qmchain/config.toml /tmp/config || fail "settings were lost in the upgrade"
cmp /tmp/restored.raw /mnt/points/web/latest/virtio0.raw || fail "the upgrade has broken a mount"
umount /mnt/points
qmchain-restore -q verify --repo /srv/backup >/dev/null
[[ $(dpkg-query -W -f '${Version}' qmchain) != 0~0-1 ]] || fail "not upgraded"

say "remove"
apt remove qmchain
! compgen -G '/usr/bin/qmchain-*' || fail "programs are left"
cmp /etc/qmchain/config.toml /tmp/config || fail "settings were lost when it was removed"
# As README.md has it, in the tree that the package was built from.
mkdir /tmp/tree
ln -s /debs /tmp/tree/dist
cd /tmp/tree
apt install ./dist/qmchain_*_amd64.deb
mkdir /mnt/backup
cp dist/qmchain_*_amd64.deb /mnt/backup/
apt remove qmchain
cd /mnt/backup
apt install ./qmchain_*_amd64.deb
cd /
rm -r /mnt/backup
cmp /etc/qmchain/config.toml /tmp/config || fail "settings were lost when it was installed again"

say "purge"
# Repositories in odd places.
cp -a /srv/backup /var/lib/qmchain/repository
cp -a /srv/backup/. /var/lib/qmchain/kept/
mkdir -p /var/lib/qmchain/fleece
touch /var/lib/qmchain/fleece/left-over
# Units that the admin has enabled, in both folders that systemd has known.
mkdir -p /etc/systemd/system/timers.target.wants
ln -s /lib/systemd/system/qmchain-backup@.timer /etc/systemd/system/timers.target.wants/qmchain-backup@110.timer
ln -s /usr/lib/systemd/system/qmchain-prune.timer /etc/systemd/system/timers.target.wants/
ln -s /lib/systemd/system/other.timer /etc/systemd/system/timers.target.wants/
apt purge qmchain
for repo in /srv/backup /var/lib/qmchain/repository /var/lib/qmchain/kept; do
	[[ -f $repo/qmchain.json && -d $repo/web ]] || fail "purge has removed a repository, $repo"
done
[[ -L /etc/systemd/system/timers.target.wants/other.timer ]] || fail "purge has removed somebody else's unit"
rm -r /var/lib/qmchain /srv/backup /srv/disk.qcow2 /mnt/points /etc/systemd/system/timers.target.wants/other.timer
kill "$guest" && wait "$guest" || true
guest=
rmdir -p --ignore-fail-on-non-empty /etc/systemd/system/timers.target.wants
files >/tmp/after
diff /tmp/before /tmp/after || fail "it has left something"
