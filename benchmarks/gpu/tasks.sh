#!/bin/bash
# State tracking and recall of many keys, many trainings to a GPU within a given time: from the repository's root,
#   OUT=FOLDER bash benchmarks/gpu/tasks.sh "GPUS" EACH SECONDS ["SEEDS"]
# GPUS such as "0 1", EACH processes on each of them, SEEDS "0 1 2" if not given. KEPT=FILE: a tasks.tgz of an earlier call, which goes on.
# What tells most comes first: parity, then recall, the widest first, then the other machines, of each seed after seed.
# WANTED: a pattern (grep -E) for lines of $RUN/jobs (recipe, seed, model, and task or d_model, between tabs); all if not given.
# MPS=1: processes of a GPU share a server of NVIDIA's, so that their kernels run side by side and not in turn; ended with the script.
# What is finished is in $OUT/tasks.tgz every 10 s; what SECONDS cut off is lost. The log is $OUT/tasks.log.
# What follows, once tasks.tgz is unpacked in a folder D, for state_tracking and recall each:
#   mambaseq reproduce state_tracking --scale full --device cpu --only finished --out D/state_tracking
set -u
gpus=$1 each=$2 end=$3 seeds=${4:-0 1 2}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD:$PWD/domains:${PYTHONPATH:-} OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
SCALE=${SCALE:-full} DEVICE=${DEVICE:-cuda} OUT=${OUT:-/tmp/out} RUN=${RUN:-/dev/shm/tasks}; mkdir -p "$OUT" "$RUN"
[ -z "${KEPT:-}" ] || tar xzf "$KEPT" -C "$RUN"
# a line each: recipe, seed, names
SCALE=$SCALE SEEDS=$seeds python3 - > "$RUN/jobs" <<'PYTHON' || exit 1
import os
from mambaseq_synthetic.recipes import recall, state_tracking
machines = [[f"state_tracking\t{{}}\t{name}\t{task}" for name in state_tracking.MODELS] for task in state_tracking.TASKS]
recalled = [f"recall\t{{}}\t{name}\td_model {width}" for width in reversed(recall.WIDTHS[os.environ["SCALE"]]) for name in recall.MODELS]
for lines in (machines[0], recalled, *machines[1:]):  # parity first
    for seed in os.environ["SEEDS"].split():
        print(*(line.format(seed) for line in lines), sep="\n")
PYTHON
[ -z "${WANTED:-}" ] || { grep -E "$WANTED" "$RUN/jobs" > "$RUN/wanted"; mv "$RUN/wanted" "$RUN/jobs"; }
[ -s "$RUN/jobs" ] || { echo "WANTED=$WANTED is in no line such as: recall<TAB>0<TAB>kda<TAB>d_model 64" >&2; exit 1; }
end_mps() { :; }
if [ "${MPS:-}" = 1 ] && command -v nvidia-cuda-mps-control > /dev/null; then
  export CUDA_MPS_PIPE_DIRECTORY=$RUN/mps CUDA_MPS_LOG_DIRECTORY=$RUN/mps; mkdir -p "$RUN/mps"
  end_mps() { echo quit | timeout 20 nvidia-cuda-mps-control > /dev/null 2>&1; unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY; }
  trap end_mps EXIT
  timeout 20 nvidia-cuda-mps-control -d && timeout 60 python3 -c "import torch; torch.ones(1, device='cuda').sum().item()" \
    && echo "one server for the processes of a GPU" || { echo "no server for the processes of a GPU: they take turns"; end_mps; }
fi
n=$(wc -l < "$RUN/jobs"); echo 0 > "$RUN/taken"; : > "$OUT/tasks.log"
keep() { (cd "$RUN" && t="$OUT/.tasks.$BASHPID.tgz" && tar czf "$t" */run.json */trials/*.json 2>/dev/null; [ -s "$t" ] && mv "$t" "$OUT/tasks.tgz"); }
take() { (flock 9; i=$(($(cat "$RUN/taken") + 1)); echo $i > "$RUN/taken"; echo $i) 9>"$RUN/lock"; }
work() { # GPU
  export CUDA_VISIBLE_DEVICES=$1
  while [ $((end - SECONDS)) -gt 15 ] && i=$(take) && [ "$i" -le "$n" ]; do
    IFS=$'\t' read -r recipe seed name task <<< "$(sed -n "${i}p" "$RUN/jobs")"
    timeout -k 5 $((end - SECONDS)) python3 -m mambaseq.cli.main reproduce "$recipe" --scale "$SCALE" --device "$DEVICE" --out "$RUN/$recipe" \
      --seed "$seed" --only "$name" ${task:+"$task"} 2>&1 | while IFS= read -r line; do echo "gpu$1 +${SECONDS}s $line"; done
  done
}
(while sleep 10; do keep; done) & keeper=$!
workers=()
for ((k = 0; k < each; k++)); do for gpu in $gpus; do work "$gpu" >> "$OUT/tasks.log" & workers+=($!); done; done
tail --pid=$$ -n +1 -F "$OUT/tasks.log" 2>/dev/null | grep --line-buffered -E "seed=[0-9]+:|CUDA graph|[Ee]rror" & teller=$!
wait "${workers[@]}"
sleep 1; kill $keeper $teller; keep; rm -f "$OUT"/.tasks.*.tgz; echo "$(ls "$RUN"/*/trials/*.json 2>/dev/null | wc -l) trials are finished after $SECONDS s"
