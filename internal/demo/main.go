// Demo shows the main job on a real guest: it boots a small Linux with two disks, takes a full and three incremental
// points of it with qmchain-backup while it works, mounts the repository with qmchain-fuse, and looks into the file
// system of every point. Each file is compared with the check sums that the guest itself took.
//
//	go run ./internal/demo [BIN]
//
// BIN is the folder of the programs, bin by default. It needs root, for loop mounts, and what `make setup` installs.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/dustin/go-humanize"

	"qmchain/internal/testenv"
)

const (
	diskSize   = 256 << 20
	stepLimit  = 2 * time.Minute
	guestName  = "demo"
	timeFormat = "15:04:05.0"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	bin := "bin"
	if len(os.Args) > 1 {
		bin = os.Args[1]
	}
	d := &demo{ctx: ctx, bin: bin}
	err := d.run()
	d.cleanUp()
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "\ndemo: %v\n", err)
		os.Exit(1)
	}
}

// demo is also the testenv.TB of its guest: what would end a test ends the demo.
type demo struct {
	ctx      context.Context
	bin      string
	vm       *testenv.VM
	dir      string // of all that the demo makes
	cleanups []func()
	failed   bool
}

type fatal struct{ error }

func (d *demo) Helper()                           {}
func (d *demo) Logf(format string, args ...any)   { fmt.Fprintf(os.Stderr, format+"\n", args...) }
func (d *demo) Errorf(format string, args ...any) { d.failed = true; d.Logf(format, args...) }
func (d *demo) Failed() bool                      { return d.failed }
func (d *demo) Cleanup(f func())                  { d.cleanups = append(d.cleanups, f) }
func (d *demo) Fatalf(format string, args ...any) {
	d.failed = true
	panic(fatal{fmt.Errorf(format, args...)})
}

func (d *demo) cleanUp() {
	for _, f := range slices.Backward(d.cleanups) {
		f()
	}
}

// point is what the demo remembers of one point.
type point struct {
	name  string // GUEST/ID
	story string // what the guest's file said
	sums  string // sha256sum's output in the guest
	took  time.Duration
}

func (d *demo) run() (err error) {
	defer func() {
		switch r := recover().(type) {
		case nil:
		case fatal:
			err = r.error
		default:
			panic(r)
		}
	}()
	if os.Geteuid() != 0 {
		return errors.New("loop mounts need root: run it with sudo")
	}
	began := time.Now()
	d.dir, err = os.MkdirTemp("", "qmchain-demo-")
	if err != nil {
		return err
	}
	d.Cleanup(func() { _ = os.RemoveAll(d.dir) })
	repo, mnt, fleece := filepath.Join(d.dir, "repo"), filepath.Join(d.dir, "mnt"), filepath.Join(d.dir, "fleece")
	for _, dir := range []string{repo, mnt, fleece} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
	}

	d.bootGuest()

	d.title("Four points, while the guest works")
	d.say("The guest goes on writing to its first disk all the time.")
	d.guest("while :; do dd if=/dev/urandom of=/churn/$((RANDOM % 20)) bs=64k count=8 2>/dev/null; sync; done >/dev/null 2>&1 &")
	stories := []string{
		"Day one: the server is installed.",
		"Day two: the customers came.",
		"Day three: somebody deleted the invoices.",
		"Day four: only this line is left.",
	}
	changes := []string{
		"mkdir /data/invoices && for i in 1 2 3 4 5 6 7 8; do dd if=/dev/urandom of=/data/invoices/$i.pdf bs=128k count=4; done 2>/dev/null; dd if=/dev/urandom of=/data/database bs=1M count=40 2>/dev/null",
		"dd if=/dev/urandom of=/data/database bs=64k count=10 seek=100 conv=notrunc 2>/dev/null; dd if=/dev/urandom of=/data/invoices/9.pdf bs=128k count=4 2>/dev/null",
		"rm -r /data/invoices",
		"dd if=/dev/urandom of=/data/database bs=64k count=4 seek=7 conv=notrunc 2>/dev/null",
	}
	var points []point
	for i, story := range stories {
		d.guest(fmt.Sprintf("echo '%s' >/data/story.txt; %s", story, changes[i]))
		// A freeze brings all to the place where a mount without replay of the journal finds it.
		d.guest("sync; fsfreeze --freeze /data; fsfreeze --unfreeze /data")
		p := point{story: story, sums: d.guest("cd /data && find . -type f | sort | xargs sha256sum")}
		start := time.Now()
		out := d.tool("qmchain-backup", "run", "-q", "--socket", d.vm.Socket, "--name", guestName, "--repo", repo, "--fleece-dir", fleece)
		p.name, p.took = strings.TrimSpace(out), time.Since(start)
		d.say("  %s took %s: the guest's file says %q", p.name, p.took.Round(time.Millisecond), story)
		points = append(points, p)
	}
	if status := d.vm.Status(); status != "running" {
		return fmt.Errorf("the guest is %s", status)
	}

	d.title("What is stored")
	fmt.Print(d.tool("qmchain-backup", "list", "--repo", repo))

	d.title("The mount")
	d.Cleanup(func() { _ = exec.Command("umount", "-l", mnt).Run() })
	d.tool("qmchain-fuse", "mount", repo, mnt)
	fmt.Print(d.show("ls", "-lR", "--time-style=long-iso", filepath.Join(mnt, guestName)))

	d.title("Inside the points")
	files := 0
	for _, p := range points {
		n, err := d.inspect(filepath.Join(mnt, p.name, "virtio1.raw"), p)
		if err != nil {
			return fmt.Errorf("point %s: %w", p.name, err)
		}
		files += n
	}

	d.title("Without qmchain")
	last := points[len(points)-1].name
	fmt.Print(d.show("qemu-img", "compare", "-f", "qcow2", "-F", "raw",
		filepath.Join(repo, filepath.Dir(last), "images", filepath.Base(last)+".virtio1.qcow2"), filepath.Join(mnt, last, "virtio1.raw")))

	d.tool("qmchain-fuse", "umount", mnt)
	used, err := exec.CommandContext(d.ctx, "du", "-sb", repo).Output()
	if err != nil {
		return err
	}
	size := uint64(0)
	if _, err := fmt.Sscan(string(used), &size); err != nil {
		return err
	}
	d.title("Done")
	d.say("%d points of two disks of %s each in %s; %d files compared with the guest's own check sums, all the same.",
		len(points), humanize.IBytes(diskSize), humanize.IBytes(size), files)
	d.say("Full: %s. Increments: %s, %s, %s. The whole demo: %s.", points[0].took.Round(time.Millisecond), points[1].took.Round(time.Millisecond),
		points[2].took.Round(time.Millisecond), points[3].took.Round(time.Millisecond), time.Since(began).Round(time.Second))
	d.say("Everything that was made is removed again.")
	d.say("\nWhere to look next: README.md for your own guests; %s --help; ARCHITECTURE.md for how it works.", filepath.Join(d.bin, "qmchain-backup"))
	return nil
}

