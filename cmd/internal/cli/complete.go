package cli

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/alecthomas/kong"

	"qmchain/cmd/internal/conf"
	"qmchain/internal/ui"
)

// Shells ask a program what could come next on its command line:
//
//	PROGRAM __complete WORD...
//
// The words are those after the program's name, up to the one with the cursor. A line of the answer is a word that can stand in
// the place of the last one and, after a tab, what it is; or it is one of
//
//	:file     also what files there are, which the shell finds
//	:dir      also what folders there are
//	:nospace  what is offered is not the whole word yet
//
// It is always given in time, if need be an empty one: what is looked up can be on a share that hangs, and a process that waits
// for that can't even be killed. So it is another process that looks, whose end nobody waits for.
const (
	completeCommand = "__complete"
	lookCommand     = "__look"
	completeLimit   = time.Second
)

// Offer is a word that can come next.
type Offer struct {
	Word string
	Help string // what it is, in a few words
}

// OfferFiles has the shell offer files, too.
var OfferFiles = Offer{Word: ":file"}

// Sources find what can stand for a value, by what the value is: the name of an argument or the placeholder of a flag, in small
// letters, or what its tag complete says.
type Sources map[string]func(*Line) []Offer

// Words is the source of words that are always the same.
func Words(words ...string) func(*Line) []Offer {
	return func(*Line) (offers []Offer) {
		for _, w := range words {
			offers = append(offers, Offer{Word: w})
		}
		return offers
	}
}

// Line is a command line up to the cursor.
type Line struct {
	Word string   // what there is of the word at the cursor; of a flag, of its value
	Args []string // the values of arguments before

	flags  map[string]string // values by flag
	getenv func(string) string
	config *conf.File // nil: there is none
}

// NewLine is a command line that names a repository and has some arguments; for tests of sources.
func NewLine(repository, word string, args ...string) *Line {
	return &Line{Word: word, Args: args, flags: map[string]string{"repo": repository}, getenv: func(string) string { return "" }}
}

// Flag is the value of a flag that was given before; "" where it was not.
func (l *Line) Flag(name string) string { return l.flags[name] }

// Repo is the repository that the command line, the environment or the configuration file names; "" is none.
func (l *Line) Repo() string {
	for _, dir := range []string{l.flags["repo"], l.getenv("QMCHAIN_REPO"), l.config.Shared("repo")} {
		if rest, ok := strings.CutPrefix(dir, "~/"); ok {
			dir = filepath.Join(l.getenv("HOME"), rest)
		}
		if dir != "" {
			return dir
		}
	}
	return ""
}

// supervise has another process look, and passes on what that says in time.
func supervise(args []string, stdout io.Writer, limit time.Duration) int {
	cmd := exec.Command("/proc/self/exe", append([]string{lookCommand}, args...)...)
	cmd.Args[0] = os.Args[0]
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return ui.ExitOK // a shell has no place for errors
	}
	said := make(chan []byte, 1)
	go func() {
		text, _ := io.ReadAll(out)
		said <- text
	}()
	select {
	case text := <-said:
		_, _ = stdout.Write(text)
	case <-time.After(limit):
		_ = cmd.Process.Kill()
	}
	return ui.ExitOK
}

// look answers.
func (p Program) look(words []string, env Env) int {
	parser, err := kong.New(p.Grammar, kong.Name(p.Name), kong.Vars{"version": Version}, kong.Bind(p.Scope))
	if err != nil || len(words) == 0 {
		return ui.ExitOK
	}
	file, _ := conf.Find(env.Getenv(conf.Variable), env.Config)
	c := completion{
		node: parser.Model.Node, sources: p.Complete,
		line: &Line{flags: map[string]string{}, getenv: env.Getenv, config: file},
	}
	last := len(words) - 1
	for _, w := range words[:last] {
		if !c.pass(unquoted(w)) {
			return ui.ExitOK
		}
	}
	out := bufio.NewWriter(env.Stdout)
	for _, o := range c.offers(unquoted(words[last])) {
		line := o.Word
		if o.Help != "" {
			line += "\t" + strings.Join(strings.FieldsFunc(o.Help, func(r rune) bool { return unicode.IsSpace(r) || !unicode.IsPrint(r) }), " ")
		}
		_, _ = fmt.Fprintln(out, line)
	}
	_ = out.Flush()
	return ui.ExitOK
}

// completion goes along a command line.
type completion struct {
	node    *kong.Node // the command, once it is known
	sources Sources
	line    *Line

	flag     *kong.Flag // whose value comes next
	noFlags  bool       // after --
	fromFile string     // ":file" or ":dir"
}

// pass takes a word that is complete; false where it makes no sense.
func (c *completion) pass(word string) bool {
	name, value, given := strings.Cut(word, "=")
	switch {
	case c.flag != nil:
		c.line.flags[c.flag.Name] = word
		c.flag = nil
	case c.noFlags || !strings.HasPrefix(word, "-") || word == "-":
		return c.passArg(word)
	case word == "--":
		c.noFlags = true
	case strings.HasPrefix(word, "--"):
		f := c.find(strings.TrimPrefix(name, "--"))
		switch {
		case f == nil || f.IsBool():
		case given:
			c.line.flags[f.Name] = value
		default:
			c.flag = f
		}
	default:
		c.passShort(word[1:])
	}
	return true
}

