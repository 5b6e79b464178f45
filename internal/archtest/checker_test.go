package archtest

import (
	"go/parser"
	"go/token"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var sample = rules{
	imports: map[string][]string{
		"cmd":      {everything},
		"a":        {"a", "lib"},
		"b":        {"lib"},
		"lib":      {},
		"lib/join": {"b"},
		"tests":    {},
	},
	never:    [][2]string{{"a", "b"}},
	only:     map[string][]string{"example.org/flags": {"cmd"}},
	testOnly: []string{"tests"},
	helpers:  []string{"cmd/show"},
	calls:    map[string][]string{"os": {"Exit"}, "example.org/log": {"Fatal"}},
	mayCall:  []string{"cmd"},
}

func made(folder string, imports ...string) *pkg {
	return &pkg{module: "m", folder: folder, imports: imports}
}

func TestCheckImports(t *testing.T) {
	t.Parallel()
	inTest := func(p *pkg, imports ...string) *pkg {
		p.testImports = imports
		return p
	}
	for name, c := range map[string]struct {
		pkgs []*pkg
		want []string
	}{
		"all is well": {pkgs: []*pkg{
			made("cmd/x", "m/a", "m/b", "example.org/flags", "os"), made("a", "m/a/sub", "m/lib"), made("a/sub", "fmt"), made("lib"),
			made("cmd/show", "m/tests"), made("tests"),
			inTest(made("b"), "m/tests", "m/a"),
		}},
		"direct": {
			[]*pkg{made("b", "m/a")},
			[]string{"b must not import a"},
		},
		"from below": {
			[]*pkg{made("lib/deep", "m/b")},
			[]string{"lib/deep must not import b"},
		},
		"a name that only starts alike": {
			[]*pkg{made("a", "m/library")},
			[]string{"a must not import library"},
		},
		"through another": {
			[]*pkg{made("a/sub", "m/lib/join"), made("lib/join", "m/b"), made("b")},
			[]string{"a/sub must not reach b: a/sub -> lib/join -> b"},
		},
		"in a circle": {
			[]*pkg{made("a", "m/a/x"), made("a/x", "m/a/y"), made("a/y", "m/a/x")},
			nil,
		},
		"no rule": {
			[]*pkg{made("new")},
			[]string{"new: no rule says what it may import"},
		},
		"somebody else's": {
			[]*pkg{made("a", "example.org/flags"), inTest(made("b"), "example.org/flags")},
			[]string{"a must not import example.org/flags", "b must not import example.org/flags"},
		},
		"what is for tests": {
			[]*pkg{made("cmd/x", "m/tests"), made("tests")},
			[]string{"cmd/x must not import tests, which is for tests"},
		},
	} {
		if diff := cmp.Diff(c.want, sample.checkImports(c.pkgs)); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", name, diff)
		}
	}
}

func TestCheckFile(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ folder, src, want string }{
		{"a", `import "os"; func f() { os.Getpid() }`, ""},
		{"a", `import "os"; func f() { os.Exit(1) }`, "os.Exit"},
		{"a", `import "os"; var exit = os.Exit`, "os.Exit"},
		{"a", `import sys "os"; func f() { sys.Exit(1) }`, "sys.Exit"},
		{"a", `import "example.org/log"; func f() { log.Fatal("x") }`, "log.Fatal"},
		{"a", `import "example.org/other/log"; func f() { log.Fatal("x") }`, ""},
		{"a", `import "example.org/ui"; func f() { ui.Exit(1) }`, ""},
		{"cmd/x", `import "os"; func main() { os.Exit(1) }`, ""},
		{"a", `func init() {}`, "init"},
		{"a", `type t int; func (t) init() {}`, ""},
	} {
		fset := token.NewFileSet()
		file, err := parser.ParseFile(fset, "x.go", "package x; "+c.src, 0)
		if err != nil {
			t.Fatal(err)
		}
		text := strings.Join(sample.checkFile(fset, c.folder, file), "\n")
		if (text == "") != (c.want == "") || !strings.Contains(text, c.want) {
			t.Errorf("%s: %s: %q, want %q", c.folder, c.src, text, c.want)
		}
	}
}

// The project's own table must bite: each of these is a wrong arrow.
func TestProjectRules(t *testing.T) {
	t.Parallel()
	for _, arrow := range [][2]string{
		{"qmp", "chain"},
		{"qmp/qga", "proxmox"},
		{"chain/repo", "qmp"},
		{"chain", "proxmox"},
		{"proxmox", "chain/repo"},
		{"proxmox", "qmp"},
		{"backup", "fusefs"},
		{"fusefs", "backup"},
		{"fusefs", "qmp"},
		{"backup", "proxmox"},
		{"hooks", "backup"},
		{"proxmox", "hooks"},
		{"chain", "backup"},
		{"chain/foreign", "chain/repo"},
		{"chain/repo", "chain/foreign"},
		{"chain/source", "chain/foreign/foreigntest"},
		{"chain/export", "chain/repo"},
		{"chain/export", "chain/source"},
		{"chain/nbd", "chain"},
		{"chain/repo", "chain/nbd"},
		{"qmp", "backup"},
		{"backup", "cmd/internal/cli"},
		{"internal/durable", "chain"},
		{"backup", "internal/testenv"},
		{"cmd/qmchain-backup", "qmp/qmptest"},
		{"cmd/qmchain-fuse", "internal/testenv"},
	} {
		if problems := project.checkImports([]*pkg{made(arrow[0], "m/"+arrow[1]), made(arrow[1])}); len(problems) == 0 {
			t.Errorf("%s -> %s was let through", arrow[0], arrow[1])
		}
	}
	for folder, want := range map[string]bool{"cmd/qmchain-backup": true, "backup": false, "internal/ui": false} {
		if ok := len(project.checkImports([]*pkg{made(folder, "github.com/alecthomas/kong")})) == 0; ok != want {
			t.Errorf("kong in %s: let through %v, want %v", folder, ok, want)
		}
	}
}
