#!/bin/bash
# All that is measured on one CUDA device, part by part, the most valuable first.
#     bash benchmarks/gpu.sh OUT             # every part that is not done yet
#     bash benchmarks/gpu.sh OUT step train  # these parts, done or not
#     DRY=1 bash benchmarks/gpu.sh OUT       # tiny sizes on the CPU: what the tests run
# BUDGET=560: seconds for all; PART=seconds (as TRAIN=300): for one part, within the budget.
# CARRIED=gpu-carry: what `make gpu-carry` has made: packages that are missing here, and slices to train on.
# Parts work in OUT.work, and go on with what is there. OUT gets few files, after each part: gpu.md and
# results.tar.gz (rows, logs, curves, scores); with CHECKPOINTS=1 also those of trainings that are not
# finished, in pieces. FROM=folder: begin with what an earlier call has left in its OUT.
cd "$(dirname "$0")/.." || exit 1
[ -n "$1" ] || { echo 'gpu.sh: expected a folder for the results: bash benchmarks/gpu.sh OUT'; exit 2; }
SECONDS=0
BUDGET=${BUDGET:-560}
RESULTS=$(realpath -m "$1"); shift
export OUT=$RESULTS.work RUN=$(date +%s) AGAIN=$*
mkdir -p "$OUT" "$RESULTS" || exit 1
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONPATH="$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
export FASTMISEG_DEVICE=${FASTMISEG_DEVICE:-$([ -n "$DRY" ] && echo cpu || echo cuda)}
CARRIED=$(realpath -m "${CARRIED:-gpu-carry}")
[ -z "$DRY" ] && [ -f "$CARRIED/slices/index.json" ] && export FASTMISEG_SLICES=${FASTMISEG_SLICES:-$CARRIED/slices}
PYTHON=${PYTHON:-python3}
gpu() { $PYTHON benchmarks/gpu.py "$@"; }

CHILD=
trap 'gpu bring "$OUT" "$RESULTS" ${CHECKPOINTS:+checkpoints}; echo "== results: $RESULTS"' EXIT
trap '[ -z "$CHILD" ] || kill "$CHILD"; exit 143' INT TERM

part() { # NAME SECONDS COMMAND...
    local name=$1 own=${1^^} limit=$2 begun=$SECONDS status
    limit=${!own:-$limit}; shift 2
    if [ $name = about ]; then : # a second call may be on another machine
    elif [ -n "$AGAIN" ]; then case " $AGAIN " in *" $name "*) ;; *) return;; esac
    elif gpu done "$OUT" "$name"; then echo "== $name: done before"; return; fi
    [ -z "$DRY" ] || limit=$BUDGET
    [ $limit -le $((BUDGET-SECONDS)) ] || limit=$((BUDGET-SECONDS))
    if [ $limit -lt 10 ]; then echo "== $name: no time left"; return; fi
    echo "== $name (at most $limit s)"
    ENDS=$(($(date +%s)+limit)) timeout -k 5 $limit "$@" > >(tee -a "$OUT/log-$name.txt") 2>&1 &
    CHILD=$!
    wait $CHILD
    status=$?
    CHILD=
    gpu note "$OUT" "$name" $status $((SECONDS-begun))
    gpu bring "$OUT" "$RESULTS"
    return $status
}
tests() { # NAME SECONDS ARGUMENTS...; what has passed before is left out
    local name=$1 limit=$2; shift 2
    part $name $limit $PYTHON -m pytest -q "$@" -p no:cacheprovider -p gpu_tests --tb=short --maxfail=40 \
        $([ -n "$DRY" ] || echo "${XDIST--n 12}")
}

[ -z "$FROM" ] || gpu begin "$FROM" "$OUT" || exit 1
gpu install "$CARRIED" "$OUT/site" || exit 1
export PYTHONPATH="$PYTHONPATH:$OUT/site"
# What reads scans is not needed here, so that it need not be brought along.
gpu stand_ins "$OUT/stand_ins" SimpleITK pydicom nibabel || exit 1
export PYTHONPATH="$PYTHONPATH:$OUT/stand_ins"

part about 60 $PYTHON benchmarks/gpu.py about "$OUT"
[ $? != 1 ] || { echo 'gpu.sh: nothing can be measured here, see above'; exit 1; }
# All that are marked `cuda`, and those that run on the device as they are.
if [ -n "$DRY" ]; then WHICH='volume_metrics or unknown_impl or (test_losses and Projector and plain)'
else WHICH='not compile_for_a_gpu'; fi
tests right 110 tests/test_{cuda,pair_kernels,pair_products,augment,copypaste,pseudo}.py tests/test_data.py::test_cuda \
    -k "$WHICH"
part step 80 $PYTHON benchmarks/gpu_step.py
part train 150 $PYTHON benchmarks/gpu_train.py
part turns 30 $PYTHON benchmarks/gpu_step.py turns
part mutual_info 40 $PYTHON benchmarks/gpu_mutual_info.py
part waiting 30 $PYTHON benchmarks/gpu_waiting.py
part loading 15 $PYTHON benchmarks/gpu_network.py loading
part compile 45 $PYTHON benchmarks/gpu_step.py compile
part network 15 $PYTHON benchmarks/gpu_network.py
# Not those that ask for equal bits, which sums of atomics do not give, nor those that write scans.
[ -n "$DRY" ] || tests main 20 tests/test_{learners,no_trace,metrics,mutual_info}.py
exit 0
