#!/usr/bin/env bash
# What only a GPU can show, in minutes: that the kernels and whole steps are right and compute-sanitizer finds
# nothing; then, alone on the GPU, where the time of a step goes, how fast it is beside PyTorch's, and how soon MNIST is
# learnt. For a machine with one GPU.
#
#   bash tests/on_gpu.sh [FOLDER]     what each stage printed goes to FOLDER (default: runs/on_gpu), its end to the screen
#
# STAGES="kernels steps" chooses stages. It needs the project installed with its extras test, cuda12 or cuda13, and MPICH
# or Open MPI; PyTorch for the stages timeline-* and step-*; MNIST where DISTCONV_DATA_DIR says. A stage that takes too
# long is ended.
set -u
cd "$(dirname "$0")/.."
folder=${1:-runs/on_gpu}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD

stage() { # name, limit in seconds, command...
    local name=$1 limit=$2 began=$SECONDS status
    shift 2
    case " ${STAGES:-all} " in *" all "* | *" $name "*) ;; *) return ;; esac
    timeout -k 5 "$limit" "$@" > "$folder/$name.txt" 2>&1
    status=$?
    [ $status = 0 ] || touch "$folder/failed"
    {
        echo "== $name: exit $status after $((SECONDS - began)) s"
        grep -v "^distconv: \(ranks on\|preparing\)" "$folder/$name.txt" | tail -n "${TAIL:-12}" | cut -c 1-150
    } | tee -a "$folder/summary.txt"
}

rm -f "$folder/failed"
: > "$folder/summary.txt"
tests="python3 -m pytest -q -p no:cacheprovider -p no:benchmark --timeout 100"  # that plugin warns beside xdist
python3 -c "import xdist" 2> /dev/null && many="-n 4" || many=
step="python3 -m distconv.bench step --device cuda --against torch --repeats 10"

stage machine 60 python3 -m distconv.doctor
stage kernels 200 $tests $many -m gpu tests/test_gpu_*.py &
stage steps 200 $tests $many -m gpu tests/test_gpu.py &
stage prove 200 python3 -m distconv.prove --device cuda --ranks 1,2,4 &
stage memcheck 200 $tests -m sanitizer tests/test_sanitizer.py -k memcheck &
stage racecheck 200 $tests -m sanitizer tests/test_sanitizer.py -k racecheck &
wait
export TAIL=50
for precision in tf32 float32 float16; do
    stage timeline-$precision 60 python3 -m tests.gpu_timeline $precision 100
done
stage timeline-resnet20 90 python3 -m tests.gpu_timeline tf32 128 --model resnet20
for precision in tf32 float32 float16; do
    stage step-$precision 60 $step --precision $precision
done
stage step-resnet20 90 $step --precision tf32 --model resnet20 --batch-size 128
stage learn 150 python3 -m distconv.bench accuracy --ranks 1 --seeds 10 --targets 0.99 -- \
    --recipe mnist-fast --device cuda --precision tf32
[ ! -e "$folder/failed" ]
