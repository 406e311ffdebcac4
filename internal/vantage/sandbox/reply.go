package sandbox

import (
	"encoding/json"
	"html/template"
	"mime"
	"net/http"
	"strings"
)

// A reply is an answer that has not been sent yet.
type reply struct {
	status  int
	header  http.Header
	body    []byte
	outcome string // what the tally calls it
}

func (a reply) write(w http.ResponseWriter) {
	a.writeHeader(w)
	_, _ = w.Write(a.body) // the client may have left: nobody to tell
}

func (a reply) writeHeader(w http.ResponseWriter) {
	for name, values := range a.header {
		w.Header()[name] = values
	}
	w.WriteHeader(a.status)
}

// with returns the reply with one more header.
func (a reply) with(name, value string) reply {
	a.header = a.header.Clone()
	if a.header == nil {
		a.header = http.Header{}
	}
	a.header.Set(name, value)
	return a
}

// jsonReply encodes v. Its media type is spelt as ASP.NET spells it.
func jsonReply(status int, v any) reply {
	body, err := json.Marshal(v)
	if err != nil {
		panic("sandbox: encoding an answer of our own: " + err.Error())
	}
	return reply{status: status, body: body}.with("Content-Type", "application/json; charset=UTF-8")
}

// noStore forbids keeping the answer, in IdentityServer's words.
func (a reply) noStore() reply {
	return a.with("Cache-Control", "no-store, no-cache, max-age=0").with("Pragma", "no-cache")
}

var pageTemplate = template.Must(template.New("page").Parse(
	`<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{{.}}</title></head><body><h1>{{.}}</h1></body></html>
`))

// page is a short HTML page, which is what unknown addresses answer with.
func page(status int, title string) reply {
	var b strings.Builder
	if err := pageTemplate.Execute(&b, title); err != nil {
		panic("sandbox: rendering a page of our own: " + err.Error())
	}
	return reply{status: status, body: []byte(b.String())}.
		with("Content-Type", "text/html; charset=utf-8").
		with("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'").
		with("X-Content-Type-Options", "nosniff")
}

func notFound() reply {
	a := page(http.StatusNotFound, "404 Not Found")
	a.outcome = "not_found"
	return a
}

func methodNotAllowed(allow string) reply {
	return reply{status: http.StatusMethodNotAllowed}.with("Allow", allow)
}

func isForm(r *http.Request) bool { return mediaType(r) == "application/x-www-form-urlencoded" }

func mediaType(r *http.Request) string {
	t, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil {
		return ""
	}
	return t
}
