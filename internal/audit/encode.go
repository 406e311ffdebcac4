package audit

import (
	"strconv"
	"time"
)

const (
	// timeFormat is RFC 3339 in UTC, of a fixed length.
	timeFormat = "2006-01-02T15:04:05.000000Z"
	// longestText is what is left of a field of a line that is too long.
	longestText = 400
)

// appendLine appends the event's line, "\n" at its end. Lines have a fixed order
// of fields, leave empty ones out, and are ASCII. One that would be longer than
// most has no scopes, long texts are cut, and it says so.
func appendLine(b []byte, e *Event, most int) []byte {
	id := e.RequestID
	if id == "" {
		id = NewRequestID()
	}
	start := len(b)
	if b = appendEvent(b, e, id, most); len(b)-start < most {
		return append(b, '\n')
	}
	short := *e
	short.Scopes = nil
	b = appendEvent(b[:start], &short, id, longestText)
	return append(b[:len(b)-1], ",\"truncated\":true}\n"...)
}

// appendEvent appends the object itself, texts no longer than most.
func appendEvent(b []byte, e *Event, id string, most int) []byte {
	text := func(name, value string) {
		if value != "" {
			b = append(b, ',', '"')
			b = append(b, name...)
			b = append(b, '"', ':')
			b = appendText(b, value, most)
		}
	}
	b = append(b, `{"time":"`...)
	b = append(e.Time.UTC().AppendFormat(b, timeFormat), '"')
	text("door", e.Door)
	text("method", e.Method)
	text("caller", e.Caller)
	text("proof", e.Proof)
	text("forwarder", e.Forwarder)
	if e.Peer != nil {
		text("peer", e.Peer.String())
	}
	text("peer_name", e.PeerName)
	text("profile", e.Profile)
	text("operation", e.Operation)
	if len(e.Scopes) > 0 {
		b = append(b, `,"scopes":[`...)
		for i, scope := range e.Scopes {
			if i > 0 {
				b = append(b, ',')
			}
			b = appendText(b, scope, most)
		}
		b = append(b, ']')
	}
	text("job", e.Job)
	if e.Allowed {
		text("decision", "allow")
	} else {
		text("decision", "deny")
	}
	text("rule", e.Rule)
	text("outcome", e.Outcome)
	text("token_id", e.TokenID)
	text("source", e.Source)
	text("request_id", id)
	text("trace_id", e.TraceID)
	return append(b, '}')
}

// appendLost appends the line that tells of events that have none.
func appendLost(b []byte, count uint64, since, now time.Time) []byte {
	b = append(b, `{"time":"`...)
	b = now.UTC().AppendFormat(b, timeFormat)
	b = append(b, `","event":"lost","count":`...)
	b = strconv.AppendUint(b, count, 10)
	b = append(b, `,"since":"`...)
	b = since.UTC().AppendFormat(b, timeFormat)
	return append(b, "\"}\n"...)
}

const hex = "0123456789abcdef"

// appendText appends a JSON string (RFC 8259 section 7) in ASCII, cut before the
// character that would make it longer than most. What is not UTF-8 becomes
// U+FFFD.
func appendText(b []byte, s string, most int) []byte {
	b = append(b, '"')
	start := len(b)
	if len(s) <= most-12 && isPlain(s) {
		return append(append(b, s...), '"')
	}
	for _, r := range s {
		if len(b)-start > most-12 { // room for the longest character
			break
		}
		switch {
		case r == '"' || r == '\\':
			b = append(b, '\\', byte(r))
		case ' ' <= r && r <= '~':
			b = append(b, byte(r))
		case r > 0xffff:
			r -= 0x10000
			b = appendUnit(b, 0xd800+r>>10)
			b = appendUnit(b, 0xdc00+r&0x3ff)
		default:
			b = appendUnit(b, r)
		}
	}
	return append(b, '"')
}

// isPlain reports whether nothing needs to be escaped, as is usual.
func isPlain(s string) bool {
	for _, c := range []byte(s) {
		if c < ' ' || c > '~' || c == '"' || c == '\\' {
			return false
		}
	}
	return true
}

// appendUnit appends a UTF-16 code unit, escaped.
func appendUnit(b []byte, u rune) []byte {
	return append(b, '\\', 'u', hex[u>>12&15], hex[u>>8&15], hex[u>>4&15], hex[u&15])
}
