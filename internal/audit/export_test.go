package audit

// OpenSized is Open with a buffer of so many events.
func OpenSized(o Options, capacity int) (*Log, error) { return open(o, capacity) }

// Capacity of the buffer that Open makes.
const Capacity = capacity

// AppendLine makes a line of an event.
func AppendLine(b []byte, e *Event, most int) []byte { return appendLine(b, e, most) }

// Line is what an event becomes.
func Line(e *Event, most int) string { return string(appendLine(nil, e, most)) }

// Limits of lines, and what they are cut by.
const (
	LongestLine     = longestLine
	LongestDatagram = longestDatagram
)
