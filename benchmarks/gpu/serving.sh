#!/bin/bash
# The server on one GPU, models of random weights: from the repository's root, OUT being a folder for figures,
#   bash benchmarks/gpu/serving.sh gpt_neox_20b_tokenizer.json
# about 110 s: demo size in float32 (answers must equal), 130M in bf16
set -u
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD:$PWD/domains:${PYTHONPATH:-} MAMBASEQ_CACHE=${MAMBASEQ_CACHE:-/tmp/mambaseq}
OUT=${OUT:-/tmp/out}; mkdir -p "$OUT"
time python3 benchmarks/gpu/random_models.py "$1" || exit 1
# everything at 130M, the load first; then the exact answers at the demo's size
time timeout 100 python3 benchmarks/serving.py --checkpoint /tmp/130M --device cuda --dtype bfloat16 \
  --parts load prefix check mixed drain --rounds 3 --minutes 0.35 --cache-mb 2048 --seconds 75 --told \
  --json "$OUT/serving_130M.json" --picture "$OUT/serving_130M.svg" 2> "$OUT/serving_130M.err"; tail -3 "$OUT/serving_130M.err"
time timeout 60 python3 benchmarks/serving.py --checkpoint /tmp/demo --device cuda \
  --parts load check drain --concurrency 1 8 64 --rounds 3 --seconds 40 --told \
  --json "$OUT/serving_demo.json" 2> "$OUT/serving_demo.err"; tail -3 "$OUT/serving_demo.err"
