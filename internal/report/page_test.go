package report

import (
	"bytes"
	"fmt"
	"image"
	"image/color"
	"strings"
	"testing"
	"time"
)

func pageOf(t *testing.T, r *Report) []byte {
	t.Helper()
	var page bytes.Buffer
	if err := r.Page(&page); err != nil {
		t.Fatal(err)
	}
	return page.Bytes()
}

// The browser must be able to complain, or that it does not says nothing.
func TestBrowserComplains(t *testing.T) {
	t.Parallel()
	b := browse(t, []byte(`<!DOCTYPE html><meta http-equiv="Content-Security-Policy" content="script-src 'none'"><script>1</script><img src="http://elsewhere.invalid/x.png">`))
	if !b.says("Content Security Policy") {
		t.Error("nobody complains of the script")
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, want := range []string{"http://elsewhere.invalid/x.png", "GET elsewhere.invalid/x.png"} {
		if all := fmt.Sprint(b.requests, b.proxied); !strings.Contains(all, want) {
			t.Errorf("no %s in %s", want, all)
		}
	}
}

// What is on the page is what the report has, and nothing of it is more than text.
func TestPageInBrowser(t *testing.T) {
	t.Parallel()
	r := sampleReport()
	b := browse(t, pageOf(t, r))
	b.screen(1200, 900, "light")

	for selector, want := range map[string]int{
		".overview tbody tr": len(r.Guests),
		"article":            len(r.Guests),
		"svg.picture":        len(r.Guests) - 1, // one has no point
		"script, img, iframe, object, embed, form, [onload], [onerror], [style]": 0,
		".picture title, .picture desc":                                          2*(len(r.Guests)-1) + b.count("g.place"),
		".attention li":                                                          5,
		"h1":                                                                     1,
		"article h3":                                                             len(r.Guests),
		"th:not([scope])":                                                        0,
	} {
		if got := b.count(selector); got != want {
			t.Errorf("%d of %s, not %d", got, selector, want)
		}
	}
	for i, g := range r.Guests {
		at := fmt.Sprintf("article:nth-of-type(%d) ", i+1)
		nodes := map[string]int{}
		points, single := 0, 0
		picture := draw(g.Points, created, mostPlaces)
		for _, p := range picture.Places {
			points += p.Count
			if p.Count == 1 {
				single++
				nodes[p.Symbol]++
			}
		}
		if points != len(g.Points) {
			t.Errorf("%s: the picture has %d of %d points", g.Name, points, len(g.Points))
		}
		for symbol, want := range nodes {
			if got := b.count(at + fmt.Sprintf(`g.place > use[href="#n-%s"]`, symbol)); got != want {
				t.Errorf("%s: %d nodes %s, not %d", g.Name, got, symbol, want)
			}
		}
		protected, removed, broken, stored := 0, 0, 0, 0
		for _, p := range g.Points {
			for n, is := range map[*int]bool{&protected: p.Protected, &removed: p.Removed, &broken: len(p.Damage) > 0} {
				if is {
					*n++
				}
			}
		}
		for _, p := range picture.Places {
			if p.Bar > 0 {
				stored++
			}
		}
		for selector, want := range map[string]int{
			"g.place":                      len(picture.Places),
			"rect.bar":                     stored,
			`use[href="#n-lock"]`:          protected,
			`use[href="#n-removed"]`:       removed,
			`use[href="#n-damaged"]`:       broken,
			".link":                        len(picture.Links),
			".points tbody tr":             min(len(g.Points), mostRows),
			".remarks li":                  len(g.Remarks),
			"h3 .badge." + string(g.State): 1,
		} {
			if got := b.count(at + selector); got != want {
				t.Errorf("%s: %d of %s, not %d", g.Name, got, selector, want)
			}
		}
	}

	// Each link leads somewhere, and each node is there to be seen.
	if lost := ask[int](b, `[...document.querySelectorAll("a[href], use")].filter(a => !document.querySelector(a.getAttribute("href"))).length`); lost != 0 {
		t.Errorf("%d links lead nowhere", lost)
	}
	if name := ask[string](b, `document.querySelector('[href="#g-zz"] + .vm').textContent`); name != strings.Join(strings.Fields(hostile), " ") {
		t.Errorf("the guest's name is %q", name)
	}
	if text := ask[string](b, `document.querySelector("article:nth-of-type(6) .points").textContent`); strings.Count(text, hostile) != 2 {
		t.Errorf("the note and the reason are not in %q", text)
	}
	for _, one := range []string{"2026-11-21 02:30 UTC", "7 h ago", "no sign of life", "8 of 13 points are not whole", "of them are drawn in groups", "The newest 200 points"} {
		if !ask[bool](b, fmt.Sprintf("document.body.innerText.includes(%q)", one)) && !ask[bool](b, fmt.Sprintf("document.body.textContent.includes(%q)", one)) {
			t.Errorf("the page does not say %q", one)
		}
	}
	b.quiet()
}

// Should a text ever become more than that, the browser still loads nothing and runs nothing.
func TestPolicy(t *testing.T) {
	t.Parallel()
	b := browse(t, pageOf(t, sampleReport()))
	for _, c := range []struct{ what, try string }{
		{"img-src", `new Promise(r => { const e = new Image(); e.onload = e.onerror = () => r(true); e.src = "http://hostile.invalid/img" })`},
		{"connect-src", `fetch("http://hostile.invalid/fetch").then(() => true, () => true)`},
		{"script-src", `(() => { const e = document.createElement("script"); e.textContent = "document.title = 'run'"; document.body.append(e); return true })()`},
		{"style-src", `(() => { document.body.setAttribute("style", "background: url(http://hostile.invalid/style)"); return true })()`},
		{"frame-src", `new Promise(r => { const e = document.createElement("iframe"); e.onload = () => r(true); e.src = "http://hostile.invalid/frame"; document.body.append(e) })`},
		{"form-action", `(() => { const e = document.createElement("form"); e.action = "http://hostile.invalid/form"; document.body.append(e); e.submit(); return true })()`},
	} {
		ask[bool](b, c.try)
		if !b.says("Content Security Policy", c.what) {
			t.Errorf("nobody complains of what is against %s", c.what)
		}
	}
	if title := ask[string](b, "document.title"); title != "Backups in /mnt/backup" {
		t.Errorf("a script has made the title %q", title)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.proxied) != 1 {
		t.Errorf("the network was asked for %q", b.proxied)
	}
}

// rgb is a colour to the eye's precision.
func rgb(c color.Color) [3]uint8 {
	r, g, b, _ := c.RGBA()
	return [3]uint8{uint8(r >> 8), uint8(g >> 8), uint8(b >> 8)}
}

func brightness(c [3]uint8) int { return (int(c[0])*3 + int(c[1])*6 + int(c[2])) / 10 }

// step is from one pixel that is looked at to the next.
const step = 3

// colours counts the pixels of each colour in a part of a picture; back is the most frequent one.
func colours(m image.Image, from, to image.Point) (n map[[3]uint8]int, back [3]uint8) {
	n = map[[3]uint8]int{}
	for y := from.Y; y < to.Y; y += step {
		for x := from.X; x < to.X; x += step {
			c := rgb(m.At(x, y))
			if n[c]++; n[c] > n[back] {
				back = c
			}
		}
	}
	return n, back
}

// The page looks as it is meant to: on a desk and on a phone, light and dark.
func TestScreenshot(t *testing.T) {
	t.Parallel()
	r := sampleReport()
	b := browse(t, pageOf(t, r))
	backs := map[string][3]uint8{}
	for _, c := range []struct {
		name, scheme  string
		width, height int
	}{{"desk", "light", 1200, 900}, {"desk", "dark", 1200, 900}, {"phone", "light", 390, 800}, {"phone", "dark", 390, 800}} {
		name := c.name + " " + c.scheme
		b.screen(c.width, c.height, c.scheme)
		if wide := ask[int](b, "document.documentElement.scrollWidth"); wide > c.width {
			t.Errorf("%s: the page is %d wide, for a screen of %d", name, wide, c.width)
		}
		if small := ask[int](b, `[...document.querySelectorAll("body *")].filter(e => e.innerText && parseFloat(getComputedStyle(e).fontSize) < 11).length`); small > 0 {
			t.Errorf("%s: %d texts are too small to be read", name, small)
		}
		top := b.shoot(box{0, 0, float64(c.width), float64(c.height)})
		if got := top.Bounds().Size(); got != image.Pt(c.width, c.height) {
			t.Fatalf("%s: the picture is %v", name, got)
		}
		n, back := colours(top, image.Pt(0, 0), top.Bounds().Max)
		backs[c.scheme] = back
		if len(n) < 20 || n[back] < c.width*c.height/step/step/3 {
			t.Errorf("%s: %d colours, and %d pixels of background: that is no page", name, len(n), n[back])
		}
		// In the picture of the first guest there are nodes on the line, bars below, and a full's bar that is by far the highest.
		svg := b.box("article:nth-of-type(1) svg.picture")
		shown := b.box("article:nth-of-type(1) .newest")
		if shown.X < 0 || shown.X+shown.Width > float64(c.width) || svg.Height != height {
			t.Errorf("%s: the picture is at %+v, in %+v", name, svg, shown)
		}
		if c.name == "phone" {
			// What does not fit can be moved to, and the newest is what one sees first.
			if now := b.box("article:nth-of-type(1) .now"); now.X < 100 || now.X > float64(c.width) {
				t.Errorf("%s: the newest points are out of view, at %+v", name, now)
			}
			continue
		}
		m := b.shoot(svg)
		_, back = colours(m, image.Pt(0, 0), m.Bounds().Max)
		for i, p := range draw(r.Guests[0].Points, created, mostPlaces).Places {
			x := int(p.X)
			if c := rgb(m.At(x, lineY)); c == back {
				t.Errorf("%s: there is no node %d at %d", name, i, x)
			}
			if c := rgb(m.At(x, barsY-3)); c == back {
				t.Errorf("%s: there is no bar %d at %d", name, i, x)
			}
			if above := int(p.BarY) - 4; above > barsTop {
				if c := rgb(m.At(x, above)); c != back && c == rgb(m.At(x, barsY-3)) {
					t.Errorf("%s: bar %d is higher than it is meant to be", name, i)
				}
			}
			if p.Bar >= 4 {
				if c := rgb(m.At(x, int(p.BarY)+2)); c == back {
					t.Errorf("%s: bar %d is lower than it is meant to be", name, i)
				}
			}
		}
		full, inc := rgb(m.At(int(svgX(r, 0)), lineY)), rgb(m.At(int(svgX(r, 1)), lineY))
		if full == inc {
			t.Errorf("%s: a full looks like an increment", name)
		}
	}
	if brightness(backs["light"]) < 200 || brightness(backs["dark"]) > 60 {
		t.Errorf("the background is %v when it is to be light, and %v when dark", backs["light"], backs["dark"])
	}
	b.quiet()
}

func svgX(r *Report, place int) float64 {
	return draw(r.Guests[0].Points, created, mostPlaces).Places[place].X
}

// Half a thousand guests with hundreds of points each make a page that a browser takes.
func TestPageBounded(t *testing.T) {
	t.Parallel()
	const guests, points = 500, 200
	r := &Report{Set: "/mnt/backup", Kind: "qmchain", Created: created, MaxAge: (26 * time.Hour).Seconds(), State: Good}
	for i := range guests {
		g := sampleGuest(fmt.Sprint(100+i), hostile, days(points-1, 0)...)
		for k := range g.Points {
			g.Points[k].Note = strings.Repeat("long ", 100)
			if i%10 == 0 {
				g.Points[k].Damage = []string{strings.Repeat("broken ", 100)}
				g.remark(Warning, "%s", strings.Repeat("broken ", 100))
			}
		}
		g.judge(Options{Now: created, MaxAge: 26 * time.Hour})
		r.Guests = append(r.Guests, g)
	}
	page := pageOf(t, r)
	t.Logf("%d bytes", len(page))
	if len(page) > 10<<20 {
		t.Errorf("the page has %d bytes", len(page))
	}
	b := browse(t, page)
	b.screen(1200, 900, "light")
	if got := b.count("article"); got != guests {
		t.Errorf("%d of %d guests", got, guests)
	}
	if got := b.count("g.place"); got > maxPlaces || got < guests*fewPlaces/2 {
		t.Errorf("%d places", got)
	}
	if got := ask[int](b, `[...document.querySelectorAll("article:nth-of-type(2) g.place")].reduce((n, g) => n + Number(g.querySelector(".count")?.textContent ?? 1), 0)`); got != points {
		t.Errorf("the places stand for %d of %d points", got, points)
	}
	if got := ask[string](b, `document.querySelector("article:nth-of-type(2) details").textContent`); !strings.Contains(got, "older points are not in this table") {
		t.Errorf("what is left out is not told: %s", got)
	}
	b.quiet()
}
