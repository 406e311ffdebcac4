package audit

import "crypto/rand"

// NewRequestID returns an id for a request whose sender has chosen none.
func NewRequestID() string { return rand.Text()[:16] }

// RequestID returns the id that the sender of a request has chosen, given the
// values of its header; empty if it has chosen none, several, or one that is not
// harmless to log: at most 64 letters, digits and any of "-", "_" and ".".
func RequestID(values []string) string {
	if len(values) != 1 || len(values[0]) > 64 {
		return ""
	}
	for _, c := range []byte(values[0]) {
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '_' || c == '.') {
			return ""
		}
	}
	return values[0]
}
