// Package jsondoc holds the programs to what qmchain-json(5) says of their output with --json. It is for tests.
//
// The page has a section for each document. Its heading is a program and a command, or several with commas between them, and
// where one command prints different documents, after a colon what this one is. In it stands each field that is no object and
// no array, by its path as jq(1) writes it, and its kind:
//
//	.SS qmchain\-backup list
//	.TP
//	.BR .[].disks[].bytes " (integer)"
//
// A field that can be left out has a question mark after its kind.
//
// A section must have exactly the fields of the Go types that are printed ([Page.Type]); and what the programs print in other
// tests may hold no others ([Page.Output]).
package jsondoc

import (
	"bytes"
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"time"
)

// TB is what the package needs of a test.
type TB interface {
	Helper()
	Fatalf(format string, args ...any)
	Errorf(format string, args ...any)
}

// fields are kinds by path.
type fields map[string]string

// Page is the manual page.
type Page struct{ sections map[string]fields }

var (
	heading = regexp.MustCompile(`^\.SS (qmchain.*)$`)
	field   = regexp.MustCompile(`^\.BR (\.\S*) " \((.*)\)"$`)
)

// Load reads the page.
func Load(tb TB) *Page {
	tb.Helper()
	dir, err := os.Getwd() // of a test, its package's
	for ; err == nil; dir = filepath.Dir(dir) {
		if _, missing := os.Stat(filepath.Join(dir, "go.mod")); missing == nil {
			break
		}
		if dir == filepath.Dir(dir) {
			err = errors.New("no go.mod above this test")
		}
	}
	if err != nil {
		tb.Fatalf("jsondoc: %v", err)
	}
	text, err := os.ReadFile(filepath.Join(dir, "packaging", "man", "qmchain-json.5"))
	if err != nil {
		tb.Fatalf("jsondoc: %v", err)
	}
	page, err := parse(string(text))
	if err != nil {
		tb.Fatalf("qmchain-json.5: %v", err)
	}
	return page
}

func parse(text string) (*Page, error) {
	page := &Page{sections: map[string]fields{}}
	var section fields
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		if m := heading.FindStringSubmatch(line); m != nil {
			name := strings.ReplaceAll(m[1], `\-`, "-")
			if page.sections[name] != nil {
				return nil, fmt.Errorf("%q is there twice", name)
			}
			section = fields{}
			page.sections[name] = section
		}
		if m := field.FindStringSubmatch(line); m != nil {
			path := strings.ReplaceAll(m[1], `\-`, "-")
			if section == nil || section[path] != "" {
				return nil, fmt.Errorf("%q is in no section, or is there twice", path)
			}
			section[path] = m[2]
		}
	}
	return page, nil
}

// Type compares a section with the type of what is printed.
func (p *Page) Type(tb TB, section string, printed any) {
	tb.Helper()
	documented := p.sections[section]
	if documented == nil {
		tb.Errorf("qmchain-json(5) has no section %q", section)
		return
	}
	want := fields{}
	want.add(".", reflect.TypeOf(printed), "")
	for _, path := range slices.Sorted(maps.Keys(want)) {
		if documented[path] != want[path] {
			tb.Errorf("qmchain-json(5), %s: %s is %q, and %q in the page", section, path, want[path], documented[path])
		}
	}
	for _, path := range slices.Sorted(maps.Keys(documented)) {
		if want[path] == "" {
			tb.Errorf("qmchain-json(5), %s: %s is in the page alone", section, path)
		}
	}
}

// add adds what a type has, at a path. Left is what kinds there end with: a question mark where all of it can be left out.
func (f fields) add(path string, t reflect.Type, left string) {
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	// A type that has a text of its own is that text.
	if _, own := reflect.New(t).Interface().(encoding.TextMarshaler); own {
		kind := "text"
		if t == reflect.TypeFor[time.Time]() {
			kind = "time"
		}
		f[path] = kind + left
		return
	}
	switch t.Kind() {
	case reflect.Struct:
		for i := range t.NumField() {
			f.addField(path, t.Field(i), left)
		}
	case reflect.Slice:
		if t.Elem().Kind() == reflect.Uint8 {
			f[path] = "text" + left
			return
		}
		f.add(path+"[]", t.Elem(), left)
	case reflect.String:
		f[path] = "text" + left
	case reflect.Bool:
		f[path] = "boolean" + left
	case reflect.Float32, reflect.Float64:
		f[path] = "number" + left
	case reflect.Int, reflect.Int64, reflect.Int32, reflect.Uint, reflect.Uint32, reflect.Uint64:
		f[path] = "integer" + left
	default:
		f[path] = t.String() // which no page has
	}
}

