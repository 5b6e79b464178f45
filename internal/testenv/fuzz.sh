#!/usr/bin/env bash
# Usage: fuzz.sh TIME [TARGET]
#
# Fuzzes each target for TIME (as go test -fuzztime takes it), one at a time, or those whose PACKAGE/NAME has TARGET in it. One that
# fails keeps no other from its turn; its input is in testdata/fuzz of its package then, and from there on a case of its test.
set -euo pipefail

time=$1
only=${2-}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../.."
go=$here/go.sh
cache=$("$go" env GOCACHE)/fuzz # where go test -fuzz has them
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

failed=()
for package in $(grep -rl --include='*_test.go' '^func Fuzz' . | xargs -n 1 dirname | sort -u); do
	package=${package#./} built=
	for target in $(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(.*/\1/p' "$package"/*_test.go | sort); do
		[[ $package/$target == *"$only"* ]] || continue
		# A package is built once for all of its targets.
		[[ -n $built ]] || "$go" test -c -fuzz=. -o "$work/test" "./$package"
		built=yes
		echo "$package/$target"
		(cd "$package" && "$work/test" -test.run '^$' -test.fuzz "^$target\$" -test.fuzztime "$time" -test.fuzzminimizetime 100x \
			-test.fuzzcachedir "$cache/qmchain/$package") </dev/null || failed+=("$package/$target")
	done
done
[[ ${#failed[@]} == 0 ]] || { echo "failed: ${failed[*]}" >&2; exit 1; }
