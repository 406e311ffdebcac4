#!/bin/sh
# Runs the tests on the stage that the environment names. "make clients" has built them: no network is needed.
set -eu
built="$(dirname "$0")/../../bin/clients-java"
exec java -cp "$built/classes:$built/test-classes:$built/lib/*" org.junit.platform.console.ConsoleLauncher execute \
  --scan-classpath="$built/test-classes" --fail-if-no-tests --disable-banner --disable-ansi-colors --details=tree
