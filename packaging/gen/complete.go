package main

import "strings"

// The completions know nothing of a program's command line but how to ask it: see cmd/internal/cli, complete.go, for the
// question and the answer. They differ in how their shell tells what was typed and takes what it can offer.

// bashScript is for bash, on the functions of package bash-completion. Bash takes a word apart at = and :, and replaces only
// what is behind the last of them.
const bashScript = `# bash completion for @program@

@function@() {
    local cur words cword
    _get_comp_words_by_ref -n =: cur words cword || return
    local offer files='' typed=${cur%"${cur##*[=:]}"}
    COMPREPLY=()
    while IFS=$'\t' read -r offer _; do
        case $offer in
            :file) files=_filedir ;;
            :dir) files='_filedir -d' ;;
            :nospace) compopt -o nospace ;;
            *) COMPREPLY+=("${offer#"$typed"}") ;;
        esac
    done < <(@program@ __complete "${words[@]:1:cword}" 2>/dev/null)
    if [[ $files ]]; then
        [[ $cur == --*=* ]] && cur=${cur#*=}
        $files
    fi
}
complete -F @function@ @program@
`

// zshScript is for zsh.
const zshScript = `#compdef @program@

_@program@() {
  local offer text files
  local -a offers close
  while IFS=$'\t' read -r offer text; do
    case $offer in
      :file) files=_files ;;
      :dir) files=_path_files ;;
      :nospace) close=(-S '') ;;
      *) offers+=("${offer//:/\\:}${text:+:$text}") ;;
    esac
  done < <(@program@ __complete "${(@)words[2,CURRENT-1]}" "$PREFIX" 2>/dev/null)
  (( $#offers )) && _describe -V offer offers "${(@)close}"
  if [[ -n $files ]]; then
    [[ $PREFIX == --*=* ]] && compset -P '*='
    if [[ $files == _path_files ]]; then _path_files -/; else _files; fi
  fi
}

_@program@ "$@"
`

// fishScript is for fish, which leaves out the space after / by itself.
const fishScript = `# fish completion for @program@

function _@function@
    set -l words (commandline -opc)
    set -l word (commandline -ct)
    set -q word[1]; or set word ''
    set -l typed (string match -r -- '^--[^=]*=' $word; or echo '')
    for line in (@program@ __complete $words[2..] $word 2>/dev/null)
        switch $line
            case :file
                for path in (__fish_complete_path (string replace -r -- '^--[^=]*=' '' $word))
                    echo -- $typed$path
                end
            case :dir
                for path in (__fish_complete_directories (string replace -r -- '^--[^=]*=' '' $word))
                    echo -- $typed$path
                end
            case :nospace
            case '*'
                echo -- $line
        end
    end
end
complete -c @program@ -f -a '(_@function@)'
`

// completion is a script for a program.
func completion(script, program string) string {
	function := "_" + strings.ReplaceAll(program, "-", "_")
	return strings.NewReplacer("@program@", program, "@function@", function).Replace(script)
}
