#!/usr/bin/env bash
# Usage: debs.sh SUITE FOLDER PACKAGE...
#
# Unpacks amd64 packages of a Debian release, and all that they depend on, into
# FOLDER: nothing is installed or configured, and root is not needed. apt
# resolves and verifies, with lists and caches of its own; the host's apt
# configuration (proxies) holds, its package state does not matter.
#
# QMCHAIN_MIRROR names the mirror; the default is the host's own.
set -euo pipefail

suite=$1 folder=$2
shift 2

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The host's mirror of Debian itself, not one of the security archive or of
# somebody else's packages.
mirror=${QMCHAIN_MIRROR:-}
if [[ -z $mirror ]]; then
	mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
		sed -n '\,/debian/\?$,{p;q}') || true
fi
mirror=${mirror:-http://deb.debian.org/debian}

keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[[ -r $keyring ]] || { echo "debs.sh: $keyring is missing (package debian-archive-keyring)" >&2; exit 1; }

mkdir -p "$work"/{lists,archives}/partial "$work/empty"
: >"$work/status"
echo "deb [signed-by=$keyring] $mirror $suite main" >"$work/sources.list"

apt=(apt-get -qq
	-o APT::Architecture=amd64 -o APT::Architectures=amd64
	-o Dir::Etc::SourceList="$work/sources.list" -o Dir::Etc::SourceParts="$work/empty"
	-o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts="$work/empty"
	-o Dir::State="$work" -o Dir::State::Lists="$work/lists" -o Dir::State::Status="$work/status"
	-o Dir::Cache="$work" -o Dir::Cache::Archives="$work/archives"
	-o APT::Sandbox::User= -o Acquire::Languages=none
	-o Acquire::Retries=3 -o Debug::NoLocking=1)

"${apt[@]}" update
"${apt[@]}" install --yes --download-only --no-install-recommends "$@"

# /bin, /sbin and /lib in /usr, as on every installed system: older releases'
# packages still differ in where they put things.
mkdir -p "$folder"/usr/{bin,sbin,lib,lib64}
for name in bin sbin lib lib64; do
	[[ -L $folder/$name ]] || ln -s "usr/$name" "$folder/$name"
done
for deb in "$work"/archives/*.deb; do
	dpkg-deb --fsys-tarfile "$deb" | tar -x --keep-directory-symlink --no-same-owner -C "$folder"
done
