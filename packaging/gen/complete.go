package main

import (
	"fmt"
	"strings"
)

// What completes at run time is looked up in the same way by all shells, in a POSIX shell's words where they can be shared:
// VMIDs are the names of the node's configurations, guests and points the folders of the repository that the command line,
// QMCHAIN_REPO or the configuration file names.
const (
	configured = `sed -n 's/^repo *= *"\(.*\)".*/\1/p' "${QMCHAIN_CONFIG-/etc/qmchain/config.toml}" 2>/dev/null`
	listVMIDs  = `ls /etc/pve/qemu-server 2>/dev/null | sed -n 's/^\([0-9]*\)\.conf$/\1/p'`
	listGuests = `ls "$repo" 2>/dev/null | grep -v '\.json$'`
	listPoints = `(cd "${repo:?}" && ls -d */20*/) 2>/dev/null | sed -n 's,^\(\([^/]*\)/[^/]*\)/$,\2/latest\n\1,p' | sort -u`
)

// bash is the completion for bash, on the functions of package bash-completion.
func bash(p program) string {
	var b strings.Builder
	fn := "_" + strings.ReplaceAll(p.Name, "-", "_")
	fmt.Fprintf(&b, `# bash completion for %[1]s, made from its own command line

%[2]s() {
    local cur prev words cword split
    _init_completion -s || return
    local i command='' repo=''
    for ((i = 1; i < cword; i++)); do
        case ${words[i]} in
            --repo)
                repo=${words[++i]}
                ;;
            --repo=*)
                repo=${words[i]#*=}
                ;;
            %[3]s)
                ((++i))
                ;;
            -*) ;;
            *)
                [[ $command ]] || command=${words[i]}
                ;;
        esac
    done
    repo=${repo/#~\//$HOME/}
    [[ $repo ]] || repo=${QMCHAIN_REPO:-$(%[4]s)}

    case $command:$prev in
`, p.Name, fn, strings.Join(valued(p), "|"), configured)
	for _, c := range p.all() {
		for _, f := range c.Flags {
			if f.Value == "" {
				continue
			}
			patterns := c.Name + ":--" + f.Name
			if f.Short != "" {
				patterns += "|" + c.Name + ":-" + f.Short
			}
			fmt.Fprintf(&b, "        %s)\n%s            return\n            ;;\n", patterns, bashValue(f, "            "))
		}
	}
	b.WriteString(`    esac
    [[ $split == true ]] && return

    case $command in
`)
	for _, c := range p.all() {
		pattern := c.Name
		if pattern == "" {
			pattern = "''"
		}
		fmt.Fprintf(&b, "        %s)\n", pattern)
		words := strings.Join(flagWords(c), " ")
		if c.Name == "" {
			fmt.Fprintf(&b, "            COMPREPLY=($(compgen -W '%s' -- \"$cur\"))\n", strings.Join(append(commandWords(p), words), " "))
		} else {
			fmt.Fprintf(&b, "            if [[ $cur == -* ]]; then\n                COMPREPLY=($(compgen -W '%s' -- \"$cur\"))\n", words)
			if value, ok := c.operand(); ok && value.kind() != anything {
				fmt.Fprintf(&b, "            else\n%s", bashValue(value, "                "))
			}
			b.WriteString("            fi\n")
		}
		b.WriteString("            ;;\n")
	}
	fmt.Fprintf(&b, "    esac\n    [[ ${COMPREPLY[*]-} == *= ]] && compopt -o nospace\n}\ncomplete -F %s %s\n", fn, p.Name)
	return b.String()
}

func bashValue(v value, indent string) string {
	words := func(list string) string {
		return indent + `COMPREPLY=($(compgen -W "` + list + `" -- "$cur"))` + "\n"
	}
	switch v.kind() {
	case choice:
		return words(strings.Join(v.Choices, " "))
	case file:
		return indent + "_filedir\n"
	case folder:
		return indent + "_filedir -d\n"
	case vmid:
		return words(`$(` + listVMIDs + `)`)
	case guest:
		return words(`$(` + listGuests + `)`)
	case point:
		return words(`$(` + listPoints + `)`)
	}
	return ""
}

