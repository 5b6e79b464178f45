package main

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"strconv"
	"strings"

	"qmchain/fusefs/tree"
)

// options are what -o can ask for.
type options struct {
	allowOther  bool
	debug       bool
	metricsFile string
	view        tree.View
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

// parseOptions reads the values of -o. Sloppy is mount(8)'s -s: what is not known is left out.
func parseOptions(list []string, sloppy bool) (options, error) {
	var o options
	for _, option := range list {
		name, value, _ := strings.Cut(option, "=")
		var err error
		switch {
		case option == "allow_other":
			o.allowOther = true
		case option == "debug":
			o.debug = true
		case name == "metrics_file" && value != "":
			o.metricsFile = value
		case name == "uid":
			o.view.UID, err = parseID(value)
		case name == "gid":
			o.view.GID, err = parseID(value)
		case name == "umask":
			o.view.Umask, err = parseUmask(value)
		case option == "remount":
			err = errors.New("the mount can't be changed: unmount and mount it again")
		case option == "" || isIgnored(option) || sloppy:
		default:
			err = errors.New("not known")
		}
		if err != nil {
			return options{}, fmt.Errorf("-o %s: %w", option, err)
		}
	}
	return o, nil
}

// parseID reads the number of a user or group. The highest stands for none, chown(2).
func parseID(s string) (*uint32, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil || n == math.MaxUint32 {
		return nil, errors.New("the number of a user or group is asked for")
	}
	id := uint32(n)
	return &id, nil
}

func parseUmask(s string) (*fs.FileMode, error) {
	n, err := strconv.ParseUint(s, 8, 32)
	if err != nil || n > 0o777 {
		return nil, errors.New("three octal digits are asked for, as in 027")
	}
	mask := fs.FileMode(n)
	return &mask, nil
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
