package main

import (
	"context"
	_ "embed"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
)

// browser is a headless Chromium. What a person could not do with a keyboard and
// a screen, it does not do either.
type browser struct {
	t   testing.TB
	ctx context.Context
}

func newBrowser(t testing.TB) *browser {
	t.Helper()
	path := ""
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome"} {
		if found, err := exec.LookPath(name); err == nil {
			path = found
			break
		}
	}
	if path == "" {
		t.Fatal("this test needs Chromium, which is not installed: run scripts/need.sh chromium")
	}
	o := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath(path), chromedp.DisableGPU, chromedp.WindowSize(1200, 900),
		chromedp.WSURLReadTimeout(time.Minute))
	if os.Geteuid() == 0 { // it refuses to run as root with a sandbox
		o = append(o, chromedp.NoSandbox)
	}
	ctx, end := chromedp.NewExecAllocator(t.Context(), o...)
	t.Cleanup(end)
	ctx, leave := chromedp.NewContext(ctx)
	t.Cleanup(leave)
	err := chromedp.Listen(ctx, func(event any) {
		switch e := event.(type) {
		case *runtime.EventExceptionThrown:
			t.Errorf("a script failed: %s", e.ExceptionDetails.Text)
		case *log.EventEntryAdded: // what the policy forbids is told here; pages of errors, too
			if e.Entry.Source != log.EntrySourceNetwork && e.Entry.Level == log.EntryLevelError {
				t.Errorf("the browser complains: %s %s", e.Entry.Text, e.Entry.URL)
			}
		}
	})
	if err != nil {
		t.Fatalf("starting %s: %v", path, err)
	}
	return &browser{t, ctx}
}

// within bounds what is asked of the browser.
func (b *browser) within() (context.Context, context.CancelFunc) {
	return context.WithTimeout(b.ctx, time.Minute)
}

func (b *browser) run(steps ...chromedp.Action[chromedp.Void]) {
	b.t.Helper()
	ctx, cancel := b.within()
	defer cancel()
	if err := chromedp.Do(ctx, steps...); err != nil {
		b.t.Fatalf("the browser: %v; it is at\n%s", err, b.page())
	}
}

// eval returns what an expression is on the page.
func eval[T any](b *browser, expression string) (T, error) {
	ctx, cancel := b.within()
	defer cancel()
	return chromedp.Run(ctx, chromedp.Evaluate[T](expression))
}

func (b *browser) page() string {
	page, err := eval[string](b, `location.href + "\n" + document.body.innerText`)
	if err != nil {
		return err.Error()
	}
	return page
}

// await polls until an expression is true on the page that there is then.
func (b *browser) await(expression string) {
	b.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		// An error may come of a page that goes while it is asked.
		if yes, err := eval[bool](b, expression); err == nil && yes {
			return
		} else if time.Now().After(deadline) {
			b.t.Fatalf("%s: not within 30 s (%v); the browser is at\n%s", expression, err, b.page())
		}
	}
}

func quoted(s string) string {
	q, err := json.Marshal(s)
	if err != nil {
		panic(err)
	}
	return string(q)
}

// at waits for the page with this heading, and holds it to checkAccessible.
func (b *browser) at(heading string) {
	b.t.Helper()
	b.await(`document.readyState === "complete" && document.querySelector("h1")?.textContent === ` + quoted(heading))
	b.checkAccessible()
}

// says waits until the page, or what the selector finds on it, has a text.
func (b *browser) says(selector, text string) {
	b.t.Helper()
	b.await(fmt.Sprintf(`[...document.querySelectorAll(%s)].some(e => e.innerText.includes(%s))`, quoted(selector), quoted(text)))
}

func (b *browser) text(selector string) string {
	b.t.Helper()
	text, err := eval[string](b, `document.querySelector(`+quoted(selector)+`).innerText`)
	if err != nil {
		b.t.Fatalf("%s: %v; the browser is at\n%s", selector, err, b.page())
	}
	return strings.TrimSpace(text)
}

func (b *browser) open(url string) {
	b.t.Helper()
	b.run(chromedp.Navigate(url))
}

func (b *browser) click(selector string) {
	b.t.Helper()
	b.run(chromedp.Click(chromedp.CSS(selector)))
}

// reach presses Tab until the focus is on what the selector finds.
func (b *browser) reach(selector string) {
	b.t.Helper()
	for range 60 {
		b.run(chromedp.KeyEvent(kb.Tab))
		if yes, err := eval[bool](b, `!!document.activeElement?.matches(`+quoted(selector)+`)`); err == nil && yes {
			if outlined, err := eval[bool](b, `getComputedStyle(document.activeElement).outlineStyle !== "none"`); err != nil || !outlined {
				b.t.Errorf("%s: the focus cannot be seen (%v)", selector, err)
			}
			return
		}
	}
	b.t.Fatalf("Tab does not lead to %s; the browser is at\n%s", selector, b.page())
}

// press is click by keyboard.
func (b *browser) press(selector string) {
	b.t.Helper()
	b.reach(selector)
	b.run(chromedp.KeyEvent(kb.Enter))
}

// keys types into a field that Tab leads to.
func (b *browser) keys(selector, text string) {
	b.t.Helper()
	b.reach(selector)
	b.run(chromedp.KeyEvent(text))
}

// accessible is a function that returns what is wrong with a page.
//
//go:embed testdata/accessible.js
var accessible string

// checkAccessible holds the page to what WCAG 2.2 AA wants and a program can
// see: names, headings, labels, sizes, contrast, light and dark, and nothing to
// scroll sideways on a narrow screen.
func (b *browser) checkAccessible() {
	b.t.Helper()
	scheme := func(name string) chromedp.Action[chromedp.Void] {
		return func(ctx context.Context, t *chromedp.Target) (chromedp.Void, error) {
			_, err := cdp.Call(ctx, t, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
				Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: name}},
			})
			return chromedp.Void{}, err
		}
	}
	for name, set := range map[string][2]chromedp.Action[chromedp.Void]{
		"light":  {scheme("light"), scheme("")},
		"dark":   {scheme("dark"), scheme("")},
		"narrow": {chromedp.EmulateViewport(320, 640), chromedp.ResetViewport()},
	} {
		b.run(set[0])
		wrong, err := eval[[]string](b, "("+accessible+")()")
		if err != nil {
			b.t.Fatal(err)
		}
		for _, w := range wrong {
			b.t.Errorf("%s, %s: %s", b.text("h1"), name, w)
		}
		b.run(set[1])
	}
}
