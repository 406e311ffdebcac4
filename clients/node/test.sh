#!/bin/sh
# Tests the package, whose node_modules and schema.json "make clients" has made, on the stage that the environment names.
set -eu
cd "$(dirname "$0")"
node_modules/.bin/tsc --project .
exec node --test --test-reporter=spec test/*.test.js