func (f fields) addField(path string, field reflect.StructField, left string) {
	name, options, _ := strings.Cut(field.Tag.Get("json"), ",")
	if strings.Contains(options, "omit") {
		left = "?"
	}
	switch {
	case name == "-":
	case field.Anonymous && name == "":
		f.add(path, field.Type, left)
	case field.IsExported() && name == "":
		f.add(join(path, field.Name), field.Type, left)
	case field.IsExported():
		f.add(join(path, name), field.Type, left)
	}
}

func join(path, name string) string {
	return strings.TrimSuffix(path, ".") + "." + name
}

// Output sees that what a command, "qmchain-backup list", has printed holds nothing but what its sections have, and no null.
// What it prints can be several documents.
func (p *Page) Output(tb TB, command string, printed []byte) {
	tb.Helper()
	allowed := fields{}
	for section, documented := range p.sections {
		if slices.Contains(commands(section), command) {
			maps.Copy(allowed, documented)
		}
	}
	if len(allowed) == 0 {
		tb.Errorf("qmchain-json(5) has nothing of %s", command)
		return
	}
	decoder := json.NewDecoder(bytes.NewReader(printed))
	decoder.UseNumber()
	for {
		var document any
		err := decoder.Decode(&document)
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			tb.Errorf("%s: %v in %s", command, err, printed)
			return
		}
		for path, kind := range leaves(".", document) {
			if !fits(kind, allowed[path]) {
				tb.Errorf("%s: %s is %s, and %q in qmchain-json(5)", command, path, kind, allowed[path])
			}
		}
	}
}

// leaves goes through what is no object and no array.
func leaves(path string, v any) func(yield func(path, kind string) bool) {
	return func(yield func(string, string) bool) {
		switch v := v.(type) {
		case map[string]any:
			for name, value := range v {
				leaves(join(path, name), value)(yield)
			}
		case []any:
			for _, value := range v {
				leaves(path+"[]", value)(yield)
			}
		case string:
			yield(path, "text")
		case bool:
			yield(path, "boolean")
		case json.Number:
			yield(path, "number")
		default:
			yield(path, "null")
		}
	}
}

func fits(printed, documented string) bool {
	switch documented = strings.TrimSuffix(documented, "?"); documented {
	case "time":
		return printed == "text"
	case "integer":
		return printed == "number"
	}
	return printed == documented
}

// commands are those that a section is about.
func commands(section string) (all []string) {
	section, _, _ = strings.Cut(section, ":")
	program, names, _ := strings.Cut(section, " ")
	for name := range strings.SplitSeq(names, ", ") {
		all = append(all, program+" "+name)
	}
	return all
}

// Complete sees that the page has all commands of a program that have --json, and no other. Described is what the program
// prints with --describe.
func (p *Page) Complete(tb TB, described []byte) {
	tb.Helper()
	var program struct {
		Name     string
		Commands []struct {
			Name  string
			Flags []struct{ Name string }
		}
	}
	if err := json.Unmarshal(described, &program); err != nil {
		tb.Fatalf("jsondoc: %v", err)
	}
	have := map[string]bool{}
	for section := range p.sections {
		for _, command := range commands(section) {
			if strings.HasPrefix(command, program.Name+" ") {
				have[command] = true
			}
		}
	}
	for _, c := range program.Commands {
		command := program.Name + " " + c.Name
		prints := slices.ContainsFunc(c.Flags, func(f struct{ Name string }) bool { return f.Name == "json" })
		if prints != have[command] {
			tb.Errorf("%s has --json: %t, and is in qmchain-json(5): %t", command, prints, have[command])
		}
		delete(have, command)
	}
	for command := range have {
		tb.Errorf("there is no command %s, which is in qmchain-json(5)", command)
	}
}
