package pvetest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"qmchain/internal/testenv"
)

// hookPath is the file of a hook script.
func (c *call) hookPath(volume string) (string, error) {
	_, name, named := strings.Cut(volume, ":")
	if !named {
		return "", die("unable to parse volume ID '%s'", volume)
	}
	if !strings.HasPrefix(name, "snippets/") {
		return "", die("'%s' is not in the snippets directory", volume)
	}
	path := c.layout().volume(volume)
	fi, err := os.Stat(path)
	switch {
	case err != nil:
		return "", die("script '%s' does not exist", volume)
	case fi.Mode()&0o111 == 0:
		return "", die("script '%s' is not executable", volume)
	}
	return path, nil
}

// hook runs the VM's hook script for a phase, if it has one. It has no time limit.
func (c *call) hook(cf *conf, phase string) error {
	volume := cf.main["hookscript"]
	if volume == "" {
		return nil
	}
	path, err := c.hookPath(volume)
	if err == nil {
		// qm works in a process of its own, which has the task's name.
		const perl = `$0 = shift; my $status = system(@ARGV); exit($status >> 8 || $status & 127)`
		task := "/usr/bin/perl /usr/sbin/qm " + c.name
		if slices.Contains([]string{"start", "stop", "shutdown", "reboot"}, c.name) {
			task = fmt.Sprintf("task UPID:%s:%08X:%08X:%08X:qm%s:%s:root@pam:", c.Name, os.Getpid(), 1, time.Now().Unix(), c.name, c.vmid)
		}
		cmd := exec.CommandContext(c.ctx, "perl", "-e", perl, task, path, c.vmid, phase)
		// The real qm is in /usr/sbin.
		cmd.Env = []string{"PATH=" + c.Bin + ":/sbin:/bin:/usr/sbin:/usr/bin", "LC_ALL=C"}
		if phase == "pre-start" || phase == "post-start" {
			cmd.Env = append(cmd.Env, "PVE_MIGRATED_FROM=")
		}
		cmd.Stdout, cmd.Stderr = c.stdout, c.stderr
		cmd.WaitDelay = time.Second
		err = cmd.Run()
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("command '%s %s %s' failed: exit code %d", path, c.vmid, phase, exit.ExitCode())
		}
	}
	if err != nil {
		return die("hookscript error for %s on %s: %v", c.vmid, phase, err)
	}
	return nil
}

// AddSnippet writes an executable script into the storage local's snippets, and returns its volume id.
func (n *Node) AddSnippet(name, script string) (volume string) {
	n.tb.Helper()
	n.fatal(testenv.WriteProgram(filepath.Join(n.Storage, "snippets", name), script))
	return "local:snippets/" + name
}
