#!/bin/bash
# forward.sh COMMAND ...: run a command, pass SIGUSR1, SIGTERM and SIGINT to it, and end with its status.
#
# SLURM's --signal=B:USR1@120 and a preemption signal only the batch shell, and bash delays a signal while a command
# runs in the foreground. The command therefore runs in the background, and the shell waits for it with `wait`, which
# signals interrupt.
set -u

# Set traps first: a signal before them would end this shell but not the command. A signal that arrives before the
# process id is known is passed on afterwards.
child='' early='' interrupted=0
for name in USR1 TERM INT; do
    # shellcheck disable=SC2064 # expand the name now
    trap "interrupted=1; early=$name; [ -z \"\$child\" ] || kill -s $name \"\$child\" 2>/dev/null" "$name"
done

"$@" &
child=$!
[ -z "$early" ] || kill -s "$early" "$child" 2>/dev/null

status=0
while :; do
    interrupted=0
    wait "$child"
    result=$?
    [ "$result" -eq 127 ] || status=$result # 127: the command has ended, and the previous `wait` returned its status
    if [ "$interrupted" -eq 0 ] || [ "$result" -eq 127 ]; then
        break
    fi
done
exit "$status"
