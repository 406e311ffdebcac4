package main

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"log/slog"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/tokenbroker/tokenbroker/internal/audit"
	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/config"
	"github.com/tokenbroker/tokenbroker/internal/console"
	"github.com/tokenbroker/tokenbroker/internal/oauth"
	"github.com/tokenbroker/tokenbroker/internal/serviceaccount"
	"github.com/tokenbroker/tokenbroker/internal/store"
)

// holding are all exported structs of ours that hold secrets.
var holding = []any{
	broker.Token{}, broker.StoredToken{}, broker.Grant{}, broker.Request{}, broker.CodeExchange{}, broker.Callback{}, broker.ClientSecret{},
	broker.Consent{}, broker.Result{}, broker.Ticket{}, broker.Redemption{}, broker.Dropped{},
	oauth.APIRequest{}, oauth.TokenRequest{}, oauth.ProfileConfig{},
	config.Admin{}, config.Config{}, config.Store{}, store.Access{}, serviceaccount.Source{}, serviceaccount.Cluster{},
}

// TestNoStructPrintsItsSecrets fills every exported struct that has room for
// secrets, and finds none in what formatters make of it.
func TestNoStructPrintsItsSecrets(t *testing.T) {
	known := map[string]bool{}
	for _, zero := range holding {
		known[reflect.TypeOf(zero).String()] = true
		v := reflect.New(reflect.TypeOf(zero))
		if n := fill(v.Elem(), 4); n == 0 {
			t.Errorf("%T has no secret: take it out of the list", zero)
		}
		wantNoCanary(t, fmt.Sprintf("%T", zero), v.Elem().Interface())
		wantNoCanary(t, fmt.Sprintf("*%T", zero), v.Interface())
	}
	encoded := []byte(canarySecret) // as a stream keeps it with the token
	sent := new(broker.Token)
	sent.Encoded[broker.FromMemory].Store(&encoded)
	wantNoCanary(t, "a token that was sent", sent)
	wantNoCanary(t, "tokens that were sent", []*broker.Token{sent})
	wantNoCanary(t, "what holds one", struct{ T *broker.Token }{sent})
	for name, at := range structsWithSecrets(t) {
		if !known[name] {
			t.Errorf("%s: %s holds secrets, and nobody tries to print it: add it to the list", at, name)
		}
	}
	// An event has no room for a secret at all.
	if n := fill(reflect.New(reflect.TypeFor[audit.Event]()).Elem(), 4) + fill(reflect.New(reflect.TypeFor[console.StoreStats]()).Elem(), 4); n != 0 {
		t.Errorf("the audit log has room for %d secrets", n)
	}
}

var secretType = reflect.TypeFor[broker.Secret]()

// fill puts secrets wherever there is room for one, and returns how many.
func fill(v reflect.Value, depth int) (n int) {
	if depth == 0 || !v.CanSet() {
		return 0
	}
	switch {
	case v.Type() == secretType:
		v.Set(reflect.ValueOf(broker.NewSecret(canarySecret)))
		return 1
	case v.Kind() == reflect.Struct:
		for i := range v.NumField() {
			n += fill(v.Field(i), depth-1)
		}
	case v.Kind() == reflect.Pointer:
		p := reflect.New(v.Type().Elem())
		if n = fill(p.Elem(), depth-1); n > 0 {
			v.Set(p)
		}
	case v.Kind() == reflect.Slice:
		s := reflect.MakeSlice(v.Type(), 1, 1)
		if n = fill(s.Index(0), depth-1); n > 0 {
			v.Set(s)
		}
	case v.Kind() == reflect.Map && v.Type().Key().Kind() == reflect.String:
		e := reflect.New(v.Type().Elem()).Elem()
		if n = fill(e, depth-1); n > 0 {
			v.Set(reflect.MakeMap(v.Type()))
			v.SetMapIndex(reflect.ValueOf("k").Convert(v.Type().Key()), e)
		}
	}
	return n
}

// wantNoCanary fails if a formatter shows the secret.
func wantNoCanary(t *testing.T, what string, v any) {
	t.Helper()
	var b bytes.Buffer
	fmt.Fprintf(&b, "%v %+v %#v %s %q %x %d", v, v, v, v, v, v, v)
	slog.New(slog.NewTextHandler(&b, nil)).Info("x", "v", v)
	slog.New(slog.NewJSONHandler(&b, nil)).Info("x", "v", v)
	for _, marshal := range []func(any) ([]byte, error){json.Marshal, yaml.Marshal, xml.Marshal} {
		func() {
			defer func() {
				if p := recover(); p != nil { // yaml, at functions
					fmt.Fprint(&b, p)
				}
			}()
			text, err := marshal(v)
			fmt.Fprintf(&b, "%s %v", text, err)
		}()
	}
	for _, spelling := range []string{canarySecret, "5b1d9c", fmt.Sprintf("%x", canarySecret), strings.Trim(fmt.Sprint([]byte(canarySecret)), "[]")} {
		if at := strings.Index(b.String(), spelling); at >= 0 {
			t.Errorf("%s shows its secret: %q", what, b.String()[max(0, at-200):at+len(spelling)])
			return
		}
	}
}

