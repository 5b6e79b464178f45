package proxmox_test

import (
	"bufio"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"qmchain/proxmox"
)

// perl is Perl's own shellwords, one process for many questions.
type perl struct {
	in  io.WriteCloser
	out *bufio.Reader
}

// A line of hex is a question; the answer is a line of as many words.
const oracle = `
use Text::ParseWords 'shellwords';
$| = 1;
while (my $line = <STDIN>) {
    chomp $line;
    print join(' ', map { 'x' . unpack('H*', $_) } shellwords(pack('H*', $line))), "\n";
}`

func newPerl(t testing.TB) *perl {
	t.Helper()
	return ask(t, oracle)
}

func (p *perl) shellwords(t rapid.TB, args string) []string {
	t.Helper()
	if _, err := fmt.Fprintf(p.in, "%x\n", args); err != nil {
		t.Fatal(err)
	}
	line, err := p.out.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	var words []string
	for _, word := range strings.Fields(line) {
		text, err := hex.DecodeString(word[1:])
		if err != nil {
			t.Fatal(err)
		}
		words = append(words, string(text))
	}
	return words
}

// texts are the words; what can't be split is no words at all, as for Perl.
func texts(t rapid.TB, args string) []string {
	t.Helper()
	words, err := proxmox.Shellwords(args)
	var quote *proxmox.QuoteError
	if err != nil && !errors.As(err, &quote) {
		t.Fatalf("%q: %v", args, err)
	}
	var all []string
	for _, w := range words {
		all = append(all, w.Text)
	}
	return all
}

func TestShellwords(t *testing.T) {
	t.Parallel()
	p := newPerl(t)
	for _, args := range []string{
		``, ` `, `-k de`, `''`, `""`, `a''b`, `'a b'c`, `"a 'b"`, `'a\'b'`, `'a\'b' c`, `"a\"b\\c\d"`, `a\ b`, `a\`, `a "b`, `a 'b\'`,
		"a\tb\vc\fd\re", "a\u00a0b", "a\x85b\xff", `-x "" '' y`, `\"a`, `\\"a b"`, `"a"'b'c`, "'a\nb' c\n", "a\\\nb",
	} {
		if got, want := texts(t, args), p.shellwords(t, args); !slices.Equal(got, want) {
			t.Errorf("%q: %q, Perl says %q", args, got, want)
		}
	}
	// Any bytes, and mostly those that mean something.
	piece := rapid.OneOf(
		rapid.SampledFrom([]string{`"`, `'`, `\`, ` `, "\t", "\v", "\n", "a", "-chardev", ",", "=", "\xff", "\u00a0", `\"`, `\'`}),
		rapid.Map(rapid.Byte(), func(b byte) string { return string([]byte{b}) }),
	)
	rapid.Check(t, func(t *rapid.T) {
		args := strings.Join(rapid.SliceOfN(piece, 0, 20).Draw(t, "args"), "")
		if got, want := texts(t, args), p.shellwords(t, args); !slices.Equal(got, want) {
			t.Fatalf("%q: %q, Perl says %q", args, got, want)
		}
	})
}

func TestQuoteErrorShowsWhere(t *testing.T) {
	t.Parallel()
	for args, want := range map[string]string{
		`-name "web`:  `unbalanced quotes: the quote at position 7 is never closed; PVE drops all args: -name  >>>"web`,
		`-k 'a' it's`: `unbalanced quotes: the quote at position 10 is never closed; PVE drops all args: -k 'a' it >>>'s`,
		`-k de \`:     `unbalanced quotes: the backslash at position 7 is never closed; PVE drops all args: -k de  >>>\`,
	} {
		if _, err := proxmox.Shellwords(args); err == nil || err.Error() != want {
			t.Errorf("%s:\n got %v\nwant %s", args, err, want)
		}
	}
}
