package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// A program with all that a command line can have.
const sample = `{
	"name": "qmchain-sample", "help": "Does things.", "exit_codes": "    0  done as asked\n  130  interrupted\n",
	"config": {"things": ["take"]},
	"flags": [{"name": "quiet", "short": "q", "help": "Print only errors.", "config": true}],
	"args": [],
	"commands": [
		{"name": "take", "help": "Take one. With --level it is ` + "`a -b`" + `.\n\n.dots and 'quotes' begin no macro.", "flags": [
			{"name": "repo", "help": "The repository.", "value": "DIR", "required": true, "env": ["QMCHAIN_REPO"], "config": true},
			{"name": "level", "help": "It's the [level]: how.", "value": "full|inc", "choices": ["full", "inc"], "default": "inc", "config": true},
			{"name": "log", "short": "l", "help": "A log.", "value": "FILE,...", "repeated": true, "config": true},
			{"name": "check", "help": "Check it.", "negatable": "no-check"}
		], "args": [{"name": "vmid", "help": "The VMs.", "repeated": true}],
		"examples": [{"for": "two at once", "line": "take 110 111 --repo /mnt/a-rather-long/path/of/a/repository --level full"}]},
		{"name": "show", "help": "Show one.", "flags": [
			{"name": "repo", "help": "The repository.", "value": "DIR", "required": true}
		], "args": [{"name": "point", "help": "The point.", "required": true}]}
	]
}`

