#!/usr/bin/env bash
# On a machine of run.sh: what can be said of the packages without using them.
set -euo pipefail

apt-get -qq update
apt-get -qq install --yes --no-install-recommends lintian mandoc man-db groff systemd zsh fish bash-completion >/dev/null 2>&1

fail() { echo "lint.sh: $*" >&2; exit 1; }

for deb in /debs/*.deb; do
	lintian --allow-root --fail-on error,warning "$deb"
	if unused=$(lintian --allow-root --display-info --tags unused-override,mismatched-override "$deb") && [[ $unused ]]; then
		fail "$unused"
	fi
	rm -rf /tmp/deb
	dpkg-deb -x "$deb" /tmp/deb
	arch=$(dpkg-deb -f "$deb" Architecture)
	for program in /tmp/deb/usr/bin/*; do
		(($(stat -c %s "$program") < 15000000)) || fail "$program ($arch) is larger than 15 MB"
		[[ -f /tmp/deb/usr/share/man/man8/${program##*/}.8.gz ]] || fail "$program has no manual page"
		[[ -f /tmp/deb/usr/share/bash-completion/completions/${program##*/} ]] || fail "$program has no completion"
		# The second word of an ELF file's header names its machine.
		machine=$(od -An -tu2 -j18 -N2 "$program" | tr -d ' ')
		[[ $arch:$machine == amd64:62 || $arch:$machine == arm64:183 ]] || fail "$program in a package for $arch is for machine $machine"
	done
done

# All that is not for one machine is the same in all packages. Here it is from the one for this machine, as shells run its programs.
rm -rf /tmp/deb
dpkg-deb -x /debs/*_"$(dpkg --print-architecture)".deb /tmp/deb
cd /tmp/deb
cp -a usr/share usr/lib usr/bin /usr/
for page in usr/share/man/man*/*.gz; do
	[[ -L $page ]] && continue
	zcat "$page" >/tmp/page
	said=$(mandoc -T lint -W style /tmp/page; man --warnings -E UTF-8 -l -Tutf8 -Z "$page" 2>&1 >/dev/null) || true
	[[ -z $said ]] || fail "$page: $said"
done
[[ -L usr/share/man/man8/mount.fuse.qmchain.8.gz ]] || fail "no page for mount.fuse.qmchain"

for file in usr/share/bash-completion/completions/*; do bash -n "$file"; done
for file in usr/share/zsh/vendor-completions/*; do zsh -n "$file"; done
for file in usr/share/fish/vendor_completions.d/*; do fish --no-execute "$file"; done
# And each shell's own word on what it would offer.
offers() { [[ " $(tr '\n\t' '  ' <<<"$2") " == *" $3 "* ]] || fail "$1 offers no $3, but: $2"; }
offers bash "$(bash -c '
	source /usr/share/bash-completion/bash_completion
	source /usr/share/bash-completion/completions/qmchain-backup
	COMP_WORDS=(qmchain-backup run --level "") COMP_CWORD=3 COMP_LINE="qmchain-backup run --level " COMP_POINT=27
	_qmchain_backup 2>/dev/null
	echo "${COMPREPLY[*]}"')" diff
offers fish "$(fish -c 'complete -C "qmchain-backup run --level "')" diff
offers fish "$(fish -c 'complete -C "qmchain-backup "')" prune
mkdir -p /tmp/repo/110/20261120T111523Z-81aa
echo '{"format": 1, "id": "0123456789abcdef0123456789abcdef"}' >/tmp/repo/qmchain.json
offers fish "$(fish -c 'complete -C "qmchain-restore image --repo /tmp/repo "')" 110/latest
offers bash "$(bash -c '
	source /usr/share/bash-completion/bash_completion
	source /usr/share/bash-completion/completions/qmchain-restore
	COMP_WORDS=(qmchain-restore image --repo = /tmp/repo 11) COMP_CWORD=5 COMP_LINE="qmchain-restore image --repo=/tmp/repo 11" COMP_POINT=40
	_qmchain_restore 2>/dev/null
	echo "${COMPREPLY[*]}"')" 110/20261120T111523Z-81aa
cat >/tmp/zshtest <<'ZSH'
zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell 'PS1="ready> " PS2= TERM=dumb; fpath=(/usr/share/zsh/vendor-completions $fpath); autoload -Uz compinit; compinit -u -D'
zpty -w shell 'zstyle ":completion:*" list-prompt ""; unsetopt zle_bracketed_paste; LISTMAX=1000; bindkey "^I" list-choices'
zpty -n -w shell $'qmchain-backup run --level \t'
sleep 5
while zpty -r -t shell chunk; do print -rn -- $chunk; done
zpty -d shell
ZSH
offers zsh "$(zsh -f /tmp/zshtest | tr -d '\r' | sed 's/\x1b\[[^a-zA-Z]*[a-zA-Z]//g')" diff

# Units: nothing unknown in them, and all that they name is there.
units=(/usr/lib/systemd/system/qmchain-*)
said=$(systemd-analyze verify --man=yes "${units[@]}" 2>&1 | grep qmchain) || true
[[ -z $said ]] || fail "$said"
for unit in "${units[@]}"; do
	[[ $unit == *.service ]] || continue
	systemd-analyze security --offline=yes --no-pager --threshold=50 "$unit" >/tmp/security || fail "$(tail -n 1 /tmp/security)"
	tail -n 1 /tmp/security
done
