package main

import (
	"fmt"
	"strings"
)

// options are what -o can ask for.
type options struct {
	allowOther bool
	debug      bool
}

// ignored are options of mount(8) and fstab(5) that are accepted without effect: those that the mount has anyway, those
// that a read-only mount can't have a use for, and those that are for mount(8) and systemd themselves. rw is among them,
// since mount(8) passes it on when nothing else is asked for; the mount is read-only all the same.
var ignored = strings.Fields(`
	ro nosuid nodev noexec default_permissions
	rw suid dev exec defaults sync async dirsync atime noatime diratime nodiratime relatime norelatime strictatime
	nostrictatime lazytime nolazytime iversion noiversion silent loud mand nomand
	auto noauto user nouser users owner group _netdev nofail
`)

// parseOptions reads the values of -o.
func parseOptions(list []string) (options, error) {
	var o options
	for _, name := range list {
		switch {
		case name == "allow_other":
			o.allowOther = true
		case name == "debug":
			o.debug = true
		case name == "" || isIgnored(name):
		default:
			return options{}, fmt.Errorf("-o %s is not known", name)
		}
	}
	return o, nil
}

func isIgnored(name string) bool {
	for _, prefix := range []string{"x-", "X-", "comment="} {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	for _, i := range ignored {
		if name == i {
			return true
		}
	}
	return false
}
