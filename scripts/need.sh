#!/usr/bin/env bash
# Makes sure that programs the tests need are there, installing them with the system's package manager where possible.
#
#   need.sh cc redis-server ...
#
# To add one: a case in have() and one in package().
set -euo pipefail

# have NAME: succeeds if it is there.
have() {
  case $1 in
    cc) command -v "$(go env CC | cut -d' ' -f1)" >/dev/null && echo 'int main(void) { return 0; }' | $(go env CC) -x c -o /dev/null - >/dev/null 2>&1 ;;
    # 7.0 is the first that can build a Cluster the way the tests do.
    redis-server) command -v redis-server >/dev/null && redis-server --version | grep -Eq ' v=([7-9]|[1-9][0-9])\.' ;;
    # 18 is the oldest that the third-party server supports.
    node) command -v node >/dev/null && node -e 'process.exit(parseInt(process.versions.node) >= 18 ? 0 : 1)' ;;
    # venv comes without pip where distributions split it up.
    python3-venv) command -v python3 >/dev/null && python3 -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ;;
    # It is built in, or it can be loaded; then nginx complains about an empty config only.
    nginx-stream)
      command -v nginx >/dev/null && { [[ $(nginx -V 2>&1) =~ --with-stream( |$) ]] ||
        [[ $(nginx -t -e stderr -g 'load_module modules/ngx_stream_module.so; pid /dev/null;' -c /dev/null 2>&1) == *'no "events" section'* ]]; }
      ;;
    chromium) command -v chromium chromium-browser google-chrome >/dev/null ;; # any will do
    *) command -v "$1" >/dev/null ;;
  esac
}

# why NAME: what it is for.
why() {
  case $1 in
    cc) echo "a C compiler, for the race detector" ;;
    redis-server) echo "redis-server 7.0 or newer, for the tests" ;;
    node) echo "Node.js 18 or newer, for the third-party authorization server" ;;
    python3-venv) echo "Python 3.10 or newer with venv and pip, for clients and Envoy in the tests" ;;
    haproxy) echo "HAProxy 2.2 or newer, as a balancer in the tests" ;;
    nginx-stream) echo "nginx with its module stream, as a balancer in the tests" ;;
    chromium) echo "Chromium, for the tests of the console" ;;
    python3) echo "Python, for the examples of Airflow in the tests" ;;
    shellcheck) echo "ShellCheck, for the scripts among the examples" ;;
    *) echo "$1, for the tests" ;;
  esac
}

# package MANAGER NAME: the packages that bring it.
package() {
  case $1:$2 in
    apt-get:cc) echo gcc libc6-dev ;;
    dnf:cc) echo gcc glibc-devel ;;
    apk:cc) echo gcc musl-dev ;;
    # Some systems start it as a service then. The tests run servers of their own, on other ports than 6379.
    apt-get:redis-server) echo redis-server redis-tools ;;
    dnf:redis-server | apk:redis-server) echo redis ;;
    *:node) echo nodejs ;;
    # Some systems start these as services then. The tests run their own, on other ports and with files of their own.
    apt-get:nginx-stream) echo nginx libnginx-mod-stream ;;
    dnf:nginx-stream | apk:nginx-stream) echo nginx nginx-mod-stream ;;
    dnf:shellcheck) echo ShellCheck ;;
    dnf:python3-venv) echo python3 python3-pip ;;
    apk:python3-venv) echo python3 py3-pip ;;
    *) echo "$2" ;;
  esac
}

# install MANAGER PACKAGE...
install() {
  local manager=$1 sudo=()
  shift
  if [ "$(id -u)" -ne 0 ]; then
    sudo=(sudo -n)
  fi
  case $manager in
    apt-get)
      "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@" ||
        { "${sudo[@]}" apt-get update && "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"; }
      ;;
    dnf) "${sudo[@]}" dnf install -y "$@" ;;
    apk) "${sudo[@]}" apk add "$@" ;;
  esac
}

for name; do
  have "$name" && continue
  manager=
  for candidate in apt-get dnf apk; do
    if command -v "$candidate" >/dev/null; then
      manager=$candidate
      break
    fi
  done
  if [ -z "$manager" ]; then
    echo "need.sh: $(why "$name") is missing, and there is no apt-get, dnf or apk to install it with: install it, then try again" >&2
    exit 1
  fi
  # Word splitting is wanted: several packages may be needed.
  # shellcheck disable=SC2207
  packages=($(package "$manager" "$name"))
  echo "need.sh: $(why "$name") is missing: installing ${packages[*]} with $manager" >&2
  if ! install "$manager" "${packages[@]}" >&2 || ! have "$name"; then
    echo "need.sh: could not install ${packages[*]} with $manager (it takes root or sudo without a password, and a network): install it, then try again" >&2
    exit 1
  fi
done
