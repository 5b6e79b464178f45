package hooks

import (
	"bytes"
	"strings"
)

// ownName is the name of our snippet that calls no other script. One that does has that script's name too: so what it calls can
// be told by its volume alone, and VMs with the same script have the same snippet.
const ownName = "qmchain-hook"

const snippetsDir = ":snippets/"

// wrap is the volume of the snippet of ours that calls theirs, on the same storage; or, where they have none, that on storage.
func wrap(theirs, storage string) string {
	if theirs == "" {
		return storage + snippetsDir + ownName
	}
	storage, name, _ := strings.Cut(theirs, snippetsDir)
	return storage + snippetsDir + ownName + "-" + name
}

// unwrap tells whether a volume has the name of a snippet of ours, and which script that calls; "": none.
func unwrap(volume string) (theirs string, ours bool) {
	storage, name, _ := strings.Cut(volume, snippetsDir)
	if name == ownName {
		return "", true
	}
	theirName, found := strings.CutPrefix(name, ownName+"-")
	if !found || theirName == "" {
		return "", false
	}
	return storage + snippetsDir + theirName, true
}

// mark is the second line of our snippets, by which they are known.
const mark = "# qmchain: calls qmchain-hook at the phases of a VM"

// script is the text of a snippet. Program is qmchain-hook; theirs the volume of the script that is called too, or "".
func script(program, theirs string) string {
	var b strings.Builder
	b.WriteString("#!/bin/sh\n" + mark + "\n")
	b.WriteString("# Made by `qmchain-hook install VMID`; `qmchain-hook remove VMID` puts back what was there.\n")
	b.WriteString("# What fails in it, or that it is not there any more, keeps no VM from starting.\n")
	ours := "[ -x " + quote(program) + " ] && " + quote(program) + ` guest "$1" "$2"` + "\n"
	if theirs == "" {
		b.WriteString(ours + "exit 0\n")
		return b.String()
	}
	_, name, _ := strings.Cut(theirs, snippetsDir)
	call := `"${0%/*}"/` + quote(name) + ` "$@"` + "\n"
	b.WriteString("# The hook script that the VM had before: its exit code counts. Before a stop it comes first, as ours may pause the guest.\n")
	b.WriteString("if [ \"$2\" = pre-stop ]; then\n\t" + call + "\trc=$?\n\t" + ours + "\texit $rc\nfi\n")
	b.WriteString(ours + "exec " + call)
	return b.String()
}

// isOurs tells whether it is the text of a snippet of ours.
func isOurs(text []byte) bool {
	_, rest, _ := bytes.Cut(text, []byte("\n"))
	line, _, _ := bytes.Cut(rest, []byte("\n"))
	return string(line) == mark
}

// quote makes it one word of the shell.
func quote(word string) string { return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'" }
