package pvetest

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// liveDrive is a drive of a VM that runs before its data is there.
type liveDrive struct {
	id, source, format string // what is read until then
	overlay            string
}

// prepareLive has drives with import-from made empty, and returns where their data comes from. The EFI variables are none of
// them: PVE imports them before the start.
func (c *call) prepareLive() ([]liveDrive, error) {
	var live []liveDrive
	for i, o := range c.options {
		d := parseDrive(o.name, o.value)
		source := d.get("import-from")
		if !driveID.MatchString(o.name) || source == "" || o.name == "efidisk0" {
			continue
		}
		format, err := c.formatOf(source)
		if err != nil {
			return nil, err
		}
		size, err := c.virtualSize(source, format)
		if err != nil {
			return nil, err
		}
		storage, _, _ := strings.Cut(d.volume, ":")
		d.volume = storage + ":" + strconv.FormatFloat(float64(size)/(1<<30), 'f', -1, 64)
		for j, p := range d.options {
			if p.name == "import-from" {
				d.options = append(d.options[:j], d.options[j+1:]...)
				break
			}
		}
		c.options[i].value = d.String()
		live = append(live, liveDrive{o.name, source, format, filepath.Join(c.Dir, "live-"+c.vmid+"-"+o.name+".qcow2")})
	}
	return live, nil
}

// runLive starts the VM on overlays over what its drives come from, and moves the data. PVE does that with a driver that only its QEMU has.
// If it fails, the VM is stopped, and stays locked.
func (c *call) runLive(live []liveDrive) error {
	defer func() {
		for _, d := range live {
			_ = os.Remove(d.overlay)
		}
	}()
	cf, err := c.load()
	if err != nil {
		return err
	}
	run := &conf{main: maps.Clone(cf.main), pending: map[string]string{}}
	for _, d := range live {
		if _, err := c.run(c.QEMU.Img, "create", "-q", "-f", "qcow2", "-b", d.source, "-F", d.format, d.overlay); err != nil {
			return die("%v", err)
		}
		over := parseDrive(d.id, run.main[d.id])
		over.volume = d.overlay
		run.main[d.id] = over.String()
	}
	args, err := c.commandLine(run)
	if err != nil {
		return err
	}
	if err := c.launch(run, args); err != nil {
		return err
	}
	for _, d := range live {
		err := c.fault("live " + d.id)
		if err == nil {
			err = c.move(cf, d)
		}
		if err != nil {
			fmt.Fprintf(c.stderr, "An error occurred during live-restore: %v\n", err)
			c.warn(c.quit())
			return die("live-restore failed")
		}
	}
	delete(cf.main, "lock")
	return c.save(cf)
}

// move moves one drive's data to its volume, while the VM runs.
func (c *call) move(cf *conf, d liveDrive) error {
	vm, volume := c.vm(c.vmid), parseDrive(d.id, cf.main[d.id])
	node, job := "live-"+d.id, "restore-drive-"+d.id
	err := vm.Try("blockdev-add", map[string]any{
		"driver": volume.format(), "node-name": node, "discard": "unmap", "file": map[string]any{"driver": "file", "filename": c.layout().volume(volume.volume)},
	}, nil)
	if err != nil {
		return err
	}
	err = vm.Try("blockdev-mirror", map[string]any{"job-id": job, "device": "drive-" + d.id, "target": node, "sync": "full"}, nil)
	if err != nil {
		return err
	}
	for complete := false; ; time.Sleep(10 * time.Millisecond) {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		var jobs []struct {
			Device string
			Ready  bool
		}
		if err := vm.Try("query-block-jobs", nil, &jobs); err != nil {
			return err
		}
		switch {
		case len(jobs) == 0 && complete:
			fmt.Fprintf(c.stdout, "%s: transferred 1.0 MiB of 1.0 MiB (100.00%%)\n", job)
			return nil
		case len(jobs) == 0:
			return die("block job '%s' has ended early", job)
		case jobs[0].Ready && !complete:
			complete = true
			if err := vm.Try("block-job-complete", map[string]any{"device": job}, nil); err != nil {
				return err
			}
		}
	}
}
