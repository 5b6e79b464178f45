package main

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
)

// page is a program's manual page.
func (g generator) page(p program, byHand string) (string, error) {
	line, byHand, _ := strings.Cut(byHand, "\n")
	name, ok := strings.CutPrefix(line, `.\" `)
	if !ok {
		return "", fmt.Errorf("%s.8 must begin with a comment, the page's description in one line", p.Name)
	}
	var b strings.Builder
	b.WriteString(".\\\" Made from what the program says of itself with --describe.\n")
	g.title(&b, p.Name, 8)
	fmt.Fprintf(&b, ".SH NAME\n%s \\- %s\n", literal(p.Name), text(name))
	b.WriteString(".SH SYNOPSIS\n")
	for i, c := range p.Commands {
		if i > 0 {
			b.WriteString(".br\n")
		}
		fmt.Fprintf(&b, ".B %s %s\n%s\n", literal(p.Name), literal(c.Name), synopsis(c))
	}
	fmt.Fprintf(&b, ".SH DESCRIPTION\n%s\n", text(p.Help))
	b.WriteString(".SH COMMANDS\n")
	for _, c := range p.Commands {
		fmt.Fprintf(&b, ".SS %s\n%s\n", literal(c.Name), text(c.Help))
		if c.Detail != "" {
			fmt.Fprintf(&b, ".PP\n%s\n", text(c.Detail))
		}
		for _, arg := range c.Args {
			fmt.Fprintf(&b, ".TP\n.I %s\n%s\n", argument(arg), text(explained(arg)))
		}
		writeFlags(&b, c.Flags)
		writeExamples(&b, p.Name, c.Examples)
	}
	b.WriteString(".SH OPTIONS\nAll commands have these:\n")
	writeFlags(&b, p.Flags)
	b.WriteString(strings.TrimSuffix(byHand, "\n") + "\n")
	b.WriteString(".SH EXIT STATUS\n")
	for line := range strings.Lines(p.ExitCodes) {
		code, meaning, _ := strings.Cut(strings.TrimSpace(line), " ")
		fmt.Fprintf(&b, ".TP\n.B %s\n%s\n", code, text(strings.TrimSpace(meaning)))
	}
	b.WriteString(".SH SEE ALSO\n.BR qmchain (7),\n.BR qmchain.toml (5),\n.BR qmchain\\-json (5)\n")
	return b.String(), nil
}

// whole fills in a page that is written by hand.
func (g generator) whole(source string, programs []program) (string, error) {
	source = strings.NewReplacer("@version@", g.version, "@date@", g.date).Replace(source)
	var b strings.Builder
	for _, section := range sections(programs) {
		fmt.Fprintf(&b, ".TP\n.B [%s]\n", section)
		for _, p := range programs {
			if commands := p.Config[section]; len(commands) > 0 {
				keys, err := p.keys(commands)
				if err != nil {
					return "", err
				}
				names := make([]string, len(commands))
				for i, c := range commands {
					names[i] = `\fB` + literal(c) + `\fR`
				}
				fmt.Fprintf(&b, "%s %s:\n%s.\n", `\fB`+literal(p.Name)+`\fR`, strings.Join(names, ", "), wrap(strings.Join(keys, ", ")))
			}
		}
	}
	return strings.Replace(source, ".\\\" @keys@\n", b.String(), 1), nil
}