func parsed(t *testing.T) program {
	t.Helper()
	p, err := parse("qmchain-sample", []byte(sample))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestParse(t *testing.T) {
	t.Parallel()
	parsed(t)
	for why, text := range map[string]string{
		"another program":      strings.Replace(sample, "qmchain-sample", "qmchain-other", 1),
		"no commands":          `{"name": "qmchain-sample", "commands": []}`,
		"no help":              strings.Replace(sample, "Check it.", "", 1),
		"commands of commands": strings.Replace(sample, `"help": "Show one."`, `"help": "Show one.", "commands": [{"name": "x"}]`, 1),
		"something new":        strings.Replace(sample, `"negatable"`, `"invertible"`, 1),
	} {
		if text == sample {
			t.Fatalf("%s: the case is none", why)
		}
		if _, err := parse("qmchain-sample", []byte(text)); err == nil {
			t.Errorf("%s: no error", why)
		}
	}
}

func TestPage(t *testing.T) {
	t.Parallel()
	g := generator{version: "1.2", date: "2026-11-20"}
	got, err := g.page(parsed(t), ".\\\" a sample\n.SH FILES\nNone.\n")
	if err != nil {
		t.Fatal(err)
	}
	want := `.\" Made from what the program says of itself with --describe.
.TH QMCHAIN-SAMPLE 8 2026-11-20 "qmchain 1.2" "qmchain"
.nh
.SH NAME
qmchain\-sample \- a sample
.SH SYNOPSIS
.B qmchain\-sample take
\fB\-\-repo\fR=\fIDIR\fR [\fIoptions\fR] [\fIVMID...\fR]
.br
.B qmchain\-sample show
\fB\-\-repo\fR=\fIDIR\fR \fIPOINT\fR
.SH DESCRIPTION
Does things.
.SH COMMANDS
.SS take
Take one. With \-\-level it is \fBa \-b\fR.
.br
\&.dots and 'quotes' begin no macro.
.TP
.I VMID...
The VMs.
.TP
\fB\-\-repo\fR=\fIDIR\fR
The repository. Environment: QMCHAIN_REPO.
.TP
\fB\-\-level\fR=\fIfull|inc\fR
It's the [level]: how. Default: inc.
.TP
\fB\-l\fR, \fB\-\-log\fR=\fIFILE,...\fR
A log.
.TP
\fB\-\-check\fR, \fB\-\-no\-check\fR
Check it.
.PP
Two at once:
.PP
.nf
.RS
$ qmchain\-sample take 110 111 \-\-repo \e
    /mnt/a\-rather\-long/path/of/a/repository \-\-level full
.RE
.fi
.SS show
Show one.
.TP
.I POINT
The point.
.TP
\fB\-\-repo\fR=\fIDIR\fR
The repository.
.SH OPTIONS
All commands have these:
.TP
\fB\-q\fR, \fB\-\-quiet\fR
Print only errors.
.SH FILES
None.
.SH EXIT STATUS
.TP
.B 0
done as asked
.TP
.B 130
interrupted
.SH SEE ALSO
.BR qmchain (7),
.BR qmchain.toml (5),
.BR qmchain\-json (5)
`
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if _, err := g.page(parsed(t), ".SH FILES\n"); err == nil {
		t.Error("a page without a description was let through")
	}
}

func TestKeys(t *testing.T) {
	t.Parallel()
	g := generator{version: "1.2", date: "2026-11-20"}
	p := parsed(t)
	got, err := g.whole("@date@ @version@\n.\\\" @keys@\nend\n", []program{p})
	if err != nil {
		t.Fatal(err)
	}
	want := "2026-11-20 1.2\n.TP\n.B [things]\n" + `\fBqmchain\-sample\fR \fBtake\fR:` + "\n" + `\fBlevel\fR, \fBlog\fR, \fBrepo\fR.` + "\nend\n"
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	p.Config = map[string][]string{"things": {"gone"}}
	if _, err := g.whole("", []program{p}); err == nil {
		t.Error("a section for a command that there is not was let through")
	}
}

func TestWrap(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("word ", 15) + "xx .dot"
	for in, want := range map[string]string{
		"one":          "one",
		".one 'two":    `\&.one 'two`,
		long:           strings.TrimSpace(strings.Repeat("word ", 15)) + " xx\n\\&.dot",
		"  a \t b\n c": "a b c",
	} {
		if got := wrap(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

// What bash offers of what the program answers, and what it asks: with stand-ins for the program, which says what it was
// asked, and for functions of package bash-completion.
func TestBash(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	script := filepath.Join(dir, "completion")
	if err := os.WriteFile(script, []byte(completion(bashScript, "qmchain-sample")), 0o600); err != nil {
		t.Fatal(err)
	}
	const driver = `
		compopt() { echo "<$*>"; }
		_filedir() { COMPREPLY+=("<files $*of $cur>"); }
		_get_comp_words_by_ref() { words=("${line[@]}"); cword=$((${#line[@]} - 1)); cur=${line[cword]}; }
		qmchain-sample() { echo "asked: $(printf '(%s)' "$@")" >&3; printf '%b' "$answer"; }
		source "$1"; answer=$2; shift 2
		line=(qmchain-sample "$@")
		exec 3>&1
		_qmchain_sample
		printf '(%s)' "${COMPREPLY[@]}"`
	for _, c := range []struct {
		line   []string
		answer string
		want   string
	}{
		{[]string{""}, `take\tTake one\nshow\tShow one\n`, "asked: (__complete)()\n(take)(show)"},
		{[]string{"take", "--level", "f"}, `full\n`, "asked: (__complete)(take)(--level)(f)\n(full)"},
		{[]string{"take", "--level=f"}, `--level=full\n`, "asked: (__complete)(take)(--level=f)\n(full)"},
		{[]string{"cp", "110/a:/"}, `110/a:/\n110/a:/etc\n`, "asked: (__complete)(cp)(110/a:/)\n(/)(/etc)"},
		{[]string{"show", "1"}, `110/\n:nospace\n`, "asked: (__complete)(show)(1)\n<-o nospace>\n(110/)"},
		{[]string{"take", "--log=a b"}, `:file\n`, "asked: (__complete)(take)(--log=a b)\n(<files of a b>)"},
		{[]string{"take", "--repo", "/m"}, `:dir\n`, "asked: (__complete)(take)(--repo)(/m)\n(<files -dof /m>)"},
		{[]string{"none", ""}, ``, "asked: (__complete)(none)()\n()"},
	} {
		cmd := exec.Command("bash", append([]string{"--norc", "-uc", driver, "bash", script, c.answer}, c.line...)...)
		cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("%q: %v: %s", c.line, err, out)
			continue
		}
		if diff := cmp.Diff(c.want, string(out)); diff != "" {
			t.Errorf("%q (-want +got)\n%s", c.line, diff)
		}
	}
}

// systemd itself looks at the paths of conditions, and hangs with a file system that does: of the cluster's, or of a share.
func TestUnitsDoNotHang(t *testing.T) {
	t.Parallel()
	units, err := filepath.Glob("../systemd/*")
	if err != nil || len(units) == 0 {
		t.Fatalf("units: %q, %v", units, err)
	}
	hangs := regexp.MustCompile(`(?m)^(Condition|Assert)\w+=.*(/etc/pve|%[fI])`)
	for _, unit := range units {
		text, err := os.ReadFile(unit)
		if err != nil {
			t.Fatal(err)
		}
		if line := hangs.Find(text); line != nil {
			t.Errorf("%s: %s", unit, line)
		}
	}
}
