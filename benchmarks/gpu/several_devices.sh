#!/bin/bash
# Several GPUs within a given time, what tells most first: from the root of the repository, OUT being a folder for figures,
#   bash benchmarks/gpu/several_devices.sh 1 [seconds]     what one GPU does alone, 190 s
#   bash benchmarks/gpu/several_devices.sh 2 [seconds]     two GPUs, 260 s
#   bash benchmarks/gpu/several_devices.sh chunks [seconds]     two GPUs, sequences in chunks alone, 155 s
#   bash benchmarks/gpu/several_devices.sh 4 [seconds]     four, or any even number above two, beside one and two of them, 590 s
# $OUT/several_devices.json is written row by row, and yeasts.json and several_devices.log beside it. YEASTS: yeasts.fa.xz, or
# nothing for no yeasts; YSTEPS: their steps. TIMES: all limits so many times over. GPU: which one is alone.
phase=$1; total=${2:-$(case $1 in 1) echo 190 ;; chunks) echo 155 ;; 2) echo 260 ;; *) echo 590 ;; esac)}; total=$((total * ${TIMES:-1}))
OUT=$(realpath "$OUT"); T0=$SECONDS; J=$OUT/several_devices.json; L=$OUT/several_devices.log; TMP=${TMPDIR:-/tmp}/several_devices; mkdir -p $TMP
YEASTS=${YEASTS:-yeasts.fa.xz}; YSTEPS=${YSTEPS:-15}
export PYTHONPATH=$PWD:$PWD/domains:${PYTHONPATH:-}
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=8 TORCH_NCCL_ASYNC_ERROR_HANDLING=1 PYTHONFAULTHANDLER=1 NCCL_DEBUG=${NCCL_DEBUG:-WARN}
at() { echo $((SECONDS - T0)); }
left() { local l=$((total - (SECONDS - T0) - 4)); [ $l -lt $1 ] && echo $l || echo $1; }
say() { echo "[phase $phase, $(at) s] $*" | tee -a $L; }

# part NAME LEAST LIMIT command...: skipped if less than LEAST seconds are left
part() {
  local name=$1 least=$2 limit; limit=$(left $(($3 * ${TIMES:-1}))); shift 3
  [ $limit -ge $least ] || { say "$name: not begun, $limit s left"; return; }
  say "$name begins, at most $limit s"
  "$@" $limit; RC=$?; say "$name rc $RC"
}
# ranks N arguments... LIMIT: as many processes of the benchmark; if one fails, the others are ended
ranks() {
  local n=$1 limit=${!#} pids=() rc=0 r one; shift; set -- "${@:1:$#-1}"
  local port=$((20000 + RANDOM % 20000))
  for ((r = 0; r < n; r++)); do
    local log=$L; [ $r = 0 ] || log=$TMP/rank$r.log
    RANK=$r LOCAL_RANK=$r WORLD_SIZE=$n MASTER_ADDR=127.0.0.1 MASTER_PORT=$port \
      timeout -s KILL $limit python3 benchmarks/context_parallel.py --out $J "$@" >> $log 2>&1 &
    pids+=($!)
  done
  local going=1
  while [ $going = 1 ]; do
    going=0
    for r in "${!pids[@]}"; do
      if kill -0 ${pids[r]} 2>/dev/null; then going=1; continue; fi
      wait ${pids[r]}; one=$?; unset "pids[r]"
      [ $one = 0 ] || rc=$one
    done
    if [ $rc != 0 ] && [ ${#pids[@]} -gt 0 ]; then  # it may be about to end by itself
      sleep 4; kill -TERM "${pids[@]}" 2>/dev/null; sleep 1; kill -KILL "${pids[@]}" 2>/dev/null; wait "${pids[@]}" 2>/dev/null; break
    fi
    sleep 0.2
  done
  for ((r = 1; r < n; r++)); do
    [ $rc = 0 ] || { echo "--- rank $r"; tail -n 40 $TMP/rank$r.log | cut -c1-600; } >> $L
    : > $TMP/rank$r.log
  done
  return $rc
}
# fit GPUS WAY... LIMIT: by `mambaseq fit`
fit() {
  local n=$1 limit=${!#}; shift; set -- "${@:1:$#-1}"
  timeout -s KILL $limit python3 benchmarks/context_parallel.py --gpus $n --only fit --ways "$@" --unchecked --seconds $((limit - 6)) --out $J >> $L 2>&1
}
# yeast one|two LIMIT
yeast() {
  [ -f "$YEASTS" ] || { echo "no $YEASTS" >> $L; return 3; }
  timeout -s KILL $(($2 + 5)) python3 benchmarks/yeast_context.py --data "$YEASTS" --out $TMP/yeasts --only $1 --steps $YSTEPS --seconds $(($2 - 12)) >> $L 2>&1
  local rc=$?; cp $TMP/yeasts/results.json $OUT/yeasts.json 2>/dev/null; return $rc
}

if [ "$phase" = 1 ]; then
  export CUDA_VISIBLE_DEVICES=${GPU:-0}
  nvidia-smi --query-gpu=index,name,memory.used --format=csv,noheader >> $L 2>&1; nvidia-smi topo -m >> $L 2>&1
  part "fit, ddp on 1" 35 70 fit 1 ddp
  part "fsdp2, ddp, alone on 1" 25 80 ranks 1 --unchecked --only fsdp2 ddp alone
  part "yeasts, one GPU" 35 60 yeast one
  part "numbers, two ranks on one GPU" 20 60 ranks 2 --one-gpu --only
elif [ "$phase" = chunks ]; then
  part "chunks of 2^20 and 2^22" 40 150 ranks 2 --only chunks apart longest
elif [ "$phase" -gt 2 ]; then
  # rows of one and two GPUs that were measured before stay
  [ -f $J ] || [ ! -f benchmarks/several_devices.json ] || cp benchmarks/several_devices.json $J
  part "numbers, step, chunks on $phase" 40 130 ranks $phase --only step chunks
  part "2^20 and 2^22 in pairs, 2^22" 40 150 ranks $phase --unchecked --only grouped longest
  part "fit, ddp on $phase" 45 110 fit $phase ddp
  part "130 M, 1.4 B, 9 B on $phase" 30 100 ranks $phase --unchecked --only fsdp2 ddp large
  part "fit, ddp on 1" 45 110 fit 1 ddp
  part "130 M, 1.4 B on 1" 25 50 ranks 1 --unchecked --only fsdp2 ddp
  part "130 M, 1.4 B on 2" 25 50 ranks 2 --unchecked --only fsdp2 ddp
  part "fit, ddp on 2" 45 110 fit 2 ddp
  part "fit, other ways on $phase" 35 120 fit $phase fsdp2 "ddp x context parallel"
else
  part "numbers, step, chunks, layers" 40 115 ranks 2 --only step chunks layers
  # where links between ranks do not work, what needs none is measured still
  grep -q '"step, chunk_length' $J && more=longest || more=
  part "fit, ddp on 2" 60 120 fit 2 ddp
  part "1.4 B, 9 B, 2^22" 30 110 ranks 2 --unchecked --only fsdp2 large $more
  part "yeasts, two GPUs" 25 60 yeast two
fi
python3 -c "import sys; from pathlib import Path; sys.path.insert(0, 'benchmarks'); import parallel_report as p; print(p.tables(p.rows_of(Path('$J'))))" 2>&1 | tee -a $L | cut -c1-200
[ ! -f $OUT/yeasts.json ] || grep -v '^  *[0-9]' $OUT/yeasts.json | head -20
say done
