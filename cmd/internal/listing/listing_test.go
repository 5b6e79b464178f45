package listing

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"qmchain/chain"
	"qmchain/chain/repo/repotest"
	"qmchain/chain/source"
	"qmchain/internal/ui"
)

func manyGuests(t *testing.T) (dir string, set source.Set) {
	t.Helper()
	dir = t.TempDir()
	r := repotest.Many{
		Guests: 5, Points: 8, Disks: 1, Size: 1 << 20, Name: func(i int) string { return fmt.Sprint(110 + i) },
		Start: time.Now().Add(-100 * 24 * time.Hour), Every: time.Hour,
	}.Make(t, dir)
	g, err := r.Guest("112")
	if err != nil {
		t.Fatal(err)
	}
	points, _, err := g.Points()
	if err != nil {
		t.Fatal(err)
	}
	repotest.Flip(t, filepath.Join(g.PointDir(points[3].ID), chain.ManifestFile), 40)
	if set, err = source.Open(dir); err != nil {
		t.Fatal(err)
	}
	return dir, set
}

// Of each guest only its rows are kept, and they are those that all points together have.
func TestGuestByGuest(t *testing.T) {
	t.Parallel()
	dir, set := manyGuests(t)
	c := &Command{Repo: dir}
	found, err := c.look(t.Context(), set)
	if err != nil || len(found.points) != 5*8-1 || len(found.problems) != 1 || !errors.Is(found.damaged, chain.ErrDamaged) {
		t.Fatalf("%d points, %v, %v, %v", len(found.points), found.problems, found.damaged, err)
	}
	var want, got, log bytes.Buffer
	if err := found.tree(time.Now(), false).print(&want, false, 0); err != nil {
		t.Fatal(err)
	}
	u, err := ui.New(&got, &log, func(string) string { return "" }, ui.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Run(t.Context(), u); !errors.Is(err, chain.ErrDamaged) {
		t.Errorf("a point is damaged: %v", err)
	}
	if got.String() != want.String() || strings.Count(log.String(), "point left out") != 1 {
		t.Errorf("listed:\n%s\nlog: %s\nwant:\n%s", got.String(), log.String(), want.String())
	}
}

// Who is interrupted has no list, in place of one that lacks guests.
func TestInterrupted(t *testing.T) {
	t.Parallel()
	_, set := manyGuests(t)
	for n := range 5 {
		ctx, cancel := context.WithCancel(t.Context())
		guests := 0
		err := (&Command{}).each(ctx, set, func(listing) {
			if guests++; guests == n+1 {
				cancel()
			}
		})
		if !errors.Is(err, context.Canceled) {
			t.Errorf("after %d guests: %v", guests, err)
		}
		cancel()
	}
}
