package pvetest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"time"

	"qmchain/internal/testenv"
)

// agentLimit bounds a guest agent's command; a freeze has longer, as in PVE.
const agentLimit = 10 * time.Second

// guestCmd asks the guest agent.
func (c *call) guestCmd() error {
	if len(c.more) != 1 {
		return &failure{255, "400 not enough arguments\nqm guest cmd <vmid> <command>"}
	}
	cf, err := c.load()
	if err != nil {
		return err
	}
	if a := cf.main["agent"]; a == "" || a[0] == '0' {
		return die("No QEMU guest agent configured")
	}
	if !c.running(c.vmid) {
		return die("VM %s is not running", c.vmid)
	}
	command := map[string]string{
		"ping": "guest-ping", "fsfreeze-freeze": "guest-fsfreeze-freeze", "fsfreeze-thaw": "guest-fsfreeze-thaw", "fsfreeze-status": "guest-fsfreeze-status",
	}[c.more[0]]
	if command == "" {
		return c.badParameter("command", "value '"+c.more[0]+"' does not have a value in the enumeration")
	}
	limit := agentLimit
	if command == "guest-fsfreeze-freeze" {
		limit = time.Minute
	}
	ctx, cancel := context.WithTimeout(c.ctx, limit)
	defer cancel()
	agent, err := testenv.DialAgent(ctx, c.vm(c.vmid).AgentSocket)
	if err != nil {
		return die("QEMU guest agent is not running")
	}
	defer func() { _ = agent.Close() }()
	var result json.RawMessage
	if err := agent.Execute(ctx, command, nil, &result); err != nil {
		if ctx.Err() != nil {
			return die("VM %s qga command '%s' failed - got timeout", c.vmid, command)
		}
		return die("Agent error: %v", err)
	}
	// PVE prints text as it is, and structures as JSON; an empty one not at all.
	var text string
	if json.Unmarshal(result, &text) == nil {
		fmt.Fprintln(c.stdout, text)
	} else if !bytes.Equal(result, []byte("{}")) {
		fmt.Fprintf(c.stdout, "%s\n", result)
	}
	return nil
}

// run runs a program, until qm is killed.
func (c *call) run(program string, args ...string) (string, error) {
	out, err := exec.CommandContext(c.ctx, program, args...).Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = errors.New(string(bytes.TrimSpace(exit.Stderr)))
	}
	return string(out), err
}
