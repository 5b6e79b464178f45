package main

import (
	"strings"
	"testing"
)

// Options come from fstab(5). Those that are understood mean what they say; an error shows which it is about.
func FuzzOptions(f *testing.F) {
	for _, s := range []string{
		"ro,nosuid,allow_other,uid=1000,gid=100,umask=027", "uid=4294967295", "umask=1000", "umask=-1", "uid=+1", "gid=1_000", "rw,x-systemd.automount,_netdev",
		"metrics_file=/run/a=b,comment=x", "remount", "debug=1,allow_other=1", "=,", "metrics_file=", "uid", "ro=1",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		list := strings.Split(text, ",")
		o, err := parseOptions(list, false)
		sloppy, sloppyErr := parseOptions(list, true)
		if err != nil {
			named := false
			for _, option := range list {
				named = named || strings.HasPrefix(err.Error(), "-o "+option+": ")
			}
			if !named {
				t.Errorf("%q: an error that does not name the option: %v", text, err)
			}
			return
		}
		if sloppyErr != nil || sloppy.allowOther != o.allowOther || sloppy.debug != o.debug || sloppy.metricsFile != o.metricsFile {
			t.Errorf("%q: %+v, and %+v with -s, %v", text, o, sloppy, sloppyErr)
		}
		asked := func(name string) (value string) {
			for _, option := range list {
				if v, found := strings.CutPrefix(option, name+"="); found && (v != "" || name != "metrics_file") {
					value = v
				}
			}
			return value
		}
		if (o.view.UID != nil) != strings.Contains(","+text, ",uid=") || (o.view.GID != nil) != strings.Contains(","+text, ",gid=") {
			t.Errorf("%q: %+v", text, o.view)
		}
		if o.metricsFile != asked("metrics_file") {
			t.Errorf("%q: metrics go to %q", text, o.metricsFile)
		}
		if mask := o.view.Umask; mask != nil && (*mask > 0o777 || strings.Trim(asked("umask"), "01234567") != "") {
			t.Errorf("%q: the umask is %o", text, *mask)
		}
	})
}