// keys are the flags of commands that can stand in the configuration file.
func (p program) keys(commands []string) ([]string, error) {
	keys := map[string]bool{}
	for _, name := range commands {
		i := slices.IndexFunc(p.Commands, func(c command) bool { return c.Name == name })
		if i < 0 {
			return nil, fmt.Errorf("%s has no command %s", p.Name, name)
		}
		for _, f := range p.Commands[i].Flags {
			if f.Config {
				keys[`\fB`+literal(f.Name)+`\fR`] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(keys)), nil
}

func (g generator) title(b *strings.Builder, name string, section int) {
	fmt.Fprintf(b, ".TH %s %d %s \"qmchain %s\" \"qmchain\"\n", strings.ToUpper(name), section, g.date, g.version)
	b.WriteString(".nh\n") // no path or flag is to be broken
}

// synopsis is a command's line after its name: what must be there is named.
func synopsis(c command) string {
	var words []string
	optional := false
	for _, f := range c.Flags {
		if f.Required {
			words = append(words, flagWord(f))
		}
		optional = optional || !f.Required
	}
	if optional {
		words = append(words, `[\fIoptions\fR]`)
	}
	for _, arg := range c.Args {
		word := `\fI` + argument(arg) + `\fR`
		if !arg.Required {
			word = "[" + word + "]"
		}
		words = append(words, word)
	}
	return strings.Join(words, " ")
}

func argument(arg value) string {
	word := literal(strings.ToUpper(arg.Name))
	if arg.Repeated {
		word += "..."
	}
	return word
}

func writeFlags(b *strings.Builder, flags []value) {
	for _, f := range flags {
		word := flagWord(f)
		if f.Negatable != "" {
			word += `, \fB\-\-` + literal(f.Negatable) + `\fR`
		}
		if f.Short != "" {
			word = `\fB\-` + literal(f.Short) + `\fR, ` + word
		}
		fmt.Fprintf(b, ".TP\n%s\n%s\n", word, text(explained(f)))
	}
}

// exampleWidth is how long a line of an example can be before it is broken.
const exampleWidth = 66

func writeExamples(b *strings.Builder, program string, examples []example) {
	for _, e := range examples {
		fmt.Fprintf(b, ".PP\n%s:\n.PP\n.nf\n.RS\n", text(strings.ToUpper(e.For[:1])+e.For[1:]))
		line := "$ " + program
		for word := range strings.SplitSeq(e.Line, " ") {
			if len(line)+1+len(word) > exampleWidth {
				b.WriteString(literal(line) + " \\e\n")
				line = "   "
			}
			line += " " + word
		}
		b.WriteString(literal(line) + "\n.RE\n.fi\n")
	}
}

func flagWord(f value) string {
	word := `\fB\-\-` + literal(f.Name) + `\fR`
	if f.Value != "" {
		word += `=\fI` + literal(f.Value) + `\fR`
	}
	return word
}

// explained is a value's help, with what else there is to say.
func explained(v value) string {
	help := v.Help
	if v.Default != "" && !strings.Contains(help, "efault:") {
		help += " Default: " + v.Default + "."
	}
	if len(v.Choices) > 0 && !strings.Contains(v.Value, v.Choices[0]) {
		help += " One of " + strings.Join(v.Choices, ", ") + "."
	}
	for _, env := range v.Env {
		help += " Environment: " + env + "."
	}
	return help
}

// literal is text that is to be shown as it is typed.
func literal(s string) string {
	return strings.NewReplacer(`\`, `\e`, "-", `\-`, "`", `\(ga`, "^", `\(ha`, "~", `\(ti`).Replace(s)
}

var (
	code  = regexp.MustCompile("`[^`]+`")
	flags = regexp.MustCompile(`(^|[\s(])(--?[a-z][a-z-]*)`)
)

// text makes running text of a help text: what stands in backquotes and looks like a flag is literal.
func text(s string) string {
	var paragraphs []string
	for paragraph := range strings.SplitSeq(s, "\n") {
		if paragraph = strings.TrimSpace(paragraph); paragraph == "" {
			continue
		}
		var b strings.Builder
		for len(paragraph) > 0 {
			at := code.FindStringIndex(paragraph)
			if at == nil {
				at = []int{len(paragraph), len(paragraph)}
			}
			plain := strings.NewReplacer(`\`, `\e`, "~", `\(ti`, "^", `\(ha`).Replace(paragraph[:at[0]])
			b.WriteString(flags.ReplaceAllStringFunc(plain, func(m string) string { return strings.ReplaceAll(m, "-", `\-`) }))
			if at[0] < at[1] {
				b.WriteString(`\fB` + literal(paragraph[at[0]+1:at[1]-1]) + `\fR`)
			}
			paragraph = paragraph[at[1]:]
		}
		paragraphs = append(paragraphs, wrap(b.String()))
	}
	return strings.Join(paragraphs, "\n.br\n")
}

// wrap breaks text into lines that editors and linters like, none of which is taken for a macro.
func wrap(s string) string {
	var b strings.Builder
	column := 0
	for _, word := range strings.Fields(s) {
		if column > 0 && column+1+len(word) > 78 {
			b.WriteByte('\n')
			column = 0
		}
		if column > 0 {
			b.WriteByte(' ')
			column++
		} else if word[0] == '.' || word[0] == '\'' {
			word = `\&` + word
		}
		b.WriteString(word)
		column += len(word)
	}
	return b.String()
}
