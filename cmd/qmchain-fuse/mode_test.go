package main

import (
	"io/fs"
	"testing"
)

func TestModeText(t *testing.T) {
	t.Parallel()
	for mode, want := range map[fs.FileMode]string{
		0o640:                    "-rw-r-----",
		fs.ModeDir | 0o755:       "drwxr-xr-x",
		fs.ModeSymlink | 0o777:   "lrwxrwxrwx",
		fs.ModeNamedPipe | 0o600: "prw-------",
		fs.ModeSocket | 0o666:    "srw-rw-rw-",
		fs.ModeDevice | fs.ModeCharDevice | 0o620: "crw--w----",
		fs.ModeDevice | 0o660:                     "brw-rw----",
		fs.ModeSetuid | 0o4755&fs.ModePerm:        "-rwsr-xr-x",
		fs.ModeSetgid | 0o644:                     "-rw-r-Sr--",
		fs.ModeDir | fs.ModeSticky | fs.ModePerm:  "drwxrwxrwt",
		fs.ModeDir | fs.ModeSticky | 0o770:        "drwxrwx--T",
	} {
		if got := modeText(mode); got != want {
			t.Errorf("%v: %s, want %s", mode, got, want)
		}
	}
}
