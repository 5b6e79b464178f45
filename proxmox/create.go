package proxmox

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"qmchain/internal/child"
)

// ErrTaken is wrapped where there is a VM or a container of a VMID.
var ErrTaken = errors.New("there is one already")

// CheckFree returns nil if a VMID is free in the whole cluster. Otherwise the error wraps ErrTaken and says whose it is.
func (h Host) CheckFree(vmid VMID) error {
	if err := h.check(); err != nil {
		return err
	}
	for kind, what := range map[string]string{"qemu-server": "VM", "lxc": "container"} {
		found, err := h.glob("nodes", "*", kind, vmid.String()+".conf")
		if err != nil {
			return err
		}
		if len(found) > 0 {
			node := filepath.Base(filepath.Dir(filepath.Dir(found[0])))
			return fmt.Errorf("%s %s on node %s: %w", what, vmid, node, ErrTaken)
		}
	}
	return nil
}

// taskEnd is how long qm has to clean up after itself when it is told to end.
const taskEnd = 2 * time.Minute

var transferred = regexp.MustCompile(`\((\d+(?:\.\d+)?)%\)`)

// Task runs a qm command that may take as long as it takes. When ctx ends qm is told to, and undoes what it has begun; it is
// killed if that takes too long. Progress, if not nil, is told the part of the data that has been copied, 0 to 1.
func (h Host) Task(ctx context.Context, progress func(part float64), args ...string) error {
	program, err := h.program()
	if err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	out, in := io.Pipe()
	read := make(chan struct{})
	go func() {
		defer close(read)
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			m := transferred.FindStringSubmatch(lines.Text())
			if m == nil || progress == nil {
				continue
			}
			percent, _ := strconv.ParseFloat(m[1], 64) // as the pattern says
			progress(percent / 100)
		}
		_, _ = io.Copy(io.Discard, out) // a line that is too long
	}()
	p, err := child.StartTo(in, program, args...)
	if err == nil {
		select {
		case <-p.Done():
			err = p.Err()
		case <-ctx.Done():
			_ = p.Stop(taskEnd) // that it failed is no news
			err = ctx.Err()
		}
	}
	_ = in.Close()
	<-read
	if err != nil {
		if ctx.Err() != nil {
			err = ctx.Err() // a terminal's Ctrl-C reaches qm too
		}
		return fmt.Errorf("qm %s: %w", strings.Join(args[:min(2, len(args))], " "), err)
	}
	return nil
}

// WriteFirewall replaces the file of a VM's firewall rules, and removes it if there are none. The cluster's file system
// makes one change of it.
func (h Host) WriteFirewall(vmid VMID, rules []byte) error {
	path := h.FirewallPath(vmid)
	if len(rules) == 0 {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("firewall of VM %s: %w", vmid, err)
		}
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		return fmt.Errorf("firewall of VM %s: %w", vmid, err)
	}
	// pmxcfs knows names that end so as ones that are being written.
	temp := fmt.Sprintf("%s.tmp.%d", path, os.Getpid())
	err := os.WriteFile(temp, rules, 0o640)
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		_ = os.Remove(temp)
		return fmt.Errorf("firewall of VM %s: %w", vmid, err)
	}
	return nil
}

// Firewall reads the VM's firewall rules; nil if it has none.
func (h Host) Firewall(vmid VMID) ([]byte, error) {
	rules, err := h.readFile(h.FirewallPath(vmid))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("firewall of VM %s: %w", vmid, err)
	}
	return rules, nil
}
