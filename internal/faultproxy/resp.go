package faultproxy

import (
	"bufio"
	"fmt"
	"io"
	"strconv"
	"strings"
)

func newCommand(words []string) Command {
	return Command{Name: strings.ToLower(words[0]), Args: words[1:]}
}

// isMessage reports whether a value is what somebody has published.
func isMessage(words []string) bool {
	return len(words) > 0 && (words[0] == "message" || words[0] == "pmessage" || words[0] == "smessage")
}

// readPiece returns what there is, one byte at least.
func readPiece(r *bufio.Reader) ([]byte, error) {
	if _, err := r.Peek(1); err != nil {
		return nil, err
	}
	piece := make([]byte, r.Buffered())
	_, err := io.ReadFull(r, piece)
	return piece, err
}

// readValue reads one value of RESP2 or RESP3: its bytes, and the strings and
// numbers in it, in their order.
func readValue(r *bufio.Reader) (raw []byte, words []string, err error) {
	for left := 1; left > 0; left-- {
		line, err := r.ReadBytes('\n')
		if err != nil {
			return nil, nil, err
		}
		raw = append(raw, line...)
		text := strings.TrimRight(string(line), "\r\n")
		if text == "" {
			return nil, nil, fmt.Errorf("not a RESP value: %q", line)
		}
		switch kind, rest := text[0], text[1:]; kind {
		case '*', '~', '>', '%', '|', '$', '=', '!':
			n, err := strconv.Atoi(rest)
			if err != nil {
				return nil, nil, fmt.Errorf("not a RESP value: %q", line)
			}
			switch {
			case n < 0: // null
			case kind == '%':
				left += 2 * n
			case kind == '|': // attributes precede the value that they are about
				left += 2*n + 1
			case kind == '*' || kind == '~' || kind == '>':
				left += n
			default:
				bulk := make([]byte, n+2)
				if _, err := io.ReadFull(r, bulk); err != nil {
					return nil, nil, err
				}
				raw, words = append(raw, bulk...), append(words, string(bulk[:n]))
			}
		default:
			words = append(words, rest)
		}
	}
	return raw, words, nil
}
