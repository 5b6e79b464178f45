package conf

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Whatever the file says: it is an error that names the file, or a command line as it could have been given, in which what is for the
// command line only has no place.
func FuzzFile(f *testing.F) {
	for _, text := range []string{
		example, "[backup]\nall = true\n", "[backup]\njobs = 3\nexclude = [\"a,b\", \"c\\\\\"]\nwait = \"10s\"\n[guest.110]\njobs = 4\n[guest.110.hook]\nx = 1\n",
		"repo = 5\n[prune]\nkeep-last = -1\n", "[backup]\nlevel = 1979-05-27\n", "[backup]\nexclude = [[1]]", "guest = 1", "[guest]\n110 = 2\n", "[guest.a.b]\n[backup.x]\n",
		"[backup]\ncompress = 'lzma'\n", "[[backup]]\n", "verbose = 0x10\nquiet = inf\n", "a.b.c = 1\n", strings.Repeat("[", 1000), "repo = '''\n", "[backup]\njobs = 1e300\n",
	} {
		f.Add([]byte(text))
	}
	path := filepath.Join(f.TempDir(), "config.toml")
	f.Fuzz(func(t *testing.T, text []byte) {
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		file, err := Load(path)
		if err != nil {
			if !strings.Contains(err.Error(), path) {
				t.Errorf("an error that does not name the file: %v", err)
			}
			return
		}
		for section := range file.sections {
			if !strings.Contains(string(text), section) {
				t.Errorf("section %q", section)
			}
		}
		for _, args := range [][]string{{"run"}, {"run", "--jobs=7", "--level=x"}, {"prune"}} {
			g, err := parse(t, string(text), "110", args...)
			if err != nil {
				if !strings.Contains(err.Error(), "config.toml: ") && !strings.Contains(err.Error(), "--") {
					t.Errorf("an error that names neither the file nor the flag: %v", err)
				}
				continue
			}
			if g.Run.All {
				t.Error("what is for the command line only was taken from the file")
			}
			if c := g.Run.Compress; c != "zstd" && c != "none" {
				t.Errorf("compress is %q", c)
			}
			if len(args) > 1 && (g.Run.Jobs != 7 || g.Run.Level != "x") {
				t.Errorf("the command line does not go before the file: %+v", g.Run)
			}
		}
	})
}
