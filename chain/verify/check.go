package verify

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"time"

	"qmchain/internal/child"
)

// qemu-img check reads all tables of an image, which are a 512th of its data at most, from a disk that may be slow.
const (
	checkLimit = 10 * time.Minute
	slowest    = 100 << 20 // bytes of image per second
)

// Exit codes of qemu-img check, qemu-img(1).
const (
	checkCorrupt = 2
	checkLeaks   = 3
)

// qemuCheck has qemu-img look for contradictions in an image. Its error is one of the whole verification.
func (r *run) qemuCheck(ctx context.Context, f *file) error {
	options, err := json.Marshal(map[string]any{
		"driver": "qcow2", "backing": nil, "file": map[string]string{"driver": "file", "filename": f.at.Path},
	})
	if err != nil {
		return err
	}
	name := "json:" + string(options)
	limit := checkLimit + time.Duration(f.at.Bytes/slowest)*time.Second
	_, err = child.Run(ctx, limit, r.QemuImg, "check", "-q", name)
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	found := checked(err, name, f.at.Name)
	for _, t := range f.targets {
		r.foundBy(&t.tables, t, found)
	}
	return nil
}

// checked is what a failure of qemu-img check says of a file, which it calls name.
func checked(err error, name, file string) fault {
	var exit *exec.ExitError
	code := -1
	if errors.As(err, &exit) {
		code = exit.ExitCode()
	}
	text := strings.TrimPrefix(err.Error(), fmt.Sprintf("exit status %d: ", code))
	text = strings.ReplaceAll(text, name, file)
	switch code {
	case checkCorrupt:
		return fault{Damage, file, "qemu-img check: " + firstLines(text)}
	case checkLeaks:
		return fault{Leak, file, fmt.Sprintf("%d clusters are leaked: they take space for nothing", max(1, strings.Count(text, "Leaked cluster")))}
	}
	if strings.Contains(text, "lock") && strings.Contains(text, "Failed to get") {
		return fault{BeingMerged, file, "another program writes to it"}
	}
	return fault{Unreadable, file, "qemu-img check: " + firstLines(text)}
}

// firstLines shortens what can be a line for each cluster of an image.
func firstLines(text string) string {
	const most = 2
	lines := strings.Split(strings.TrimSpace(text), "\n")
	if n := len(lines); n > most {
		lines = append(lines[:most], fmt.Sprintf("and %d more lines", n-most))
	}
	return strings.Join(lines, "; ")
}
