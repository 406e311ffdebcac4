#!/usr/bin/env bash
# Compares proto/ with what it was before, and fails on a change that breaks users.
#
# Before means: the last commit that this work and main have in common; on main itself, the commit before (the current
# one, while proto/ has changes that are not committed). BREAKING_AGAINST=<commit> overrides it.
set -euo pipefail

skip() {
  echo "################################################################" >&2
  echo "SKIPPED buf breaking: $1" >&2
  echo "################################################################" >&2
  exit 0
}

git rev-parse --verify -q HEAD >/dev/null || skip "there is no earlier commit to compare with"

base=${BREAKING_AGAINST:-}
if [ -z "$base" ]; then
  main=$(git rev-parse --verify -q refs/remotes/origin/main || git rev-parse --verify -q refs/heads/main || git rev-parse HEAD)
  if ! git merge-base --is-ancestor HEAD "$main"; then
    base=$(git merge-base HEAD "$main") || skip "this branch has no commit in common with main"
  elif [ -n "$(git status --porcelain -- proto)" ]; then
    base=HEAD
  elif ! base=$(git rev-parse --verify -q HEAD~1); then
    if [ "$(git rev-parse --is-shallow-repository)" = true ]; then
      echo "buf breaking needs the commit before HEAD, and this clone is shallow: run git fetch --unshallow" >&2
      exit 1
    fi
    skip "HEAD is the first commit, there is no earlier one to compare with"
  fi
fi
base=$(git rev-parse --verify "$base^{commit}")
[ -n "$(git ls-tree "$base" proto)" ] || skip "the earlier commit $base has no proto/ to compare with"

# The earlier schema is compiled with today's buf.yaml and with the validate.proto that git does not hold.
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
git archive "$base" proto | tar -x -C "$tmp"
cp -R buf.yaml third_party "$tmp/"
bin/buf breaking --against "$tmp"
echo "buf breaking: compatible with $(git log -1 --format='%h (%s)' "$base")"
