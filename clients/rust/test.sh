#!/bin/sh
# Runs the tests on the stage that the environment names. "make clients" has built them: no network is needed.
set -eu
cd "$(dirname "$0")"
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$PWD/../../bin/clients-rust}"
exec cargo test --locked --offline -- --test-threads=1 --nocapture
