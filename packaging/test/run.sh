#!/usr/bin/env bash
# Usage: run.sh [SUITE...]
#
# Tests the packages as users get them:
#
#   - two builds, from different folders, are the same to the bit;
#   - lint.sh: lintian, manual pages, units, completions;
#   - install.sh, on a clean Debian of each suite (bookworm and trixie unless
#     told otherwise): install, first steps, upgrade, remove, purge;
#   - units.sh, there too, with systemd as the first process: the units start,
#     with all that they are locked out of.
#
# Needs root, debootstrap and the network. Machines are folders in the cache
# and name spaces, as those of internal/testenv/fresh.sh, and go afterwards.
set -euo pipefail

suites=("$@")
((${#suites[@]})) || suites=(bookworm trixie)
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
tree=$(cd "$here/../.." && pwd)
cache=${QMCHAIN_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/qmchain}/fresh
((EUID == 0)) || { echo "run.sh: needs root" >&2; exit 1; }

mkdir -p "$cache"
work=$(TMPDIR=$cache mktemp -d)
child=
# Nothing is mounted here but in the name space of a child, which ends with its first process, and that with the child.
finish() {
	if [[ $child ]]; then
		kill -9 "$child"
		wait "$child" || true
	fi
	rm -rf --one-file-system "$work"
}
trap finish EXIT

step() { printf '\n== %s\n' "$*"; }

# machine SUITE: makes $root, a new machine of that suite with the packages in /debs.
machine() {
	local suite=$1
	root=$work/$suite
	archives=$cache/apt-$suite
	rm -rf --one-file-system "$root"
	[[ -d $cache/$suite ]] || "$tree/internal/testenv/fresh.sh" "$suite" help >/dev/null
	mkdir -p "$archives/partial"
	cp -a "$cache/$suite" "$root"
	cp -L /etc/resolv.conf /etc/hosts "$root/etc/"
	# Behind a proxy that has its own: the authorities this host trusts in addition.
	cp -rT /usr/local/share/ca-certificates "$root/usr/local/share/ca-certificates"
	chroot "$root" update-ca-certificates >/dev/null 2>&1
	mkdir "$root/debs" "$root/test"
	cp "$work"/debs/*.deb "$root/debs/"
	cp "$here"/*.sh "$root/test/"
}

# inside COMMAND...: runs it on the machine, for 20 minutes at most, in name spaces of its own: mounts and processes go with
# it, however it ends.
inside() {
	unshare --mount --propagation private --pid --fork --kill-child --uts --ipc --cgroup -- bash -c '
		set -euo pipefail
		root=$1 archives=$2
		shift 2
		# A root that is a mount of its own, as that of a machine is.
		mount --bind "$root" "$root"
		mount -t proc proc "$root/proc"
		mount --rbind /sys "$root/sys"
		mount --rbind /dev "$root/dev"
		mount --bind "$archives" "$root/var/cache/apt/archives"
		if [[ $1 == */systemd ]]; then
			# What a first process needs: a hierarchy of control groups of its own, and an empty /run.
			mount -t tmpfs tmpfs "$root/sys/fs/cgroup"
			mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
			mount -t tmpfs -o mode=755 tmpfs "$root/run"
			export container=qmchain
		fi
		exec chroot "$root" env -i ${container+container="$container"} \
			${http_proxy+http_proxy="$http_proxy"} ${https_proxy+https_proxy="$https_proxy"} ${no_proxy+no_proxy="$no_proxy"} \
			HOME=/root TERM=dumb LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive \
			PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$@"
	' bash "$root" "$archives" "$@" &
	child=$!
	timeout 20m tail --pid="$child" -f /dev/null || kill -9 "$child"
	local code=0
	wait "$child" || code=$?
	child=
	return "$code"
}

# booted SCRIPT: starts the machine with systemd as its first process, which runs the script as a unit.
booted() {
	cat >"$root/etc/systemd/system/test.service" <<-UNIT
		[Service]
		Type=oneshot
		ExecStart=/bin/bash /test/$1
		Environment=HOME=/root LC_ALL=C.UTF-8
		TimeoutStartSec=10min
		StandardOutput=append:/test/log
		StandardError=inherit
		ExecStopPost=/bin/sh -c 'systemctl exit \$\$([ "\$\$SERVICE_RESULT" = success ] && echo 42 || echo 1)'
	UNIT
	mkdir -p "$root/etc/systemd/system/multi-user.target.wants"
	ln -s ../test.service "$root/etc/systemd/system/multi-user.target.wants/"
	local code=0
	inside /lib/systemd/systemd --system --show-status=false --log-target=journal --unit=multi-user.target || code=$?
	cat "$root/test/log"
	((code == 42)) || { echo "run.sh: $1 failed ($code)" >&2; return 1; }
}

step "two builds"
# Of one state of the tree and its history, in two places.
go_paths=("GOPATH=$(cd "$tree" && internal/testenv/go.sh env GOPATH)" "GOCACHE=$(cd "$tree" && internal/testenv/go.sh env GOCACHE)")
git_dir=$work/history/.git
git clone --quiet --shared --no-checkout "$tree" "$work/history"
GIT_DIR=$git_dir git read-tree HEAD
mkdir -p "$work/one" "$work/another/place"
(
	cd "$tree"
	git ls-files --cached --others --exclude-standard -z |
		while IFS= read -r -d '' file; do
			if [[ -e $file ]]; then printf '%s\0' "$file"; fi
		done | tar --null --files-from=- -c
) | tar -x --no-same-owner -C "$work/one"
cp -r "$work/one/." "$work/another/place"
(
	export GIT_DIR=$git_dir
	cd "$work/one"
	make deb
	mv dist "$work/debs"
)
(
	umask 077
	env GIT_DIR="$git_dir" "${go_paths[@]}" HOME="$work/another" TMPDIR="$work/another" TZ=Asia/Tokyo LC_ALL=C.UTF-8 \
		"$work/another/place/packaging/build.sh" "$work/again"
)
for deb in "$work"/debs/*.deb; do
	cmp "$deb" "$work/again/${deb##*/}"
done
echo "the same: $(cd "$work/debs" && echo ./*.deb)"

step "lint (trixie)"
machine trixie
inside bash /test/lint.sh
for suite in "${suites[@]}"; do
	step "install, upgrade, remove, purge ($suite)"
	machine "$suite"
	inside bash /test/install.sh
	step "units ($suite)"
	inside bash -c 'apt-get -qq install --yes --no-install-recommends systemd qemu-utils qemu-system-x86 fuse3 >/dev/null 2>&1 &&
		apt-get -qq install --yes --no-install-recommends /debs/qmchain_*_amd64.deb >/dev/null 2>&1 && rm -f /lib/systemd/system/systemd-modules-load.service && mkdir -p /etc/pve'
	booted units.sh
done
step "all is well"
