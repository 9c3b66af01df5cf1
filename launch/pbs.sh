#!/usr/bin/env bash
# Train on the nodes of a PBS cluster (PBS Pro, OpenPBS) until the run is finished, however many time limits that takes.
#
# Copy this file, edit the two places that say EDIT, activate your Python environment, and, in the folder where the file
# lies: qsub pbs.sh
# Give the job no name of its own (-N): its name is that of the file, by which it submits itself again.
#
# Two minutes before the time limit the run gets USR1. All ranks stop after the same step with a checkpoint, the run
# ends with exit code 75, and the job submits itself again. Then the same command with the same --out goes on, bit for
# bit. DONE in --out says that the run is finished. What qdel ends stays ended; qsub goes on with it.

#PBS -V
#PBS -j oe
#PBS -r y

# EDIT 1 of 2: the resources, and the seconds after which the run is asked to stop: 120 less than the walltime.
#PBS -l select=2:ncpus=4:mpiprocs=4
#PBS -l walltime=01:00:00
seconds=3480

cd "$PBS_O_WORKDIR" || exit

# EDIT 2 of 2: the folder of the run, and its train command. mpirun knows the nodes if it was built for PBS; if not, it
# takes -f "$PBS_NODEFILE" (MPICH) or --hostfile "$PBS_NODEFILE" (Open MPI).
out=runs/pbs
run=(mpirun python -m distconv.train --data mnist --epochs 20 --out "$out")

# A good first line while you set this up: mpirun python -m distconv.doctor
export OMP_NUM_THREADS=1 # ranks share the cores of a node: more threads would take them from one another

newest_checkpoint() {
    local files=("$out"/checkpoints/*)
    echo "${files[-1]}"
}
first=$(newest_checkpoint)

# PBS has no signal of its own before the limit, so `timeout` sends it; qsig -s USR1 asks for a stop at any time.
trap 'interrupted=yes; kill -USR1 $!' USR1
timeout --foreground --preserve-status --signal=USR1 "$seconds" "${run[@]}" &
while true; do
    interrupted=no
    wait $!
    code=$?
    [ $interrupted = no ] && break # else the trap has run, and the ranks still write
done

# 75 says: run me again. Without DONE, so does a run that came further than it began: a node may have failed, and mpirun
# may lose the 75. A run that came no further would fail in the same way again, so that one ends here.
if [ ! -e "$out/DONE" ] && { [ "$code" = 75 ] || [ "$(newest_checkpoint)" != "$first" ]; }; then
    qsub "$PBS_JOBNAME"
fi
exit "$code"
