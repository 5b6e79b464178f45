package main

import (
	"path/filepath"
	"strings"
)

// helperName is what mount(8) looks for in /sbin when it is to mount the type fuse.qmchain: a link to this program.
const helperName = "mount.fuse.qmchain"

// helperArgs makes a mount of this program out of what mount(8) calls its helpers with:
//
//	mount.fuse.qmchain REPO MNT [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]
//
// Under its own name the program's arguments stay as they are. What is wrong in them is for the command line to say.
func helperArgs(args []string) []string {
	if len(args) == 0 || filepath.Base(args[0]) != helperName {
		return args
	}
	out := []string{"qmchain-fuse", "mount"}
	var paths []string
	for rest := args[1:]; len(rest) > 0; {
		arg := rest[0]
		rest = rest[1:]
		switch {
		case arg == "--":
			paths, rest = append(paths, rest...), nil
		case !strings.HasPrefix(arg, "-") || arg == "-":
			paths = append(paths, arg)
		case arg == "-o":
			out = append(out, arg)
			if len(rest) > 0 {
				out, rest = append(out, rest[0]), rest[1:]
			}
		case (arg == "-t" || arg == "-N") && len(rest) > 0:
			rest = rest[1:] // the type is in our name, and mount(8) has gone into the namespace
		case strings.Trim(arg[1:], "sfnv") == "":
			for _, letter := range arg[1:] {
				switch letter {
				case 's':
					out = append(out, "--sloppy")
				case 'f':
					out = append(out, "--fake")
				case 'v':
					out = append(out, "--verbose")
				} // n: there is no /etc/mtab to write to
			}
		default:
			out = append(out, arg)
		}
	}
	if len(paths) > 0 {
		out = append(append(out, "--"), paths...)
	}
	return out
}
