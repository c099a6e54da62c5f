#!/usr/bin/env bash
# What the Triton kernels await a GPU for, in three calls of some nine minutes: correctness, times, launches.
#
#   suites/gpu.sh check OUT      the tests marked gpu, the kernels' own, the scorecard
#   suites/gpu.sh measure OUT    suite `kernels` and its plots
#   suites/gpu.sh tune OUT       the Triton kernels at their launches and at others
#
# A step that fails does not stop the next. OUT gets a log of each, and what they store, as one archive. Exit
# code 1 where any failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ $# -ne 2 ] || ! [[ $1 =~ ^(check|measure|tune)$ ]]; then
    echo "usage: suites/gpu.sh check|measure|tune OUT" >&2
    exit 2
fi
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "suites/gpu.sh: torch sees no CUDA device here" >&2
    exit 2
fi
mkdir -p "$2"
out=$(cd "$2" && pwd)
stored=$(mktemp -d)
trap 'rm -rf "$stored"' EXIT
failed=0

step() { # name, seconds, command
    local name=$1 limit=$2 began=$SECONDS code=0
    shift 2
    timeout --signal=INT --kill-after=30 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
    tail -n 15 "$out/$name.log"
    echo "== $name: exit code $code after $((SECONDS - began)) s of at most $limit"
    [ "$code" -eq 0 ] || failed=1
}

# Tests compile kernels more than they run them: several processes share the GPU.
export PYTHONUNBUFFERED=1 PYTEST_ADDOPTS="${PYTEST_ADDOPTS:--n 6}"
case $1 in
check)
    step tests 240 pytest -q -m gpu
    step kernels 150 pytest -q -m interpret tests/nsa/kernels
    step verify 150 nsabench verify --device cuda --out "$stored/results"
    ;;
measure)
    step kernels 540 nsabench suite run kernels --budget 8m --out "$stored/results" --plots "$stored/plots"
    ;;
tune)
    step tune 540 python suites/tune.py --budget 8m --json "$out/tune.jsonl"
    ;;
esac
if [ -n "$(ls -A "$stored")" ]; then
    tar -C "$stored" -czf "$out/$1.tar.gz" .
fi
exit "$failed"
