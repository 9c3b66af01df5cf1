#!/usr/bin/env bash
# Train on the nodes of an LSF cluster until the run is finished, however many time limits that takes.
#
# Copy this file, edit the two places that say EDIT, activate your Python environment, and: bsub < lsf.sh
#
# LSF sends USR1 two minutes before the time limit. All ranks stop after the same step with a checkpoint, the run ends
# with exit code 75, and LSF puts the job back into the queue. Then the same command with the same --out goes on, bit
# for bit. DONE in --out says that the run is finished. What bkill ends stays ended; bsub goes on with it.

# EDIT 1 of 2: the resources: ranks, ranks on each node, and hours:minutes.
#BSUB -n 8
#BSUB -R "span[ptile=4]"
#BSUB -W 01:00

#BSUB -wt 2
#BSUB -wa USR1
#BSUB -Q 75
#BSUB -r
#BSUB -o distconv-%J.log

# EDIT 2 of 2: the folder of the run, and its train command. mpirun knows the nodes if it was built for LSF; MPICH was.
out=runs/lsf
run=(mpirun python -m distconv.train --data mnist --epochs 20 --out "$out")

# A good first line while you set this up: mpirun python -m distconv.doctor
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
if [ ! -e "$out/DONE" ] && [ "$(newest_checkpoint)" != "$first" ]; then
    code=75
fi
exit "$code"
