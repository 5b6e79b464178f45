package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/alecthomas/kong"

	"qmchain/cmd/internal/cli"
	"qmchain/fusefs/inside"
	"qmchain/internal/ui"
)

// lsCmd lists what is in a folder of a guest, or the volumes of a point.
type lsCmd struct {
	volumeFlags `embed:""`
	Long        bool `short:"l" help:"With modes, owners (as numbers), sizes and times."`
	JSON        bool `conf:"no" name:"json" help:"Print one JSON document."`
	Path        ref  `arg:"" complete:"file-in" help:"What to list: POINT:/PATH; or POINT alone: its partitions and volumes, for which no appliance is started."`
}

// catCmd writes files of a guest to standard output.
type catCmd struct {
	volumeFlags `embed:""`
	Path        refs `arg:"" complete:"file-in" help:"The files: POINT:/PATH, all of one point."`
}

// cpCmd copies files of a guest.
type cpCmd struct {
	volumeFlags `embed:""`
	Recursive   bool `short:"r" help:"Copy folders, with all that is in them. Symbolic links are copied as such."`
	Preserve    bool `short:"p" help:"Keep owners, modes (with set-uid) and times. Else what is copied is yours, with modes as the umask allows."`
	Path        refs `arg:"" complete:"copied" help:"The files or folders: POINT:/PATH, all of one point; and last where to: a new name, or a folder that is there. Nothing is replaced."`
}

// ref is POINT:/PATH, and refs are several. Kong would take what is no UTF-8 out of a string.
type (
	ref  string
	refs []string
)

var (
	_ kong.MapperValue = (*ref)(nil)
	_ kong.MapperValue = (*refs)(nil)
)

func (r *ref) Decode(c *kong.DecodeContext) error {
	t, err := c.Scan.PopValue("path")
	*r = ref(t.String())
	return err
}

func (r *refs) Decode(c *kong.DecodeContext) error {
	for _, t := range c.Scan.PopWhile(func(t kong.Token) bool { return t.IsValue() }) {
		*r = append(*r, t.String())
	}
	return nil
}

// entryJSON is one file in the output of ls --json.
type entryJSON struct {
	Name string `json:"name"`
	// NameBytes has the name, in base64, where it is no UTF-8.
	NameBytes []byte    `json:"name_bytes,omitempty"`
	Mode      string    `json:"mode"`
	UID       uint32    `json:"uid"`
	GID       uint32    `json:"gid"`
	Size      int64     `json:"size"`
	Time      time.Time `json:"time"`
	Target    string    `json:"target,omitempty"`
}

// volumeJSON is one volume in the output of ls --json.
type volumeJSON struct {
	Disk  string `json:"disk,omitempty"`
	Part  string `json:"part,omitempty"`
	LV    string `json:"lv,omitempty"`
	Size  int64  `json:"size"` // bytes
	Type  string `json:"type,omitempty"`
	Label string `json:"label,omitempty"`
	UUID  string `json:"uuid,omitempty"`
	Why   string `json:"why,omitempty"` // it can't be shown by itself
}

func (c *lsCmd) Run(ctx context.Context, u *ui.UI, common *cli.Common) error {
	point, name, ok := strings.Cut(string(c.Path), ":")
	if !ok {
		return explainFiles(c.listVolumes(ctx, u, point))
	}
	return explainFiles(c.view(ctx, u, common, []string{string(c.Path)}, func(ctx context.Context, view *inside.View, t *timer, _ []string) error {
		list, err := inside.List(ctx, view.Root(), name, t.progress)
		if err != nil {
			return inGuest(err, point, name)
		}
		t.Stop() // who reads the result may take his time
		out := []entryJSON{}
		for _, e := range list {
			j := entryJSON{Name: e.Name, Mode: modeText(e.Mode), UID: e.UID, GID: e.GID, Size: e.Size, Time: e.Time.UTC(), Target: e.Target}
			if !utf8.ValidString(e.Name) {
				j.NameBytes = []byte(e.Name)
			}
			out = append(out, j)
		}
		return u.Result(c.JSON, out, func(w io.Writer) error { return c.print(w, list) })
	}))
}

func (c *lsCmd) print(w io.Writer, list []inside.Entry) error {
	for _, e := range list {
		line := quoted(e.Name)
		if c.Long {
			line = fmt.Sprintf("%s\t%d\t%d\t%d\t%s\t%s", modeText(e.Mode), e.UID, e.GID, e.Size, e.Time.UTC().Format(time.DateTime), line)
			if e.Target != "" {
				line += " -> " + quoted(e.Target)
			}
		}
		if _, err := fmt.Fprintln(w, line); err != nil {
			return err
		}
	}
	return nil
}

// modeText is a mode as ls(1) shows it, which has other letters than Go.
func modeText(m fs.FileMode) string {
	letter := byte('-')
	switch {
	case m&fs.ModeDir != 0:
		letter = 'd'
	case m&fs.ModeSymlink != 0:
		letter = 'l'
	case m&fs.ModeNamedPipe != 0:
		letter = 'p'
	case m&fs.ModeSocket != 0:
		letter = 's'
	case m&fs.ModeCharDevice != 0:
		letter = 'c'
	case m&fs.ModeDevice != 0:
		letter = 'b'
	}
	text := []byte(m.Perm().String())
	text[0] = letter
	for _, special := range []struct {
		bit   fs.FileMode
		at    int
		both  byte // with the right to execute
		alone byte
	}{{fs.ModeSetuid, 3, 's', 'S'}, {fs.ModeSetgid, 6, 's', 'S'}, {fs.ModeSticky, 9, 't', 'T'}} {
		switch {
		case m&special.bit == 0:
		case text[special.at] == 'x':
			text[special.at] = special.both
		default:
			text[special.at] = special.alone
		}
	}
	return string(text)
}

