package report

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"image"
	"image/png"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// browser is a headless Chromium that is steered by its DevTools protocol, over pipes. All that it asks a network for goes to a
// proxy of the test's, which has nothing but the page.
type browser struct {
	t    *testing.T
	in   *os.File // to Chromium
	page string   // where the page is

	mu       sync.Mutex
	next     int
	session  string
	answers  map[int]chan message
	events   map[string]chan struct{} // closed at the first event of that kind
	said     []string                 // on the console, or as an error
	requests []string                 // that pages began
	proxied  []string                 // that reached the proxy
	gone     error
}

type message struct {
	ID      int             `json:"id,omitempty"`
	Session string          `json:"sessionId,omitempty"`
	Method  string          `json:"method,omitempty"`
	Params  json.RawMessage `json:"params,omitempty"`
	Result  json.RawMessage `json:"result,omitempty"`
	Error   *struct {
		Message string `json:"message"`
	} `json:"error,omitempty"`
}

// patience bounds each step of the browser.
const patience = 60 * time.Second

// browse opens a page in a new browser.
func browse(t *testing.T, page []byte) *browser {
	t.Helper()
	b := &browser{t: t, answers: map[int]chan message{}, events: map[string]chan struct{}{}}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b.mu.Lock()
		b.proxied = append(b.proxied, r.Method+" "+r.Host+r.URL.Path)
		b.mu.Unlock()
		if r.Host != "backups.invalid" || r.URL.Path != "/report.html" {
			http.NotFound(w, r)
			return
		}
		w.Header().Set("Content-Type", "text/html")
		_, _ = w.Write(page)
	}))
	t.Cleanup(server.Close)
	b.page = "http://backups.invalid/report.html"
	b.start(server.Listener.Addr())
	b.open()
	return b
}

func (b *browser) start(proxy net.Addr) {
	b.t.Helper()
	program := ""
	for _, name := range []string{"chromium-headless-shell", "chromium"} {
		if path, err := exec.LookPath(name); err == nil {
			program = path
			break
		}
	}
	if program == "" {
		b.t.Fatal("there is no Chromium: `make setup` installs it")
	}
	toIn, toOut, err := os.Pipe()
	if err != nil {
		b.t.Fatal(err)
	}
	fromIn, fromOut, err := os.Pipe()
	if err != nil {
		b.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(b.t.Context()))
	cmd := exec.CommandContext(ctx, program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
		"--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
		"--user-data-dir="+b.t.TempDir(), "--proxy-server=http://"+proxy.String(), "--proxy-bypass-list=<-loopback>",
		"--remote-debugging-pipe", "about:blank")
	cmd.ExtraFiles = []*os.File{toIn, fromOut} // its descriptors 3 and 4
	// Chromium is many processes: all of them must go.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Start(); err != nil {
		b.t.Fatal(err)
	}
	_ = toIn.Close()
	_ = fromOut.Close()
	b.in = toOut
	done := make(chan struct{})
	go func() {
		defer close(done)
		b.read(fromIn)
	}()
	b.t.Cleanup(func() {
		cancel()
		_ = cmd.Wait()
		_ = toOut.Close()
		_ = fromIn.Close()
		<-done
		if b.t.Failed() {
			b.t.Logf("Chromium said:\n%s", stderr.String())
		}
	})
}

// read takes what Chromium says, until it is gone.
func (b *browser) read(from *os.File) {
	r := bufio.NewReader(from)
	for {
		text, err := r.ReadBytes(0)
		if err == nil {
			var m message
			if err = json.Unmarshal(text[:len(text)-1], &m); err == nil {
				b.take(m)
				continue
			}
		}
		b.mu.Lock()
		b.gone = err
		for _, answer := range b.answers {
			close(answer)
		}
		b.answers = nil
		b.mu.Unlock()
		return
	}
}

func (b *browser) take(m message) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if answer := b.answers[m.ID]; answer != nil {
		delete(b.answers, m.ID)
		answer <- m
		return
	}
	switch m.Method {
	case "Network.requestWillBeSent":
		var p struct{ Request struct{ URL string } }
		_ = json.Unmarshal(m.Params, &p)
		b.requests = append(b.requests, p.Request.URL)
	case "Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown":
		b.said = append(b.said, string(m.Params))
	}
	if event := b.events[m.Method]; event != nil {
		delete(b.events, m.Method)
		close(event)
	}
}

// call has Chromium do something, and decodes its answer into result, unless that is nil.
func (b *browser) call(method string, params, result any) {
	b.t.Helper()
	if err := b.try(method, params, result); err != nil {
		b.t.Fatalf("%s: %v", method, err)
	}
}