// structsWithSecrets finds exported structs with a field of the type Secret in the
// code, with the place of each.
func structsWithSecrets(t *testing.T) map[string]string {
	t.Helper()
	found := map[string]string{}
	files := token.NewFileSet()
	err := filepath.WalkDir("../../internal", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		f, err := parser.ParseFile(files, path, nil, 0)
		if err != nil {
			return err
		}
		ast.Inspect(f, func(n ast.Node) bool {
			spec, ok := n.(*ast.TypeSpec)
			if !ok || !spec.Name.IsExported() {
				return true
			}
			s, ok := spec.Type.(*ast.StructType)
			if !ok {
				return true
			}
			for _, field := range s.Fields.List {
				if exported(field) && isSecret(field.Type, f.Name.Name) {
					found[f.Name.Name+"."+spec.Name.Name] = files.Position(field.Pos()).String()
				}
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(found) < 10 {
		t.Fatalf("found only %v", found)
	}
	return found
}

func exported(f *ast.Field) bool { return len(f.Names) == 0 || f.Names[0].IsExported() }

// isSecret reports whether a type is a Secret, or several.
func isSecret(e ast.Expr, pkg string) bool {
	switch e := e.(type) {
	case *ast.Ident:
		return e.Name == "Secret" && pkg == "broker"
	case *ast.SelectorExpr:
		return fmt.Sprint(e.X, ".", e.Sel) == "broker.Secret"
	case *ast.ArrayType:
		return isSecret(e.Elt, pkg)
	case *ast.MapType:
		return isSecret(e.Value, pkg)
	case *ast.StarExpr:
		return isSecret(e.X, pkg)
	}
	return false
}

// TestNothingOfAConfigPrintsItsSecrets goes through all that a loaded config is
// made of, private fields too, and formats each struct that it meets.
func TestNothingOfAConfigPrintsItsSecrets(t *testing.T) {
	keyset, err := store.NewKeyset()
	if err != nil {
		t.Fatal(err)
	}
	literal := `{value: "` + canarySecret + `"}`
	c, err := config.Parse("broker.yaml", []byte(`admin: {bearer_token: `+literal+`}
store: {redis: {addresses: ["r:1"], password: `+literal+`}, encryption_keyset: {env: KEYSET}}
profiles:
  - {name: a, vantage: {region: eu, client_id: c, client_secret: `+literal+`, client_credentials: {}}}
  - {name: b, vantage: {region: eu, client_id: c, client_secret: `+literal+`, password: {username: `+literal+`, password: `+literal+`}}}
  - {name: c, scopes: [a], oauth2: {token_url: "https://id.example.com/t", client_id: c, client_auth: client_secret_basic, client_secrets: [`+literal+`], client_credentials: {}}}
  - {name: d, secret_rotation: {before_expiry: 30d}, vantage: {region: eu, tenant_id: t, client_id: c, client_secret: `+literal+`, client_credentials: {}}}
`), config.Options{LookupEnv: func(string) (string, bool) { return keyset.Reveal(), true }})
	if err != nil {
		t.Fatal(err)
	}
	seen, structs := map[any]bool{}, 0
	var walk func(v reflect.Value, path string)
	walk = func(v reflect.Value, path string) {
		switch v.Kind() {
		case reflect.Pointer:
			key := struct {
				at  uintptr
				has reflect.Type
			}{v.Pointer(), v.Type()}
			if v.IsNil() || seen[key] {
				return
			}
			seen[key] = true
			walk(v.Elem(), path)
		case reflect.Interface:
			if !v.IsNil() {
				walk(v.Elem(), path)
			}
		case reflect.Struct:
			if v.Type() == secretType || !strings.HasPrefix(v.Type().PkgPath(), "github.com/tokenbroker/") {
				return
			}
			structs++
			text := fmt.Sprintf("%v %+v %#v", v, v, v)
			if at := strings.Index(text, "5b1d9c"); at >= 0 {
				t.Errorf("%s, a %s, prints a secret: %q", path, v.Type(), text[max(0, at-200):at+6])
			}
			for i := range v.NumField() {
				walk(v.Field(i), path+"."+v.Type().Field(i).Name)
			}
		case reflect.Slice, reflect.Array:
			for i := range v.Len() {
				walk(v.Index(i), fmt.Sprintf("%s[%d]", path, i))
			}
		case reflect.Map:
			for _, k := range v.MapKeys() {
				walk(v.MapIndex(k), fmt.Sprintf("%s[%v]", path, k))
			}
		}
	}
	walk(reflect.ValueOf(c), "config")
	if structs < 15 {
		t.Errorf("found only %d structs", structs)
	}
	wantNoCanary(t, "the config", c)
	wantNoCanary(t, "what it holds", *c)
}
