#!/usr/bin/env bash
# Succeeds if the tool chain of a language is on the machine, and new enough; else it says loudly what is left out.
#
#   toolchain.sh java|rust what is left out
set -euo pipefail

# least HAVE WANT: HAVE is no older than WANT.
least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

missing() {
  echo "NOT BUILT, NOT TESTED: $2: $1" >&2
  exit 1
}

case $1 in
  java)
    command -v mvn >/dev/null && command -v javac >/dev/null || missing "a JDK, 17 or newer, with Maven is not installed" "$2"
    version=$(javac -version 2>&1)
    least "${version#javac }" 17 || missing "$version is older than 17" "$2"
    ;;
  rust)
    command -v cargo >/dev/null || missing "Rust, 1.88 or newer, is not installed" "$2"
    version=$(cargo --version | cut -d' ' -f2)
    least "$version" 1.88 || missing "Rust $version is older than 1.88" "$2"
    ;;
  *)
    echo "toolchain.sh: which is $1?" >&2
    exit 2
    ;;
esac