func (b *browser) try(method string, params, result any) error {
	text, err := json.Marshal(params)
	if err != nil {
		return err
	}
	answer := make(chan message, 1)
	b.mu.Lock()
	b.next++
	m := message{ID: b.next, Session: b.session, Method: method, Params: text}
	if b.gone != nil {
		err = b.gone
	} else {
		b.answers[m.ID] = answer
	}
	b.mu.Unlock()
	if err != nil {
		return err
	}
	if text, err = json.Marshal(m); err != nil {
		return err
	}
	if _, err := b.in.Write(append(text, 0)); err != nil {
		return err
	}
	select {
	case m, ok := <-answer:
		switch {
		case !ok:
			return errors.New("Chromium is gone")
		case m.Error != nil:
			return errors.New(m.Error.Message)
		case result != nil:
			return json.Unmarshal(m.Result, result)
		}
		return nil
	case <-time.After(patience):
		return errors.New("no answer")
	}
}

// open loads the page, and waits until it is there.
func (b *browser) open() {
	b.t.Helper()
	var target struct{ TargetID string }
	b.call("Target.createTarget", map[string]any{"url": "about:blank"}, &target)
	var attached struct{ SessionID string }
	b.call("Target.attachToTarget", map[string]any{"targetId": target.TargetID, "flatten": true}, &attached)
	b.mu.Lock()
	b.session = attached.SessionID
	loaded := make(chan struct{})
	b.events["Page.loadEventFired"] = loaded
	b.mu.Unlock()
	for _, domain := range []string{"Page", "Network", "Log", "Runtime"} {
		b.call(domain+".enable", struct{}{}, nil)
	}
	var navigated struct{ ErrorText string }
	b.call("Page.navigate", map[string]any{"url": b.page}, &navigated)
	if navigated.ErrorText != "" {
		b.t.Fatalf("the page does not load: %s", navigated.ErrorText)
	}
	select {
	case <-loaded:
	case <-time.After(patience):
		b.t.Fatal("the page does not load")
	}
}

// screen makes the screen so wide and high, and light or dark.
func (b *browser) screen(width, height int, scheme string) {
	b.t.Helper()
	b.call("Emulation.setDeviceMetricsOverride", map[string]any{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}, nil)
	b.call("Emulation.setEmulatedMedia", map[string]any{"features": []map[string]string{{"name": "prefers-color-scheme", "value": scheme}}}, nil)
}

// ask evaluates an expression in the page.
func ask[T any](b *browser, expression string) (value T) {
	b.t.Helper()
	var answer struct {
		Result           struct{ Value json.RawMessage }
		ExceptionDetails json.RawMessage
	}
	b.call("Runtime.evaluate", map[string]any{"expression": expression, "returnByValue": true, "awaitPromise": true}, &answer)
	if answer.ExceptionDetails != nil {
		b.t.Fatalf("%s: %s", expression, answer.ExceptionDetails)
	}
	if err := json.Unmarshal(answer.Result.Value, &value); err != nil {
		b.t.Fatalf("%s: %v: %s", expression, err, answer.Result.Value)
	}
	return value
}

// count counts the elements that a CSS selector names.
func (b *browser) count(selector string) int {
	b.t.Helper()
	return ask[int](b, fmt.Sprintf("document.querySelectorAll(%q).length", selector))
}

// box is where something is on the page.
type box struct{ X, Y, Width, Height float64 }

// box finds the first element that a CSS selector names, and moves the page to it, as what is out of view is not drawn. Nothing
// is moved sidewards.
func (b *browser) box(selector string) box {
	b.t.Helper()
	return ask[box](b, fmt.Sprintf(`new Promise(done => {
		const e = document.querySelector(%q);
		window.scrollTo(0, e.getBoundingClientRect().y + scrollY - 200);
		requestAnimationFrame(() => requestAnimationFrame(() => {
			const r = e.getBoundingClientRect(); done({X: r.x, Y: r.y + scrollY, Width: r.width, Height: r.height});
		}));
	})`, selector))
}

// shoot takes a picture of a part of the page.
func (b *browser) shoot(at box) image.Image {
	b.t.Helper()
	var shot struct{ Data string }
	b.call("Page.captureScreenshot", map[string]any{
		"format": "png", "captureBeyondViewport": true,
		"clip": map[string]any{"x": at.X, "y": at.Y, "width": at.Width, "height": at.Height, "scale": 1},
	}, &shot)
	data, err := base64.StdEncoding.DecodeString(shot.Data)
	if err != nil {
		b.t.Fatal(err)
	}
	m, err := png.Decode(bytes.NewReader(data))
	if err != nil {
		b.t.Fatal(err)
	}
	return m
}

// says waits until all of these words were in one line on the console.
func (b *browser) says(words ...string) bool {
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		b.mu.Lock()
		said := slices.ContainsFunc(b.said, func(line string) bool {
			return !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) })
		})
		b.mu.Unlock()
		if said {
			return true
		}
	}
	return false
}

// quiet fails the test if the page asked for anything, or Chromium had anything to complain of.
func (b *browser) quiet() {
	b.t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, text := range b.said {
		b.t.Errorf("on the console: %s", text)
	}
	for _, url := range b.requests {
		if url != b.page && !strings.HasPrefix(url, "data:,") {
			b.t.Errorf("the page asks for %s", url)
		}
	}
	if len(b.proxied) != 1 {
		b.t.Errorf("the network was asked for %q", b.proxied)
	}
}
