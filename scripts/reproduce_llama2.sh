#!/usr/bin/env bash
# The published table of Llama-2 in the Marlin format, measured again: WikiText-2 and RedPajama perplexity and MMLU (0-shot),
# full precision and 4 bits, beside the published figures. It takes the weights, a GPU, and hours for 70B:
#
#   bash scripts/reproduce_llama2.sh                      7B, 13B and 70B from the hub (meta-llama/Llama-2-*-hf)
#   bash scripts/reproduce_llama2.sh 7B=./llama-2-7b      one of them, from a directory
#   bash scripts/reproduce_llama2.sh --limit 4 --datasets wikitext2 --calibration demo tiny=examples/tiny-llama
#
#   --out DIR           where models and reports go               [build/reproduce-llama2]
#   --datasets NAMES    for perplexity, separated by commas       [wikitext2,redpajama]
#   --calibration NAME  dataset that calibrates                   [redpajama]
#   --n-samples N       documents of it                           [256]
#   --data-dir DIR      MMLU from the original CSV files instead of the hub; --subjects A,B takes some of them
#   --no-mmlu           leave MMLU out
#   --device cpu|cuda   [auto]
#   --limit N           only the first windows and questions: for tests, the figures then mean nothing
#
# NAME=MODEL: 7B, 13B and 70B have published figures, any other name has none. A quantized model that is there already is
# measured as it is; delete it to quantize again.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
out=build/reproduce-llama2 datasets=wikitext2,redpajama calibration=redpajama n_samples=256 device=auto
mmlu=(--tasks mmlu) subjects=() limit=() models=()

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; }

while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --no-mmlu) mmlu=(); shift; continue ;;
        *=*) models+=("$1"); shift; continue ;;
    esac
    [ $# -ge 2 ] || { echo "error: $1: needs a value, or is no NAME=MODEL (see --help)" >&2; exit 2; }
    case $1 in
        --out) out=$2 ;;
        --datasets) datasets=$2 ;;
        --calibration) calibration=$2 ;;
        --n-samples) n_samples=$2 ;;
        --data-dir) mmlu=(--data-dir "$2") ;;
        --subjects) subjects=(--subjects "$2") ;;
        --device) device=$2 ;;
        --limit) limit=(--limit "$2") ;;
        *) echo "error: $1: unknown option (see --help)" >&2; exit 2 ;;
    esac
    shift 2
done
if [ ${#models[@]} -eq 0 ]; then
    models=(7B=meta-llama/Llama-2-7b-hf 13B=meta-llama/Llama-2-13b-hf 70B=meta-llama/Llama-2-70b-hf)
fi
mkdir -p "$out"

run() { # print the command, then run it
    printf '\n$ %s\n' "$*"
    "$@"
}

reports=()
for pair in "${models[@]}"; do
    name=${pair%%=*} model=${pair#*=}
    quantized=$out/$name-marlin
    if [ -f "$quantized/config.json" ]; then
        echo "kept: $quantized is there already"
    else
        run marlin-quantize "$model" --wbits 4 --preset marlin -o "$quantized" --dataset "$calibration" --n-samples "$n_samples" --device "$device"
    fi
    run marlin-eval report "$quantized" --baseline "$model" --datasets "$datasets" --device "$device" \
        ${mmlu[@]+"${mmlu[@]}"} ${subjects[@]+"${subjects[@]}"} ${limit[@]+"${limit[@]}"} -o "$out/$name.html"
    reports+=("$name=$out/$name.json")
done
echo
python3 "$root/scripts/published_llama2.py" "${reports[@]}"