// passShort takes flags of a letter, of which the last can be followed by its value.
func (c *completion) passShort(letters string) {
	for i, letter := range letters {
		j := slices.IndexFunc(c.flags(), func(f *kong.Flag) bool { return f.Short == letter })
		if j < 0 || c.flags()[j].IsBool() {
			continue
		}
		if rest := letters[i+1:]; rest != "" {
			c.line.flags[c.flags()[j].Name] = rest
		} else {
			c.flag = c.flags()[j]
		}
		return
	}
}

func (c *completion) passArg(word string) bool {
	if c.node.Type != kong.ApplicationNode {
		c.line.Args = append(c.line.Args, word)
		return true
	}
	i := slices.IndexFunc(c.node.Children, func(n *kong.Node) bool { return n.Name == word })
	if i >= 0 {
		c.node = c.node.Children[i]
	}
	return i >= 0
}

// flags are all that can stand here.
func (c *completion) flags() (flags []*kong.Flag) {
	for _, group := range c.node.AllFlags(true) {
		flags = append(flags, group...)
	}
	return flags
}

func (c *completion) find(name string) *kong.Flag {
	for _, f := range c.flags() {
		if f.Name == name {
			return f
		}
	}
	return nil
}

// offers are what can stand in the place of the last word, the words that the shell is to take for something else among them.
func (c *completion) offers(word string) []Offer {
	name, value, given := strings.Cut(word, "=")
	prefix := ""
	var found []Offer
	switch {
	case c.flag != nil:
		found = c.values(c.flag.Value, c.flag.PlaceHolder, word)
	case !c.noFlags && strings.HasPrefix(word, "--") && given:
		if f := c.find(strings.TrimPrefix(name, "--")); f != nil && !f.IsBool() {
			prefix = name + "="
			found = c.values(f.Value, f.PlaceHolder, value)
			word = value
		}
	case !c.noFlags && strings.HasPrefix(word, "-"):
		found = c.flagOffers()
	case c.node.Type == kong.ApplicationNode:
		for _, n := range c.node.Children {
			if !n.Hidden {
				found = append(found, Offer{n.Name, summary(n.Help)})
			}
		}
	case len(c.node.Positional) > 0:
		i := min(len(c.line.Args), len(c.node.Positional)-1)
		if arg := c.node.Positional[i]; len(c.line.Args) == i || repeated(arg) {
			found = c.values(arg, arg.Name, word)
		}
	}
	var offers []Offer
	for _, o := range found {
		if o == OfferFiles {
			c.fromFile = o.Word
		} else if strings.HasPrefix(o.Word, word) && plain(o.Word) {
			offers = append(offers, Offer{prefix + o.Word, o.Help})
		}
	}
	if c.fromFile != "" {
		offers = append(offers, Offer{Word: c.fromFile})
	}
	if len(offers) > 0 && !slices.ContainsFunc(offers, func(o Offer) bool { return !unfinished(o.Word) }) {
		offers = append(offers, Offer{Word: ":nospace"})
	}
	return offers
}

// plain tells whether a shell takes a word for what it is. Bash puts what it is offered on the command line as it stands, and
// names come from repositories, in which others may have written: $(...) would be run. What is not plain is for the user to
// type, and to quote.
func plain(word string) bool {
	return !strings.ContainsFunc(word, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune("._/:@%+,=-", r)
	})
}

// unfinished tells whether more is to come in the same word.
func unfinished(word string) bool {
	return strings.HasSuffix(word, "/") || strings.HasSuffix(word, ":")
}

func (c *completion) flagOffers() (found []Offer) {
	for _, f := range c.flags() {
		if _, given := c.line.flags[f.Name]; given && !repeated(f.Value) {
			continue
		}
		found = append(found, Offer{"--" + f.Name, summary(f.Help)})
		switch f.Tag.Negatable {
		case "":
		case "_":
			found = append(found, Offer{"--no-" + f.Name, ""})
		default:
			found = append(found, Offer{"--" + f.Tag.Negatable, ""})
		}
	}
	return found
}

// values are what a flag or an argument can be.
func (c *completion) values(v *kong.Value, name, word string) (found []Offer) {
	if v.Enum != "" {
		for _, choice := range v.EnumSlice() {
			found = append(found, Offer{choice, ""})
		}
		return found
	}
	kind := strings.TrimSuffix(strings.ToLower(name), ",...")
	if tag := v.Tag.Get("complete"); tag != "" {
		kind = tag
	}
	if source := c.sources[kind]; source != nil {
		c.line.Word = word
		return source(c.line)
	}
	switch kind {
	case "file", "path", "addr", "device", "image":
		c.fromFile = ":file"
	case "dir", "repo", "mnt", "foreign-dir", "set":
		c.fromFile = ":dir"
	}
	return nil
}

// summary is the first sentence of a help text, for lists.
func summary(help string) string {
	first, _, _ := strings.Cut(help, "\n")
	if i := strings.Index(first, ". "); i >= 0 {
		first = first[:i]
	}
	return strings.TrimSuffix(first, ".")
}

// unquoted is a word as the shell will pass it, as far as that can be told without being the shell.
func unquoted(word string) string {
	var b strings.Builder
	quote := rune(0)
	escaped := false
	for _, r := range word {
		switch {
		case escaped:
			b.WriteRune(r)
			escaped = false
		case r == '\\' && quote != '\'':
			escaped = true
		case quote == 0 && (r == '\'' || r == '"'):
			quote = r
		case r == quote:
			quote = 0
		default:
			b.WriteRune(r)
		}
	}
	return b.String()
}
