package config

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"unicode/utf8"

	"google.golang.org/protobuf/reflect/protoreflect"

	configv1 "github.com/tokenbroker/tokenbroker/gen/tokenbroker/config/v1"
	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// maxSecret is far beyond any secret, private keys and keysets included.
const maxSecret = 64 << 10

// inspect goes through everything that is set below a message: it notes what is
// discouraged, and resolves secrets.
func (l *load) inspect(message protoreflect.Message, path string) {
	message.Range(func(field protoreflect.FieldDescriptor, value protoreflect.Value) bool {
		fieldPath := child(path, string(field.Name()))
		if reason, ok := discouraged[field.FullName()]; ok {
			l.warning(fieldPath, reason)
		}
		switch {
		case field.Message() == nil || field.IsMap() || field.Message().FullName() == durationName:
		case field.IsList():
			for i := range value.List().Len() {
				l.inspectOne(field, value.List().Get(i).Message(), item(fieldPath, i))
			}
		default:
			l.inspectOne(field, value.Message(), fieldPath)
		}
		return true
	})
}

func (l *load) inspectOne(field protoreflect.FieldDescriptor, message protoreflect.Message, path string) {
	l.inspect(message, path)
	if reference, ok := message.Interface().(*configv1.Secret); ok {
		l.resolve(field, reference, path)
	}
}

// resolve reads a secret from where it is, and takes it out of the message. A
// reference that breaks a rule of the schema is noted already.
func (l *load) resolve(field protoreflect.FieldDescriptor, reference *configv1.Secret, path string) {
	secret, mistake := "", ""
	switch source := reference.GetSource().(type) {
	case *configv1.Secret_File:
		path = child(path, "file")
		if !l.tainted[path] {
			secret, mistake = l.secretFile(source.File, path)
		}
	case *configv1.Secret_Env:
		path = child(path, "env")
		if !l.tainted[path] {
			secret, mistake = l.secretEnv(source.Env)
		}
	case *configv1.Secret_Value:
		path = child(path, "value")
		secret = source.Value
		reference.Source = nil
	}
	if mistake == "" && !l.tainted[path] {
		mistake = flaw(field, secret)
	}
	if mistake != "" {
		l.problem(path, mistake)
		return
	}
	l.secrets[reference] = broker.NewSecret(secret)
}

func (l *load) secretFile(name, path string) (secret, mistake string) {
	data, err := l.files.read(l.absolute(name), maxSecret)
	if err != nil {
		return "", fmt.Sprintf("reading the secret from %s: %v", l.shown(name), err)
	}
	secret = strings.TrimSuffix(strings.TrimSuffix(string(data), "\n"), "\r")
	if secret == "" {
		return "", fmt.Sprintf("the secret's file is empty: write the secret into %s", l.shown(name))
	}
	l.warnIfOpen(name, path)
	return secret, ""
}

// warnIfOpen warns of a file that every user of the machine can read. Its group
// may: that is how a container gets at a mounted secret.
func (l *load) warnIfOpen(name, path string) {
	info, err := os.Stat(l.absolute(name))
	if err == nil && info.Mode()&0o007 != 0 {
		l.warning(path, fmt.Sprintf("every user of this machine has access to %s (mode %04o): chmod o= it, or in Kubernetes set defaultMode: 0440",
			l.shown(name), info.Mode().Perm()))
	}
}

// envName is how people name variables; anything else may be a secret in the
// wrong place and is not repeated.
var envName = regexp.MustCompile(`^[A-Z]+(_[A-Z0-9]+)+$`)

func (l *load) secretEnv(name string) (secret, mistake string) {
	shown := "the environment variable that is named here"
	if envName.MatchString(name) {
		shown = "the environment variable " + name
	}
	secret, found := l.lookupEnv(name)
	switch {
	case !found:
		return "", shown + " is not set: set it where the broker is started"
	case secret == "":
		return "", shown + " is empty: set it where the broker is started"
	case len(secret) > maxSecret:
		return "", fmt.Sprintf("%s is longer than %d KiB", shown, maxSecret>>10)
	}
	return secret, ""
}

// flaw says what is wrong with a secret, in general.
func flaw(field protoreflect.FieldDescriptor, secret string) string {
	switch {
	case strings.ContainsRune(secret, 0) || !utf8.ValidString(secret):
		return "the secret is not text: it has bytes that no secret has"
	case strings.HasPrefix(string(field.Name()), "client_secret") && strings.TrimSpace(secret) != secret:
		return "the secret has blanks or line ends around it: remove them where it comes from"
	}
	return ""
}
