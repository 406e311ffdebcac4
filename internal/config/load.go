package config

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"go.yaml.in/yaml/v3"

	configv1 "github.com/tokenbroker/tokenbroker/gen/tokenbroker/config/v1"
	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/oauth"
)

// Loader loads one configuration file, again and again. It remembers what the
// last load has read, so that Watch can tell when to load again. It may be used
// from several goroutines.
type Loader struct {
	path    string
	options Options
	poll    time.Duration // how often Watch looks without a reason
	loaded  chan struct{} // has room for one; Watch reads it

	mu   sync.Mutex
	seen files // what the last load has read, successful or not
}

// NewLoader returns a Loader of the file at path. Nothing is read yet.
func NewLoader(path string, options Options) *Loader {
	return &Loader{path: path, options: options.withDefaults(), poll: pollTime, loaded: make(chan struct{}, 1)}
}

// Load reads the file and all that it refers to. The error is of type
// [Problems] and has all that is wrong.
func Load(path string, options Options) (*Config, error) {
	return NewLoader(path, options).Load()
}

// Parse does what Load does with text instead of a file. Problems call it name,
// and relative paths in it are relative to name's directory.
func Parse(name string, text []byte, options Options) (*Config, error) {
	l := newLoad(name, options.withDefaults())
	return l.run(text)
}

// Load reads the file and all that it refers to, anew. The error is of type
// [Problems] and has all that is wrong.
func (l *Loader) Load() (*Config, error) {
	load := newLoad(l.path, l.options)
	config, err := load.file()
	l.mu.Lock()
	l.seen = load.files
	l.mu.Unlock()
	select {
	case l.loaded <- struct{}{}:
	default: // Watch will look anyway.
	}
	return config, err
}

func (o Options) withDefaults() Options {
	if o.FingerprintKey == nil {
		o.FingerprintKey = make([]byte, 32)
		_, _ = rand.Read(o.FingerprintKey) // never fails
	}
	if o.Transport == nil {
		o.Transport = oauth.NewTransport(oauth.TransportConfig{})
	}
	if o.LookupEnv == nil {
		o.LookupEnv = os.LookupEnv
	}
	return o
}

// load is one load under way.
type load struct {
	*notes
	directory string // of the configuration file, absolute
	options   Options
	lookupEnv func(string) (string, bool)
	files     files
	secrets   map[*configv1.Secret]broker.Secret
	ends      map[string]time.Time // of certificates, by the path of their field
}

func newLoad(name string, options Options) *load {
	directory := filepath.Dir(name)
	if absolute, err := filepath.Abs(directory); err == nil {
		directory = absolute
	}
	return &load{
		notes:     newNotes(name),
		directory: directory,
		options:   options,
		lookupEnv: options.LookupEnv,
		files:     files{},
		secrets:   map[*configv1.Secret]broker.Secret{},
		ends:      map[string]time.Time{},
	}
}

// file loads the configuration file itself, which may also be a pipe: those are
// read once and not watched.
func (l *load) file() (*Config, error) {
	path := filepath.Join(l.directory, filepath.Base(l.notes.file))
	text, err := readText(l.notes.file)
	if info, statErr := os.Stat(path); statErr != nil || info.Mode().IsRegular() {
		l.files[path] = digest{}
		if err == nil {
			l.files[path] = sha256.Sum256(text)
		}
	}
	if err != nil {
		return nil, Problems{{File: l.notes.file, Message: fmt.Sprintf("reading the configuration: %v", withoutPath(err))}}
	}
	return l.run(text)
}

func readText(path string) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return io.ReadAll(io.LimitReader(file, maxList+1) /* as readFile */)
}

// run takes text through all stages.
func (l *load) run(text []byte) (*Config, error) {
	config := l.build(text)
	if len(l.problems) > 0 {
		return nil, l.problems.sorted()
	}
	config.Files = l.files.paths()
	config.Warnings = l.warnings.sorted()
	return config, nil
}

func (l *load) build(text []byte) *Config {
	if len(text) > maxFile {
		l.problem("", fmt.Sprintf("is larger than %d MiB: is it the right file?", maxFile>>20))
		return nil
	}
	root, ok := l.parse(bytes.TrimPrefix(text, []byte("\ufeff")))
	if !ok {
		return nil
	}
	if root == nil {
		root = &yaml.Node{Kind: yaml.MappingNode}
	}
	root = l.message(root, "", (&configv1.Config{}).ProtoReflect().Descriptor())
	if root == nil {
		return nil
	}
	message := l.decode(root)
	l.validate(message)
	l.checkNames(message.GetProfiles())
	l.inspect(message.ProtoReflect(), "")
	config := &Config{
		Server: l.server(message.GetServer()),
		Admin:  l.admin(message.GetAdmin()),
		Log:    logging(message.GetLog()),
		Policy: l.policy(message),
		Places: l.placesOf("policy", len(message.GetPolicy())),
	}
	if message.GetStore() != nil {
		config.Store = l.store(message.GetStore())
	}
	config.Profiles = l.profiles(message, config.Admin)
	config.Certificates = l.certificates(message.GetProfiles())
	return config
}
