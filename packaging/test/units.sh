#!/usr/bin/env bash
# On a machine of run.sh, as a unit of its systemd: the package's units do
# their work with all that they are locked out of. VM 110 is a real QEMU, and
# qm a few lines that change its configuration, which lies on a file system of
# its own as it does on Proxmox VE.
set -euo pipefail

fail() {
	echo "units.sh: $*" >&2
	journalctl --no-pager -n 40 -o short-monotonic -t qmchain-backup -t qmchain-fuse -t qmchain-restore -t systemd -t umount >&2
	exit 1
}
say() { echo "-- $*"; }
trap 'fail "line $LINENO failed"' ERR
active() { [[ $(systemctl show -P ActiveState "$1") == active ]] || fail "$1 is not active"; }
done_well() { systemctl start "$1" || fail "$1 failed"; }

say "nothing is enabled, nothing runs"
[[ -z $(find /etc/systemd/system -lname '*qmchain*') ]] || fail "something is enabled"
[[ -z $(systemctl list-units --plain --no-legend 'qmchain-*') ]] || fail "something runs"

mount -t tmpfs tmpfs /etc/pve
mkdir -p /etc/pve/nodes/node/qemu-server /run/qemu-server /srv/my-backup
ln -s nodes/node /etc/pve/local
ln -s nodes/node/qemu-server /etc/pve/qemu-server
cat >/etc/pve/qemu-server/110.conf <<'CONF'
args: -chardev socket,id=qmchain,path=/var/run/qemu-server/110-backup.qmp,server=on,wait=off,reconnect=0 -mon chardev=qmchain,mode=control
boot: order=virtio0
memory: 64
name: web
smbios1: uuid=11111111-2222-3333-4444-555555555555
virtio0: local:110/disk.qcow2,size=64M
CONF
cat >/usr/sbin/qm <<'QM'
#!/bin/sh
conf=/etc/pve/qemu-server/$2.conf
case "$*" in
"set 110 --lock backup") echo "lock: backup" >>"$conf" ;;
"unlock 110") sed -i '/^lock:/d' "$conf" ;;
*) echo "not known here: qm $*" >&2; exit 255 ;;
esac
echo "$*" >>/run/qm.calls
QM
chmod 755 /usr/sbin/qm
cat >>/etc/qmchain/config.toml <<'CONF'
repo = "/srv/my-backup"
[prune]
keep-last = 1
CONF

# A disk that says something on the serial console when it is started: mov si,text; lodsb; out dx,al; until the end.
{
	printf '\xfa\x31\xc0\x8e\xd8\xbe\x15\x7c\xfc\xac\x84\xc0\x74\x06\xba\xf8\x03\xee\xeb\xf5\xf4qmchain boots\r\n'
	head -c 474 /dev/zero
	printf '\x55\xaa'
	head -c 8M /dev/urandom
} >/srv/disk.raw
[[ $(od -An -tx1 -j510 -N2 /srv/disk.raw) == " 55 aa" ]]
truncate -s 64M /srv/disk.raw
qemu-img convert -f raw -O qcow2 /srv/disk.raw /srv/disk.qcow2
vm() {
	qemu-system-x86_64 -name web,debug-threads=on -machine pc -accel tcg -m 64 -S -nodefaults -display none -monitor none \
		-smbios type=1,uuid=11111111-2222-3333-4444-555555555555 -uuid 11111111-2222-3333-4444-555555555555 \
		-drive file=/srv/disk.qcow2,format=qcow2,if=none,id=drive-virtio0 -device virtio-blk-pci,drive=drive-virtio0,id=virtio0 \
		-chardev socket,id=qmchain,path=/var/run/qemu-server/110-backup.qmp,server=on,wait=off -mon chardev=qmchain,mode=control \
		-pidfile /run/qemu-server/110.pid -daemonize
}
vm

say "backup: by its timer, an increment, all"
systemctl enable --quiet --now qmchain-backup@110.timer
systemctl enable --now qmchain-backup-all.timer qmchain-prune.timer
active qmchain-backup@110.timer
active qmchain-backup-all.timer
active qmchain-prune.timer
done_well qmchain-backup@110.service
done_well qmchain-backup-all.service
(($(ls -d /srv/my-backup/110/2*/ | wc -l) == 2)) || fail "not two points"
qmchain-backup list --json | grep -q '"level": *"inc"' || fail "no increment"
grep -q '^unlock 110$' /run/qm.calls || fail "the lock was not given back"
done_well qmchain-backup@111.service # a VM of another node: skipped

say "keep"
systemctl start qmchain-keep@110.service
sleep 2
active qmchain-keep@110.service
done_well qmchain-backup@110.service # beside it
systemctl stop qmchain-keep@110.service
[[ $(systemctl show -P Result qmchain-keep@110.service) == success ]] || fail "keep did not end well"

say "prune, while somebody else has a guest for longer than prune by hand would wait"
flock /srv/my-backup/110/.prune.lock sleep 12 &
until ! flock --nonblock /srv/my-backup/110/.prune.lock true; do sleep 0.05; done
done_well qmchain-prune.service
(($(ls -d /srv/my-backup/110/2*/ | wc -l) == 1)) || fail "nothing was pruned"
qmchain-restore -q verify >/dev/null || fail "what is kept is damaged"

