package listing

import (
	"testing"
	"time"

	"github.com/alecthomas/kong"
)

func TestInterval(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		args  []string
		watch time.Duration
		guest string
		wrong bool
	}{
		{[]string{"web"}, 0, "web", false},
		{[]string{"--watch"}, 5 * time.Second, "", false},
		{[]string{"--watch", "web"}, 5 * time.Second, "web", false},
		{[]string{"--watch", "110"}, 5 * time.Second, "110", false},
		{[]string{"--watch", "2"}, 2 * time.Second, "", false},
		{[]string{"--watch", "2", "110"}, 2 * time.Second, "110", false},
		{[]string{"--watch=30"}, 30 * time.Second, "", false},
		{[]string{"--watch=30s", "web"}, 30 * time.Second, "web", false},
		{[]string{"--watch", "30s"}, 5 * time.Second, "30s", false}, // a guest can be called so
		{[]string{"--watch", "--long"}, 5 * time.Second, "", false},
		{[]string{"--watch=0"}, 0, "", true},
		{[]string{"--watch=100"}, 0, "", true},
		{[]string{"--watch=often"}, 0, "", true},
	} {
		var g Command
		parser, err := kong.New(&g, kong.Exit(func(int) { t.Error("exit") }))
		if err != nil {
			t.Fatal(err)
		}
		_, err = parser.Parse(append([]string{"--repo", "/mnt"}, c.args...))
		if (err != nil) != c.wrong || !c.wrong && (time.Duration(g.Watch) != c.watch || g.Guest != c.guest) {
			t.Errorf("%q: %s of %q, %v", c.args, time.Duration(g.Watch), g.Guest, err)
		}
	}
}
