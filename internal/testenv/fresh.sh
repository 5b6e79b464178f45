#!/usr/bin/env bash
# Usage: fresh.sh SUITE ARGUMENT...
#
# Runs `make ARGUMENT...` for the working tree on a machine that has nothing:
# a new Debian of that suite (bookworm, trixie) with git, make and
# ca-certificates. For instance:
#
#	internal/testenv/fresh.sh trixie demo
#	internal/testenv/fresh.sh bookworm setup build unit PKG=./qmp/...
#
# Needs root and debootstrap. The first run of a suite makes a template in the
# cache; each run works on a copy of it, which goes afterwards. The environment
# (proxies) is passed on, this host's Go is not.
set -euo pipefail

suite=$1
shift
cache=${QMCHAIN_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/qmchain}/fresh
tree=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
((EUID == 0)) || { echo "fresh.sh: needs root" >&2; exit 1; }

mkdir -p "$cache"
template=$cache/$suite
(
	flock 9
	[[ -d $template ]] && exit
	rm -rf "$template.new"
	debootstrap --variant=minbase --include=git,make,ca-certificates "$suite" "$template.new" "${QMCHAIN_MIRROR:-http://deb.debian.org/debian}"
	mv "$template.new" "$template"
) 9>"$template.lock"

root=$(TMPDIR=$cache mktemp -d)
# Nothing is mounted here but in the name space below, which ends first.
trap 'rm -rf --one-file-system "$root"' EXIT
cp -a "$template/." "$root"
cp -L /etc/resolv.conf /etc/hosts "$root/etc/"
# Behind a proxy that has its own: the authorities this host trusts in addition.
cp -rT /usr/local/share/ca-certificates "$root/usr/local/share/ca-certificates"
chroot "$root" update-ca-certificates >/dev/null 2>&1
mkdir "$root/qmchain"
(
	cd "$tree"
	# What a commit of everything here would hold.
	git ls-files --cached --others --exclude-standard -z |
		while IFS= read -r -d '' file; do
			if [[ -e $file ]]; then printf '%s\0' "$file"; fi
		done | tar --null --files-from=- -c
) | tar -x --no-same-owner -C "$root/qmchain"

# Mounts and processes live in name spaces of their own: both go with the last
# command, however it ends.
unshare --mount --propagation private --pid --fork --kill-child -- bash -c '
	set -euo pipefail
	root=$1
	shift
	# A root that is a mount of its own, as that of a machine is.
	mount --bind "$root" "$root"
	mount -t proc proc "$root/proc"
	mount --rbind /sys "$root/sys"
	mount --rbind /dev "$root/dev"
	exec env -u QMCHAIN_CACHE -u XDG_CACHE_HOME -u TMPDIR -u GOROOT -u GOPATH -u GOTOOLCHAIN -u GOFLAGS \
		HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
		chroot "$root" make -C /qmchain "$@"
' bash "$root" "$@"
