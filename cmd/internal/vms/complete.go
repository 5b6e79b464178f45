package vms

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"qmchain/cmd/internal/cli"
	"qmchain/proxmox"
)

// Sources are what shells can offer of a node.
func Sources(host proxmox.Host) cli.Sources {
	return cli.Sources{
		"vmid": func(*cli.Line) (offers []cli.Offer) {
			ids, _ := host.VMIDs()
			for _, id := range ids {
				o := cli.Offer{Word: id.String()}
				if config, err := host.Config(id); err == nil {
					o.Help = config.Name()
				}
				offers = append(offers, o)
			}
			return offers
		},
		"pool":    func(*cli.Line) []cli.Offer { return groups(host.Pools()) },
		"tag":     func(*cli.Line) []cli.Offer { return groups(host.Tags()) },
		"storage": func(l *cli.Line) []cli.Offer { return storages(host, l.Word, proxmox.Storage.Images) },
		"snippets": func(l *cli.Line) []cli.Offer {
			return storages(host, "", func(s proxmox.Storage) bool { return slices.Contains(s.Content, "snippets") })
		},
	}
}

func groups(of map[string][]proxmox.VMID, _ error) (offers []cli.Offer) {
	for _, name := range slices.Sorted(maps.Keys(of)) {
		o := cli.Offer{Word: name, Help: fmt.Sprintf("%d VMs", len(of[name]))}
		if len(of[name]) == 1 {
			o.Help = "VM " + of[name][0].String()
		}
		offers = append(offers, o)
	}
	return offers
}

// storages are those that something can be on, for all disks or, where the word says so, for one.
func storages(host proxmox.Host, word string, fits func(proxmox.Storage) bool) (offers []cli.Offer) {
	disk := ""
	if name, _, one := strings.Cut(word, "="); one {
		disk = name + "="
	}
	all, _ := host.Storages()
	for _, name := range slices.Sorted(maps.Keys(all)) {
		if fits(all[name]) {
			offers = append(offers, cli.Offer{Word: disk + name, Help: all[name].Type})
		}
	}
	return offers
}

// Disks are the disks of a VM.
func Disks(host proxmox.Host, vmid string) (offers []cli.Offer) {
	id, err := proxmox.ParseVMID(vmid)
	if err != nil {
		return nil
	}
	config, err := host.Config(id)
	if err != nil {
		return nil
	}
	for _, d := range config.Drives() {
		if !d.CDROM() {
			offers = append(offers, cli.Offer{Word: d.ID})
		}
	}
	return offers
}
