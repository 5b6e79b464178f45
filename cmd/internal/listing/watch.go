package listing

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/alecthomas/kong"

	"qmchain/chain/source"
	"qmchain/internal/ui"
)

// interval is how often --watch looks; 0 is once.
type interval time.Duration

const (
	usualInterval = interval(5 * time.Second)
	maxInterval   = 99 * time.Second // a number from 100 on is a guest's name, a VMID
)

var _ kong.BoolMapperValue = (*interval)(nil)

// IsBool says that it needs no value.
func (*interval) IsBool() bool { return true }

// Decode implements kong.MapperValue: --watch, --watch=N or --watch N, in seconds.
func (i *interval) Decode(c *kong.DecodeContext) error {
	next := c.Scan.Peek()
	text := fmt.Sprint(next.Value)
	n, err := strconv.Atoi(strings.TrimSuffix(text, "s"))
	right := err == nil && n >= 1 && time.Duration(n)*time.Second <= maxInterval
	switch {
	case next.Type == kong.FlagValueToken && !right:
		return fmt.Errorf("it must be a number of seconds, from 1 to %d, but got %q", maxInterval/time.Second, text)
	case next.Type == kong.FlagValueToken, right && next.IsValue() && strconv.Itoa(n) == text:
		c.Scan.Pop()
		*i = interval(time.Duration(n) * time.Second)
	default:
		*i = usualInterval
	}
	return nil
}

// watch lists again and again, until ctx ends: that is how it is ended, and no failure.
func (c *Command) watch(ctx context.Context, u *ui.UI, set source.Set) error {
	page, err := u.Page()
	if errors.Is(err, ui.ErrNoTerminal) {
		return ui.Exit(ui.ExitUsage, ui.Hint(fmt.Errorf("--watch: %w", err), "--json is for programs, which can ask again"))
	}
	if err != nil {
		return err
	}
	defer page.Close()
	looks := make(chan string, 1)
	go func() {
		for ctx.Err() == nil {
			looks <- c.text(ctx, u, set)
			select {
			case <-ctx.Done():
			case <-time.After(time.Duration(c.Watch)):
			}
		}
	}()
	// The terminal's user is not to wait for a share that hangs.
	text, last := "looking...", time.Now()
	for {
		heading := fmt.Sprintf("%s, every %s; Ctrl-C ends it", set.Dir(), time.Duration(c.Watch))
		if silent := time.Since(last); silent > time.Duration(c.Watch)+stale {
			heading = fmt.Sprintf("%s: NO ANSWER for %s", set.Dir(), silent.Round(time.Second))
		}
		if err := page.Draw(heading, text); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case text = <-looks:
			last = time.Now()
		case <-time.After(time.Second):
		}
	}
}

// stale is how long a look may take before the user is told.
const stale = 3 * time.Second

// text is what there is to see now.
func (c *Command) text(ctx context.Context, u *ui.UI, set source.Set) string {
	found, err := c.look(ctx, set)
	if err != nil {
		return "error: " + err.Error()
	}
	var b strings.Builder
	_ = found.tree(time.Now(), c.Long).print(&b, u.Unicode(), u.Width()) // into memory
	for _, p := range found.problems {
		if !p.lost {
			_, _ = io.WriteString(&b, "warning: "+p.text+"\n")
		}
	}
	return b.String()
}
