// Package conf reads the configuration file: flags that need not be given on every command line.
//
//	repo = "/mnt/backup/qmchain"     # every program's, as are quiet, verbose and log-file
//
//	[backup]                         # of qmchain-backup's run, and what else has such a flag
//	exclude = ["120", "121"]
//	mail-to = ["admin@example.org"]
//
//	[prune]                          # of qmchain-backup prune; so [check]; and of the programs [restore], [fuse], [hook]
//	keep-daily = 14
//
//	[guest.110]                      # goes before [backup], for this guest alone
//	compress = "zstd"
//
//	[guest.110.hook]                 # goes before [hook], for this guest alone
//	post-start-backup = true
//
// Words:
//
//   - A key is a flag's name without its dashes, and its value what would follow it: text, a number, true or false, or a list
//     for a flag that can be given several times.
//   - A [Scope] says which section is for which commands of a program.
//
// A flag on the command line goes before the environment, and that before the file. Flags that say what is to be done just
// now, such as --all, have no place in it (they are tagged conf:"no"): nor has what would have a timer do nothing for ever, as
// --dry-run, or each restore go over what is there, as --force. What a section has that none of its commands knows is
// an error, as is a section that nobody knows: a misspelt setting must not pass for one that is in effect.
package conf

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/BurntSushi/toml"
	"github.com/alecthomas/kong"

	"qmchain/cmd/internal/similar"
	"qmchain/internal/ui"
)

// Path is where the file usually is. It need not be there.
const Path = "/etc/qmchain/config.toml"

// Variable is the environment variable that names another file, which must be there.
const Variable = "QMCHAIN_CONFIG"

// shared are the keys before the first section.
var shared = []string{"repo", "quiet", "verbose", "log-file"}

// sections are those of all programs.
var sections = []string{"backup", "check", "fuse", "guest", "hook", "prune", "restore"}

// Scope names, for each section of a program's, the commands that it is for.
type Scope map[string][]string

// guests is the section that those of single guests go before.
func (s Scope) guests() string {
	for _, name := range []string{"backup", "hook"} {
		if s[name] != nil {
			return name
		}
	}
	return ""
}

// of is the section for a command, or "".
func (s Scope) of(command string) string {
	for name, commands := range s {
		if slices.Contains(commands, command) {
			return name
		}
	}
	return ""
}

// File is a configuration file that was read.
type File struct {
	path     string
	top      map[string]any
	sections map[string]map[string]any
	guests   map[string]map[string]any
	hooks    map[string]map[string]any // the guests' own sections for hooks
}

// own is what goes before a section for one guest, and where that stands.
func (f *File) own(section, guest string) (name string, values map[string]any) {
	if section == "hook" {
		return "[guest." + guest + ".hook]", f.hooks[guest]
	}
	return "[guest." + guest + "]", f.guests[guest]
}

// Find reads the file that is in effect: the one given, as by Variable, or else the usual one, if that is there; "" is none.
// It is nil where there is none.
func Find(given, usual string) (*File, error) {
	if given != "" {
		return Load(given)
	}
	if usual == "" {
		return nil, nil
	}
	f, err := Load(usual)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return f, err
}

// Load reads a file. It must be of sections that some program knows.
func Load(path string) (*File, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("configuration file: %w", err)
	}
	f := &File{path: path, top: map[string]any{}, sections: map[string]map[string]any{}, guests: map[string]map[string]any{}}
	var all map[string]any
	if _, err := toml.Decode(string(text), &all); err != nil {
		var parse toml.ParseError
		if errors.As(err, &parse) {
			return nil, fmt.Errorf("%s:%d: %s", path, parse.Position.Line, parse.Message)
		}
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	for _, key := range slices.Sorted(maps.Keys(all)) {
		table, isSection := all[key].(map[string]any)
		switch {
		case !isSection && slices.Contains(shared, key):
			f.top[key] = all[key]
		case !isSection:
			return nil, misspelt(fmt.Errorf("%s: %s: before the first section only %s can stand", path, key, strings.Join(shared, ", ")), key, shared)
		case !slices.Contains(sections, key):
			return nil, misspelt(fmt.Errorf("%s: no program has a section [%s], only %s", path, key, strings.Join(sections, ", ")), key, sections)
		case key == "guest":
			if f.guests, err = f.subsections(table); err != nil {
				return nil, err
			}
		default:
			f.sections[key] = table
		}
	}
	return f, nil
}

// Shared is the text of a key before the first section; "" where there is none, as in no file.
func (f *File) Shared(key string) string {
	if f == nil {
		return ""
	}
	text, _ := f.top[key].(string)
	return text
}

// Of is what a key in a guest's own section says, if that is a text.
func (f *File) Of(guest, key string) string {
	if f == nil {
		return ""
	}
	text, _ := f.guests[guest][key].(string)
	return text
}

func (f *File) subsections(table map[string]any) (map[string]map[string]any, error) {
	guests := map[string]map[string]any{}
	f.hooks = map[string]map[string]any{}
	for name, value := range table {
		sub, ok := value.(map[string]any)
		if !ok {
			return nil, fmt.Errorf("%s: guest.%s: guests have sections of their own, such as [guest.110]", f.path, name)
		}
		if hook, ok := sub["hook"].(map[string]any); ok {
			f.hooks[name] = hook
			delete(sub, "hook")
		}
		guests[name] = sub
	}
	return guests, nil
}

