package pvetest

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"qmchain/internal/testenv"
)

// newDisk is how a drive asks for a new volume: STORAGE:GIB.
var newDisk = regexp.MustCompile(`^([^/:\s]+):(\d+(?:\.\d+)?)$`)

// checkDrives refuses drives that PVE would not import.
func (c *call) checkDrives() error {
	for _, o := range c.options {
		if !driveID.MatchString(o.name) && o.name != "tpmstate0" {
			continue
		}
		d := parseDrive(o.name, o.value)
		source := d.get("import-from")
		if source == "" {
			continue
		}
		m := newDisk.FindStringSubmatch(d.volume)
		if m == nil || strings.Trim(m[2], "0.") != "" {
			return c.badParameter(o.name, "'import-from' requires special syntax - use <storage ID>:0,import-from=<source>")
		}
		if !filepath.IsAbs(source) && (!strings.Contains(source, ":") || strings.Contains(source, "//")) {
			return c.badParameter(o.name, "invalid format - format error\n"+o.name+".import-from: invalid format - unable to parse volume ID '"+source+"'")
		}
		for _, key := range map[string][]string{"efidisk0": {"efitype", "pre-enrolled-keys"}, "tpmstate0": {"version"}}[o.name] {
			if d.get(key) == "" {
				return c.badParameter(o.name, "need to specify '"+key+"' when using 'import-from'")
			}
		}
	}
	return nil
}

// newVolume makes the volume that an option's value asks for, and returns what stands in the configuration then. Other
// values are returned as they are.
func (c *call) newVolume(id, value string) (string, error) {
	if !driveID.MatchString(id) && id != "tpmstate0" {
		return value, nil
	}
	d := parseDrive(id, value)
	m := newDisk.FindStringSubmatch(d.volume)
	if m == nil {
		return c.attach(id, value)
	}
	if c.storage(m[1]) == "" {
		return "", die("storage '%s' does not exist", m[1])
	}
	storage, source, format := m[1], d.get("import-from"), d.get("format")
	d.options = slices.DeleteFunc(d.options, func(o option) bool { return o.name == "import-from" || o.name == "format" || o.name == "size" })
	if format == "" {
		format = "raw"
	}
	d.volume = c.freeVolume(storage, format)
	path := c.layout().volume(d.volume)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return "", err
	}
	args := []string{"create", "-q", "-f", format, path, m[2] + "G"}
	if source != "" {
		fi, err := os.Stat(source)
		if err != nil || !fi.Mode().IsRegular() {
			return "", die("%s: '%s' is not a regular file", id, source)
		}
		from, err := c.formatOf(source)
		if err != nil {
			return "", err
		}
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			return "", err
		}
		fmt.Fprintf(c.stdout, "transferred 0.0 B of 1.0 MiB (0.00%%)\n")
		if err := c.fault("import " + source); err != nil {
			c.free(d.volume)
			return "", err
		}
		args = []string{"convert", "-q", "-f", from, "-O", format, source, path}
	}
	if _, err := c.run(c.QEMU.Img, args...); err != nil {
		c.free(d.volume)
		return "", die("%v", err)
	}
	fmt.Fprintf(c.stdout, "transferred 1.0 MiB of 1.0 MiB (100.00%%)\n")
	size, err := c.virtualSize(path, format)
	if err != nil {
		return "", err
	}
	d.options = append(d.options, option{"size", sizeText(size)})
	fmt.Fprintf(c.stdout, "%s: successfully created disk '%s'\n", id, d)
	return d.String(), nil
}

// freeVolume is the first name that is not taken.
func (c *call) freeVolume(storage, format string) string {
	for n := 0; ; n++ {
		volume := fmt.Sprintf("%s:vm-%s-disk-%d", storage, c.vmid, n)
		if storage == "local" {
			volume = fmt.Sprintf("local:%s/vm-%s-disk-%d.", c.vmid, c.vmid, n)
			taken, _ := filepath.Glob(c.layout().volume(volume) + "*") // a valid pattern
			if len(taken) == 0 {
				return volume + format
			}
			continue
		}
		if _, err := os.Stat(c.layout().volume(volume)); err != nil {
			return volume
		}
	}
}

func (c *call) virtualSize(path, format string) (int64, error) {
	out, err := c.run(c.QEMU.Img, "info", "-U", "-f", format, "--output=json", path)
	if err != nil {
		return 0, die("%v", err)
	}
	var info struct {
		Size int64 `json:"virtual-size"`
	}
	return info.Size, json.Unmarshal([]byte(out), &info)
}

// sizeText is a size with the largest unit that it is a multiple of.
func sizeText(n int64) string {
	for i, unit := range []string{"", "K", "M", "G", "T"} {
		if i == 4 || n%1024 != 0 {
			return strconv.FormatInt(n, 10) + unit
		}
		n /= 1024
	}
	return ""
}

// unuse keeps a deleted drive's volume as an unused one.
func (c *call) unuse(cf *conf, key string) {
	if !volumeKey.MatchString(key) || strings.HasPrefix(key, "unused") || c.running(c.vmid) {
		return
	}
	for _, value := range []string{cf.main[key], cf.pending[key]} {
		if d := parseDrive(key, value); d.volume != "" && !d.cdrom() {
			cf.addUnused(d.volume)
		}
	}
}

