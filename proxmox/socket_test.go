package proxmox_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"qmchain/proxmox"
)

const (
	run   = "/var/run/qemu-server"
	mine  = "-chardev socket,id=qmchain,path=/var/run/qemu-server/110-backup.qmp,server=on,wait=off -mon chardev=qmchain,mode=control"
	older = "-chardev 'socket,id=qmp-backup,path=/var/run/qemu-server/110-backup.qmp,server=on,wait=off' -mon 'chardev=qmp-backup,mode=control'"
	short = "-qmp unix:/var/run/qemu-server/110-backup.qmp,server=on,wait=off"
)

var vm110 = proxmox.Socket{VMID: 110, Dir: run}

func TestSocketInArgs(t *testing.T) {
	t.Parallel()
	of := func(vmid string, args string) string { return strings.ReplaceAll(args, "/110-", "/"+vmid+"-") }
	for _, test := range []struct {
		what           string
		args           string
		faults         string // in part; "" is right or absent
		present        bool
		added, removed string
		addErr         error
	}{
		{what: "nothing", args: "", added: mine},
		{what: "others alone", args: "-k de", added: "-k de " + mine, removed: "-k de"},
		{what: "ours", args: mine, present: true, added: mine},
		{what: "as documented earlier", args: older, present: true, added: older},
		{what: "short form", args: short, present: true, added: short},
		{what: "shortest form", args: "-qmp unix:/run/qemu-server/110-backup.qmp,server,nowait", present: true, added: "-qmp unix:/run/qemu-server/110-backup.qmp,server,nowait"},
		{what: "two dashes", args: "-" + short, present: true, added: "-" + short},
		{what: "amid others", args: "-k de  " + mine + "  -rtc   'base=utc'", present: true, added: "-k de  " + mine + "  -rtc   'base=utc'", removed: "-k de  -rtc   'base=utc'"},
		{what: "a clone's", args: "-k de " + of("100", mine), present: true, faults: "it is that of VM 100", added: "-k de " + mine, removed: "-k de"},
		{what: "a clone's, short", args: of("100", short) + " -k de", present: true, faults: "it is that of VM 100", added: "-k de " + mine, removed: "-k de"},
		{what: "a clone's and its own", args: of("100", older) + " " + mine, present: true, faults: "there are 2", added: mine},
		{what: "twice", args: mine + " " + mine, present: true, faults: "there are 2", added: mine},
		{what: "in two forms", args: short + " " + mine, present: true, faults: "there are 2", added: short},
		{what: "elsewhere", args: strings.ReplaceAll(mine, run, "/srv"), present: true, faults: "its path is /srv/110-backup.qmp, not " + run + "/110-backup.qmp", added: mine},
		{what: "without its monitor", args: "-k de -chardev socket,id=qmchain,path=" + run + "/110-backup.qmp,server=on,wait=off", present: true, faults: "-mon is missing", added: "-k de " + mine, removed: "-k de"},
		{what: "without its device", args: "-mon chardev=qmchain,mode=control -k de", present: true, faults: "-chardev is missing", added: "-k de " + mine, removed: "-k de"},
		{what: "an earlier one without its device", args: "-mon qmp-backup,mode=control", present: true, faults: "-chardev is missing", added: mine},
		{what: "without options' names", args: "socket,id=qmchain,path=" + run + "/110-backup.qmp,server=on,wait=off chardev=qmchain,mode=control", present: true, faults: "-chardev or -qmp is missing", added: mine},
		{what: "a server that waits", args: "-qmp unix:" + run + "/110-backup.qmp,server=on", present: true, faults: "wait=off is missing", added: mine},
		{what: "a client", args: "-qmp unix:" + run + "/110-backup.qmp,wait=off", present: true, faults: "server=on is missing", added: mine},
		{what: "with more", args: "-qmp unix:" + run + "/110-backup.qmp,server=on,wait=off,reconnect=5", present: true, faults: "it has the option reconnect", added: mine},
		{what: "a monitor for people", args: strings.ReplaceAll(mine, ",mode=control", ""), present: true, faults: "mode=control", added: mine},
		{what: "two monitors", args: mine + " -mon qmchain,mode=control", present: true, faults: "it has 2 monitors", added: mine},
		{
			what: "others' sockets", args: "-qmp unix:/tmp/110-backup.qmp,server,wait=off -chardev socket,id=qmp-backup,path=/x,server=on -mon qmp-backup -qmp tcp:localhost:44",
			added:   "-qmp unix:/tmp/110-backup.qmp,server,wait=off -chardev socket,id=qmp-backup,path=/x,server=on -mon qmp-backup -qmp tcp:localhost:44 " + mine,
			removed: "-qmp unix:/tmp/110-backup.qmp,server,wait=off -chardev socket,id=qmp-backup,path=/x,server=on -mon qmp-backup -qmp tcp:localhost:44",
		},
		{what: "others' with a similar path", args: "-qmp unix:" + run + "/110-other.qmp,server", added: "-qmp unix:" + run + "/110-other.qmp,server " + mine, removed: "-qmp unix:" + run + "/110-other.qmp,server"},
		{what: "a monitor for people on our path", args: "-monitor unix:" + run + "/110-backup.qmp,server", removed: "-monitor unix:" + run + "/110-backup.qmp,server", addErr: proxmox.ErrConflict},
		{what: "an option without its value", args: "-k de -chardev", removed: "-k de -chardev", addErr: proxmox.ErrConflict},
		{what: "quotes that PVE would take for those of the whole", args: `"-k" ` + mine + ` "de"`, present: true, added: `"-k" ` + mine + ` "de"`, removed: `''"-k" "de"`},
	} {
		found, err := vm110.Look(test.args)
		if err != nil {
			t.Fatalf("%s: %v", test.what, err)
		}
		if found.Present != test.present || found.Right != (test.present && test.faults == "") {
			t.Errorf("%s: present %v, right %v", test.what, found.Present, found.Right)
		}
		if all := strings.Join(found.Faults, "; "); !strings.Contains(all, test.faults) || test.faults == "" && all != "" {
			t.Errorf("%s: faults are %q, not %q", test.what, all, test.faults)
		}
		added, err := vm110.Add(test.args)
		if !errors.Is(err, test.addErr) {
			t.Errorf("%s: add: error %v", test.what, err)
		}
		if test.what == "quotes that PVE would take for those of the whole" {
			test.added = "''" + test.added
		}
		if err == nil && added != test.added {
			t.Errorf("%s: add:\n got %s\nwant %s", test.what, added, test.added)
		}
		removed, err := vm110.Remove(test.args)
		if err != nil || removed != test.removed {
			t.Errorf("%s: remove: %v\n got %s\nwant %s", test.what, err, removed, test.removed)
		}
	}
}

