package cli

import (
	"fmt"
	"io"
	"strings"

	"github.com/alecthomas/kong"

	"qmchain/internal/ui"
)

// Example is a command line that a user may want to copy.
type Example struct {
	For  string `json:"for"`  // what it does, with neither a capital nor a full stop
	Line string `json:"line"` // without the program's name
}

// Exemplary is a command with examples: the grammar itself, for the whole program, or a field of it.
type Exemplary interface{ Examples() []Example }

func examplesOf(n *kong.Node) []Example {
	if !n.Target.CanAddr() {
		return nil
	}
	if e, ok := n.Target.Addr().Interface().(Exemplary); ok {
		return e.Examples()
	}
	return nil
}

// Parses tells whether a command line is one of the program's. A repository need not be named: the configuration file, or the
// environment, can do that.
func (p Program) Parses(args []string) error {
	env := Env{io.Discard, io.Discard, func(string) string { return "" }, ""}
	_, err := p.parse(args, env, "", p.Grammar)
	if err != nil && strings.Contains(err.Error(), "missing flags: --repo=DIR") {
		_, err = p.parse(append(args[:1:1], append([]string{"--repo=/"}, args[1:]...)...), env, "", p.Grammar)
	}
	return err
}

// maxHelpWidth keeps lines short enough to be read on a wide terminal.
const maxHelpWidth = 100

// helpOf is a flag's help text, with its default where nothing else shows that.
func helpOf(v *kong.Value) string {
	text := kong.DefaultHelpValueFormatter(v)
	shown := v.Flag == nil || v.Flag.PlaceHolder == "" // then the default stands in the place of the value
	if !v.HasDefault || v.Default == "" || v.IsBool() || shown || strings.Contains(text, "efault:") {
		return text
	}
	return text + " (default " + v.Default + ")"
}

// help is kong's help, followed by the examples and, for the program as a whole, by the exit codes.
func help(options kong.HelpOptions, ctx *kong.Context) error {
	if err := kong.DefaultHelpPrinter(options, ctx); err != nil {
		return err
	}
	node := ctx.Selected()
	if node == nil {
		node = ctx.Model.Node
	}
	var b strings.Builder
	if examples := examplesOf(node); len(examples) > 0 {
		b.WriteString("\nExamples:\n")
		for _, e := range examples {
			fmt.Fprintf(&b, "  # %s\n  %s %s\n", e.For, ctx.Model.Name, e.Line)
		}
	}
	if node == ctx.Model.Node {
		b.WriteString("\nExit codes:\n" + ui.ExitCodes())
	}
	_, err := fmt.Fprint(ctx.Stdout, b.String())
	return err
}
