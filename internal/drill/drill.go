package drill

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/sirupsen/logrus"

	"qmchain/chain/image"
	"qmchain/chain/nbd"
	"qmchain/internal/child"
	"qmchain/internal/durable"
	"qmchain/qmp"
	"qmchain/qmp/qga"
)

// Disk is one disk of the guest.
type Disk struct {
	Name  string // scsi0, virtio1, …: the letters say what it is attached to
	Image image.Image
}

// Sign is what a guest must show to pass.
type Sign string

// The signs. Text is that Config.Text appears on the serial console.
const (
	Agent Sign = "agent"
	Login Sign = "login"
	Text  Sign = "text"
)

// Config is all that a drill needs.
type Config struct {
	Disks  []Disk // the first is booted from, unless there is a kernel
	Memory int64  // MiB
	CPUs   int
	Accel  string // "kvm" or "tcg"
	CPU    string // "": the host's with kvm, else the best that can be emulated
	// Machine is QEMU's machine type, such as "pc" or "q35".
	Machine string
	// SCSI is the device that SCSI disks are attached to; "": virtio-scsi-pci.
	SCSI string
	// UUID is the guest's, by which it and its licences know it; "": none.
	UUID string
	// Firmware is the path of UEFI code, for a guest with a disk efidisk0, which holds its variables.
	Firmware string
	// Kernel is started directly, if it is set, with Initrd and Append.
	Kernel, Initrd, Append string

	Sign    Sign
	Text    string
	Timeout time.Duration

	// Screenshot is the path of a PNG that is taken at the end; "": none.
	Screenshot string

	QEMU, QemuImg string // the programs
	Log           logrus.FieldLogger
	Now           func() time.Time
}

// Result is what a drill has found.
type Result struct {
	Passed bool
	Why    string        // what was seen, or what was not
	Took   time.Duration // from the start of QEMU to the sign, or to the end of patience
	// Console is the end of what the guest has printed on its serial console.
	Console string
}

const (
	stopLimit   = 15 * time.Second
	pollEvery   = 200 * time.Millisecond
	probeLimit  = 3 * time.Second // for one try to reach the agent
	shotLimit   = 20 * time.Second
	createLimit = time.Minute

	keptConsole = 4096 // bytes
)

// drill is one under way.
type drill struct {
	cfg  Config
	dir  string
	qemu *child.Process
}

func (d *drill) path(name string) string { return filepath.Join(d.dir, name) }

// Run starts the guest and waits for its sign of life. An error means that the drill could not be done; a guest that does not
// boot is no error but a Result that has not passed.
func Run(ctx context.Context, cfg Config) (result Result, err error) {
	d := &drill{cfg: cfg}
	if d.dir, err = os.MkdirTemp("", "qmchain-drill-"); err != nil {
		return Result{}, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(d.dir)) }()

	serveCtx, stopServing := context.WithCancel(ctx)
	served := make(chan error, 1)
	listener, err := nbd.Listen(ctx, "unix:"+d.path("nbd"))
	if err != nil {
		stopServing()
		return Result{}, err
	}
	server := nbd.Server{Problem: func(err error) { cfg.Log.Warn(err) }}
	for _, disk := range cfg.Disks {
		server.Exports = append(server.Exports, nbd.Export{Name: disk.Name, Image: disk.Image})
	}
	go func() { served <- server.Serve(serveCtx, listener) }()
	defer func() {
		stopServing()
		err = errors.Join(err, <-served)
	}()

	for _, disk := range cfg.Disks {
		if _, err := child.Run(ctx, createLimit, cfg.QemuImg, "create", "-q", "-f", "qcow2", d.path(disk.Name+".qcow2"), fmt.Sprint(disk.Image.Size())); err != nil {
			return Result{}, fmt.Errorf("disk %s: %w", disk.Name, err)
		}
	}
	args, err := d.arguments()
	if err != nil {
		return Result{}, err
	}
	began := cfg.Now()
	if d.qemu, err = child.Start(cfg.QEMU, args...); err != nil {
		return Result{}, err
	}
	defer func() { _ = d.qemu.Stop(stopLimit) }() // how it ends is of no interest: it is told to
	client, err := d.connect(ctx)
	if err != nil {
		return Result{}, err
	}
	defer client.Close()

	result, err = d.wait(ctx)
	result.Took = cfg.Now().Sub(began)
	if err != nil {
		return Result{}, err
	}
	result.Console = d.console()
	if cfg.Screenshot != "" {
		if err := d.screenshot(ctx, client); err != nil {
			cfg.Log.Warnf("no screenshot: %v", err)
		}
	}
	return result, nil
}