// TestSocketAmongAny edits random args and asks Perl what PVE would make of the outcome.
func TestSocketAmongAny(t *testing.T) {
	t.Parallel()
	p := newPerl(t)
	ours := []string{
		mine, older, short, strings.ReplaceAll(mine, "/110-", "/112-"), strings.ReplaceAll(short, "/110-", "/9999-"),
		"-mon chardev=qmchain,mode=control", `"-mon" qmp-backup`, `-chardev socket,id=qmchain,path="/old place"/x`,
	}
	theirs := rapid.SampledFrom([]string{
		"-k de", `-name "a b"`, `'-x'`, `-device 'e1000,id="n"'`, `-qmp unix:/tmp/a,server=on,wait=off`, `-append "it's\""`,
		"-mon chardev=other", "-chardev pty,id=other", `""`, `a\ b`, "-S", "\xff\xfe", `"-k" "de"`,
	})
	gap := rapid.SampledFrom([]string{" ", "  ", "\t ", " \v"})
	rapid.Check(t, func(t *rapid.T) {
		var args, others strings.Builder
		var words []string
		for range rapid.IntRange(0, 6).Draw(t, "n") {
			var piece string
			if rapid.Bool().Draw(t, "ours") {
				piece = rapid.SampledFrom(ours).Draw(t, "piece")
			} else {
				piece = theirs.Draw(t, "piece")
				words = append(words, texts(t, piece)...)
				others.WriteString(piece)
			}
			args.WriteString(piece + gap.Draw(t, "gap"))
		}
		before := strings.Trim(args.String(), " \t\v")
		removed, err := vm110.Remove(before)
		if err != nil {
			t.Fatal(err)
		}
		written := asPVEWrites(removed)
		if got := p.shellwords(t, written); !slices.Equal(got, words) {
			t.Fatalf("remove of %q: PVE starts QEMU with %q, not %q", before, got, words)
		}
		if squeeze := strings.NewReplacer(" ", "", "\t", "", "\v", "").Replace; strings.TrimPrefix(squeeze(removed), "''") != squeeze(others.String()) {
			t.Fatalf("remove of %q leaves %q: others' args are not what they were", before, removed)
		}
		if again, err := vm110.Remove(written); err != nil || again != written {
			t.Fatalf("remove, done twice: %q, %v", again, err)
		}
		added, err := vm110.Add(before)
		if err != nil {
			t.Fatal(err)
		}
		written = asPVEWrites(added)
		found, err := vm110.Look(written)
		if err != nil || !found.Right {
			t.Fatalf("add to %q: %q has %v, %v", before, written, found.Faults, err)
		}
		if again, err := vm110.Add(written); err != nil || again != written {
			t.Fatalf("add, done twice: %q, %v", again, err)
		}
		if got, err := vm110.Remove(written); err != nil || !slices.Equal(p.shellwords(t, got), words) {
			t.Fatalf("add and remove: %q, %v", got, err)
		}
		if n := strings.Count(strings.Join(p.shellwords(t, written), "\x00"), run+"/110-backup.qmp"); n != 1 {
			t.Fatalf("add to %q: the path is there %d times", before, n)
		}
	})
}

