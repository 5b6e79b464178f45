#!/usr/bin/env bash
# Usage: qemu-release.sh SUITE FOLDER
#
# Unpacks the QEMU of another Debian release (trixie: 10.0, bookworm: 7.2, sid:
# the newest) and makes FOLDER/bin/qemu-system-x86_64, qemu-img, qemu-io,
# qemu-nbd and qemu-storage-daemon, which run it with that release's own
# libraries. Does nothing when FOLDER is there.
set -euo pipefail

suite=$1 folder=$2
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ -d $folder ]] && exit 0

# Two set-ups at once: the second waits, and then finds the work done. The
# folder appears by a rename, whole.
mkdir -p "$(dirname "$folder")"
exec 9>"$folder.lock"
flock 9
[[ -d $folder ]] && exit 0
new=$folder.new
rm -rf "$new"
trap 'rm -rf "$new"' EXIT

echo "unpacking the QEMU of Debian $suite into $folder"
"$here/debs.sh" "$suite" "$new/root" qemu-system-x86 qemu-utils
root=$new/root

# What no test needs, a third of it.
rm -rf "$root"/{etc,var} "$root"/usr/{sbin,bin/qemu-system-i386} \
	"$root"/usr/share/{doc,man,locale,info,perl,perl5,bash-completion,icons,applications} \
	"$root"/usr/lib/x86_64-linux-gnu/{gconv,perl,perl-base}

mkdir "$new/bin"
for program in qemu-system-x86_64 qemu-img qemu-io qemu-nbd qemu-storage-daemon; do
	data=
	if [[ $program == qemu-system-* ]]; then
		# QEMU looks for its data next to its own binary, which is ld.so here.
		data='-L "$root/usr/share/qemu" -L "$root/usr/share/seabios" -L "$root/usr/lib/ipxe/qemu" '
	fi
	# exec: the process must be QEMU itself, for its pid and for its death.
	cat >"$new/bin/$program" <<-WRAPPER
		#!/bin/sh
		root=\${0%/*}/../root
		lib=\$root/usr/lib/x86_64-linux-gnu
		export QEMU_MODULE_DIR="\$lib/qemu"
		exec "\$lib/ld-linux-x86-64.so.2" --argv0 "\$0" --library-path "\$lib" "\$root/usr/bin/$program" $data"\$@"
	WRAPPER
	chmod +x "$new/bin/$program"
	"$new/bin/$program" --version >"$new/version"
done
mv "$new" "$folder"
