#!/usr/bin/env bash
# Usage: docs.sh FOLDER
#
# Lays out in FOLDER what the package has in /usr/share/doc/qmchain for people
# to read. All of it is in one folder there, and what is not installed is not
# linked to.
set -euo pipefail

out=$1
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p "$out/examples"
install -m 644 packaging/copyright packaging/doc/* "$out/"
install -m 644 packaging/examples/* "$out/examples/"
for page in README.md SECURITY.md BENCHMARKS.md ARCHITECTURE.md; do
	sed -e 's#(packaging/doc/#(#g' -e 's#(LICENSE)#(copyright)#g' -e 's#\[CONTRIBUTING.md\](CONTRIBUTING.md)#CONTRIBUTING.md in the source#g' "$page" >"$out/$page"
	chmod 644 "$out/$page"
done
