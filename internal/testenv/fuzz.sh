#!/usr/bin/env bash
# Usage: fuzz.sh TIME
#
# Fuzzes each target for TIME (as go test -fuzztime takes it), one at a time.
set -euo pipefail

time=$1
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../.."
# Names of fuzz targets, by package: go test takes one of each.
grep -rl --include='*_test.go' '^func Fuzz' . | sort | while read -r file; do
	sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\).*/\1/p' "$file" | while read -r target; do
		"$here/go.sh" test -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 1s -timeout 10m "$(dirname "$file")" </dev/null
	done
done
