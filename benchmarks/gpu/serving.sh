#!/bin/bash
# The server on one GPU, models of random weights: from the repository's root, OUT being a folder for figures,
#   bash benchmarks/gpu/serving.sh gpt_neox_20b_tokenizer.json
# at most 100 s: 130M in bf16 first, then, in what is left, the demo's size in float32 (answers must equal)
set -u
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD:$PWD/domains:${PYTHONPATH:-} MAMBASEQ_CACHE=${MAMBASEQ_CACHE:-/tmp/mambaseq}
OUT=${OUT:-/tmp/out}; mkdir -p "$OUT"; SECONDS=0
time python3 benchmarks/gpu/random_models.py "$1" || exit 1
time timeout 70 python3 benchmarks/serving.py --checkpoint /tmp/130M --device cuda --dtype bfloat16 \
  --parts load prefix check drain --concurrency 1 8 64 --rounds 3 --cache-mb 2048 --seconds 55 --told \
  --json "$OUT/serving_130M.json" --picture "$OUT/serving_130M.svg" 2> "$OUT/serving_130M.err"
grep -v INFO "$OUT/serving_130M.err" | tail -5
left=$((98 - SECONDS))
time timeout $left python3 benchmarks/serving.py --checkpoint /tmp/demo --device cuda \
  --parts load check drain --concurrency 64 --rounds 3 --seconds $((left - 8)) --told \
  --json "$OUT/serving_demo.json" 2> "$OUT/serving_demo.err"
grep -v INFO "$OUT/serving_demo.err" | tail -5
