package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/config"
)

func newCheck() *cobra.Command {
	var path, output string
	var q question
	cmd := &cobra.Command{
		Use:   "check --config FILE",
		Short: "Check a config, as serve would, without touching the network",
		Long: "Check a config, as serve would, without touching the network: every mistake with its\nline and column. The exit status is 0 if it can be served, else 2.\n\n" +
			"With --explain it then says which rule of the policy decides whether a caller may do\nsomething with a profile, or why none allows it and what to change. The exit status\nis 0 whether it is allowed or denied.",
		Example: "  broker check --config broker.yaml\n" +
			"  broker check --config broker.yaml --explain --caller dns:worker.example.com --profile invoices\n" +
			"  broker check --config broker.yaml --explain --caller unix:uid:1000 --group unix:gid:20 --profile invoices --operation issue --scope read",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "text" && output != "json" {
				return usageError{fmt.Errorf("--output %q: use text or json", output)}
			}
			if err := q.check(cmd); err != nil {
				return usageError{err}
			}
			return check(path, output, &q, cmd.OutOrStdout())
		},
	}
	configFlag(cmd, &path)
	f := cmd.Flags()
	f.StringVar(&output, "output", "text", "text or json")
	f.BoolVar(&q.asked, "explain", false, "say what the policy decides about --caller and --profile, and why")
	f.StringVar(&q.caller, "caller", "", "who asks, as whoami and the log spell it, for example spiffe://prod/ns/batch/sa/worker")
	f.StringArrayVar(&q.groups, "group", nil, "a group of the caller unix:uid:N, unix:gid:N; may be repeated")
	f.StringVar(&q.profile, "profile", "", "the profile")
	f.StringVar(&q.operation, "operation", "", "issue, refresh, watch, revoke or admin; default: each of them")
	f.StringSliceVar(&q.scopes, "scope", nil, "a scope that is asked for; may be repeated; default: the profile's own")
	return cmd
}

// question is what --explain is asked.
type question struct {
	asked     bool
	caller    string
	groups    []string
	profile   string
	operation string
	scopes    []string
}

// check finds mistakes in how it is asked.
func (q *question) check(cmd *cobra.Command) error {
	if !q.asked {
		for _, flag := range []string{"caller", "group", "profile", "operation", "scope"} {
			if cmd.Flags().Changed(flag) {
				return fmt.Errorf("--%s says what to explain: add --explain", flag)
			}
		}
		return nil
	}
	switch {
	case q.caller == "" || q.profile == "":
		return errors.New("--explain needs --caller and --profile")
	case len(q.groups) > 0 && !strings.HasPrefix(q.caller, "unix:uid:"):
		return errors.New("--group: only callers unix:uid:N have groups")
	case q.operation != "" && len(q.operations()) == 0:
		return fmt.Errorf("--operation %q: use issue, refresh, watch, revoke or admin", q.operation)
	}
	for _, group := range q.groups {
		if !strings.HasPrefix(group, "unix:gid:") || access.CheckName(group) != nil {
			return fmt.Errorf("--group %q: write unix:gid:N", group)
		}
	}
	return nil
}

func (q *question) operations() []access.Operation {
	return slices.DeleteFunc(access.Operations(), func(op access.Operation) bool {
		return q.operation != "" && q.operation != op.String()
	})
}

// report is what check prints as JSON.
type report struct {
	Valid       bool            `json:"valid"`
	Profiles    int             `json:"profiles"`
	Problems    config.Problems `json:"problems"`
	Warnings    config.Problems `json:"warnings"`
	Explanation *explanation    `json:"explanation,omitempty"`
}

// explanation answers a question.
type explanation struct {
	Caller string   `json:"caller"`
	Groups []string `json:"groups,omitempty"`
	// CallerProblem says why no caller has that name, if so.
	CallerProblem string `json:"caller_problem,omitempty"`
	Profile       string `json:"profile"`
	ProfileExists bool   `json:"profile_exists"`
	// Scopes that are asked for; admin has nothing to do with them.
	Scopes    []string  `json:"scopes"`
	Decisions []verdict `json:"decisions"`
}

// verdict is what the policy says of one operation.
type verdict struct {
	Operation string        `json:"operation"`
	Allowed   bool          `json:"allowed"`
	Rule      string        `json:"rule,omitempty"`
	Place     *config.Place `json:"place,omitempty"`
	// Limits are the scopes to which the rule limits it.
	Limits []string `json:"limits,omitempty"`
	// Missing are the scopes that the nearest rule lacks.
	Missing []string `json:"missing,omitempty"`
	Why     string   `json:"why"`
	// Invalid says why the request would be refused though it is allowed.
	Invalid string `json:"invalid,omitempty"`
}

