package cli

import (
	"encoding/json"
	"reflect"
	"strings"

	"github.com/alecthomas/kong"

	"qmchain/cmd/internal/conf"
	"qmchain/internal/ui"
)

// describeFlag prints the program's command line as JSON, as --version prints the version. Manual pages and completions are
// made from that, so that they say what the program does.
type describeFlag bool

// BeforeReset is called by kong as soon as the flag is seen: nothing else on the command line matters then.
func (describeFlag) BeforeReset(app *kong.Kong, scope conf.Scope) error {
	p := describedProgram{describedCommand: describeNode(app.Model.Node), ExitCodes: ui.ExitCodes(), Config: scope}
	text, err := json.MarshalIndent(p, "", "  ")
	if err != nil {
		return err
	}
	if _, err := app.Stdout.Write(append(text, '\n')); err != nil {
		return err
	}
	app.Exit(ui.ExitOK)
	return nil
}

type describedProgram struct {
	describedCommand
	ExitCodes string     `json:"exit_codes"` // a code and what it means, a line each
	Config    conf.Scope `json:"config"`     // sections of the configuration file, and the commands that each is for
}

type describedCommand struct {
	Name     string             `json:"name"`
	Help     string             `json:"help"`
	Detail   string             `json:"detail,omitempty"`
	Flags    []describedValue   `json:"flags"`
	Args     []describedValue   `json:"args"`
	Examples []Example          `json:"examples,omitempty"`
	Commands []describedCommand `json:"commands,omitempty"`
}

// describedValue is a flag, or an argument that is told by its place.
type describedValue struct {
	Name      string   `json:"name"`
	Short     string   `json:"short,omitempty"`
	Help      string   `json:"help"`
	Value     string   `json:"value,omitempty"` // what stands for its value; a flag without takes none
	Default   string   `json:"default,omitempty"`
	Choices   []string `json:"choices,omitempty"`
	Env       []string `json:"env,omitempty"`
	Required  bool     `json:"required,omitempty"`
	Repeated  bool     `json:"repeated,omitempty"`
	Negatable string   `json:"negatable,omitempty"` // the flag that says no
	Config    bool     `json:"config,omitempty"`    // can stand in the configuration file
}

func describeNode(n *kong.Node) describedCommand {
	c := describedCommand{Name: n.Name, Help: n.Help, Detail: n.Detail, Flags: []describedValue{}, Args: []describedValue{}, Examples: examplesOf(n)}
	for _, f := range n.Flags {
		if !f.Hidden {
			c.Flags = append(c.Flags, describeFlagOf(f))
		}
	}
	for _, arg := range n.Positional {
		c.Args = append(c.Args, describeValue(arg))
	}
	for _, child := range n.Children {
		if !child.Hidden {
			c.Commands = append(c.Commands, describeNode(child))
		}
	}
	return c
}

func describeFlagOf(f *kong.Flag) describedValue {
	v := describeValue(f.Value)
	if f.Short != 0 {
		v.Short = string(f.Short)
	}
	v.Env = f.Envs
	v.Config = f.Tag.Get("conf") != "no" && f.Name != "help" && f.Name != "version"
	switch {
	case !f.IsBool():
		v.Value = f.FormatPlaceHolder()
		if len(v.Choices) > 0 && f.PlaceHolder == "" {
			v.Value = strings.Join(v.Choices, "|")
		}
	case f.Tag.Negatable == "_": // kong's word for the usual one
		v.Negatable = "no-" + f.Name
	default:
		v.Negatable = f.Tag.Negatable
	}
	return v
}

// repeated tells whether a value can be given several times: kong says so of unnamed types alone.
func repeated(v *kong.Value) bool { return v.IsCumulative() || v.Target.Kind() == reflect.Slice }

func describeValue(v *kong.Value) describedValue {
	d := describedValue{Name: v.Name, Help: v.Help, Required: v.Required, Repeated: repeated(v)}
	if v.HasDefault && !v.IsBool() {
		d.Default = v.Default
	}
	if v.Enum != "" {
		d.Choices = v.EnumSlice()
	}
	return d
}
