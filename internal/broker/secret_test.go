package broker_test

import (
	"bytes"
	"encoding"
	"encoding/base64"
	"encoding/binary"
	"encoding/gob"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"html/template"
	"io"
	"log"
	"log/slog"
	"net/url"
	"strings"
	"testing"
	texttemplate "text/template"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

const unprintable = "s3cret-0123456789-value"

// wantHidden fails if the text has the secret in any spelling.
func wantHidden(t *testing.T, how, text string) {
	t.Helper()
	for _, spelling := range []string{
		unprintable, hex.EncodeToString([]byte(unprintable)), base64.RawStdEncoding.EncodeToString([]byte(unprintable))[:24],
		fmt.Sprint([]byte(unprintable)), fmt.Sprintf("%#v", []byte(unprintable))[7:40], url.QueryEscape(unprintable),
	} {
		if strings.Contains(strings.ToLower(text), strings.ToLower(spelling)) {
			t.Errorf("%s shows the secret: %s", how, text)
		}
	}
}

type holder struct {
	Public  broker.Secret
	Pointer *broker.Secret
	private broker.Secret // which fmt prints without asking its methods
	List    []broker.Secret
	Map     map[string]broker.Secret
	Any     any
	err     error
}

// holders are all the ways in which a secret gets near a formatter.
func holders(s broker.Secret) map[string]any {
	h := holder{s, &s, s, []broker.Secret{s}, map[string]broker.Secret{"k": s}, s, fmt.Errorf("with %v", s)}
	return map[string]any{
		"value": s, "pointer": &s, "pointer to pointer": func() any { p := &s; return &p }(), "slice": []broker.Secret{s}, "array": [1]broker.Secret{s}, "map": map[string]broker.Secret{"k": s}, "key": map[broker.Secret]int{s: 1},
		"struct": h, "pointer to struct": &h, "nested": struct{ In, in any }{h, &h}, "slice of any": []any{s, &s, h}, "embedded": struct{ broker.Secret }{s},
		"channel's": func() any { c := make(chan broker.Secret, 1); c <- s; return c }(),
		"token":     broker.Token{Access: s, ID: s.ID()}, "pointer to token": &broker.Token{Access: s}, "stored token": broker.StoredToken{Access: s}, "grant": broker.Grant{AccessToken: s, RefreshToken: s},
		"pointer to grant": &broker.Grant{AccessToken: s, RefreshToken: s}, "request": broker.Request{RefreshToken: s}, "callback": broker.Callback{Code: s, Browser: s},
		"client secret": &broker.ClientSecret{Value: s, End: time.Now()},
	}
}

func TestSecretsCannotBePrinted(t *testing.T) {
	for name, v := range holders(broker.NewSecret(unprintable)) {
		t.Run(name, func(t *testing.T) {
			for _, flags := range []string{"", "+", "#", "-", " ", "0", "40", ".3", "+#40"} {
				for _, verb := range "vsqxXdcobOUtTeEfFgGp" {
					format := "%" + flags + string(verb)
					wantHidden(t, format, fmt.Sprintf(format, v))
				}
			}
			wantHidden(t, "Sprint", fmt.Sprint(v)+fmt.Sprintln(v)+fmt.Errorf("%w %v", errors.New("x"), v).Error())
			wantHidden(t, "Join", errors.Join(fmt.Errorf("%v", v), fmt.Errorf("%+v", v)).Error())
			for how, marshal := range map[string]func(w io.Writer) error{
				"json":      func(w io.Writer) error { return json.NewEncoder(w).Encode(v) },
				"indented":  func(w io.Writer) error { b, err := json.MarshalIndent(v, "", " "); _, _ = w.Write(b); return err },
				"xml":       func(w io.Writer) (err error) { defer caught(&err); return xml.NewEncoder(w).Encode(v) },
				"yaml":      func(w io.Writer) (err error) { defer caught(&err); return yaml.NewEncoder(w).Encode(v) },
				"gob":       func(w io.Writer) (err error) { defer caught(&err); return gob.NewEncoder(w).Encode(v) },
				"binary":    func(w io.Writer) error { return binary.Write(w, binary.BigEndian, v) },
				"log":       func(w io.Writer) error { log.New(w, "", 0).Print(v); return nil },
				"slog text": func(w io.Writer) error { logged(slog.NewTextHandler(w, nil), v); return nil },
				"slog json": func(w io.Writer) error { logged(slog.NewJSONHandler(w, nil), v); return nil },
				"template": func(w io.Writer) error {
					return texttemplate.Must(texttemplate.New("").Parse("{{.}} {{printf `%v` .}} {{print .}} {{js .}} {{urlquery .}}")).Execute(w, v)
				},
				"html": func(w io.Writer) error {
					return template.Must(template.New("").Parse("{{.}}<a href='{{.}}'><script>{{.}}</script>")).Execute(w, v)
				},
				"panic's text": func(w io.Writer) (err error) { defer func() { fmt.Fprintf(w, "%v", recover()) }(); panic(v) },
			} {
				var b bytes.Buffer
				err := marshal(&b)
				wantHidden(t, how, b.String())
				if err != nil { // some cannot be encoded at all, which hides them as well
					wantHidden(t, "the error of "+how, err.Error())
				}
			}
		})
	}
}

func caught(err *error) {
	if v := recover(); v != nil {
		*err = fmt.Errorf("panic: %v", v)
	}
}

func logged(h slog.Handler, v any) {
	l := slog.New(h)
	l.Info("x", "v", v)
	l.With("v", v).WithGroup("g").Info("x", slog.Group("g", slog.Any("v", v)), slog.Any("e", fmt.Errorf("%v", v)))
}

// What a secret is asked for by name, it answers with the same words.
func TestSecretSaysThatItIsOne(t *testing.T) {
	s := broker.NewSecret(unprintable)
	j, err := json.Marshal(map[string]any{"a": s, "b": &s})
	if err != nil || string(j) != `{"a":"[redacted]","b":"[redacted]"}` {
		t.Errorf("%s, %v", j, err)
	}
	y, err := yaml.Marshal(map[string]any{"a": s})
	if err != nil || string(y) != "a: '[redacted]'\n" {
		t.Errorf("%s, %v", y, err)
	}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		if got := fmt.Sprintf(verb, s); got != "[redacted]" {
			t.Errorf("%s: %s", verb, got)
		}
	}
	var _ encoding.TextMarshaler = s
	if s.Reveal() != unprintable || !s.Equal(broker.NewSecret(unprintable)) || s.Equal(broker.Secret{}) || !(broker.Secret{}).IsEmpty() {
		t.Error("it is not the secret")
	}
}