// zsh is the completion for zsh.
func zsh(p program) string {
	var b strings.Builder
	fn := "_" + p.Name
	fmt.Fprintf(&b, "#compdef %s\n# Made from the program's own command line.\n\n", p.Name)
	for _, l := range []struct{ name, list string }{{"vmids", listVMIDs}, {"guests", listGuests}, {"points", listPoints}} {
		fmt.Fprintf(&b, `%s-%s() {
  local repo=${(Q)opt_args[--repo]:-${QMCHAIN_REPO:-$(%s)}}
  local -a found
  found=(${(f)"$(%s)"})
  compadd -a found
}

`, fn, l.name, configured, l.list)
	}
	fmt.Fprintf(&b, "%s() {\n  local curcontext=$curcontext state line\n  local -A opt_args\n  _arguments -C \\\n", fn)
	for _, f := range p.Flags {
		fmt.Fprintf(&b, "    %s \\\n", zshFlag(f, fn))
	}
	b.WriteString("    '1:command:->command' \\\n    '*::argument:->argument'\n  case $state in\n  command)\n    local -a commands\n    commands=(\n")
	for _, c := range p.Commands {
		fmt.Fprintf(&b, "      %s\n", quoted(c.Name+":"+summary(c.Help)))
	}
	b.WriteString("    )\n    _describe -t commands command commands\n    ;;\n  argument)\n    case $line[1] in\n")
	for _, c := range p.Commands {
		fmt.Fprintf(&b, "    %s)\n      _arguments", c.Name)
		for _, f := range append(c.Flags, p.Flags...) {
			fmt.Fprintf(&b, " \\\n        %s", zshFlag(f, fn))
		}
		for i, arg := range c.Args {
			place := fmt.Sprint(i + 1)
			if arg.Repeated {
				place = "*"
			} else if !arg.Required {
				place += ":"
			}
			fmt.Fprintf(&b, " \\\n        %s", quoted(place+":"+arg.Name+":"+zshValue(arg, fn)))
		}
		b.WriteString("\n      ;;\n")
	}
	fmt.Fprintf(&b, "    esac\n    ;;\n  esac\n}\n\n%s \"$@\"\n", fn)
	return b.String()
}