// connect waits until QEMU answers.
func (d *drill) connect(ctx context.Context) (*qmp.Client, error) {
	ctx, cancel := context.WithTimeout(ctx, createLimit)
	defer cancel()
	for {
		if client, err := qmp.Dial(ctx, d.path("qmp")); err == nil {
			return client, nil
		}
		select {
		case <-d.qemu.Done():
			return nil, fmt.Errorf("the guest can't be started: %w", errors.Join(d.qemu.Err(), errEnded))
		case <-ctx.Done():
			return nil, fmt.Errorf("%s does not answer: %w", d.cfg.QEMU, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

var errEnded = errors.New("QEMU has ended")

// wait waits for the sign.
func (d *drill) wait(ctx context.Context) (Result, error) {
	patience, cancel := context.WithTimeout(ctx, d.cfg.Timeout)
	defer cancel()
	for {
		console := d.console()
		if strings.Contains(console, "Kernel panic - not syncing") {
			return Result{Why: "the guest's kernel has panicked"}, nil
		}
		switch d.cfg.Sign {
		case Agent:
			if d.agentAnswers(patience) {
				return Result{Passed: true, Why: "the guest agent answers"}, nil
			}
		case Login:
			if strings.Contains(console, "login:") {
				return Result{Passed: true, Why: "there is a login prompt on the serial console"}, nil
			}
		case Text:
			if strings.Contains(console, d.cfg.Text) {
				return Result{Passed: true, Why: fmt.Sprintf("the serial console says %q", d.cfg.Text)}, nil
			}
		}
		select {
		case <-d.qemu.Done():
			return Result{Why: "the guest has switched itself off"}, nil
		case <-patience.Done():
			if ctx.Err() != nil {
				return Result{}, ctx.Err()
			}
			return Result{Why: fmt.Sprintf("no sign of life (%s) within %s", d.cfg.Sign, d.cfg.Timeout)}, nil
		case <-time.After(pollEvery):
		}
	}
}

func (d *drill) agentAnswers(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, probeLimit)
	defer cancel()
	agent, err := qga.Dial(ctx, d.path("agent"))
	if err != nil {
		return false
	}
	_ = agent.Close()
	return true
}

// console is the end of what the guest has printed.
func (d *drill) console() string {
	f, err := os.Open(d.path("console"))
	if err != nil {
		return ""
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return ""
	}
	text := make([]byte, min(info.Size(), keptConsole))
	n, _ := f.ReadAt(text, info.Size()-int64(len(text)))
	return string(bytes.ToValidUTF8(text[:n], []byte("?")))
}

// screenshot has QEMU draw the guest's screen.
func (d *drill) screenshot(ctx context.Context, client *qmp.Client) error {
	ctx, cancel := context.WithTimeout(ctx, shotLimit)
	defer cancel()
	shot := d.path("screen.png")
	if err := client.Execute(ctx, "screendump", map[string]any{"filename": shot, "format": "png"}, nil); err != nil {
		return err
	}
	png, err := os.ReadFile(shot)
	if err != nil {
		return err
	}
	return durable.FS{}.WriteFile(d.cfg.Screenshot, png, 0o600)
}

// FindFirmware returns the path of UEFI code on this host, as Proxmox VE's and Debian's packages have it.
func FindFirmware() (string, error) {
	for _, path := range []string{"/usr/share/pve-edk2-firmware/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_CODE.fd"} {
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("no UEFI firmware: install ovmf (Debian) or pve-edk2-firmware (Proxmox VE): %w", fs.ErrNotExist)
}

// FindQEMU returns the name of QEMU's program on this host: Proxmox VE's, if there is one.
func FindQEMU() string {
	if path, err := exec.LookPath("kvm"); err == nil {
		return path
	}
	return "qemu-system-x86_64"
}
