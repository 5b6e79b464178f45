package archtest

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// pkg is a package of the module.
type pkg struct {
	module, folder string
	documented     bool
	imports        []string // of its files other than tests
	testImports    []string
	files          []*ast.File // other than tests
}

func TestArchitecture(t *testing.T) {
	t.Parallel()
	fset := token.NewFileSet()
	pkgs := load(t, fset)
	for _, problem := range project.checkImports(pkgs) {
		t.Error(problem)
	}
	for _, p := range pkgs {
		if !p.documented {
			t.Errorf("%s has no doc comment", p.folder)
		}
		for _, file := range p.files {
			for _, problem := range project.checkFile(fset, p.folder, file) {
				t.Error(problem)
			}
		}
	}
}

// load reads every Go file of the module, whatever its build constraints. (A
// test that asked `go list` would be taken from the cache after a change.)
func load(t *testing.T, fset *token.FileSet) []*pkg {
	t.Helper()
	const root = "../.."
	gomod, err := os.ReadFile(filepath.Join(root, "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	var module string
	if _, err := fmt.Sscanf(string(gomod), "module %s\n", &module); err != nil {
		t.Fatal(err)
	}
	byFolder := map[string]*pkg{}
	err = filepath.WalkDir(root, func(name string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir() && name != root && (strings.HasPrefix(entry.Name(), ".") || entry.Name() == "testdata"):
			return filepath.SkipDir
		case entry.IsDir() || filepath.Ext(name) != ".go":
			return nil
		}
		file, err := parser.ParseFile(fset, name, nil, parser.SkipObjectResolution|parser.ParseComments)
		if err != nil {
			return err
		}
		folder, err := filepath.Rel(root, filepath.Dir(name))
		if err != nil {
			return err
		}
		p := byFolder[folder]
		if p == nil {
			p = &pkg{module: module, folder: folder}
			byFolder[folder] = p
		}
		p.add(file, strings.HasSuffix(name, "_test.go"))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	// Were the root another folder, all would be well there.
	if len(byFolder) < 10 {
		t.Fatalf("%d packages only", len(byFolder))
	}
	return slices.Collect(maps.Values(byFolder))
}

func (p *pkg) add(file *ast.File, test bool) {
	for _, spec := range file.Imports {
		importPath := unquote(spec.Path)
		if test {
			p.testImports = append(p.testImports, importPath)
		} else {
			p.imports = append(p.imports, importPath)
		}
	}
	if !test {
		p.documented = p.documented || file.Doc.Text() != ""
		p.files = append(p.files, file)
	}
}

func unquote(lit *ast.BasicLit) string {
	s, err := strconv.Unquote(lit.Value)
	if err != nil {
		panic(err) // the parser lets no other through
	}
	return s
}

// covers tells whether a package lies in one of the folders.
func covers(folders []string, folder string) bool {
	return slices.ContainsFunc(folders, func(f string) bool {
		return f == everything || f == folder || strings.HasPrefix(folder, f+"/")
	})
}

// checkImports returns what is wrong with the imports of a module's packages.
func (r rules) checkImports(pkgs []*pkg) (problems []string) {
	problem := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	imports := map[string][]string{} // of the module, by folder
	for _, p := range pkgs {
		allowed, ok := r.allowed(p.folder)
		if !ok {
			problem("%s: no rule says what it may import", p.folder)
		}
		for _, i := range p.imports {
			target, inside := strings.CutPrefix(i, p.module+"/")
			if !inside {
				continue
			}
			imports[p.folder] = append(imports[p.folder], target)
			if !covers(allowed, target) {
				problem("%s must not import %s", p.folder, target)
			}
			if covers(r.testOnly, target) && !covers(r.testOnly, p.folder) && !covers(r.helpers, p.folder) {
				problem("%s must not import %s, which is for tests", p.folder, target)
			}
		}
		for _, i := range slices.Concat(p.imports, p.testImports) {
			if folders, restricted := r.only[i]; restricted && !covers(folders, p.folder) {
				problem("%s must not import %s", p.folder, i)
			}
		}
	}
	for _, pair := range r.never {
		for folder := range imports {
			if !covers(pair[:1], folder) {
				continue
			}
			if way := reach(imports, folder, pair[1]); way != nil {
				problem("%s must not reach %s: %s", folder, pair[1], strings.Join(way, " -> "))
			}
		}
	}
	slices.Sort(problems)
	return slices.Compact(problems)
}

// allowed is the rule of the longest folder that covers the package.
func (r rules) allowed(folder string) ([]string, bool) {
	for f := folder; f != "."; f = path.Dir(f) {
		if allowed, ok := r.imports[f]; ok {
			return allowed, true
		}
	}
	return nil, false
}

// reach returns the shortest way over imports from a package into a folder.
func reach(imports map[string][]string, from, folder string) []string {
	ways := [][]string{{from}}
	seen := map[string]bool{from: true}
	for len(ways) > 0 {
		way := ways[0]
		ways = ways[1:]
		for _, next := range imports[way[len(way)-1]] {
			if seen[next] {
				continue
			}
			seen[next] = true
			longer := append(slices.Clone(way), next)
			if covers([]string{folder}, next) {
				return longer
			}
			ways = append(ways, longer)
		}
	}
	return nil
}

// checkFile returns the calls in a source file that its folder must not make,
// and init functions.
func (r rules) checkFile(fset *token.FileSet, folder string, file *ast.File) (problems []string) {
	names := map[string]string{} // what packages are called in this file
	for _, spec := range file.Imports {
		importPath := unquote(spec.Path)
		name := path.Base(importPath)
		if spec.Name != nil {
			name = spec.Name.Name
		}
		names[name] = importPath
	}
	at := func(n ast.Node, what string) {
		problems = append(problems, fmt.Sprintf("%s: %s", fset.Position(n.Pos()), what))
	}
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.FuncDecl:
			if n.Recv == nil && n.Name.Name == "init" {
				at(n, "init: nothing may happen before main")
			}
		case *ast.SelectorExpr:
			x, ok := n.X.(*ast.Ident)
			if ok && slices.Contains(r.calls[names[x.Name]], n.Sel.Name) && !covers(r.mayCall, folder) {
				at(n, x.Name+"."+n.Sel.Name+": only a program's main ends the process")
			}
		}
		return true
	})
	return problems
}
