#!/usr/bin/env bash
# Train on the nodes of a Grid Engine cluster until the run is finished, however many time limits that takes.
#
# Copy this file, edit the two places that say EDIT, activate your Python environment, and: qsub gridengine.sh
#
# Grid Engine sends USR1 at the soft limit s_rt. All ranks stop after the same step with a checkpoint, the run ends with
# exit code 75, and the job goes back to the queue. Then the same command with the same --out goes on, bit for bit.
# DONE in --out says that the run is finished. What qdel ends stays ended; qsub goes on with it.

# EDIT 1 of 2: the resources: your site's parallel environment with the number of ranks, and the limits, two minutes
# apart.
#$ -pe mpi 8
#$ -l s_rt=00:58:00,h_rt=01:00:00

#$ -S /bin/bash
#$ -cwd
#$ -V
#$ -j y
#$ -r y

# EDIT 2 of 2: the folder of the run, and its train command.
out=runs/gridengine
run=(mpirun -n "$NSLOTS" python -m distconv.train --data mnist --epochs 20 --out "$out")

# A good first line while you set this up: mpirun -n "$NSLOTS" python -m distconv.doctor
export OMP_NUM_THREADS=1 # ranks share the cores of a node: more threads would take them from one another

newest_checkpoint() {
    local files=("$out"/checkpoints/*)
    echo "${files[-1]}"
}
first=$(newest_checkpoint)

trap 'interrupted=yes; kill -USR1 $!' USR1 # the ranks of other nodes hear of it by mpirun
"${run[@]}" &
while true; do
    interrupted=no
    wait $!
    code=$?
    [ $interrupted = no ] && break # else the trap has run, and the ranks still write
done

# 75 says: run me again. Without DONE, so does a run that came further than it began: a node may have failed, and mpirun
# may lose the 75. A run that came no further would fail in the same way again, so that one ends the job.
if [ ! -e "$out/DONE" ] && { [ "$code" = 75 ] || [ "$(newest_checkpoint)" != "$first" ]; }; then
    exit 99 # by which Grid Engine knows that a job wants to run again
fi
exit "$code"
