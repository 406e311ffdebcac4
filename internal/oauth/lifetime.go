package oauth

import (
	"encoding/json"
	"errors"
	"math"
	"strconv"
	"strings"
	"time"
)

// maxLifetime is the longest lifetime that is believed: servers that mean
// "for ever" state numbers that overflow whatever they meet.
const maxLifetime = 10 * 365 * 24 * time.Hour

var (
	errNotSeconds = errors.New("not a decimal number of seconds")
	errNegative   = errors.New("negative")
)

// lifetime reads expires_in: a number of seconds as RFC 6749 section 5.1 has
// it, or as a string, with or without a fraction. Zero means that none is
// stated, which null, an empty string and 0 mean as well. A positive one stays
// positive however small it is.
func lifetime(raw json.RawMessage) (time.Duration, error) {
	s, err := stringMember(raw)
	if err != nil {
		s = string(raw)
	}
	if s = strings.TrimSpace(s); s == "" {
		return 0, nil
	}
	d, err := parseSeconds(s)
	return min(d, maxLifetime), err
}

// parseSeconds reads a decimal number of seconds, exponent allowed. What is
// too much for a time.Duration comes out as the longest one.
func parseSeconds(s string) (time.Duration, error) {
	if strings.Trim(s, "0123456789.eE+-") != "" {
		return 0, errNotSeconds // ParseFloat knows NaN, Inf and hexadecimal too
	}
	seconds, err := strconv.ParseFloat(s, 64)
	switch {
	case err != nil && !errors.Is(err, strconv.ErrRange):
		return 0, errNotSeconds
	case seconds < 0:
		return 0, errNegative
	case seconds >= math.MaxInt64/1e9:
		return math.MaxInt64, nil
	}
	return time.Duration(math.Ceil(seconds * 1e9)), nil
}
