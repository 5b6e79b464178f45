#!/usr/bin/env bash
# Usage: build.sh OUT [ARCH...]
#
# Builds qmchain_VERSION-1_ARCH.deb in OUT, for amd64 and arm64 unless told
# otherwise. The same commit gives the same bytes, wherever and whenever it is
# built: nothing of the time, the paths or the user gets into the package.
#
# DEB_VERSION    of the package; the tag's, else one made from the last commit
# DEB_MAINTAINER who is named as its maintainer, "Name <address>": those who use it report bugs and weaknesses there
set -euo pipefail

out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
arches=("$@")
((${#arches[@]})) || arches=(amd64 arm64)

cd "$(dirname "${BASH_SOURCE[0]}")/.."
go=internal/testenv/go.sh
nfpm=github.com/goreleaser/nfpm/v2/cmd/nfpm@v2.45.0

export LC_ALL=C TZ=UTC
umask 022
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH
date=$(date -d "@$SOURCE_DATE_EPOCH" +%F)

# A tag v1.2.3 is version 1.2.3; commits after it are 1.2.3+N.HASH. Before the first tag, versions sort by time, below all.
if [[ -z ${DEB_VERSION:-} ]]; then
	if tag=$(git describe --tags --match 'v[0-9]*' 2>/dev/null); then
		DEB_VERSION=$(sed -E 's/^v//; s/-([0-9]+)-(g[0-9a-f]+)$/+\1.\2/' <<<"$tag")
	else
		DEB_VERSION=0~$(date -d "@$SOURCE_DATE_EPOCH" +%Y%m%d.%H%M%S).$(git rev-parse --short=8 HEAD)
	fi
fi
export VERSION=$DEB_VERSION
if [[ -z ${DEB_MAINTAINER:-} ]]; then
	DEB_MAINTAINER="qmchain maintainers <maintainers@qmchain.invalid>"
	echo "build.sh: warning: DEB_MAINTAINER is not given: the package's maintainer is $DEB_MAINTAINER, whom no mail reaches. Set it before you pass the package on." >&2
fi
export MAINTAINER=$DEB_MAINTAINER

git diff --quiet HEAD 2>/dev/null || echo "build.sh: with changes that are not committed" >&2

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# programs FOLDER: static programs, for GOARCH.
programs() {
	mkdir -p "$1"
	CGO_ENABLED=0 GOFLAGS= GOAMD64=v1 GOARM64=v8.0 GOEXPERIMENT= $go build -trimpath -buildvcs=false \
		-ldflags "-s -w -buildid= -X qmchain/cmd/internal/cli.Version=$VERSION" -o "$1/" ./cmd/...
}

# What is the same on all architectures: made once, by what runs here.
common=$work/common
doc=$common/usr/share/doc/qmchain
mkdir -p "$doc" "$common/usr/lib/systemd/system" "$common/usr/share/lintian/overrides" "$common/usr/share/qmchain/snippets"
programs "$work/host"
$go run ./packaging/gen -bin "$work/host" -man packaging/man -out "$common" -version "$VERSION" -date "$date"
install -m 644 packaging/systemd/* "$common/usr/lib/systemd/system/"
install -m 755 packaging/snippets/* "$common/usr/share/qmchain/snippets/"
install -m 644 packaging/lintian-overrides "$common/usr/share/lintian/overrides/qmchain"
packaging/docs.sh "$doc"
install -m 644 CHANGELOG.md "$doc/changelog"
cat >"$doc/changelog.Debian" <<CHANGELOG
qmchain ($VERSION-1) unstable; urgency=medium

  * Built from commit $(git rev-parse HEAD).
    What has changed is in changelog.gz.

 -- $MAINTAINER  $(date -R -d "@$SOURCE_DATE_EPOCH")
CHANGELOG
# The licences of all that is linked in ask for their texts to be passed on.
{
	echo "qmchain's programs hold the Go standard library and these modules, under their licences."
	{
		echo "go $($go env GOVERSION) $($go env GOROOT)"
		$go list -deps -f '{{with .Module}}{{if not .Main}}{{.Path}} {{.Version}} {{.Dir}}{{end}}{{end}}' ./cmd/... | sort -u
	} | while read -r module version dir; do
		printf '\n\n==== %s %s ====\n' "$module" "$version"
		texts=("$(find "$dir" -maxdepth 1 -type f \( -iname '*licen*' -o -iname 'copying*' -o -iname 'notice*' \) | sort)")
		[[ ${texts[0]} ]] || { echo "build.sh: $module has no licence" >&2; exit 1; }
		while IFS= read -r text; do
			echo
			cat "$text"
		done <<<"${texts[0]}"
	done
} >"$doc/third-party"
gzip -9n "$doc/changelog" "$doc/changelog.Debian" "$doc/third-party" "$common"/usr/share/man/man*/*

for arch in "${arches[@]}"; do
	export ARCH=$arch TREE=$work/$arch
	cp -a "$common" "$TREE"
	GOARCH=$arch programs "$TREE/usr/bin"
	find "$TREE" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
	package=$out/qmchain_$VERSION-1_$arch.deb
	log=$(GOFLAGS= $go run "$nfpm" package --config packaging/nfpm.yaml --packager deb --target "$package" 2>&1) || { echo "$log" >&2; exit 1; }
	echo "$package"
done
