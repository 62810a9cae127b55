#!/bin/bash
# All that is measured on one CUDA device, part by part; each has a limit and writes its results as it goes.
#     bash benchmarks/gpu.sh OUT             # every part that OUT does not say is done
#     bash benchmarks/gpu.sh OUT step train  # these parts only
#     DRY=1 bash benchmarks/gpu.sh OUT       # tiny sizes on the CPU: what the tests run
# OUT gets results.jsonl (a line for each row, and for each part that is done), log-PART.txt, the tests
# that failed, and the trainings' curves and scores; `python benchmarks/gpu.py report OUT` makes gpu.md
# from it.
cd "$(dirname "$0")/.." || exit 1
OUT=$(realpath -m "$1"); shift
mkdir -p "$OUT"
export OUT PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore PYTHONPATH="$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
export FASTMISEG_DEVICE=${FASTMISEG_DEVICE:-$([ -n "$DRY" ] && echo cpu || echo cuda)}
PYTHON=${PYTHON:-python3}
ASKED=" $* "

part() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2; shift 2
    if [ "$ASKED" != "  " ]; then case "$ASKED" in *" $name "*) ;; *) return;; esac
    elif $PYTHON benchmarks/gpu.py done "$OUT" "$name"; then echo "== $name: done before"; return; fi
    echo "== $name (at most $limit s)"
    local begun=$SECONDS
    timeout -k 5 "$limit" "$@" > >(tee -a "$OUT/log-$name.txt") 2>&1
    local status=$?
    $PYTHON benchmarks/gpu.py note "$OUT" "$name" $status $((SECONDS-begun))
}

part about 60 $PYTHON benchmarks/gpu.py about "$OUT"
# What reads scans is not needed here, so that it need not be brought along.
if [ -z "$DRY" ]; then
    $PYTHON benchmarks/gpu.py stand_ins "$OUT/stand_ins" SimpleITK pydicom nibabel &&
        PYTHONPATH="$PYTHONPATH:$OUT/stand_ins"
fi
NEEDS_SCANS=$([ -d "$OUT/stand_ins/SimpleITK" ] && echo 'and not inference')

if [ -n "$DRY" ]; then
    part right 100 $PYTHON -m pytest -q -m cuda tests/test_cuda.py \
        -k 'volume_metrics or (test_losses and Projector and plain)' -p no:cacheprovider -p gpu_failures
    part train 100 $PYTHON benchmarks/gpu_train.py
else
    # trainings, whose pace alone is measured first, beside the tests, which take no times
    if [ -n "$BESIDE" ]; then
        part train $((${TRAIN:-150}+30)) \
            env SECONDS_TO_TRAIN=${TRAIN:-150} SHARE=.7 $PYTHON benchmarks/gpu_train.py &
        sleep ${PACE:-25}
    fi
    part right ${RIGHT:-110} $PYTHON -m pytest -q -m cuda tests/test_cuda.py -k "test_ $NEEDS_SCANS" \
        -p no:cacheprovider -p gpu_failures --tb=short --maxfail=40 ${XDIST--n 10}
    wait
fi
part step ${STEP:-90} $PYTHON benchmarks/gpu_step.py
[ -n "$DRY" ] || part mutual_info ${MUTUAL_INFO:-60} $PYTHON benchmarks/gpu_mutual_info.py
part waiting ${WAITING:-60} $PYTHON benchmarks/gpu_waiting.py
part loading ${LOADING:-30} $PYTHON benchmarks/gpu_network.py loading
part compile ${COMPILE:-60} $PYTHON benchmarks/gpu_step.py compile
if [ -z "$DRY$BRIEF" ]; then
    part network ${NETWORK:-100} $PYTHON benchmarks/gpu_network.py
    MAIN=$(ls tests/test_{learners,no_trace,resume,metrics,mutual_info,inference,segmenter,slices}.py 2>/dev/null)
    part main ${MAIN_LIMIT:-100} $PYTHON -m pytest -q $MAIN \
        -p no:cacheprovider -p gpu_failures --tb=line ${XDIST--n 12}
    part train ${TRAIN:-300} $PYTHON benchmarks/gpu_train.py
fi
$PYTHON benchmarks/gpu.py report "$OUT" > "$OUT/gpu.md"
echo "== results: $OUT/gpu.md"
