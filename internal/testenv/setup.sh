#!/usr/bin/env bash
# Usage: setup.sh [bench]
#
# Installs what building and testing need on Debian 12 and 13, and says what:
#
#   - packages of the system, with apt-get, as root or through sudo;
#   - a Go, if there is none that go.sh can use;
#   - in the cache ($QMCHAIN_CACHE, else ~/.cache/qmchain): the QEMU of the
#     other Debian release, a small Linux guest, and a kernel for libguestfs'
#     appliance if none is installed.
#
# With "bench" also the programs that benchmarks compare with.
#
# What is there already is left alone, and then no network is needed.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${QMCHAIN_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/qmchain}

packages=(
	ca-certificates debian-archive-keyring # to fetch the rest
	gcc libc6-dev                          # go test -race
	qemu-system-x86 qemu-utils
	fuse3                                  # fusermount3
	rsync                                  # a guide copies a repository with it
	e2fsprogs xfsprogs btrfs-progs fdisk   # file systems and partitions in test images
	ntfs-3g dosfstools mtools lvm2
	guestmount libguestfs-xfs kmod         # the files in a point
	chromium-headless-shell                # the report's page
)
if [[ ${1:-} == bench ]]; then
	packages+=(nbdkit libnbd-bin) # the latter has nbdfuse
fi

# apt-get, as root, quiet unless it fails.
apt() {
	local log
	local -a sudo=()
	((EUID == 0)) || sudo=(sudo)
	log=$(mktemp)
	if ! "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -o Acquire::Retries=3 "$@" >"$log" 2>&1 </dev/null; then
		cat "$log" >&2
		rm -f "$log"
		return 1
	fi
	rm -f "$log"
}

install() {
	echo "installing packages: $*"
	apt update
	apt install --yes --no-install-recommends "$@"
}

installed() {
	[[ $(dpkg-query --show --showformat '${db:Status-Status}' "$1" 2>/dev/null) == installed ]]
}

if ! type -P dpkg-query apt-get >/dev/null; then
	echo "setup.sh: this is no Debian; install by hand: ${packages[*]}, and Go" >&2
	exit 1
fi
missing=()
for package in "${packages[@]}"; do
	installed "$package" || missing+=("$package")
done
((${#missing[@]} == 0)) || install "${missing[@]}"

# Debian 12's own Go is too old; its backports have one that can fetch others.
if ! "$here/go.sh" version >/dev/null 2>&1; then
	codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
	if [[ $codename == bookworm ]]; then
		if ! apt-get indextargets --format '$(SUITE) $(CODENAME)' 2>/dev/null | grep -q bookworm-backports; then
			file=/etc/apt/sources.list.d/qmchain-backports.sources
			echo "adding bookworm-backports in $file"
			mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | sed -n '\,/debian/\?$,{p;q}')
			sudo=
			((EUID == 0)) || sudo=sudo
			$sudo tee "$file" >/dev/null <<-SOURCES
				Types: deb
				URIs: ${mirror:-http://deb.debian.org/debian}
				Suites: bookworm-backports
				Components: main
				Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
			SOURCES
		fi
		install golang-1.23-go
	else
		install golang-go
	fi
fi
"$here/go.sh" version >/dev/null || { echo "setup.sh: no usable Go" >&2; exit 1; }

# Tests run with the QEMU of both releases. The host's own counts.
have=$(qemu-system-x86_64 --version | sed -n 's/^QEMU emulator version \([0-9]*\.[0-9]*\).*/\1/p')
[[ $have == 10.0 ]] || "$here/qemu-release.sh" trixie "$cache/qemu/trixie"
[[ $have == 7.2 ]] || "$here/qemu-release.sh" bookworm "$cache/qemu/bookworm"

# The guest goes by the script that makes it, as package testenv looks for it.
guest=$cache/guest-$(sha256sum "$here/guest.sh" | cut -c 1-12)
"$here/guest.sh" "$guest"

# libguestfs starts an installed kernel. In a container there is none, and on a
# developer's machine one for tests must not come between it and its boot loader.
appliance=$cache/appliance
if ! compgen -G '/boot/vmlinuz-*' >/dev/null && ! compgen -G "$appliance/lib/modules/*/modules.dep" >/dev/null; then
	echo "unpacking a kernel into $appliance"
	rm -rf "$appliance.new" "$appliance"
	"$here/debs.sh" bookworm "$appliance.new" linux-image-cloud-amd64
	for modules in "$appliance.new"/lib/modules/*; do
		PATH=$PATH:/usr/sbin:/sbin depmod --basedir "$appliance.new" "$(basename "$modules")"
	done
	mv "$appliance.new" "$appliance"
fi
# supermin looks into it though it is told of another.
if [[ ! -d /lib/modules ]]; then
	if ((EUID == 0)); then mkdir /lib/modules; else sudo mkdir /lib/modules; fi
fi

echo "set up: $("$here/go.sh" env GOVERSION), QEMU $have and $(cd "$cache/qemu" && echo */ | tr -d /) in $cache"
