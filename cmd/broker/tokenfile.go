package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
)

// maxTokenFile is what the broker takes of a token, and a line end.
const maxTokenFile = 16<<10 + 2

// tokenFile sends a file's token with each call, as it is at that moment:
// Kubernetes replaces the tokens of pods long before they end.
type tokenFile struct {
	path string
	// secure says that the token leaves this machine, and not in clear.
	secure bool
}

// GetRequestMetadata implements credentials.PerRPCCredentials.
func (f tokenFile) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	token, err := f.read()
	if err != nil {
		return nil, err
	}
	return map[string]string{"authorization": "Bearer " + token}, nil
}

// RequireTransportSecurity implements credentials.PerRPCCredentials.
func (f tokenFile) RequireTransportSecurity() bool { return f.secure }

// read returns the token. Its errors repeat nothing of it.
func (f tokenFile) read() (string, error) {
	data, err := f.content()
	if err != nil {
		return "", fmt.Errorf("reading --token-file %s: %w", f.path, err)
	}
	token := strings.TrimSuffix(strings.TrimSuffix(string(data), "\n"), "\r")
	switch {
	case len(data) > maxTokenFile:
		return "", fmt.Errorf("reading --token-file: %s is larger than a token can be", f.path)
	case token == "" || strings.ContainsFunc(token, func(c rune) bool { return c <= ' ' || c > '~' }):
		return "", fmt.Errorf("reading --token-file: %s does not hold one token and nothing else", f.path)
	}
	return token, nil
}

func (f tokenFile) content() ([]byte, error) {
	file, err := os.Open(f.path)
	if err != nil {
		var failure *fs.PathError
		if errors.As(err, &failure) {
			return nil, failure.Err // the path is told already
		}
		return nil, err
	}
	defer file.Close()
	return io.ReadAll(io.LimitReader(file, maxTokenFile+1))
}
