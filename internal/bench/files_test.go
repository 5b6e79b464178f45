package bench

import (
	"errors"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"qmchain/internal/testenv"
)

var filesRounds = flag.Int("files-rounds", 3, "BenchmarkFiles: how often each way is timed")

// fileText is what the file that is read holds.
const fileText = "read me\n"

// One small file out of a guest's ext4, in the last point of a chain of ten: by qmchain-fuse cat, whose appliance is
// libguestfs', and by its --kernel, beside guestmount, cat and guestunmount. All appliances are emulated, without KVM. For
// root alone.
func BenchmarkFiles(b *testing.B) {
	program := filepath.Join(b.TempDir(), "qmchain-fuse")
	build(b, program, "qmchain/cmd/qmchain-fuse")
	dir := b.TempDir()
	tree, raw, mnt := filepath.Join(dir, "tree"), filepath.Join(dir, "raw"), filepath.Join(dir, "mnt")
	for _, folder := range []string{tree, mnt} {
		if err := os.Mkdir(folder, 0o700); err != nil {
			b.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(tree, "file"), []byte(fileText), 0o600); err != nil {
		b.Fatal(err)
	}
	run(b, "mkfs.ext4", "-q", "-d", tree, raw, "256M")
	c := newMountChain(b, b.TempDir())
	c.full(raw, "")
	c.rewrite(10, raw)
	env := applianceEnv(b)
	do := func(name string, args ...string) string {
		cmd := exec.CommandContext(b.Context(), name, args...)
		cmd.Env = env
		var failed strings.Builder
		cmd.Stderr = &failed
		out, err := cmd.Output()
		if err != nil {
			b.Fatalf("%v: %v: %s", cmd, err, failed.String())
		}
		return string(out)
	}
	cat := func(flags ...string) {
		args := append([]string{"--quiet", "cat", "--repo", c.dir(), mountGuest + "/latest:/file"}, flags...)
		if text := do(program, args...); text != fileText {
			b.Fatalf("the file holds %q", text)
		}
	}
	pidFile := filepath.Join(dir, "pid")
	guestmount := func() {
		do("guestmount", "--ro", "--format=qcow2", "--add", c.image(9), "--mount", "/dev/sda", "--pid-file", pidFile, mnt)
		text, err := os.ReadFile(filepath.Join(mnt, "file"))
		do("guestunmount", mnt)
		awaitEnd(b, pidFile)
		if err != nil || string(text) != fileText {
			b.Fatalf("the file holds %q, %v", text, err)
		}
	}
	guestmount() // libguestfs has made its appliance now, and all is in the cache
	r := rounds{}
	once(b, func() {
		ways := []struct {
			name string
			do   func()
		}{
			{"guestmount-cat", guestmount},
			{"ours-cat", func() { cat() }},
			{"ours-cat-kernel", func() { cat("--kernel") }},
		}
		for round := range *filesRounds {
			for i := range ways {
				way := ways[(i+round)%len(ways)]
				began := time.Now()
				way.do()
				r.add(way.name, time.Since(began).Seconds())
			}
		}
	})
	r["guestmount-cat-kernel"] = r["guestmount-cat"]
	record(b, r.beside("cat", "s", "guestmount"), r.beside("cat-kernel", "s", "guestmount"))
	b.Logf("%v; load %s", r, load())
}

// awaitEnd waits for the end of the process that a file names.
func awaitEnd(b *testing.B, pidFile string) {
	b.Helper()
	text, err := os.ReadFile(pidFile)
	if err != nil {
		b.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		b.Fatal(err)
	}
	for end := time.Now().Add(serverLimit); !errors.Is(syscall.Kill(pid, 0), syscall.ESRCH); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			b.Fatal("guestmount does not end")
		}
	}
}

// applianceEnv is the environment in which libguestfs finds a kernel, and does without KVM.
func applianceEnv(b *testing.B) []string {
	b.Helper()
	env := append(os.Environ(), "LIBGUESTFS_BACKEND=direct", "LIBGUESTFS_BACKEND_SETTINGS=force_tcg", "LIBGUESTFS_CACHEDIR=/var/tmp")
	if installed, _ := filepath.Glob("/boot/vmlinuz-*"); len(installed) > 0 {
		return env
	}
	cache, err := testenv.CacheDir()
	if err != nil {
		b.Fatal(err)
	}
	kernels, _ := filepath.Glob(filepath.Join(cache, "appliance/boot/vmlinuz-*"))
	if len(kernels) != 1 {
		b.Fatalf("kernels in %s: %v (make setup)", cache, kernels)
	}
	version := strings.TrimPrefix(filepath.Base(kernels[0]), "vmlinuz-")
	return append(env, "SUPERMIN_KERNEL="+kernels[0], "SUPERMIN_KERNEL_VERSION="+version,
		"SUPERMIN_MODULES="+filepath.Join(cache, "appliance/lib/modules", version))
}
