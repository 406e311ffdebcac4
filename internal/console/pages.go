package console

import (
	"bytes"
	"context"
	"embed"
	"html/template"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

//go:embed assets
var assets embed.FS

var (
	style  = mustRead("assets/style.css")
	script = mustRead("assets/console.js")
	pages  = template.Must(template.New("").Funcs(template.FuncMap{
		"plain": func(s string) string { return plain(s, 500) }, "utc": utc, "stamp": stamp, "since": distance,
	}).ParseFS(assets, "assets/*.html"))
)

func mustRead(name string) []byte {
	b, err := assets.ReadFile(name)
	if err != nil {
		panic("console: " + err.Error()) // it is embedded
	}
	return b
}

func asset(kind string, content []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", kind)
		_, _ = w.Write(content) // who has left does not mind
	}
}

// page is what all pages have in common.
type page struct {
	Title    string
	Operator string
	Session  bool
	Degraded []string
	Version  string
	// Live pages are brought up to date by the script.
	Live bool
	Body any
}

// policy of pages: nothing but our style, our script and our forms.
const policy = "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"

// render writes a page. The operator is nil for pages that anyone may see.
func (c *console) render(w http.ResponseWriter, o *operator, status int, name string, p page) {
	p.Version = c.Version
	if o != nil {
		p.Operator, p.Session = o.Name, o.session
		p.Degraded = append(c.Ready(), c.Degraded()...)
	}
	var b bytes.Buffer
	if err := pages.ExecuteTemplate(&b, name, p); err != nil {
		c.Logger.Error("console: rendering a page", "page", name, "error", err)
		http.Error(w, "The page could not be made; the log has more.", http.StatusInternalServerError)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", policy)
	w.WriteHeader(status)
	_, _ = w.Write(b.Bytes())
}

// fail shows a problem.
func (c *console) fail(w http.ResponseWriter, r *http.Request, o *operator, p *problem) {
	p.RequestID = requestID(r)
	p.NotEncrypted = p.Login && !c.secure(r) && !isLoopbackHost(r.Host)
	c.render(w, o, p.Status, "problem", page{Title: p.Title, Body: p})
}

// listPage is the number of profiles on a page.
const listPage = 200

// listing is the page of profiles.
type listing struct {
	Profiles  []view
	Query     string
	Attention bool // only those that need some
	// Found profiles in all; First and Last of them are on this page, from 1.
	Found, First, Last int
	Next, Previous     string // URLs
}

func (c *console) list(w http.ResponseWriter, r *http.Request, o *operator) {
	query := r.URL.Query()
	l := listing{Query: strings.ToLower(plain(query.Get("q"), 64)), Attention: query.Get("show") == "attention"}
	names := c.find(o, l)
	l.Found = len(names)
	// A page begins after a name, so that profiles that come and go move none
	// from one page to another.
	first, _ := slices.BinarySearch(names, query.Get("from"))
	last := min(first+listPage, len(names))
	l.First, l.Last = min(first+1, l.Found), last
	if last < len(names) {
		l.Next = l.from(names[last])
	}
	if first > 0 {
		l.Previous = l.from(names[max(first-listPage, 0)])
	}
	l.Profiles = c.views(r.Context(), names[first:last])
	c.render(w, o, http.StatusOK, "list", page{Title: "Profiles", Live: true, Body: l})
}

// find returns the names of the operator's profiles that are looked for.
func (c *console) find(o *operator, l listing) []string {
	var names []string
	for _, name := range c.Broker.Profiles() {
		if !strings.Contains(name, l.Query) || !c.may(o, name) {
			continue
		}
		if l.Attention {
			// What memory knows has to do: there may be thousands.
			if s, err := c.Broker.Glance(name); err != nil || !c.view(s).Attention {
				continue
			}
		}
		names = append(names, name)
	}
	return names
}

// from is the URL of the same list from a name on.
func (l listing) from(name string) string {
	v := url.Values{"from": {name}}
	if l.Query != "" {
		v.Set("q", l.Query)
	}
	if l.Attention {
		v.Set("show", "attention")
	}
	return "/?" + v.Encode()
}

// views looks profiles up in the store, and takes what memory knows where that
// does not answer.
func (c *console) views(ctx context.Context, names []string) []view {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	found := make([]*broker.Status, len(names))
	var g errgroup.Group
	g.SetLimit(16)
	for i, name := range names {
		g.Go(func() error {
			if s, err := c.Broker.Status(ctx, name); err == nil { // or it is gone since
				found[i] = s
			}
			return nil
		})
	}
	_ = g.Wait() // there are none
	var vs []view
	for _, s := range found {
		if s != nil {
			vs = append(vs, c.view(s))
		}
	}
	return vs
}

// done says what an action has brought, by the parameter that it redirects to.
var done = map[string]string{
	"refreshed": "There is a new token.",
	"reset":     "The failure is forgotten. The next call tries again.",
	"signed-in": "The sign-in is complete.",
	"replaced":  "The new account's grant has replaced the other one.",
	"kept":      "The grant stays as it was. The new account's was given up.",
}

// detail is the page of one profile.
type detail struct {
	view
	Done string
}

func (c *console) show(w http.ResponseWriter, r *http.Request, o *operator, s *broker.Status) {
	d := detail{c.view(s), done[r.URL.Query().Get("done")]}
	c.render(w, o, http.StatusOK, "profile", page{Title: s.Name, Live: true, Body: d})
}
