#!/usr/bin/env bash
# Measure the figures of the README's table again: `make reproduce`, or with the environment's bin folder on the PATH
#
#   bash scripts/reproduce.sh [DATA] [MODEL ...]      default: ../shared/data, small-llama and tiny-llama
#
# DATA holds the model directories and calib/calib.jsonl (256 documents of 2 to 2048 tokens are taken, by seed). A model
# that is not there is skipped; tiny-llama is in examples/, and calibrates with embedded text if DATA is missing.
# SEEDS="0 1 2" gives the spread over calibration seeds; PRESETS="marlin fast best" more recipes than marlin; DEVICE=cpu|cuda|auto.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:-../shared/data}
shift || true
models=("${@:-small-llama}")
[ $# -gt 0 ] || models+=(tiny-llama)
out=build/reproduce
mkdir -p "$out"

calibration=(--dataset "$data/calib/calib.jsonl")
if [ ! -f "$data/calib/calib.jsonl" ]; then
    echo "note: no $data/calib/calib.jsonl, so the embedded demo documents calibrate: figures differ a little from the README's"
    calibration=(--dataset demo)
fi
device=(--device "${DEVICE:-auto}")

run() { # print the command, then run it
    printf '\n$ %s\n' "$*"
    "$@"
}

for name in "${models[@]}"; do
    model=$data/$name
    [ "$name" = tiny-llama ] && model=examples/tiny-llama
    if [ ! -d "$model" ]; then
        echo "skipped: no $model"
        continue
    fi
    made=("$out/$name-rtn")
    run marlin-quantize "$model" --wbits 4 --method rtn -o "$out/$name-rtn" --overwrite "${device[@]}"
    for preset in ${PRESETS:-marlin}; do
        for seed in ${SEEDS:-0}; do
            made+=("$out/$name-$preset-$seed")
            run marlin-quantize "$model" --wbits 4 --preset "$preset" -o "$out/$name-$preset-$seed" --overwrite \
                "${device[@]}" "${calibration[@]}" --n-samples 256 --seq-len 2048 --seed "$seed"
        done
    done
    for quantized in "${made[@]}"; do
        # the first command for perplexity, of the whole text; the second for KL and top-1, over the first 40 windows
        run marlin-eval perplexity "$quantized" --baseline "$model" --dataset wikitext2 --seq-len 1024 --no-divergence "${device[@]}"
        run marlin-eval perplexity "$quantized" --baseline "$model" --dataset wikitext2 --seq-len 1024 --limit 40 "${device[@]}"
    done
done
