#!/bin/bash
# The trainings on books, on one GPU within a given time: from the repository's root,
#   DATA=FOLDER OUT=FOLDER bash benchmarks/gpu/books.sh GPU MINUTES "SEEDS" LINE [LINE ...]
# DATA has books.tar.xz and gpt_neox_20b_tokenizer.json (and books_*.tgz of earlier calls, which are unpacked first).
# FLOORS=1 for count models beside; STEPS: of a training (1200).
# One process trains all: first each line's rate (2 to 4 eighths of a training), then seed after seed, line after line.
# What is finished is in $OUT/books_gpuN.tgz every 10 s; what MINUTES cut off is lost. Two GPUs: two of these at once.
# What follows: mambaseq reproduce books --scale full --device cpu --only finished --data DATA --out FOLDER
set -u
gpu=$1 minutes=$2 seeds=$3; shift 3
export CUDA_VISIBLE_DEVICES=$gpu PYTHONUNBUFFERED=1 PYTHONPATH=$PWD:$PWD/domains:${PYTHONPATH:-} TOKENIZERS_PARALLELISM=false
export MAMBASEQ_CACHE=${MAMBASEQ_CACHE:-/tmp/mambaseq}
OUT=${OUT:-/tmp/out}; RUN=${RUN:-/dev/shm/books}; mkdir -p "$OUT" "$RUN"
(flock 9; [ -e "$RUN/.unpacked" ] || { for old in "$DATA"/books_*.tgz; do [ -e "$old" ] && tar xzf "$old" -C "$RUN"; done; touch "$RUN/.unpacked"; }) 9>/tmp/books.lock
steps=(); [ -n "${STEPS:-}" ] && steps=(--steps "$STEPS")
keep() { (cd "$RUN" && t="$OUT/.gpu$gpu.$BASHPID.tgz" && tar czf "$t" run.json trials/*.json $(ls ./*.svg 2>/dev/null) 2>/dev/null && mv "$t" "$OUT/books_gpu$gpu.tgz"); }
(while sleep 10; do keep; done) & keeper=$!
# count models and compressors need no GPU, and about two minutes of other cores
floors=; [ "${FLOORS:-}" != 1 ] || { CUDA_VISIBLE_DEVICES= timeout "${minutes}m" python3 -m mambaseq.cli.main reproduce books --scale full --device cpu \
  --data "$DATA" --out "$RUN" --only floors > "$OUT/floors.log" 2>&1 & floors=$!; }
began=$SECONDS
timeout -k 5 "${minutes}m" python3 -m mambaseq.cli.main reproduce books --scale full ${DEVICE:+--device $DEVICE} --data "$DATA" \
  --out "$RUN" --seed $seeds "${steps[@]}" --only "$@" 2>&1 | while IFS= read -r line; do echo "gpu$gpu +$((SECONDS - began))s $line"; done | tee "$OUT/books_gpu$gpu.log"
[ -z "$floors" ] || { [ $((SECONDS - began)) -ge $((${minutes%.*} * 60 - 5)) ] || wait "$floors"; tail -n 1 "$OUT/floors.log"; }
kill $keeper; keep; rm -f "$OUT"/.gpu"$gpu".*.tgz; echo "gpu$gpu: $(ls "$RUN"/trials/*.json 2>/dev/null | wc -l) trials are finished"
