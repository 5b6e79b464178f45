package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"qmchain/chain"
	"qmchain/internal/fleet"
	"qmchain/internal/testenv"
)

// TestFleet: of twenty VMs some hang, are locked or have no socket, and all others are backed up.
func TestFleet(t *testing.T) {
	t.Parallel()
	p := newPVE(t)
	const first, count = 200, 20
	hung, deadAgent, locked, noSocket, stopped, excluded := 201, 202, 203, 204, 205, 207
	for vmid := first; vmid < first+count; vmid++ {
		lines := []string{fmt.Sprintf("scsi0: local:%d/vm-%d-disk-0.qcow2,size=1M", vmid, vmid), "memory: 16"}
		if vmid == deadAgent {
			lines = append(lines, "agent: 1")
		}
		p.AddVM(vmid, lines...)
		if vmid != noSocket {
			p.socket(vmid)
		}
		if vmid != stopped {
			p.QM("start", strconv.Itoa(vmid))
			p.VM(vmid).IO("scsi0", fmt.Sprintf("write -P %d 0 64k", vmid-first+1))
		}
	}
	p.AddVM(300, "template: 1")
	p.QM("set", strconv.Itoa(locked), "--lock", "snapshot")
	if err := syscall.Kill(p.VM(hung).Pid(), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Kill(p.VM(hung).Pid(), syscall.SIGCONT) })
	mail := filepath.Join(p.Dir, "mail")
	script := fmt.Sprintf("#!/bin/sh\necho \"$@\" > %[1]s.args\ncat > %[1]s\n", mail)
	if err := testenv.WriteProgram(p.host.Sendmail, script); err != nil {
		t.Fatal(err)
	}
	p.config = filepath.Join(p.Dir, "config.toml")
	config := fmt.Sprintf("[backup]\nexclude = [%d]\nmail-to = [\"root\", \"admin@example.org\"]\n[guest.206]\nname = \"mail-server\"\ncompress = \"zstd\"\n", excluded)
	if err := os.WriteFile(p.config, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	report := filepath.Join(p.Dir, "report")
	code, stdout, stderr := p.run("--all", "--jobs", "2", "--lock-wait", "1s", "--report", report)
	if code != 7 {
		t.Fatalf("exit code %d: %s", code, stderr)
	}
	p.says(stderr, "3 of 20 guests failed")
	t.Logf("%s", stderr[max(0, strings.Index(stderr, "GUEST")-200):])

	good := map[string]bool{}
	for line := range strings.Lines(stdout) {
		m, disks := p.read(strings.TrimSpace(line))
		good[m.Guest.Name] = true
		if vmid, err := strconv.Atoi(m.Guest.Name); err == nil && vmid != stopped {
			p.holds(disks, "scsi0", byte(vmid-first+1))
		}
	}
	if len(good) != count-4 || !good["mail-server"] || good["206"] || !good[strconv.Itoa(deadAgent)] || !good[strconv.Itoa(stopped)] {
		t.Errorf("points of %v", good)
	}
	for vmid := first; vmid < first+count; vmid++ {
		if lock := p.lock(vmid); lock != "" && vmid != locked {
			t.Errorf("VM %d has the lock %s", vmid, lock)
		}
	}
	text, err := os.ReadFile(report)
	if err != nil {
		t.Fatal(err)
	}
	for vmid, want := range map[int]string{
		hung: "hang", locked: "locked (snapshot)", noSocket: "no backup socket", deadAgent: "agent does not answer", 300: "skipped", 208: "ok",
	} {
		if !strings.Contains(lineOf(string(text), strconv.Itoa(vmid)), want) {
			t.Errorf("VM %d: %q does not say %q", vmid, lineOf(string(text), strconv.Itoa(vmid)), want)
		}
	}
	if strings.Contains(string(text), strconv.Itoa(excluded)) {
		t.Errorf("the excluded VM is in the report: %s", text)
	}
	sent, err := os.ReadFile(mail)
	if err != nil {
		t.Fatal(err)
	}
	p.says(string(sent), "Subject: qmchain-backup on pve1: 3 of 20 guests FAILED\n", string(text))
	if args, err := os.ReadFile(mail + ".args"); err != nil || string(args) != "-i -- root admin@example.org\n" {
		t.Errorf("sendmail %s, %v", args, err)
	}

	// All is well: no mail, and as events.
	if err := os.Remove(mail); err != nil {
		t.Fatal(err)
	}
	code, stdout, stderr = p.run("208", "209", "--json")
	if code != 0 {
		t.Fatalf("exit code %d: %s", code, stderr)
	}
	lines := strings.Split(strings.TrimSpace(stdout), "\n")
	var last struct {
		Event, Host string
		Guests      []fleet.Outcome
	}
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &last); err != nil {
		t.Fatal(err)
	}
	if last.Event != "summary" || last.Host != "pve1" || len(last.Guests) != 2 || last.Guests[1].Guest != "209" || last.Guests[1].Verdict != fleet.Good || last.Guests[1].Level != string(chain.Inc) {
		t.Errorf("summary %+v", last)
	}
	if _, err := os.Stat(mail); err == nil {
		t.Error("mailed though all is well")
	}
	metricsFile := filepath.Join(p.Dir, "m.prom")
	if code, _, stderr := p.run("208", "206", "--metrics-file", metricsFile); code != 0 {
		t.Errorf("exit code %d: %s", code, stderr)
	}
	if text, err := os.ReadFile(metricsFile); err != nil || strings.Count(string(text), "# HELP qmchain_backup_last_run_exit_code") != 1 ||
		!strings.Contains(string(text), `last_run_exit_code{guest="208"} 0`) || !strings.Contains(string(text), `last_run_exit_code{guest="mail-server"} 0`) {
		t.Errorf("%s, %v", text, err)
	}

	// One guest's settings are wrong: the others have points.
	if err := os.WriteFile(p.config, []byte("[guest.208]\ncompress = \"frob\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, stdout, stderr := p.run("208", "209"); code != 7 || !strings.Contains(stdout, "209/") || !strings.Contains(stderr, "frob") {
		t.Errorf("exit code %d: %s%s", code, stdout, stderr)
	}
}

// lineOf is the report's line about a guest.
func lineOf(report, guest string) string {
	for line := range strings.Lines(report) {
		if strings.HasPrefix(line, guest+" ") {
			return line
		}
	}
	return ""
}
