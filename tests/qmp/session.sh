#!/bin/sh
# A migration by hand, with nothing but socat: session.sh SOURCE DESTINATION URI.
#
# SOURCE and DESTINATION are QMP sockets; the destination was started with `--incoming defer`. Prints
# what both answer, and ends both.
set -eu

# ask SOCKET COMMAND…: a session with these commands.
ask() {
    socket=$1
    shift
    printf '%s\n' '{"execute": "qmp_capabilities"}' "$@" | socat -t 30 - "UNIX-CONNECT:$socket"
}

ask "$2" '{"execute": "migrate-incoming", "arguments": {"uri": "'"$3"'"}}'
ask "$1" '{"execute": "migrate-set-parameters", "arguments": {"downtime-limit": 2000}}' \
    '{"execute": "migrate", "arguments": {"uri": "'"$3"'"}}'
tries=600
until ask "$1" '{"execute": "query-migrate"}' | grep '"status": "completed"'; do
    tries=$((tries - 1))
    [ "$tries" -gt 0 ]
    sleep 0.1
done
ask "$1" '{"execute": "query-status"}' '{"execute": "quit"}'
ask "$2" '{"execute": "query-status"}' '{"execute": "quit"}'
