#!/usr/bin/env bash
# Usage: go.sh ARGUMENT...
#
# Runs the go command with the toolchain that go.mod names: a Go of that
# version directly, any other from 1.21 on by fetching that toolchain through
# the module proxy, whatever GOTOOLCHAIN says here. Looks on PATH, in
# /usr/local/go and where Debian puts its versions.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
pinned=$(sed -n 's/^toolchain //p' "$root/go.mod")

found=
for go in $(type -aP go) /usr/local/go/bin/go $(printf '%s\n' /usr/lib/go-*/bin/go | sort -rV); do
	[[ -x $go ]] || continue
	version=$(GOTOOLCHAIN=local "$go" env GOVERSION 2>/dev/null) || continue
	if [[ ${version%% *} == "$pinned" ]]; then
		found=$go toolchain=local
		break
	fi
	# Before 1.21 there was no toolchain to switch to.
	if [[ -z $found && $(printf '%s\n' go1.21 "$version" | sort -V | head -n 1) == go1.21 ]]; then
		found=$go toolchain=$pinned
	fi
done
[[ -n $found ]] || { echo "no Go from 1.21 on found; run \`make setup\`" >&2; exit 1; }

export GOTOOLCHAIN=$toolchain
exec "$found" "$@"