// addUnused adds a volume as an unused one, if it is none yet.
func (c *conf) addUnused(volume string) {
	for key, value := range c.main {
		if strings.HasPrefix(key, "unused") && value == volume {
			return
		}
	}
	c.main[c.freeUnused()] = volume
}

func (c *conf) freeUnused() string {
	for n := 0; ; n++ {
		if key := fmt.Sprintf("unused%d", n); c.main[key] == "" {
			return key
		}
	}
}

// create makes a VM.
func (c *call) create() error {
	return c.locked(func() error {
		if _, err := os.Stat(c.configPath(c.vmid)); err == nil {
			return die("unable to create VM %s - VM %s already exists on node '%s'", c.vmid, c.vmid, c.Name)
		}
		if err := c.checkDrives(); err != nil {
			return err
		}
		var live []liveDrive
		if c.flag("live-restore") {
			var err error
			if live, err = c.prepareLive(); err != nil {
				return err
			}
		}
		cf := parseConf("lock: create\n")
		if err := c.save(cf); err != nil {
			return err
		}
		cf.main = map[string]string{}
		if err := c.fill(cf); err != nil {
			for key, value := range cf.main {
				if volumeKey.MatchString(key) {
					c.free(parseDrive(key, value).volume)
				}
			}
			return errors.Join(die("unable to create VM %s - %v", c.vmid, err), os.Remove(c.configPath(c.vmid)))
		}
		if live == nil {
			return c.save(cf)
		}
		cf.main["lock"] = "import"
		if err := c.save(cf); err != nil {
			return err
		}
		return c.runLive(live)
	})
}

// fill makes the configuration of a new VM, and its volumes.
func (c *call) fill(cf *conf) error {
	for _, o := range c.options {
		if o.name == "start" || o.name == "storage" || o.name == "live-restore" {
			continue
		}
		if o.name == "description" {
			cf.description = strings.ReplaceAll(o.value, ":", "%3A") + "\n"
			continue
		}
		value, err := stored(o.name, o.value)
		if err != nil {
			return err
		}
		if value, err = c.newVolume(o.name, value); err != nil {
			return err
		}
		cf.main[o.name] = value
	}
	if cf.main["boot"] == "" {
		cf.main["boot"] = bootOrder(cf.main)
	}
	for key, value := range map[string]func() string{
		"smbios1": func() string { return "uuid=" + testenv.RandomUUID() },
		"vmgenid": testenv.RandomUUID,
	} {
		if cf.main[key] == "" || cf.main[key] == "1" {
			cf.main[key] = value()
		}
	}
	return nil
}

// importDisk copies an image into a volume: of an unused drive, or of the one that is asked for.
func (c *call) importDisk() error {
	if len(c.more) != 2 {
		return &failure{255, "400 not enough arguments\nqm disk import <vmid> <source> <storage> [OPTIONS]"}
	}
	return c.unlocked(func(cf *conf) error {
		fmt.Fprintf(c.stdout, "importing disk '%s' to VM %s ...\n", c.more[0], c.vmid)
		target := c.option("target-disk")
		id := target
		if id == "" {
			id = "scsi0" // of any bus: only the volume is kept
		}
		value := c.more[1] + ":0,import-from=" + c.more[0]
		if format := c.option("format"); format != "" {
			value += ",format=" + format
		}
		value, err := c.newVolume(id, value)
		if err != nil {
			return err
		}
		if target == "" {
			target, value = cf.freeUnused(), parseDrive(id, value).volume
		}
		cf.main[target] = value
		fmt.Fprintf(c.stdout, "%s: successfully imported disk '%s'\n", target, value)
		return c.save(cf)
	})
}

// resize grows a drive.
func (c *call) resize() error {
	if len(c.more) != 2 {
		return &failure{255, "400 not enough arguments\nqm resize <vmid> <disk> <size> [OPTIONS]"}
	}
	return c.unlocked(func(cf *conf) error {
		id, size := c.more[0], c.more[1]
		if cf.main[id] == "" {
			return die("disk '%s' does not exist", id)
		}
		d := parseDrive(id, cf.main[id])
		path := c.layout().volume(d.volume)
		before, err := c.virtualSize(path, d.format())
		if err != nil {
			return err
		}
		want, err := parseDrive(id, "x,size="+strings.TrimPrefix(size, "+")).size()
		if err != nil {
			return c.badParameter("size", "value does not match the regex pattern")
		}
		if strings.HasPrefix(size, "+") {
			want += before
		}
		if want < before {
			return die("shrinking disks is not supported")
		}
		if c.running(c.vmid) {
			node := map[string]any{"device": "drive-" + id, "size": want}
			if c.PVE >= 9 {
				node = map[string]any{"node-name": "drive-" + id, "size": want}
			}
			if err := c.vm(c.vmid).Try("block_resize", node, nil); err != nil {
				return die("VM %s qmp command 'block_resize' failed - %v", c.vmid, err)
			}
		} else if _, err := c.run(c.QEMU.Img, "resize", "-q", "-f", d.format(), path, strconv.FormatInt(want, 10)); err != nil {
			return die("%v", err)
		}
		d.options = slices.DeleteFunc(d.options, func(o option) bool { return o.name == "size" })
		d.options = append(d.options, option{"size", sizeText(want)})
		cf.main[id] = d.String()
		return c.save(cf)
	})
}
