#!/usr/bin/env bash
# What a GPU alone can show, in at most eight minutes on one with 40 GB; each part is stopped when its time is up.
#
#     benchmarks/gpu.sh OUT [GSM8K]           results into the folder OUT; GSM8K holds train.jsonl and test.jsonl
#     TINY=1 benchmarks/gpu.sh OUT            the same parts on a CPU with tiny sizes: whether all of it runs
set -u
out=$(realpath -m "${1:?a folder for the results}")
data=${2:-}
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
mkdir -p "$out"
if [ -n "${TINY:-}" ]; then
    device=cpu dtype=float32 whole=tiny part=tiny rank=4 batch=1 tokens=16 threads=1
else
    device=cuda dtype=bfloat16 whole=7b:32 part=7b:2 rank=128 batch=2 tokens=1024 threads=2
fi
sizes="--device $device --dtype $dtype --rank $rank --batch $batch --tokens $tokens"
failed=0

part() { # seconds, name, command
    echo "== $2"
    SECONDS=0
    timeout "$1" "${@:3}" >"$out/$2.log" 2>&1
    status=$?
    [ $status = 0 ] || { failed=1; echo "   failed, or out of time (124): $status"; }
    tail -n 25 "$out/$2.log"
    echo "   $SECONDS s"
}

{ nvidia-smi -L 2>/dev/null || echo "no GPU"; "$python" -c "import torch; print('torch', torch.__version__)"; git rev-parse HEAD; date; } |
    tee "$out/machine.txt"

# The tests that are skipped for want of a GPU.
part 60 tests "$python" -m pytest -q -n 0 tests/test_analysis_tracker.py tests/test_sharing.py -k "gpu or cuda or device or kept or weight_is"

# Attach to the 224 linear layers of Llama-2-7B, beside PEFT's fast start; the others decompose for minutes.
part 100 attach "$python" -m benchmarks.speed --model $whole $sizes --threads $threads --rounds 1 --only attaching --out "$out" --without \
    "peft PiSSA" "peft PiSSA, 16 iterations" "PiSSA, exact" "SVFT banded" "torch.linalg.svd of all weights"

# Steps, files, merging and tokens at the shapes of its layers, beside PEFT and SORSA's own package where it is installed.
part 100 step "$python" -m benchmarks.speed --model $part $sizes --threads $threads --rounds 5 --only steps merging tokens --out "$out"

# Memory, synchronisations, torch.compile and CUDA graphs.
part 100 device "$python" -m benchmarks.speed.device --model $part $sizes --out "$out/device.json"

# SmolLM2-135M on GSM-8K, as many methods as the time allows; goes on where it was stopped.
if [ -n "$data" ]; then
    part 120 gsm8k "${python%/*}/svdpeft" compare benchmarks/gsm8k.toml --no-search --option "path=$data" --out "$out/gsm8k"
fi
exit $failed