// Resolver gives kong the values for a program's flags, those of a guest first, if one is named.
func (f *File) Resolver(scope Scope, guest string) *Resolver {
	return &Resolver{file: f, scope: scope, guest: guest, used: map[string]string{}}
}

// Resolver is a source of values for kong.
type Resolver struct {
	file  *File
	scope Scope
	guest string
	used  map[string]string // where the values of flags are from that were given out
}

var _ kong.Resolver = (*Resolver)(nil)

// Validate implements kong.Resolver: every key of this program's sections must be a flag that can stand there.
func (r *Resolver) Validate(app *kong.Application) error {
	for _, section := range slices.Sorted(maps.Keys(r.scope)) {
		if err := r.validate(app, section, "["+section+"]", r.file.sections[section]); err != nil {
			return err
		}
	}
	if section := r.scope.guests(); section != "" {
		for _, name := range slices.Sorted(maps.Keys(r.file.guests)) {
			where, values := r.file.own(section, name)
			if err := r.validate(app, section, where, values); err != nil {
				return err
			}
		}
	}
	return nil
}

func (r *Resolver) validate(app *kong.Application, section, name string, values map[string]any) error {
	for _, key := range slices.Sorted(maps.Keys(values)) {
		flag := r.flag(app, section, key)
		switch {
		case flag == nil:
			return misspelt(fmt.Errorf("%s: %s: %s: there is no flag --%s", r.file.path, name, key, key), key, r.keys(app, section))
		case flag.Tag.Get("conf") == "no":
			return fmt.Errorf("%s: %s: %s: --%s is for the command line only", r.file.path, name, key, key)
		}
		if _, err := text(values[key]); err != nil {
			return fmt.Errorf("%s: %s: %s: %w", r.file.path, name, key, err)
		}
	}
	return nil
}

// flags are those of the commands that a section is for.
func (r *Resolver) flags(app *kong.Application, section string) (flags []*kong.Flag) {
	for _, command := range app.Children {
		if slices.Contains(r.scope[section], command.Name) {
			flags = append(flags, command.Flags...)
		}
	}
	return flags
}

func (r *Resolver) flag(app *kong.Application, section, key string) *kong.Flag {
	for _, flag := range r.flags(app, section) {
		if flag.Name == key && !flag.Hidden {
			return flag
		}
	}
	return nil
}

// keys are those that can stand in a section.
func (r *Resolver) keys(app *kong.Application, section string) (keys []string) {
	for _, flag := range r.flags(app, section) {
		if flag.Tag.Get("conf") != "no" && !flag.Hidden {
			keys = append(keys, flag.Name)
		}
	}
	return keys
}

// misspelt gives an error about a name in the file the next step.
func misspelt(err error, name string, known []string) error {
	hint := similar.Question(name, known)
	if hint == "" {
		hint = "`man qmchain.toml` tells what can stand there"
	}
	return ui.Hint(err, hint)
}

// Resolve implements kong.Resolver.
func (r *Resolver) Resolve(ctx *kong.Context, _ *kong.Path, flag *kong.Flag) (any, error) {
	for _, name := range flag.Envs {
		if _, set := os.LookupEnv(name); set { // kong has looked there itself
			return nil, nil
		}
	}
	if flag.Hidden || flag.Tag.Get("conf") == "no" {
		return nil, nil
	}
	command := ""
	if node := ctx.Selected(); node != nil {
		command = node.Name
	}
	section := r.scope.of(command)
	type place struct {
		name   string
		values map[string]any
	}
	places := []place{{"[" + section + "]", r.file.sections[section]}, {"the beginning", r.file.top}}
	if section != "" && section == r.scope.guests() && r.guest != "" {
		name, values := r.file.own(section, r.guest)
		places = append([]place{{name, values}}, places...)
	}
	for _, p := range places {
		value, ok := p.values[flag.Name]
		if !ok {
			continue
		}
		t, err := text(value)
		if err != nil {
			return nil, fmt.Errorf("%s: %s: %s: %w", r.file.path, p.name, flag.Name, err)
		}
		r.used[flag.Name] = p.name
		return t, nil
	}
	return nil, nil
}

// Explain adds to kong's error about a flag that its value is from the file.
func (r *Resolver) Explain(err error) error {
	for _, name := range slices.Sorted(maps.Keys(r.used)) {
		if strings.Contains(err.Error()+" ", "--"+name+" ") || strings.Contains(err.Error(), "--"+name+"=") || strings.Contains(err.Error(), "--"+name+":") {
			return fmt.Errorf("%s: %s: %s: %w", r.file.path, r.used[name], name, err)
		}
	}
	return err
}

// text is a value as it would stand on the command line.
func text(value any) (string, error) {
	switch v := value.(type) {
	case string, bool, int64, float64:
		return fmt.Sprint(v), nil
	case []any:
		var items []string
		for _, item := range v {
			if _, nested := item.([]any); nested {
				return "", errors.New("a list in a list")
			}
			t, err := text(item)
			if err != nil {
				return "", err
			}
			items = append(items, t)
		}
		return kong.JoinEscaped(items, ','), nil
	}
	return "", errors.New("its value is neither text, a number, true or false, nor a list of those")
}