// answer says what a policy decides.
func (q *question) answer(c *config.Config, policy *access.Policy) *explanation {
	e := &explanation{Caller: q.caller, Groups: q.groups, Profile: q.profile, Scopes: slices.Clone(q.scopes)}
	for _, p := range c.Profiles {
		if p.Name == q.profile {
			e.ProfileExists = true
			if len(q.scopes) == 0 {
				e.Scopes = slices.Clone(p.Scopes)
			}
		}
	}
	if e.Scopes == nil {
		e.Scopes = []string{}
	}
	caller, err := access.Named(q.caller, q.groups...)
	if err != nil {
		e.CallerProblem = err.Error()
		for _, op := range q.operations() {
			e.Decisions = append(e.Decisions, verdict{Operation: op.String(), Why: e.CallerProblem})
		}
		return e
	}
	e.Caller = caller.Name
	for _, op := range q.operations() {
		e.Decisions = append(e.Decisions, q.verdict(c, policy, caller, op, e))
	}
	return e
}

func (q *question) verdict(c *config.Config, policy *access.Policy, caller *access.Caller, op access.Operation, e *explanation) verdict {
	d := policy.Explain(caller, op, q.profile, e.Scopes)
	v := verdict{Operation: op.String(), Allowed: d.Allowed, Rule: d.By(), Missing: d.Missing, Why: d.Why}
	if d.Rule >= 0 {
		v.Place = &c.Places[d.Rule]
		if op != access.Admin {
			v.Limits = c.Policy[d.Rule].Scopes
		}
	}
	switch {
	case !e.ProfileExists:
		v.Allowed, v.Why = false, "there is no such profile; if there were: "+d.Why
	case v.Allowed && op != access.Admin && len(q.scopes) > 0:
		if foreign := without(q.scopes, profileNamed(c.Profiles, q.profile).Scopes); len(foreign) > 0 {
			v.Invalid = "the profile does not have the scopes " + strings.Join(foreign, " ")
		}
	}
	return v
}

func profileNamed(profiles []*broker.Profile, name string) *broker.Profile {
	return profiles[slices.IndexFunc(profiles, func(p *broker.Profile) bool { return p.Name == name })]
}

// without are the words that are not among others.
func without(words, others []string) []string {
	return slices.DeleteFunc(slices.Clone(words), func(word string) bool { return slices.Contains(others, word) })
}

// print writes a line per operation.
func (e *explanation) print(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	row := func(name, value string) { fmt.Fprintf(t, "%s\t%s\n", name, value) }
	row("caller", strings.Join(append([]string{e.Caller}, e.Groups...), " "))
	row("profile", e.Profile)
	row("scopes", or(strings.Join(e.Scopes, " "), "none: the server decides"))
	for _, v := range e.Decisions {
		row(v.Operation, v.String())
	}
	return t.Flush()
}

func (v verdict) String() string {
	if !v.Allowed {
		return "denied: " + v.Why
	}
	s := "allowed: " + v.Why
	if v.Place != nil {
		s = fmt.Sprintf("allowed by %s (%s:%d)", v.Rule, filepath.Base(v.Place.File), v.Place.Line)
	}
	if len(v.Limits) > 0 {
		s += ", which limits the scopes to " + strings.Join(v.Limits, " ")
	}
	if v.Invalid != "" {
		s += "; but the request is not valid: " + v.Invalid
	}
	return s
}

func check(path, output string, q *question, w io.Writer) error {
	r := report{Problems: config.Problems{}, Warnings: config.Problems{}}
	c, err := config.Load(path, config.Options{})
	var policy *access.Policy
	if err == nil {
		policy, err = access.NewPolicy(c.Policy)
	}
	if err != nil {
		if !errors.As(err, &r.Problems) {
			r.Problems = config.Problems{{File: path, Message: err.Error()}}
		}
	} else {
		r.Valid, r.Profiles, r.Warnings = true, len(c.Profiles), append(r.Warnings, c.Warnings...)
		if q.asked {
			r.Explanation = q.answer(c, policy)
		}
	}
	if printErr := r.print(w, path, output); printErr != nil {
		return printErr
	}
	if err != nil {
		return alreadyTold{usageError{err}}
	}
	return nil
}

func (r *report) print(w io.Writer, path, output string) error {
	if output == "json" {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(r)
	}
	for _, p := range r.Problems {
		fmt.Fprintln(w, p)
	}
	for _, p := range r.Warnings {
		fmt.Fprintln(w, "warning:", p)
	}
	if r.Valid {
		fmt.Fprintf(w, "%s is valid: %d profiles\n", path, r.Profiles)
	}
	if r.Explanation != nil {
		return r.Explanation.print(w)
	}
	return nil
}
