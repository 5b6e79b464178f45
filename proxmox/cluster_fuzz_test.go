package proxmox

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// FuzzCluster reads the files that say what storages and pools there are: a volume's file is below its storage, the two readers of storages
// agree, and a pool has no VM that it does not name. The text of users is taken for HA's resources and for the kernel's locks as well.
func FuzzCluster(f *testing.F) {
	const storages = "dir: local\n\tpath /var/lib/vz\n\tcontent iso,snippets,images\n\nlvmthin: local-lvm\n\tthinpool data\n\tvgname pve\n\nnfs: nas\n\texport /x\n\tnodes pve1,pve2\n\nzfspool: off\n\tdisable\n\tpool rpool\n"
	const users = "user:root@pam:1:0:::::\npool:web:text:110,120:nas:\npool:db::110;9,x 110::\n"
	f.Add(storages, users, "pve1", "local:iso/x.iso", "web")
	f.Add(storages+"dir: local\n", users, "", "nas:snippets/../../x", "db")
	f.Add("dir : a\n path x\ndir:b\n#lvm: c\n: d\ndir: \n", "pool:", "a", "a:iso/x", "")
	f.Add("cifs: a b\n\tpath\n\tcontent none\n\tshared 0", "pool:a:b:c", "a", "local:snippets/x", "a")
	f.Add("", "vm: 110\n\tstate started\n\nct: 110\n\tstate ignored\nvm: 120\n\tgroup x\n", "", "", "")
	f.Add("", "1: FLOCK  ADVISORY  WRITE 708 00:19:1153 0 EOF\n1: -> FLOCK  ADVISORY  WRITE 709 00:19:1153 0 EOF\n", "", "", "")
	h := Host{Etc: f.TempDir()}
	if err := os.Mkdir(filepath.Join(h.Etc, "qemu-server"), 0o700); err != nil {
		f.Fatal(err)
	}
	if err := os.WriteFile(h.ConfigPath(110), nil, 0o600); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, storages, users, node, volume, pool string) {
		for name, text := range map[string]string{"storage.cfg": storages, "user.cfg": users} {
			if err := os.WriteFile(filepath.Join(h.Etc, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		all := parseStorages(storages, node)
		for name, s := range all {
			if name == "" || name != "local" && !strings.Contains(storages, name) {
				t.Errorf("storage %q", name)
			}
			// The storage local is there in any case.
			if kind := h.storageType(name); name != "local" && strings.Count(storages, name) == 1 && kind != s.Type {
				t.Errorf("storage %q is of type %q, and %q", name, s.Type, kind)
			}
			if slices.Contains(s.Content, "") {
				t.Errorf("storage %q has %q", name, s.Content)
			}
		}
		if file := VolumeFile(all, volume); file != "" {
			name, _, _ := strings.Cut(volume, ":")
			below, err := filepath.Rel(all[name].Path, file)
			if err != nil || !filepath.IsLocal(below) || below == "." {
				t.Errorf("%q is %s, storage at %s", volume, file, all[name].Path)
			}
		}
		vmids, notes, err := h.pool(pool)
		if err != nil && (!errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), pool)) {
			t.Errorf("pool %q: %v", pool, err)
		}
		for _, id := range vmids {
			if id != 110 || !strings.Contains(users, "110") {
				t.Errorf("pool %q has VM %s", pool, id)
			}
		}
		// What stands before and after a section changes nothing for it.
		managed := haManaged(users, 110)
		if haManaged(users+"\nvm: 1100\n\tstate ignored\n", 110) != managed || !haManaged(users+"\nvm: 110\n\tstate stopped\n", 110) ||
			haManaged("vm: 110\n\tstate ignored\n\nct: 110\n", 110) || managed && !strings.Contains(users, "110") {
			t.Errorf("HA: %v", managed)
		}
		dev := unix.Mkdev(0, 0x19)
		if flocked(users, dev, 1153) && !strings.Contains(users, "00:19:1153") || !flocked(users+"\n1: FLOCK  ADVISORY  WRITE 708 00:19:1153 0 EOF\n", dev, 1153) {
			t.Error("a lock that is held is not seen, or one that is not is")
		}
		for _, note := range notes {
			if strings.HasPrefix(note, "VM 110:") {
				t.Errorf("pool %q: %s", pool, note)
			}
		}
	})
}