func (d *demo) bootGuest() {
	d.title("A guest")
	start := time.Now()
	d.vm = testenv.Start(d, testenv.Config{
		QEMU: testenv.Host(d), Style: testenv.Throttle, Guest: true, Name: guestName,
		Disks: []testenv.Disk{{ID: "scsi0", Size: diskSize, Discard: "unmap"}, {ID: "virtio1", Size: diskSize, Discard: "unmap"}},
	})
	d.say("Linux %s booted in %s under QEMU %s, with two disks of %s.", strings.TrimSpace(d.guest("uname -r")),
		time.Since(start).Round(100*time.Millisecond), d.vm.Config().QEMU.Name, humanize.IBytes(diskSize))
	d.guest("mkdir -p /churn /data && mkfs.ext4 -q /dev/disk/scsi0 && mkfs.ext4 -q /dev/disk/virtio1 && mount /dev/disk/scsi0 /churn && mount /dev/disk/virtio1 /data")
	d.say("Both have an ext4 now. Its QMP socket for backups is %s.", d.vm.Socket)
}

// inspect mounts the file system in a disk and compares its files with what the guest said. It returns how many.
func (d *demo) inspect(disk string, p point) (files int, err error) {
	dir := filepath.Join(d.dir, "inside")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return 0, err
	}
	d.show("mount", "-o", "ro,loop,noload", disk, dir)
	defer func() {
		if umountErr := exec.Command("umount", dir).Run(); umountErr != nil {
			_ = exec.Command("umount", "-l", dir).Run()
			err = errors.Join(err, umountErr)
		}
	}()
	story, err := os.ReadFile(filepath.Join(dir, "story.txt"))
	if err != nil {
		return 0, err
	}
	if got := strings.TrimSpace(string(story)); got != p.story {
		return 0, fmt.Errorf("the file says %q, not %q", got, p.story)
	}
	cmd := exec.CommandContext(d.ctx, "sh", "-c", "find . -type f | sort | xargs sha256sum")
	cmd.Dir = dir
	sums, err := cmd.Output()
	if err != nil {
		return 0, err
	}
	if string(sums) != p.sums {
		return 0, fmt.Errorf("check sums differ from the guest's:\n%s\nthe guest's:\n%s", sums, p.sums)
	}
	files = strings.Count(p.sums, "\n")
	d.say("  %s: %d files as the guest had them; story.txt says %q", p.name, files, p.story)
	return files, nil
}

func (d *demo) title(text string) { fmt.Printf("\n== %s (%s)\n", text, time.Now().Format(timeFormat)) }

func (d *demo) say(format string, args ...any) { fmt.Printf(format+"\n", args...) }

// guest runs a shell command in the guest.
func (d *demo) guest(shell string) string {
	ctx, cancel := context.WithTimeout(d.ctx, stepLimit)
	defer cancel()
	return d.vm.Run(ctx, shell)
}

// show prints a command, runs it, and returns what it prints.
func (d *demo) show(name string, args ...string) string {
	fmt.Printf("$ %s %s\n", name, strings.Join(args, " "))
	ctx, cancel := context.WithTimeout(d.ctx, stepLimit)
	defer cancel()
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		d.Fatalf("%s: %v\n%s%s", name, err, stdout.String(), stderr.String())
	}
	return stdout.String()
}

// tool runs one of our programs.
func (d *demo) tool(name string, args ...string) string {
	return d.show(filepath.Join(d.bin, name), args...)
}