func zshFlag(f value, fn string) string {
	escaped := strings.NewReplacer(`\`, `\\`, "[", `\[`, "]", `\]`, ":", `\:`)
	tail := "[" + escaped.Replace(summary(f.Help)) + "]"
	long := "--" + f.Name
	if f.Value != "" {
		long += "="
		tail += ":" + escaped.Replace(f.Value) + ":" + zshValue(f, fn)
	}
	switch {
	case f.Repeated && f.Short != "":
		return "'*'{-" + f.Short + "," + long + "}" + quoted(tail)
	case f.Repeated:
		return quoted("*" + long + tail)
	case f.Short != "":
		return quoted("(-"+f.Short+" --"+f.Name+")") + "{-" + f.Short + "," + long + "}" + quoted(tail)
	}
	return quoted(long + tail)
}

func zshValue(v value, fn string) string {
	switch v.kind() {
	case choice:
		return "(" + strings.Join(v.Choices, " ") + ")"
	case file:
		return "_files"
	case folder:
		return "_files -/"
	case vmid:
		return fn + "-vmids"
	case guest:
		return fn + "-guests"
	case point:
		return fn + "-points"
	}
	return " " // something that can't be completed
}

// fish is the completion for fish.
func fish(p program) string {
	var b strings.Builder
	fn := "__" + strings.ReplaceAll(p.Name, "-", "_")
	fmt.Fprintf(&b, "# fish completion for %s, made from its own command line\n\n", p.Name)
	fmt.Fprintf(&b, `function %s_list -a what
    set -l words (commandline -opc)
    set -l repo $QMCHAIN_REPO
    for i in (seq (count $words))
        if string match -q -- '--repo=*' $words[$i]
            set repo (string replace -- '--repo=' '' $words[$i])
        else if test "$words[$i]" = --repo; and test $i -lt (count $words)
            set repo $words[(math $i + 1)]
        end
    end
    switch $what
        case vmids
            sh -c %s
        case guests
            env repo="$repo" sh -c %s
        case points
            env repo="$repo" sh -c %s
    end
end

`, fn, quoted(listVMIDs), quoted(orConfigured+listGuests), quoted(orConfigured+listPoints))
	top := "-n __fish_use_subcommand"
	fmt.Fprintf(&b, "complete -c %s -f\n", p.Name)
	for _, c := range p.Commands {
		fmt.Fprintf(&b, "complete -c %s %s -a %s -d %s\n", p.Name, top, c.Name, quoted(summary(c.Help)))
	}
	for _, c := range p.all() {
		when := ""
		if c.Name != "" {
			when = " -n '__fish_seen_subcommand_from " + c.Name + "'"
			if operand, ok := c.operand(); ok {
				if offer := fishValue(operand, fn); offer != "" {
					fmt.Fprintf(&b, "complete -c %s%s%s\n", p.Name, when, offer)
				}
			}
		}
		for _, f := range c.Flags {
			fmt.Fprintf(&b, "complete -c %s%s -l %s", p.Name, when, f.Name)
			if f.Short != "" {
				b.WriteString(" -s " + f.Short)
			}
			if f.Value != "" {
				b.WriteString(" -r" + fishValue(f, fn))
			}
			fmt.Fprintf(&b, " -d %s\n", quoted(summary(f.Help)))
		}
	}
	return b.String()
}

// orConfigured goes before a list that needs the repository.
const orConfigured = `[ "$repo" ] || repo=$(` + configured + `); `

func fishValue(v value, fn string) string {
	switch v.kind() {
	case choice:
		return " -f -a " + quoted(strings.Join(v.Choices, " "))
	case file:
		return " -F"
	case folder:
		return " -f -a '(__fish_complete_directories (commandline -ct))'"
	case vmid:
		return " -f -a '(" + fn + "_list vmids)'"
	case guest:
		return " -f -a '(" + fn + "_list guests)'"
	case point:
		return " -f -a '(" + fn + "_list points)'"
	}
	return ""
}

// all are the commands, and first what goes before any of them.
func (p program) all() []command {
	all := []command{{Flags: p.Flags}}
	for _, c := range p.Commands {
		c.Flags = append(c.Flags[:len(c.Flags):len(c.Flags)], p.Flags...)
		all = append(all, c)
	}
	return all
}

// operand is the argument to offer: the last, which is the one that can be repeated, unless only the first is known.
func (c command) operand() (value, bool) {
	for i := len(c.Args) - 1; i >= 0; i-- {
		if c.Args[i].kind() != anything {
			return c.Args[i], true
		}
	}
	return value{}, false
}

func commandWords(p program) (words []string) {
	for _, c := range p.Commands {
		words = append(words, c.Name)
	}
	return words
}

func flagWords(c command) (words []string) {
	for _, f := range c.Flags {
		if f.Value != "" {
			words = append(words, "--"+f.Name+"=")
		} else {
			words = append(words, "--"+f.Name)
		}
		if f.Negatable != "" {
			words = append(words, "--"+f.Negatable)
		}
	}
	return words
}

// valued are all flags whose value is the next word, but --repo, which is looked at.
func valued(p program) (words []string) {
	seen := map[string]bool{"--repo": true}
	add := func(word string) {
		if !seen[word] {
			seen[word] = true
			words = append(words, word)
		}
	}
	for _, c := range p.all() {
		for _, f := range c.Flags {
			if f.Value == "" {
				continue
			}
			add("--" + f.Name)
			if f.Short != "" {
				add("-" + f.Short)
			}
		}
	}
	return words
}

// quoted is one word of a shell, zsh and fish too.
func quoted(s string) string {
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
