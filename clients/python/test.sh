#!/bin/sh
# Tests the package that "make clients" has installed into bin/clients-python, on the stage that the environment names.
set -eu
cd "$(dirname "$0")"
bin=$PWD/../../bin/clients-python/bin
"$bin/mypy" --cache-dir=/dev/null token_broker build_schema.py
cd tests # where no other token_broker is
exec "$bin/python" -W error::ResourceWarning -m unittest -v
