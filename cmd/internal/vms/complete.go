package vms

import (
	"qmchain/cmd/internal/cli"
	"qmchain/proxmox"
)

// Sources are what shells can offer of a node.
func Sources(host proxmox.Host) cli.Sources {
	return cli.Sources{"vmid": func(*cli.Line) (offers []cli.Offer) {
		ids, _ := host.VMIDs()
		for _, id := range ids {
			o := cli.Offer{Word: id.String()}
			if config, err := host.Config(id); err == nil {
				o.Help = config.Name()
			}
			offers = append(offers, o)
		}
		return offers
	}}
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
