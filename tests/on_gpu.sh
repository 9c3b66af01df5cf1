#!/usr/bin/env bash
# What only a GPU can show, in some four minutes: that the kernels and whole steps are right, how fast a step is beside
# PyTorch's, how soon MNIST is learnt, and that compute-sanitizer finds nothing. For a machine with one GPU.
#
#   bash tests/on_gpu.sh [FOLDER]     what each stage printed goes to FOLDER (default: runs/on_gpu), a summary to the screen
#
# STAGES="kernels steps" chooses stages. It needs the project installed with its extras test, cuda12 or cuda13, and MPICH
# or Open MPI; PyTorch for the stages step-*; MNIST where DISTCONV_DATA_DIR says. A stage that takes too long is ended.
set -u
cd "$(dirname "$0")/.."
folder=${1:-runs/on_gpu} failed=0
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD

stage() { # name, limit in seconds, command...
    local name=$1 limit=$2 began=$SECONDS status
    shift 2
    case " ${STAGES:-all} " in *" all "* | *" $name "*) ;; *) return ;; esac
    timeout -k 5 "$limit" "$@" > "$folder/$name.txt" 2>&1
    status=$?
    [ $status = 0 ] || failed=1
    echo "== $name: exit $status after $((SECONDS - began)) s" | tee -a "$folder/summary.txt"
    grep -v "^distconv: \(ranks on\|preparing\)" "$folder/$name.txt" | tail -n "${TAIL:-12}" | cut -c 1-150
}

: > "$folder/summary.txt"
tests="python3 -m pytest -q -p no:cacheprovider -p no:benchmark --timeout 100"  # that plugin warns beside xdist
python3 -c "import xdist" 2> /dev/null && many="-n 8" || many=
step="python3 -m distconv.bench step --device cuda --against torch --repeats 40"

stage machine 60 python3 -m distconv.doctor
stage kernels 100 $tests $many -m gpu tests/test_gpu_*.py
stage learn 60 python3 -m distconv.bench accuracy --ranks 1 --seeds 5 --targets 0.99 -- --recipe mnist-fast --device cuda --precision tf32
TAIL=40 stage step-float32 60 $step --evaluate
TAIL=40 stage step-tf32 60 $step --precision tf32
TAIL=40 stage step-bfloat16 60 $step --precision bfloat16 --batch-size 100 400
stage memcheck 60 $tests -m sanitizer tests/test_sanitizer.py -k memcheck
stage steps 100 $tests $many -m gpu tests/test_gpu.py
stage racecheck 120 $tests -m sanitizer tests/test_sanitizer.py -k racecheck
stage prove 60 python3 -m distconv.prove --device cuda --ranks 1,2,4
exit $failed
