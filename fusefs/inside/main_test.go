package inside

import (
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"qmchain/chain/image"
	"qmchain/internal/testenv"
)

// run runs one of the host's programs.
func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// disk opens a raw file as a disk.
func disk(t testing.TB, name, path string) Disk {
	t.Helper()
	img, err := image.NewPool(image.PoolOptions{}).Open(-1, image.Layer{Path: path, Name: name, Format: image.Raw, Bytes: -1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = img.Close() })
	return Disk{name, img}
}

// makeFile makes a file of size bytes that is all hole.
func makeFile(t testing.TB, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.raw")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

// tree makes a folder with etc/fstab, and more.
func tree(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "etc/fstab"), []byte("of a guest\n"), 0o640); err != nil {
		t.Fatal(err)
	}
	return dir
}

// noMounts runs its arguments, from the name of the script on, where no mounts are known. mkfs.btrfs looks at the sources of all,
// and fails if one is on a FUSE mount of another test whose server has just gone.
const noMounts = `mount -t tmpfs none /proc && mkdir /proc/self && : >/proc/self/mounts && exec "$0" "$@"`

// makers make file systems with etc/fstab in them, without mounting anything.
var makers = map[string]struct {
	size int64
	make func(t testing.TB, path, tree string)
}{
	"ext2": {16 << 20, func(t testing.TB, path, tree string) {
		run(t, "mkfs.ext2", "-q", "-F", "-L", "my label", "-d", tree, path)
	}},
	"ext3": {16 << 20, func(t testing.TB, path, tree string) {
		run(t, "mkfs.ext3", "-q", "-F", "-L", "my label", "-d", tree, path)
	}},
	"ext4": {16 << 20, func(t testing.TB, path, tree string) {
		run(t, "mkfs.ext4", "-q", "-F", "-L", "my label", "-d", tree, path)
	}},
	"xfs": {320 << 20, func(t testing.TB, path, tree string) {
		proto := filepath.Join(t.TempDir(), "proto")
		text := "/\n0 0\nd--755 0 0\netc d--755 0 0\nfstab ---640 0 0 " + filepath.Join(tree, "etc/fstab") + "\n$\n$\n"
		if err := os.WriteFile(proto, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		run(t, "mkfs.xfs", "-q", "-L", "my label", "-p", proto, path)
	}},
	"btrfs": {128 << 20, func(t testing.TB, path, tree string) {
		command := []string{"mkfs.btrfs", "-q", "-L", "my label", "--rootdir", tree, path}
		if os.Geteuid() == 0 {
			command = append([]string{"unshare", "--mount", "sh", "-c", noMounts}, command...)
		}
		run(t, command[0], command[1:]...)
	}},
	"ntfs": {16 << 20, func(t testing.TB, path, tree string) {
		run(t, "mkfs.ntfs", "-q", "-F", "-f", "-L", "my label", path)
		run(t, "ntfscp", "-q", path, filepath.Join(tree, "etc/fstab"), "fstab")
	}},
	"vfat": {16 << 20, func(t testing.TB, path, tree string) {
		run(t, "mkfs.vfat", "-n", "MY LABEL", path)
		run(t, "mcopy", "-i", path, filepath.Join(tree, "etc/fstab"), "::fstab")
	}},
	"swap": {4 << 20, func(t testing.TB, path, _ string) { run(t, "mkswap", "-q", "-L", "my label", path) }},
}

// dirty makes an ext4 whose file "late" is in the journal alone, as after a crash. The kernel's own mount is what does that.
func dirty(t testing.TB) string {
	t.Helper()
	path := makeFile(t, 32<<20)
	makers["ext4"].make(t, path, tree(t))
	// A mount without a place: nobody else sees it, and it ends with its descriptor.
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	loop, name, err := attachLoop(int(file.Fd()), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(loop)
	mnt, err := detached("ext4", map[string]string{"source": name, "commit": "1000"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(mnt)
	fd, err := unix.Openat(mnt, "late", unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	late := os.NewFile(uintptr(fd), "late")
	if _, err := late.WriteString("in the journal\n"); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(late.Sync(), late.Close()); err != nil {
		t.Fatal(err)
	}
	copied := filepath.Join(t.TempDir(), "dirty.raw")
	run(t, "cp", "--sparse=always", path, copied)
	return copied
}

func sum(t testing.TB, path string) [32]byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(b)
}

func quiet() logrus.FieldLogger {
	l := logrus.New()
	l.SetOutput(io.Discard)
	return l
}

// find finds the volumes; nothing may be wrong with them.
func find(t testing.TB, disks ...Disk) []Volume {
	t.Helper()
	v, err := Find(t.Context(), disks, func(err error) { t.Errorf("problem: %v", err) })
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// content reads a file of a view.
func readFile(ctx context.Context, v *View, path string) (string, error) {
	f, err := OpenAt(v.Root(), path, unix.O_RDONLY)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	return string(b), err
}

// guestmountEnv is the environment in which libguestfs finds a kernel, and starts its appliance without KVM.
func guestmountEnv(t testing.TB) []string {
	t.Helper()
	env := append(os.Environ(), "LIBGUESTFS_BACKEND=direct", "LIBGUESTFS_BACKEND_SETTINGS=force_tcg")
	if installed, _ := filepath.Glob("/boot/vmlinuz-*"); len(installed) > 0 {
		return env
	}
	cache, err := testenv.CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	kernels, _ := filepath.Glob(filepath.Join(cache, "appliance/boot/vmlinuz-*"))
	if len(kernels) != 1 {
		t.Fatalf("kernels in %s: %v (make setup)", cache, kernels)
	}
	version := strings.TrimPrefix(filepath.Base(kernels[0]), "vmlinuz-")
	return append(env, "SUPERMIN_KERNEL="+kernels[0], "SUPERMIN_KERNEL_VERSION="+version,
		"SUPERMIN_MODULES="+filepath.Join(cache, "appliance/lib/modules", version))
}
