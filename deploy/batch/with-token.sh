#!/bin/sh
# Runs a program with an access token in a file that is kept fresh, and stops keeping it when the program ends:
#
#   with-token.sh [OPTION...] PROFILE PROGRAM [ARGUMENT...]
#
#   --job ID            id of the batch job, the same one for each try of the same work
#   --dedicated         a token of the job's own
#   --scope SCOPE       a scope of the profile, to get a token for fewer than all; may be repeated
#   --min-lifetime TIME how long each token must still live when it comes, such as 10m
#   --revoke WHEN       revoke the dedicated token when the program has ended: "success" if its exit status is 0, because
#                       one that failed may be tried again under the same id; or "always"
#   --wait SECONDS      how long to wait for the first token; default: 60
#
# The program finds the file's path in TOKEN_FILE and reads it each time it needs the token. It gets the signals HUP, TERM,
# USR1 and USR2 that this script gets, and TERM for INT and QUIT; this script ends with its exit status, which is 128 and
# the signal's number if a signal ended it. It is not started without a token: then the exit status is 1, or 2 for wrong
# arguments.
#
# How to reach the broker is in the environment: BROKER_ADDRESS, BROKER_CA and the others of "broker watch --help". BROKER
# is the command itself, if it is not "broker" on the PATH. The file is in a new directory below TOKEN_DIR, by default in
# memory (/dev/shm) where there is such a place, which only this user can open and which is removed in the end. After
# SIGKILL nobody does that: in a container the end of the container does.
set -u

say() { echo "with-token.sh: $*" >&2; }
misused() {
  say "$*"
  exit 2
}

broker=${BROKER:-broker} job='' dedicated='' scopes='' lifetime='' revoke='' patience=60
while [ $# -gt 0 ]; do
  case $1 in
    --dedicated) dedicated=yes && shift && continue ;;
    --) shift && break ;;
    --job | --scope | --min-lifetime | --revoke | --wait) ;;
    -*) misused "unknown option $1" ;;
    *) break ;;
  esac
  if [ $# -lt 2 ] || [ -z "$2" ]; then
    misused "$1 needs a value; is the variable set that it comes from?"
  fi
  case $1 in
    --job) job=$2 ;;
    --scope) scopes=${scopes:+$scopes,}$2 ;;
    --min-lifetime) lifetime=$2 ;;
    --revoke) revoke=$2 ;;
    --wait) patience=$2 ;;
  esac
  shift 2
done
if [ $# -lt 2 ] || { [ "$2" = -- ] && [ $# -lt 3 ]; }; then
  misused "which profile, and which program? with-token.sh [OPTION...] PROFILE PROGRAM [ARGUMENT...]"
fi
profile=$1
shift
if [ "$1" = -- ]; then
  shift
fi
case $revoke in
  '') ;;
  success | always)
    if [ -z "$job" ] || [ -z "$dedicated" ]; then
      misused "--revoke is for a token of the job's own: add --job ID and --dedicated"
    fi
    ;;
  *) misused "--revoke $revoke: use success or always" ;;
esac
case $patience in *[!0-9]* | 0?* | ???????*) misused "--wait $patience: use a number of seconds" ;; esac

if [ -z "${TOKEN_DIR:-}" ]; then
  TOKEN_DIR=${TMPDIR:-/tmp}
  [ -d /dev/shm ] && [ -w /dev/shm ] && TOKEN_DIR=/dev/shm
fi
directory='' watch='' program='' got=''
# Whatever ends this script, nothing of it is left.
# shellcheck disable=SC2317 # the trap calls it
clean() {
  [ -d "$directory" ] || return 0
  trap '' HUP INT QUIT TERM USR1 USR2
  if [ -n "${watch:=${!:-}}" ]; then
    kill -TERM "$watch" 2>/dev/null
    wait "$watch" 2>/dev/null
  fi
  rm -rf "$directory"
}
trap clean EXIT

# passed SIGNAL [STATUS]: a signal is the program's; before there is one it ends this script, if it has a status for that.
# That a trap has run ends "wait", too.
# shellcheck disable=SC2317 # the traps call it
passed() {
  got=yes
  if [ -n "$watch" ] && [ -z "$program" ] && [ "$!" != "$watch" ]; then
    program=$! # started, and not noted yet
  fi
  if [ -n "$program" ]; then
    kill -"$1" "$program" 2>/dev/null
  elif [ $# -gt 1 ]; then
    exit "$2"
  fi
}
trap 'passed HUP 129' HUP
trap 'passed TERM 130' INT # which what a shell starts in the background does not hear
trap 'passed TERM 131' QUIT
trap 'passed TERM 143' TERM
trap 'passed USR1' USR1
trap 'passed USR2' USR2

directory=$(mktemp -d "$TOKEN_DIR/token.XXXXXX") || exit 1
TOKEN_FILE=$directory/access_token
export TOKEN_FILE
"$broker" watch "$profile" --file "$TOKEN_FILE" ${job:+--job "$job"} ${dedicated:+--dedicated} ${scopes:+--scope "$scopes"} \
  ${lifetime:+--min-lifetime "$lifetime"} </dev/null >&2 &
watch=$!

tenths=$((patience * 10))
until [ -s "$TOKEN_FILE" ]; do
  if ! kill -0 "$watch" 2>/dev/null; then
    wait "$watch"
    status=$?
    [ "$status" -ne 2 ] && status=1
    say "no token of profile $profile: broker watch has ended, see above"
    exit "$status"
  fi
  if [ "$tenths" -le 0 ]; then
    say "no token of profile $profile within $patience s; --wait says how long to wait"
    exit 1
  fi
  tenths=$((tenths - 1))
  sleep 0.1
done

exec 3<&0 # what a shell starts in the background has no input unless it is given one
exec "$@" <&3 3<&- & # a program, whatever functions of this script have its name
program=$!
exec 3<&-

# A wait that a signal has cut short says nothing about the program, so wait again; 127 is the answer for a program that
# has been waited for already, whose status came with the signal.
status=0 again=''
while :; do
  got=''
  wait "$program"
  last=$?
  [ -n "$again" ] && [ "$last" -eq 127 ] || status=$last
  [ -n "$got" ] || break
  again=yes
done

if [ "$revoke" = always ] || { [ "$revoke" = success ] && [ "$status" -eq 0 ]; }; then
  clean
  "$broker" revoke "$profile" --job "$job" --dedicated ${scopes:+--scope "$scopes"} --timeout 10s </dev/null >&2 ||
    say "the token of job $job is not revoked; it ends by itself"
fi
exit "$status"
