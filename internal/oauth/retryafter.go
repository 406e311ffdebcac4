package oauth

import (
	"net/http"
	"strings"
	"time"
)

// maxRetryAfter is the longest that a server can ask to be left alone for. A
// slip in a header must not silence a profile for a day.
const maxRetryAfter = time.Hour

// retryAfter reads Retry-After in both forms (RFC 9110 section 10.2.3) as a
// span from now. A date counts from the answer's own Date where there is one:
// the two share a clock, which may not be ours. It reports false when there is
// no such header or it cannot be read.
func retryAfter(header http.Header, now time.Time) (time.Duration, bool) {
	value := strings.TrimSpace(header.Get("Retry-After"))
	if value == "" {
		return 0, false
	}
	if wait, err := parseSeconds(value); err == nil {
		return min(wait, maxRetryAfter), true
	}
	until, err := http.ParseTime(value)
	if err != nil {
		return 0, false
	}
	if date, err := http.ParseTime(header.Get("Date")); err == nil {
		now = date
	}
	return min(max(until.Sub(now), 0), maxRetryAfter), true
}
