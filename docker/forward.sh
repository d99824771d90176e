#!/bin/bash
# forward.sh COMMAND ...: runs it, hands SIGUSR1, SIGTERM and SIGINT on to it, and ends with its status.
#
# SLURM's --signal=B:USR1@120 and a preemption reach the batch shell alone, and bash leaves a signal waiting as long as
# a command runs in the foreground. So the command runs in the background, and the shell waits in a way that signals end.
set -u

# Traps come first: a signal before them would end this shell and leave the command behind. One that comes before the
# command has a number is handed on once it has.
child='' early='' interrupted=0
for name in USR1 TERM INT; do
    # shellcheck disable=SC2064 # the name is that of now
    trap "interrupted=1; early=$name; [ -z \"\$child\" ] || kill -s $name \"\$child\" 2>/dev/null" "$name"
done

"$@" &
child=$!
[ -z "$early" ] || kill -s "$early" "$child" 2>/dev/null

status=0
while :; do
    interrupted=0
    wait "$child"
    found=$?
    [ "$found" -eq 127 ] || status=$found # 127: it has ended, and its status was given the time before
    if [ "$interrupted" -eq 0 ] || [ "$found" -eq 127 ]; then
        break
    fi
done
exit "$status"
