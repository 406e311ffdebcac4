package main

import (
	"errors"
	"fmt"
	"strings"
)

// jobID is the value of --job. It refuses what a platform leaves behind when it
// has not filled in a variable: an empty id asks for the token that everybody
// shares, and one that is the same for all jobs gives them one token, which the
// first of them revokes.
type jobID string

// Set implements pflag.Value.
func (j *jobID) Set(id string) error {
	if id == "" {
		return errors.New("it is empty; is the variable set that it comes from?")
	}
	for _, mark := range []string{"$(", "${", "{{"} {
		if strings.Contains(id, mark) {
			return fmt.Errorf("it contains %q: a variable that nothing has replaced", mark)
		}
	}
	*j = jobID(id)
	return nil
}

// String implements pflag.Value.
func (j *jobID) String() string { return string(*j) }

// Type implements pflag.Value.
func (*jobID) Type() string { return "string" }

// hasJob finds out whether --dedicated says whose token it means.
func hasJob(dedicated bool, id string) error {
	if dedicated && id == "" {
		return usageError{errors.New("--dedicated is a token of one job's own: say which with --job ID")}
	}
	return nil
}
