package proxmox_test

import (
	"bufio"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"qmchain/proxmox"
)

// FuzzShellwords asks Perl. What can't be split is no words for it, and an error that shows the place here.
func FuzzShellwords(f *testing.F) {
	for _, args := range []string{
		mine, older, short, `-name "web server" -x 'a\'b' "c\"d" e\ f`, `a"b"'c'\d`, `''`, `""`, `\`, `"\"`, `'\`, "a\vb\x85c\xa0d", "a\x00b", "\\\n",
	} {
		f.Add(args)
	}
	p := newPerl(f)
	f.Fuzz(func(t *testing.T, args string) {
		want := p.shellwords(t, args)
		words, err := proxmox.Shellwords(args)
		var quote *proxmox.QuoteError
		if errors.As(err, &quote) {
			if len(want) > 0 || quote.Offset < 0 || quote.Offset >= len(args) || !strings.ContainsRune(`"'\`, rune(args[quote.Offset])) {
				t.Errorf("%q: error at %d, Perl has %q", args, quote.Offset, want)
			}
			_ = quote.Error()
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		got, at := []string{}, 0
		for _, w := range words {
			got = append(got, w.Text)
			if w.Start < at || w.End <= w.Start || w.End > len(args) {
				t.Fatalf("%q: word at %d to %d", args, w.Start, w.End)
			}
			if strings.Trim(args[at:w.Start], " \t\n\v\f\r") != "" {
				t.Errorf("%q: %q is between words", args, args[at:w.Start])
			}
			at = w.End
		}
		if !slices.Equal(got, want) {
			t.Errorf("%q: %q, Perl has %q", args, got, want)
		}
	})
}

// pveParser reads a configuration with the expressions that PVE has for it (PVE::QemuServer, parse_vm_config). For each line of
// hex it prints the options of the main section, of the pending ones, and of each snapshot.
const pveParser = `
$| = 1;
while (my $hex = <STDIN>) {
    chomp $hex;
    my ($name, %sections) = ('main');
    foreach my $line (split(/\n/, pack('H*', $hex))) {
        if ($line =~ m/^\[PENDING\]\s*$/i) {
            $name = 'pending';
            $sections{$name} = {};
        } elsif ($line =~ m/^\[special:[^\]]*\]\s*$/i) {
            $name = undef;
        } elsif ($line =~ m/^\[([a-z][a-z0-9_\-]+)\]\s*$/i) {
            $name = "snapshot $1";
            $sections{$name} = {};
        } elsif ($line =~ m/^\[([^\]]*)\]\s*$/) {
            $name = undef;
        } elsif (!defined($name) || $line =~ m/^\#/ || $line =~ m/^description:\s*(.*\S)\s*$/) {
        } elsif ($line =~ m/^(args):\s*(.*\S)\s*$/) {
            $sections{$name}->{$1} = $2;
        } elsif ($line =~ m/^delete:\s*(.*\S)\s*$/) {
        } elsif ($line =~ m/^([a-z][a-z_\-]*\d*):\s*(.+?)\s*$/) {
            my ($key, $value) = ($1, $2);
            next if $key eq 'delete' || $key eq 'description'; # blank, and no options
            $key = 'ide2' if $key eq 'cdrom';
            $sections{$name}->{$key} = $value;
        }
    }
    my @all;
    for my $name (keys %sections) {
        push @all, map { unpack('H*', "$name\n$_\n$sections{$name}->{$_}") } keys %{$sections{$name}};
    }
    print join(' ', @all), "\n";
}`

// A configuration is read as by PVE's own expressions, and what is kept of it for a restore says the same.
func FuzzConfig(f *testing.F) {
	for _, name := range []string{"120.conf", "120-pending.conf"} {
		text, err := os.ReadFile("testdata/pve/" + name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	f.Add([]byte("[PENDING]\ndelete: !,\n[a]\nscsi0: ,=,size=\nagent: ,=\ntags: ;\n[]"))
	f.Add([]byte("#first%3A\n#\nargs:  -a\v\ncdrom: none,media=cdrom\n[Snap-1] \nsnaptime: 1\n[special:cloudinit]\nname: a\n[PENDING]\nname: b\nsmbios1: uuid=a"))
	f.Add([]byte("scsi0: a:b,size=1.5G,iothread=1\r\nscsi0: a:b,size=9999999999T\nefidisk0: file=x\nunused0: y\nlock: backup\nparent: z"))
	p := ask(f, pveParser)
	f.Fuzz(func(t *testing.T, text []byte) {
		c := proxmox.ParseConfig(110, text)
		got := map[string]string{}
		add := func(section string, options proxmox.Options) {
			for key, value := range options {
				got[section+"\n"+key+"\n"+value] = "read here"
			}
		}
		add("main", c.Options)
		add("pending", c.Pending)
		last := map[string]proxmox.Options{} // of two with one name PVE keeps the second
		for _, s := range c.Snapshots {
			last[s.Name] = s.Options
		}
		for name, options := range last {
			add("snapshot "+name, options)
		}
		for _, option := range p.answer(t, string(text)) {
			if got[option] == "" {
				got[option] = "read by PVE"
				continue
			}
			delete(got, option)
		}
		for option, who := range got {
			t.Errorf("only %s: %q", who, option)
		}

		for _, d := range c.Drives() {
			if !proxmox.IsDrive(d.ID) {
				t.Errorf("drive %q", d.ID)
			}
			if size, ok := d.Size(); ok && size < 0 {
				t.Errorf("%s has the size %d", d.ID, size)
			}
			d.IOThread()
			d.CloudInit()
		}
		c.Agent()
		for _, tag := range c.Tags() {
			if strings.ContainsAny(tag, ",; \t\n\v\f\r\x00") || tag == "" {
				t.Errorf("tag %q", tag)
			}
		}
		c.UUID()
		again := proxmox.ParseConfig(110, []byte(c.Portable()))
		if again.Description != c.Description {
			t.Errorf("description %q became %q", c.Description, again.Description)
		}
		kept := maps.Clone(c.Options)
		maps.DeleteFunc(kept, func(key, _ string) bool { return key == "lock" || key == "parent" || strings.HasPrefix(key, "unused") })
		if !maps.Equal(again.Options, kept) {
			t.Errorf("options %q became %q", kept, again.Options)
		}
	})
}

// ask starts a Perl script that answers a line of hex with a line of words in hex.
func ask(t testing.TB, script string) *perl {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "perl", "-e", script)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = in.Close()
		_ = cmd.Wait()
	})
	return &perl{in, bufio.NewReader(out)}
}

func (p *perl) answer(t testing.TB, question string) []string {
	t.Helper()
	if _, err := fmt.Fprintf(p.in, "%x\n", question); err != nil {
		t.Fatal(err)
	}
	line, err := p.out.ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	var words []string
	for _, word := range strings.Fields(line) {
		text, err := hex.DecodeString(word)
		if err != nil {
			t.Fatal(err)
		}
		words = append(words, string(text))
	}
	return words
}
