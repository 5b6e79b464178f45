package inside

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"qmchain/chain/nbd"
)

// ErrNoAppliance means that libguestfs' guestmount is not installed.
var ErrNoAppliance = errors.New("guestmount of libguestfs is not installed")

// Subtype is what mount(8) shows behind "fuse." for an appliance's mount.
const Subtype = "qmchain-files"

// maxSocket is the length of a unix socket's path, unix(7).
const maxSocket = 107

// hiddenMount is the mount point in Appliance.Temp where there is no other.
const hiddenMount = "mnt"

// guestmount is libguestfs' program that starts an appliance and mounts what is in it.
const guestmount = "guestmount"

// endLimit is how long killed processes and forced unmounts may take.
const endLimit = 10 * time.Second

// Appliance says what an appliance is to show, and where.
type Appliance struct {
	// Volume is the one to show. Where it is nil, or is a logical volume that only LVM can put together, the appliance gets
	// Disks, and where it is nil it looks for the guest's fstab there.
	Volume *Volume
	Disks  []Disk

	SkipJournal bool // no replay; only with a Volume
	// Dir is the mount point. Where it is empty the mount is for View.Root alone.
	Dir        string
	AllowOther bool   // other users may look in too, as far as the modes of the guest's files let them
	Source     string // what mount(8) shows as the source

	// Temp is an existing folder of the caller's, for sockets and overlays. It is the caller's to remove.
	Temp string
	// Env is the environment of guestmount: LIBGUESTFS_BACKEND, TMPDIR and so on.
	Env []string
	Log logrus.FieldLogger
}

// View is files that can be seen.
type View struct {
	root *os.File // nil if there is a mount point
	done chan struct{}
	err  error
	stop func() // ends it at once; Close calls it once
	once sync.Once
}

// Root is the root folder of the files, for OpenAt and the like; nil where they are mounted at a mount point.
func (v *View) Root() *os.File { return v.root }

// Done is closed when the view has ended, by whatever.
func (v *View) Done() <-chan struct{} { return v.done }

// Err says why it has ended; nil after an unmount. It must not be called before Done is closed.
func (v *View) Err() error { return v.err }

// Close ends the view at once, with all that was started for it. Who still has files open gets errors.
func (v *View) Close() {
	v.once.Do(func() {
		v.stop()
		v.await()
		if v.root != nil {
			_ = v.root.Close()
		}
	})
}

// await waits for the end, which nothing is in the way of any more but the system itself.
func (v *View) await() {
	select {
	case <-v.done:
	case <-time.After(endLimit):
	}
}

// Start starts the appliance and returns when its files can be seen. That takes seconds with KVM, and some twenty without;
// ctx bounds it. It wraps ErrNoAppliance, or what guestmount says.
func (a Appliance) Start(ctx context.Context) (_ *View, err error) {
	if a.SkipJournal && (a.Volume == nil || a.Volume.lvm) {
		return nil, errors.New("without a replay of the journal only one volume can be shown, and none that LVM must put together")
	}
	program, err := exec.LookPath(guestmount)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoAppliance, err)
	}
	// The NBD server ends with the appliance.
	serving, stopServing := context.WithCancel(context.Background())
	defer func() {
		if err != nil {
			stopServing()
		}
	}()
	socket := filepath.Join(a.Temp, "nbd")
	if len(socket) > maxSocket {
		return nil, fmt.Errorf("%s is too long for the path of a socket: set TMPDIR", socket)
	}
	l, err := nbd.Listen(ctx, "unix:"+socket)
	if err != nil {
		return nil, err
	}
	drives := a.drives()
	go func() {
		// What goes wrong with a client is for the log; the server itself ends with serving alone.
		server := nbd.Server{Exports: drives, Problem: func(err error) { a.Log.Warn(err) }}
		_ = server.Serve(serving, l)
	}()

	dir := a.Dir
	if dir == "" {
		dir = filepath.Join(a.Temp, hiddenMount)
		if err := os.Mkdir(dir, 0o700); err != nil {
			return nil, err
		}
	}
	p, err := a.run(program, a.args(drives, socket, dir))
	if err != nil {
		return nil, err
	}
	v := &View{done: make(chan struct{}), stop: p.kill}
	go func() {
		<-p.done
		v.err = p.err
		stopServing()
		close(v.done)
	}()
	fail := func(err error) (*View, error) {
		v.Close()
		return nil, err
	}
	if err := p.awaitReady(ctx, a.Temp); err != nil {
		return fail(err)
	}
	if a.Dir != "" {
		go v.watch(a.Dir, a.Log)
	} else if v.root, err = p.open(ctx, dir); err != nil {
		return fail(err)
	}
	return v, nil
}