// quoted is a name as a terminal can show it: names are the guest's, and can hold line feeds and control sequences.
func quoted(name string) string {
	for _, r := range name {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return strconv.Quote(name)
		}
	}
	return name
}

func (c *lsCmd) listVolumes(ctx context.Context, u *ui.UI, point string) error {
	o, err := c.open(ctx, u, point)
	if err != nil {
		return err
	}
	defer o.close()
	out := []volumeJSON{}
	for _, v := range o.volumes {
		out = append(out, volumeJSON{v.Disk, v.Part, v.LV, v.Size, v.Type, v.Label, v.UUID, v.Why})
	}
	return u.Result(c.JSON, out, func(w io.Writer) error { return inside.Print(w, o.volumes) })
}

func (c *catCmd) Run(ctx context.Context, u *ui.UI, common *cli.Common) error {
	return explainFiles(c.view(ctx, u, common, c.Path, func(ctx context.Context, view *inside.View, t *timer, names []string) error {
		for _, name := range names {
			f, err := inside.OpenFile(view.Root(), name)
			if err != nil {
				point, _, _ := strings.Cut(c.Path[0], ":")
				return inGuest(err, point, name)
			}
			err = copyOut(ctx, os.Stdout, f, t)
			_ = f.Close() // nothing was written
			if errors.Is(err, errNoReader) {
				return nil
			}
			if err != nil {
				return err
			}
		}
		return nil
	}))
}

// errNoReader is returned when nobody reads standard output any more.
var errNoReader = errors.New("who reads standard output has ended")

// copyOut copies a file. Who reads may take his time.
func copyOut(ctx context.Context, w io.Writer, f *os.File, t *timer) error {
	buf := make([]byte, 1<<20)
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n, err := f.Read(buf)
		t.Stop()
		if _, err := w.Write(buf[:n]); err != nil {
			return cmp.Or(ui.Shown(err), errNoReader)
		}
		t.progress()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (c *cpCmd) Run(ctx context.Context, u *ui.UI, common *cli.Common) error {
	if len(c.Path) < 2 {
		return ui.Exit(ui.ExitUsage, errors.New("where to copy to is missing"))
	}
	from, to := c.Path[:len(c.Path)-1], c.Path[len(c.Path)-1]
	info, err := os.Stat(to)
	into := err == nil && info.IsDir()
	if len(from) > 1 && !into {
		return ui.Exit(ui.ExitUsage, fmt.Errorf("%s: to copy several it must be a folder that is there", to))
	}
	skipped := 0
	err = c.view(ctx, u, common, from, func(ctx context.Context, view *inside.View, t *timer, names []string) error {
		copier := inside.Copier{
			Root: view.Root(), Recursive: c.Recursive, Preserve: c.Preserve, Progress: t.progress,
			Skipped: func(name string) {
				skipped++
				u.Log.Warnf("%s is no file, folder or link: left out", quoted(name))
			},
		}
		for _, name := range names {
			target := filepath.Clean(to)
			if into {
				base := path.Base(path.Clean("/" + name))
				if base == "/" {
					return ui.Exit(ui.ExitUsage, fmt.Errorf("%s is there: to copy all of a file system a new name is needed", to))
				}
				target = filepath.Join(to, base)
			}
			if err := copier.Copy(ctx, name, target); err != nil {
				point, _, _ := strings.Cut(from[0], ":")
				return inGuest(err, point, path.Clean(name))
			}
		}
		return nil
	})
	if err == nil && skipped > 0 {
		return ui.Exit(ui.ExitPartly, fmt.Errorf("%d left out that are no files, folders or links", skipped))
	}
	return explainFiles(err)
}

// view shows the files of a point to do, which gets the paths in it. They are gone when it returns.
func (f *volumeFlags) view(ctx context.Context, u *ui.UI, common *cli.Common, refs []string, do func(context.Context, *inside.View, *timer, []string) error) (err error) {
	point, names, err := splitRefs(refs)
	if err != nil {
		return ui.Exit(ui.ExitUsage, err)
	}
	o, err := f.open(ctx, u, point)
	if err != nil {
		return err
	}
	defer o.close()
	temp, err := inside.NewTemp(ctx, os.TempDir(), time.Now())
	if err != nil {
		return err
	}
	defer func() {
		if left := temp.Remove(context.WithoutCancel(ctx)); left != nil {
			u.Log.WithError(left).Warn("temporary files are left")
		}
	}()
	ctx, t, stop := newTimer(ctx, f.Timeout)
	defer stop()
	view, err := f.start(ctx, u, common, o, place{temp: temp.Dir})
	if err != nil {
		return err
	}
	defer view.Close()
	// What waits for an appliance or a share that hangs gets an error when the view is gone.
	defer context.AfterFunc(ctx, view.Close)()
	t.progress()
	if err = do(ctx, view, t, names); err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// inGuest names the file that an error is about as the user has: with the point, as it is none of this host's.
func inGuest(err error, point, name string) error {
	var failed *os.PathError
	if errors.As(err, &failed) && (failed.Path == name || failed.Path == strings.TrimPrefix(name, "/")) {
		failed.Path = point + ":" + name
	}
	return err
}

// splitRefs splits POINT:/PATH, all of one point.
func splitRefs(refs []string) (point string, names []string, err error) {
	for i, ref := range refs {
		p, name, ok := strings.Cut(ref, ":")
		switch {
		case !ok || !strings.HasPrefix(name, "/"):
			return "", nil, fmt.Errorf("%s: POINT:/PATH is asked for", ref)
		case i > 0 && p != point:
			return "", nil, fmt.Errorf("%s: not of the same point as %s", ref, refs[0])
		}
		point, names = p, append(names, name)
	}
	return point, names, nil
}
