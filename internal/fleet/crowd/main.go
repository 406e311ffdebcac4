// Command crowd is many callers of a fleet at once. It reads a fleet.Crowd as
// one line of JSON from standard input and connects; it says "ready", and begins
// at the next line; with Crowd.Again it ends when standard input does. Then it
// writes a []fleet.Answer, encoded by gob.
package main

import (
	"bufio"
	"context"
	"encoding/gob"
	"encoding/json"
	"fmt"
	"io"
	"os"

	"github.com/tokenbroker/tokenbroker/internal/fleet"
)

func main() {
	if err := run(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "crowd:", err)
		os.Exit(1)
	}
}

func run(stdin io.Reader, stdout io.Writer) error {
	in := bufio.NewReader(stdin)
	line, err := in.ReadBytes('\n')
	if err != nil {
		return fmt.Errorf("reading what to do: %w", err)
	}
	var crowd fleet.Crowd
	if err := json.Unmarshal(line, &crowd); err != nil {
		return fmt.Errorf("reading what to do: %w", err)
	}
	ctx, end := context.WithCancel(context.Background())
	defer end()
	begin := make(chan struct{})
	go func() {
		_, _ = in.ReadBytes('\n') // its end, too, is a beginning
		close(begin)
		if crowd.Again {
			_, _ = io.Copy(io.Discard, in)
			end()
		}
	}()
	answers, err := crowd.Run(ctx, func() { fmt.Fprintln(stdout, "ready") }, begin)
	if err != nil {
		return err
	}
	if err := gob.NewEncoder(stdout).Encode(answers); err != nil {
		return fmt.Errorf("writing the answers: %w", err)
	}
	return nil
}
