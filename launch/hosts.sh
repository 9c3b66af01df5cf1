#!/usr/bin/env bash
# Train on a list of hosts, over ssh and without a batch system, until the run is finished.
#
# Copy this file, edit the two places that say EDIT, and start it on the first of the hosts: ./hosts.sh
# It must reach the others by ssh without a password, and all of them must have the Python environment, the data and
# --out at the same path: a shared folder does it.
#
# Ctrl-C, TERM or USR1 asks for a stop: all ranks stop after the same step with a checkpoint, and this ends with exit
# code 75. Start it again, and the same command with the same --out goes on, bit for bit. DONE in --out says that the
# run is finished. After an accident it goes on by itself.

# EDIT 1 of 2: the resources: each host with its number of ranks.
hosts=node1:4,node2:4

# EDIT 2 of 2: the Python environment, the folder of the run, and its train command. The other hosts do not know your
# PATH, so programs need their whole path. MPICH takes the first line, Open MPI the second.
bin=$PWD/.venv/bin out=$PWD/runs/hosts
run=("$bin/mpirun" -hosts "$hosts" "$bin/python" -m distconv.train --data mnist --epochs 20 --out "$out")
#run=("$bin/mpirun" --host "$hosts" -x OMP_NUM_THREADS "$bin/python" -m distconv.train --data mnist --out "$out")

# A good first line while you set this up: "$bin/mpirun" -hosts "$hosts" "$bin/python" -m distconv.doctor
export OMP_NUM_THREADS=1 # ranks share the cores of a host: more threads would take them from one another

newest_checkpoint() {
    local files=("$out"/checkpoints/*)
    echo "${files[-1]}"
}

stopping=no
trap 'stopping=yes; interrupted=yes; kill -USR1 $!' INT TERM HUP USR1
while true; do
    first=$(newest_checkpoint)
    setsid "${run[@]}" </dev/null & # in a session of its own, as Ctrl-C would make mpirun kill the ranks
    while true; do
        interrupted=no
        wait $!
        code=$?
        [ $interrupted = no ] && break # else the trap has run, and the ranks still write
    done
    # Without DONE, a run that came further than it began has met with an accident, and starts again. A run that came no
    # further would fail in the same way again. 75 says that it was asked to stop.
    if [ -e "$out/DONE" ] || [ $stopping = yes ] || [ "$code" = 75 ] || [ "$(newest_checkpoint)" = "$first" ]; then
        exit "$code"
    fi
done
