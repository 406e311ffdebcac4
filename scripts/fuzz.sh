#!/usr/bin/env bash
# Runs each fuzz target for a while: fuzz.sh 30s ./...
set -euo pipefail

time=$1
shift
# Word splitting is wanted: several patterns may be given.
# shellcheck disable=SC2048
for package in $(go list $*); do
  for target in $(go test -list '^Fuzz' "$package" | grep '^Fuzz' || true); do
    echo "$package $target"
    # Targets with real servers behind them are not deterministic enough to be minimised for long.
    go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 10x "$package"
  done
done