// asPVEWrites is what PVE makes of a value when it writes it.
func asPVEWrites(args string) string {
	if len(args) > 1 && args[0] == '"' && args[len(args)-1] == '"' {
		return args[1 : len(args)-1]
	}
	return args
}

// TestSocketPath: a path with characters that mean something to Perl or to QEMU.
func TestSocketPath(t *testing.T) {
	t.Parallel()
	p := newPerl(t)
	for _, dir := range []string{"/a b", "/a,b", `/a"b`, `/a'b`, `/a\b`} {
		s := proxmox.Socket{VMID: 110, Dir: dir}
		args, err := s.Add("-k de")
		if err != nil {
			t.Fatal(err)
		}
		want := []string{"-k", "de", "-chardev", fmt.Sprintf("socket,id=qmchain,path=%s,server=on,wait=off", strings.ReplaceAll(s.Path(), ",", ",,")), "-mon", "chardev=qmchain,mode=control"}
		if got := p.shellwords(t, args); !slices.Equal(got, want) {
			t.Errorf("%q", got)
		}
		if found, err := s.Look(args); err != nil || !found.Right {
			t.Errorf("%s: %v %v", args, found.Faults, err)
		}
	}
}

func TestUnbalancedArgsAreRefused(t *testing.T) {
	t.Parallel()
	var quote *proxmox.QuoteError
	if _, err := vm110.Add(`-name "web`); !errors.As(err, &quote) || quote.Offset != 6 {
		t.Errorf("add: %v", err)
	}
	if _, err := vm110.Remove(mine + ` -name 'web`); !errors.As(err, &quote) {
		t.Errorf("remove: %v", err)
	}
}

func FuzzSocket(f *testing.F) {
	for _, args := range []string{mine, older, short, `-x "`, "-mon", "unix:", "socket,", "-chardev ,,=,", "-qmp chardev:"} {
		f.Add(args)
	}
	f.Fuzz(func(t *testing.T, args string) {
		added, err := vm110.Add(args)
		if err != nil {
			return
		}
		if found, err := vm110.Look(added); err != nil || !found.Right {
			t.Errorf("add to %q: %q has %v, %v", args, added, found.Faults, err)
		}
		removed, err := vm110.Remove(added)
		if err != nil {
			t.Errorf("%q: %v", added, err)
		}
		if found, err := vm110.Look(removed); err != nil || found.Present {
			t.Errorf("remove from %q: %q, %v", added, removed, err)
		}
	})
}