say "verify, check"
systemctl enable --now qmchain-verify.timer qmchain-check.timer
systemctl enable --quiet --now qmchain-verify@110.timer
active qmchain-verify.timer
active qmchain-check.timer
active qmchain-verify@110.timer
# As its comment has it, for those who know where the repository is.
mkdir -p /etc/systemd/system/qmchain-verify@.service.d
cat >/etc/systemd/system/qmchain-verify@.service.d/narrow.conf <<'CONF'
[Service]
ProtectSystem=strict
ReadWritePaths=/srv/my-backup
CONF
systemctl daemon-reload
for service in qmchain-verify.service qmchain-verify@110.service; do
	rm /srv/my-backup/110/.checked.json
	! qmchain-restore report --json | grep -q '"verified"' || fail "it is verified before it is"
	done_well "$service"
	qmchain-restore report --json | grep -q '"verified"' || fail "$service has kept nothing: $(qmchain-restore report)"
done
done_well qmchain-check.service
mkdir /etc/systemd/system/qmchain-check.service.d
printf '[Service]\nExecStart=\nExecStart=/usr/bin/qmchain-backup check --all\n' >/etc/systemd/system/qmchain-check.service.d/all.conf
systemctl daemon-reload
done_well qmchain-check.service
rm -r /etc/systemd/system/qmchain-check.service.d

say "what fails is told"
cat >/usr/sbin/sendmail <<'MAIL'
#!/bin/sh
cat >>/run/mail
MAIL
chmod 755 /usr/sbin/sendmail
mkdir -p /etc/systemd/system/qmchain-.service.d
cp /usr/share/doc/qmchain/examples/on-failure.conf /etc/systemd/system/qmchain-.service.d/
cp /usr/share/doc/qmchain/examples/backup-failed@.service /etc/systemd/system/
systemctl daemon-reload
told() { # UNIT TEXT: it fails, and the mail tells of it with that text.
	rm -f /run/mail
	! systemctl start "$1" 2>/dev/null || fail "$1 did not fail"
	for _ in {1..100}; do
		if grep -q "^Subject: .*: $1 has failed" /run/mail 2>/dev/null && grep -q "$2" /run/mail; then break; fi
		sleep 0.1
	done
	grep -q "$2" /run/mail || fail "nothing was told of $1: $(cat /run/mail)"
	systemctl reset-failed "$1"
}
image=(/srv/my-backup/110/images/*)
cp "${image[0]}" /srv/whole
printf x | dd of="${image[0]}" bs=1 seek=$((1 << 20)) conv=notrunc status=none
told qmchain-verify@110.service "are not whole"
cp /srv/whole "${image[0]}"
done_well qmchain-verify@110.service
cp /etc/qmchain/config.toml /srv/config.toml
printf '[check]\nmax-age = "1ms"\n' >>/etc/qmchain/config.toml
told qmchain-check.service 110
cp /srv/config.toml /etc/qmchain/config.toml
rm -r /etc/systemd/system/qmchain-.service.d /etc/systemd/system/qmchain-verify@.service.d /etc/systemd/system/backup-failed@.service
systemctl daemon-reload

say "mount"
unit=$(systemd-escape --path --template=qmchain-fuse@.service /srv/my-backup)
mnt=/run/qmchain-fuse/srv/my-backup
systemctl start "$unit" || fail "no mount"
cmp "$mnt/110/latest/virtio0.raw" /srv/disk.raw || fail "another disk"
pid=$(systemctl show -P MainPID "$unit")
kill -9 "$pid"
for _ in {1..100}; do
	[[ $(systemctl show -P MainPID "$unit") != "$pid" && $(systemctl show -P ActiveState "$unit") == active ]] && break
	sleep 0.2
done
cmp "$mnt/110/latest/virtio0.raw" /srv/disk.raw || fail "not there again after the server was killed"
systemctl stop "$unit"
! grep -q qmchain /proc/self/mounts || fail "still mounted"

say "drill"
mkdir -p /etc/systemd/system/qmchain-drill@.service.d
cat >/etc/systemd/system/qmchain-drill@.service.d/text.conf <<'CONF'
[Service]
ExecStart=
ExecStart=/usr/bin/qmchain-restore drill %i/latest --accel tcg --text "qmchain boots" --result %t/qmchain-drill-%i/result.json
CONF
systemctl daemon-reload
done_well qmchain-drill@110.service
qmchain-restore report | grep -q 'passed' || fail "its result was not kept: $(qmchain-restore report)"

say "an upgrade ends nothing, a removal all"
systemctl start "$unit" qmchain-keep@110.service
pids=$(systemctl show -P MainPID "$unit" qmchain-keep@110.service)
dpkg -i /debs/qmchain_*_amd64.deb >/dev/null 2>&1
[[ $(systemctl show -P MainPID "$unit" qmchain-keep@110.service) == "$pids" ]] || fail "the upgrade has started something anew"
active "$unit"
active qmchain-backup@110.timer
cmp "$mnt/110/latest/virtio0.raw" /srv/disk.raw || fail "the upgrade has ended the mount"
dpkg --purge qmchain >/dev/null 2>&1
for pid in $pids; do
	[[ ! -e /proc/$pid ]] || fail "$(tr '\0' ' ' <"/proc/$pid/cmdline") still runs"
done
! grep -q qmchain-fuse /proc/self/mounts || fail "still mounted"
[[ -z $(systemctl list-units --plain --no-legend 'qmchain-*') ]] || fail "left: $(systemctl list-units --plain --no-legend 'qmchain-*')"
left=$(find /etc /usr /var/lib /run \( -path /etc/pve -o -path /var/lib/dpkg -o -path /sys \) -prune -o -name '*qmchain*' -print | grep -v -e qmchain-drill@.service.d -e /run/systemd/ -e qmchain-units) || true
[[ -z $left ]] || fail "left: $left"
[[ -f /srv/my-backup/qmchain.json ]] || fail "the repository is gone"
