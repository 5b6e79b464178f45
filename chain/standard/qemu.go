package standard

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"qmchain/chain"
	"qmchain/chain/image"
	"qmchain/internal/child"
)

const (
	// toolLimit bounds what reads and writes little.
	toolLimit = 10 * time.Minute
	// slowest is the rate at which data is expected to be written at least, in bytes per second.
	slowest = 1 << 20
	// maxSeconds is a year: more than anybody waits.
	maxSeconds = 365 * 24 * 3600
)

// node describes an image to QEMU's programs: with its format named and without what its header says of a backing file.
func node(path string) map[string]any {
	return map[string]any{"driver": "qcow2", "file": map[string]any{"driver": "file", "filename": path}, "backing": nil}
}

// named is a node as the name of a file.
func named(node map[string]any) string {
	text, err := json.Marshal(node)
	if err != nil {
		panic(err) // of strings and maps alone
	}
	return "json:" + string(text)
}

func (j *Job) qemuImg(ctx context.Context, limit time.Duration, args ...string) error {
	_, err := child.Run(ctx, limit, j.req.QemuImg, args...)
	if err != nil && strings.Contains(err.Error(), "Failed to get") && strings.Contains(err.Error(), "lock") {
		return fmt.Errorf("another program has the image open: %w: %w", ErrBusy, err)
	}
	return err
}

// exitLeaks is how qemu-img check ends where clusters are of no use, which hurts nobody.
const exitLeaks = 3

// check has qemu-img look for contradictions in an image. What is wrong wraps chain.ErrDamaged.
func (j *Job) check(ctx context.Context, path string, stored int64) error {
	err := j.qemuImg(ctx, toolLimit+time.Duration(stored/(100*slowest))*time.Second, "check", "-q", named(node(path)))
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		switch exit.ExitCode() {
		case exitLeaks:
			return nil
		case 2:
			return fmt.Errorf("%w: %w", chain.ErrDamaged, err)
		}
	}
	return err
}

// backingName is what a header says for a file in its own folder. QEMU takes what is before a colon for a protocol.
func backingName(name string) string {
	if strings.ContainsRune(name, ':') {
		return "./" + name
	}
	return name
}

// rebase writes the name of a backing file into a header; "" takes it out. Nothing is opened by it.
func (j *Job) rebase(ctx context.Context, path, backing string, format image.Format) error {
	args := []string{"rebase", "-q", "-u", "-f", "qcow2", "-b", backing}
	if backing != "" {
		args = append(args, "-F", format.String())
	}
	return j.qemuImg(ctx, toolLimit, append(args, path)...)
}

func (j *Job) snapshot(ctx context.Context, path, name string) error {
	return j.qemuImg(ctx, toolLimit, "snapshot", "-q", "-c", name, named(node(path)))
}

func (j *Job) resize(ctx context.Context, path string, size int64) error {
	return j.qemuImg(ctx, toolLimit, "resize", "-q", "--shrink", "-f", "qcow2", path, strconv.FormatInt(size, 10))
}

func (j *Job) create(ctx context.Context, path string, size int64, backing string, format image.Format) error {
	return j.qemuImg(ctx, toolLimit, "create", "-q", "-f", "qcow2", "-o", "compat=1.1,cluster_size="+strconv.Itoa(cluster),
		"-b", backing, "-F", format.String(), path, strconv.FormatInt(size, 10))
}
