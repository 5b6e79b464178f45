package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"qmchain/chain"
	"qmchain/chain/repo"
	"qmchain/proxmox"
)

// maxSaved bounds a file of a VM's in a point, in bytes. The largest are states of TPMs, of 4 MiB.
const maxSaved = 8 << 20

// savedVM is what a point holds of a Proxmox VE VM, beside its disks.
type savedVM struct {
	config   *proxmox.Config
	firewall []byte // nil: no rules
	// states are those of TPMs, by drive: no disks of QEMU's.
	states map[string][]byte
}

// savedVM reads the configuration that was saved in the point. Without one the error wraps chain.ErrNoPoint.
func (p *point) savedVM() (*savedVM, error) {
	names, err := p.From.Files(p.Manifest)
	if err != nil {
		return nil, err
	}
	var found []proxmox.VMID
	for _, name := range names {
		id, isConfig := strings.CutSuffix(filepath.Base(name), ".conf")
		if vmid, err := proxmox.ParseVMID(id); isConfig && err == nil && filepath.Dir(name) == repo.GuestFilesFolder {
			found = append(found, vmid)
		}
	}
	switch {
	case len(found) == 0:
		return nil, fmt.Errorf("%s holds no configuration of a Proxmox VE VM: %w", p.Name(), chain.ErrNoPoint)
	case len(found) > 1:
		return nil, fmt.Errorf("%s holds the configurations of %d VMs: %w", p.Name(), len(found), chain.ErrDamaged)
	}
	vmid := found[0]
	text, err := p.readFile(vmid.String() + ".conf")
	if err != nil {
		return nil, err
	}
	vm := &savedVM{config: proxmox.ParseConfig(vmid, text), states: map[string][]byte{}}
	for _, d := range vm.config.Drives() {
		if name := d.ID + ".raw"; d.TPM() && slices.Contains(names, filepath.Join(repo.GuestFilesFolder, name)) {
			if vm.states[d.ID], err = p.readFile(name); err != nil {
				return nil, err
			}
		}
	}
	if firewall := vmid.String() + ".fw"; slices.Contains(names, filepath.Join(repo.GuestFilesFolder, firewall)) {
		if vm.firewall, err = p.readFile(firewall); err != nil {
			return nil, err
		}
	}
	return vm, nil
}

func (p *point) readFile(name string) ([]byte, error) {
	text, err := readBounded(filepath.Join(p.From.Folder(p.Manifest), repo.GuestFilesFolder, name))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p.Name(), err)
	}
	return text, nil
}

func readBounded(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	text, err := io.ReadAll(io.LimitReader(f, maxSaved+1))
	if err == nil && len(text) > maxSaved {
		err = fmt.Errorf("%s: more than %d bytes", path, maxSaved)
	}
	return text, err
}

// givenVM reads a configuration from a file, in place of the saved one. Its VMID is the file's name, if that is one.
func givenVM(path string) (*savedVM, error) {
	text, err := readBounded(path)
	if err != nil {
		return nil, err
	}
	vmid, _ := proxmox.ParseVMID(strings.TrimSuffix(filepath.Base(path), ".conf"))
	return &savedVM{config: proxmox.ParseConfig(vmid, text)}, nil
}

// exists tells whether there is a file, or a device.
func exists(path string) bool {
	if path == "" {
		return false
	}
	_, err := os.Stat(path)
	return !errors.Is(err, fs.ErrNotExist)
}
