package pveguest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"qmchain/backup"
	"qmchain/proxmox"
)

// maxTPM bounds the state of a TPM, in bytes. PVE's volumes for it have 4 MiB.
const maxTPM = 8 << 20

// Files implements backup.Guard: the configuration as a restore needs it, the firewall's rules, and the state of the TPM,
// each under its usual name.
func (vm *VM) Files(ctx context.Context) (files []backup.File, warnings []string, err error) {
	files = []backup.File{{Name: vm.ID.String() + ".conf", Data: []byte(vm.Config.Portable())}}
	rules, err := vm.site.Host.Firewall(vm.ID)
	switch {
	case err == nil && rules != nil:
		files = append(files, backup.File{Name: vm.ID.String() + ".fw", Data: rules})
	case err != nil:
		warnings = append(warnings, fmt.Sprintf("the firewall's rules are not saved: %v", err))
	}
	for _, d := range vm.Config.Drives() {
		if !d.TPM() {
			continue
		}
		state, err := vm.tpm(ctx, d)
		if err != nil {
			warnings = append(warnings, fmt.Sprintf("the state of the TPM is not saved: %v", err))
			continue
		}
		files = append(files, backup.File{Name: d.ID + ".raw", Data: state})
	}
	return files, warnings, nil
}

// tpm reads the state of the TPM. swtpm writes it whenever it likes, so it is read until it reads the same twice.
func (vm *VM) tpm(ctx context.Context, d proxmox.Drive) ([]byte, error) {
	v, err := vm.site.Host.Volume(ctx, d)
	if err != nil {
		return nil, err
	}
	if v.Format != "raw" {
		return nil, fmt.Errorf("%s: %s is of format %s: %w", d.ID, d.Volume, v.Format, proxmox.ErrVolume)
	}
	var last []byte
	for range 5 {
		state, err := readAll(v.Path, maxTPM)
		if err != nil {
			return nil, err
		}
		if last != nil && bytes.Equal(state, last) {
			return state, nil
		}
		last = state
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
	return nil, fmt.Errorf("%s: it changes all the time", d.ID)
}

func readAll(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = fmt.Errorf("%s: more than %d bytes", path, limit)
	}
	return data, err
}