// endPatience is how long guestmount has to end after its mount. One whose appliance hangs never does.
const endPatience = 10 * time.Second

// watch ends a guestmount that does not end by itself though its mount has.
func (v *View) watch(dir string, log logrus.FieldLogger) {
	if err := v.awaitUnmount(dir); err != nil {
		log.WithError(err).Warn("the end of the mount can't be watched")
		return
	}
	select {
	case <-v.done:
	case <-time.After(endPatience):
		log.Warn("the appliance does not end with its mount: it is killed")
		v.Close()
	}
}

// awaitUnmount waits until the kernel has given up the mount at dir, or the view has ended. A mount that is detached while
// files are open lives until they are closed, which mountinfo does not show; inotify does, and does not keep it in use.
func (v *View) awaitUnmount(dir string) error {
	mount, err := topMount(dir)
	if err != nil || !ours(mount) {
		return err
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return fmt.Errorf("inotify: %w", err)
	}
	events := os.NewFile(uintptr(fd), "inotify")
	defer events.Close()
	go func() {
		<-v.done
		_ = events.Close()
	}()
	// Of the root of a mount nothing else is reported than that it is unmounted, which needs no flag.
	_, err = unix.InotifyAddWatch(fd, dir, unix.IN_DELETE_SELF|unix.IN_ONLYDIR|unix.IN_DONT_FOLLOW)
	if now, lookErr := topMount(dir); lookErr != nil || now.ID != mount.ID {
		return lookErr // it was quicker
	}
	if err != nil {
		return fmt.Errorf("inotify: %w", err)
	}
	_, err = events.Read(make([]byte, unix.SizeofInotifyEvent+unix.NAME_MAX+1))
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}

// drives are what the appliance gets, in the order in which it names them.
func (a Appliance) drives() []nbd.Export {
	if a.Volume != nil && !a.Volume.lvm {
		return []nbd.Export{{Name: "volume", Image: a.Volume.img}}
	}
	var list []nbd.Export
	for _, d := range a.Disks {
		list = append(list, nbd.Export{Name: d.Name, Image: d})
	}
	return list
}

// args are guestmount's.
func (a Appliance) args(drives []nbd.Export, socket, dir string) []string {
	args := []string{"--ro", "--no-fork", "--fd=3"}
	for _, d := range drives {
		// The format is that of all drives behind it. Read-only drives get a qcow2 overlay, made with this format's name.
		uri := url.URL{Scheme: "nbd", Path: "/" + d.Name, RawQuery: "socket=" + url.PathEscape(socket)}
		args = append(args, "--format=raw", "-a", uri.String())
	}
	switch v := a.Volume; {
	case v == nil:
		args = append(args, "-i")
	case v.lvm:
		args = append(args, "-m", "/dev/"+v.LV)
	default:
		driver := fileSystems[v.Type].driver
		if driver == "ntfs3" {
			driver = "ntfs" // whatever the appliance has for it
		}
		args = append(args, "-m", "/dev/sda:/:"+strings.Join(v.options("ro", a.SkipJournal), ",")+":"+driver)
	}
	options := []string{"ro", "nosuid", "nodev", "noexec", "subtype=" + Subtype, "fsname=" + a.Source}
	if a.AllowOther {
		options = append(options, "allow_other", "default_permissions")
	}
	for _, o := range options {
		args = append(args, "-o", o)
	}
	return append(args, "--", dir)
}

// options are the mount options of the volume's file system.
func (v Volume) options(first string, skip bool) []string {
	fs := fileSystems[v.Type]
	o := []string{first}
	if fs.always != "" {
		o = append(o, fs.always)
	}
	if skip && fs.skip != "" {
		o = append(o, fs.skip)
	}
	return o
}
