#!/usr/bin/env bash
# Memory of tpshard does not grow with the model: at most twice the largest tensor and 256 MiB, for a checkpoint that
# is much larger; and every byte of it is right.
#
#   LAYERS    size of the checkpoint: about 67 MB each (default 10; 30 make 2 GB; in slow builds, TEST_QUICK=1, 2)
cd "$(dirname "$0")/.." || exit 1
. tests/shard_helpers.sh

[ -z "${TEST_QUICK:-}" ] || LAYERS=${LAYERS:-2}
layers=${LAYERS:-10}
leave_out_syncs
hidden=2048 intermediate=4096 vocab=8192
largest=$((vocab * hidden * 2))
bound=$((2 * largest + 256 * 1024 * 1024))

# Runs tpshard and sets peak to the most memory that the kernel saw it hold.
watch() {
    local pid now
    peak=0
    "$tpshard" "$@" >"$work/out" 2>"$work/err" &
    pid=$!
    while now=$(sed -n 's/^VmHWM:[[:space:]]*\([0-9]*\) kB/\1/p' "/proc/$pid/status" 2>/dev/null) && [ -n "$now" ]; do
        peak=$((now * 1024))
        sleep 0.05
    done
    wait $pid
}

within() { # NAME
    local reported
    reported=$(sed -n 's/.*"peak_memory_bytes": \([0-9]*\).*/\1/p' "$work/out")
    if [ "$peak" -gt 0 ] && [ "$peak" -le $bound ] && [ "${reported:-0}" -le $bound ]; then
        ok "$1: $((peak >> 20)) MiB of at most $((bound >> 20)) for $((source_bytes >> 20)) MiB"
    else
        not_ok "$1: peak $peak, reported ${reported:-none}, bound $bound"
    fi
}

# The checkpoint, and beside it as much again at most: in bf16, or in int8 twice.
needed=$((2 * (layers * 67 + 70) + 100))
free=$(df -Pk "$work" | awk 'NR == 2 { print int($4 / 1024) }')
if [ "${free:-0}" -lt $needed ]; then
    echo "SKIP it takes $needed MiB of disk, and under $BUILD there are ${free:-0} MiB free (LAYERS=2 makes it smaller)"
    exit 77
fi

python3 scripts/make_synthetic_checkpoint.py --layers "$layers" --hidden $hidden --intermediate $intermediate \
    --heads 32 --kv-heads 8 --head-dim 64 --vocab $vocab --files 4 "$work/source" >"$work/out" ||
    { echo "SKIP no python3"; exit 77; }
source_bytes=$(du -sb "$work/source" | cut -f1)
[ "$source_bytes" -gt $((2 * bound)) ] || [ -n "${LAYERS:-}" ] || not_ok "the checkpoint is too small to show anything"

measure() { # NAME ARGUMENTS...
    local name=$1
    shift
    if watch "$@"; then within "$name"; else not_ok "$name: $(cat "$work/err")"; fi
}

measure "convert" convert --json --quiet --tp 2 "$work/source" "$work/bf16"
rm -rf "$work/bf16"
measure "convert --quant int8" convert --json --quiet --tp 2 --quant int8 "$work/source" "$work/int8"
measure "verify --against" verify --quiet --against "$work/source" "$work/int8"
measure "reshard" reshard --json --quiet --tp 4 "$work/int8" "$work/four"
finish
