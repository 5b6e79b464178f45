package pvetest

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"qmchain/internal/testenv"
)

var uuidSetting = regexp.MustCompile(`uuid=[0-9a-f-]+`)

// clone copies a VM, its args with what they name of the old one.
func (c *call) clone() error {
	if len(c.more) != 1 {
		return &failure{255, "400 not enough arguments\nqm clone <vmid> <newid> [OPTIONS]"}
	}
	newID := c.more[0]
	if !validVMID.MatchString(newID) {
		return c.badParameter("newid", "invalid format - value does not look like a valid VM ID")
	}
	return c.unlocked(func(cf *conf) error {
		if _, err := os.Stat(c.configPath(newID)); err == nil {
			return die("unable to create VM %s: config file already exists", newID)
		}
		copied := &conf{description: cf.description, main: maps.Clone(cf.main), pending: map[string]string{}}
		for _, key := range []string{"lock", "parent", "template", "snaptime"} {
			delete(copied.main, key)
		}
		for key := range copied.main {
			if strings.HasPrefix(key, "unused") {
				delete(copied.main, key)
			}
		}
		copied.main["smbios1"] = uuidSetting.ReplaceAllString(copied.main["smbios1"], "uuid="+testenv.RandomUUID())
		if copied.main["vmgenid"] != "" {
			copied.main["vmgenid"] = testenv.RandomUUID()
		}
		copied.main["name"] = "Copy-of-VM-" + cf.main["name"]
		if name := c.option("name"); name != "" {
			copied.main["name"] = name
		}
		for _, d := range cf.drives() {
			if d.cdrom() {
				continue
			}
			from := c.layout().volume(d.volume)
			d.volume = renamed(d.volume, c.vmid, newID)
			to := c.layout().volume(d.volume)
			if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
				return err
			}
			fmt.Fprintf(c.stdout, "create full clone of drive %s (%s)\n", d.id, d.volume)
			testenv.Output(c.tb, c.QEMU.Img, "convert", "-f", d.format(), "-O", d.format(), from, to)
			copied.main[d.id] = d.String()
		}
		return writeFile(c.configPath(newID), copied.String())
	})
}

// renamed is a volume's name for another VM.
func renamed(volume, from, to string) string {
	volume = strings.ReplaceAll(volume, "vm-"+from+"-", "vm-"+to+"-")
	volume = strings.ReplaceAll(volume, "base-"+from+"-", "vm-"+to+"-")
	return strings.ReplaceAll(volume, ":"+from+"/", ":"+to+"/")
}

// template makes a VM a template: it never runs again, and its volumes are called base.
func (c *call) template() error {
	return c.unlocked(func(cf *conf) error {
		switch {
		case cf.main["template"] == "1":
			return die("you can't convert a template to a template")
		case c.running(c.vmid):
			return die("you can't convert a VM to template if VM is running vm")
		}
		cf.main["template"] = "1"
		for _, d := range cf.drives() {
			if d.cdrom() {
				continue
			}
			from := c.layout().volume(d.volume)
			d.volume = strings.Replace(d.volume, "vm-"+c.vmid+"-", "base-"+c.vmid+"-", 1)
			if err := os.Rename(from, c.layout().volume(d.volume)); err != nil {
				return err
			}
			cf.main[d.id] = d.String()
		}
		return c.save(cf)
	})
}

// destroy removes a stopped VM with its volumes.
func (c *call) destroy() error {
	return c.unlocked(func(cf *conf) error {
		if c.running(c.vmid) {
			return die("VM %s is running - destroy failed", c.vmid)
		}
		if cf.main["protection"] == "1" {
			return die("can't remove VM %s - protection mode enabled", c.vmid)
		}
		for key, value := range cf.main {
			d := parseDrive(key, value)
			if volumeKey.MatchString(key) && (!d.cdrom() || strings.Contains(d.volume, "-cloudinit")) {
				c.free(d.volume)
			}
		}
		if err := os.Remove(filepath.Join(c.Etc, "firewall", c.vmid+".fw")); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return os.Remove(c.configPath(c.vmid))
	})
}
