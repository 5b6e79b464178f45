package pvetest

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// SetFault has f asked before each command of qm ("set 110 --onboot 1"), before each option that is set ("option onboot"), in
// the middle of each import ("import /a/file"), and before a running VM's drive is moved to its volume ("live scsi0"). An error is
// what the command fails with.
func (n *Node) SetFault(f func(at string) error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.faults = f
}

func (n *Node) fault(at string) error {
	n.mu.Lock()
	f := n.faults
	n.mu.Unlock()
	if f == nil {
		return nil
	}
	if err := f(at); err != nil {
		return die("%v", err)
	}
	return nil
}

// VolumePath is the file of a volume.
func (n *Node) VolumePath(volume string) string { return n.layout().volume(volume) }

// volumeKey tells options that hold a volume: drives and unused ones.
var volumeKey = regexp.MustCompile(`^(ide|scsi|virtio|sata|efidisk|tpmstate|unused)\d+$`)

// formatOf is the format of a file that is to be imported. PVE looks what is in it, and takes nothing that names other
// files.
func (c *call) formatOf(source string) (string, error) {
	out, err := c.run(c.QEMU.Img, "info", "--output=json", source)
	if err != nil {
		return "", die("could not get file size of %s: %v", source, err)
	}
	var info struct {
		Format  string
		Backing string `json:"backing-filename"`
	}
	if err := json.Unmarshal([]byte(out), &info); err != nil {
		return "", err
	}
	if info.Backing != "" {
		return "", die("importing from images with a backing file (%s) is not allowed", info.Backing)
	}
	return info.Format, nil
}

// attach is what stands in the configuration for a volume that is there, with its size; and for one of cloud-init that is asked
// for, which it makes.
func (c *call) attach(id, value string) (string, error) {
	d := parseDrive(id, value)
	storage, name, _ := strings.Cut(d.volume, ":")
	if name != "cloudinit" {
		path := c.layout().volume(d.volume)
		if d.cdrom() || !isFile(path) {
			return value, nil
		}
		size, err := c.virtualSize(path, d.format())
		if err != nil {
			return "", err
		}
		d.options = slices.DeleteFunc(d.options, func(o option) bool { return o.name == "size" })
		d.options = append(d.options, option{"size", sizeText(size)})
		return d.String(), nil
	}
	d.volume = storage + ":vm-" + c.vmid + "-cloudinit"
	if storage == "local" {
		d.volume = storage + ":" + c.vmid + "/vm-" + c.vmid + "-cloudinit.qcow2"
	}
	path := c.layout().volume(d.volume)
	if _, err := os.Stat(path); err == nil {
		return "", die("disk image '%s' already exists", path)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return "", err
	}
	if _, err := c.run(c.QEMU.Img, "create", "-q", "-f", d.format(), path, "4M"); err != nil {
		return "", die("%v", err)
	}
	d.options = []option{{"media", "cdrom"}}
	return d.String(), nil
}

func isFile(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.Mode().IsRegular()
}

// free removes a volume's file.
func (c *call) free(volume string) {
	if strings.Contains(volume, ":") && !filepath.IsAbs(volume) {
		_ = os.Remove(c.layout().volume(volume))
	}
}

// deleteUnused is what becomes of an unused volume's option that is deleted: the volume goes with it.
func (c *call) deleteUnused(cf *conf, key string) {
	if strings.HasPrefix(key, "unused") {
		c.free(cf.main[key])
	}
}

// replace keeps the volume of a drive that another one takes the place of, on a stopped VM, as an unused one; but that of a
// cloud-init drive, which can be made again at any time.
func (c *call) replace(cf *conf, key, value string) {
	if !volumeKey.MatchString(key) || c.running(c.vmid) {
		return
	}
	for _, old := range []string{cf.main[key], cf.pending[key]} {
		d := parseDrive(key, old)
		switch {
		case d.volume == parseDrive(key, value).volume || d.volume == "none" || d.volume == "":
		case strings.Contains(d.volume, "-cloudinit"):
			c.free(d.volume)
		case !d.cdrom():
			cf.addUnused(d.volume)
		}
	}
}

// forgetUsed drops unused volumes that a drive uses now, as PVE does with each write.
func (c *conf) forgetUsed() {
	used := map[string]bool{}
	for _, section := range []map[string]string{c.main, c.pending} {
		for key, value := range section {
			if volumeKey.MatchString(key) && !strings.HasPrefix(key, "unused") {
				used[parseDrive(key, value).volume] = true
			}
		}
	}
	maps.DeleteFunc(c.main, func(key, value string) bool { return strings.HasPrefix(key, "unused") && used[value] })
}

// checkBoot refuses a boot order with devices that the VM does not have.
func (c *call) checkBoot(cf *conf) error {
	list, found := strings.CutPrefix(c.option("boot"), "order=")
	if !found || list == "" {
		return nil
	}
	for _, id := range strings.Split(list, ";") {
		if cf.main[id] == "" && cf.pending[id] == "" && c.option(id) == "" || slices.Contains(split(c.option("delete")), id) {
			return die("invalid bootorder: device '%s' does not exist'", id)
		}
	}
	return nil
}

// bootOrder is what a VM gets that is made without one: its first disk, and its first network.
func bootOrder(main map[string]string) string {
	var order []string
	for _, kind := range []string{"scsi", "virtio", "sata", "ide", "net"} {
		for _, key := range slices.Sorted(maps.Keys(main)) {
			if strings.TrimRight(key, "0123456789") == kind && !parseDrive(key, main[key]).cdrom() {
				order = append(order, key)
				break
			}
		}
	}
	return "order=" + strings.Join(order, ";")
}

var netModel = regexp.MustCompile(`^(e1000|rtl8139|virtio|vmxnet3)(,|$)`)

// stored is what stands in the configuration for an option that is given in another form.
func stored(key, value string) (string, error) {
	switch {
	case key == "sshkeys": // the name of a file
		text, err := os.ReadFile(value)
		if err != nil {
			return "", die("can't open '%s' - No such file or directory", value)
		}
		return strings.ReplaceAll(url.QueryEscape(string(text)), "+", "%20"), nil
	case strings.HasPrefix(key, "net"):
		mac := fmt.Sprintf("BC:24:11:%02X:%02X:%02X", rand.N(256), rand.N(256), rand.N(256))
		return netModel.ReplaceAllString(value, "$1="+mac+"$2"), nil
	}
	return value, nil
}
