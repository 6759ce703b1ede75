#!/usr/bin/env bash
# What one foreign busy core costs: decode of two ranks with one thread each, alone and beside a process that never sleeps, in turns. A fair
# share on two cores would cost 1.3 to 2 times; ranks that only spin lose far more.
#
#   busy quant=int4 tp_size=2 quiet_tokens_per_s=.. busy_tokens_per_s=.. slowdown=..
set -eu
BUILD=${BUILD:-build}
dir=${MODEL_DIR:-$BUILD/bench-busy}
rounds=${ROUNDS:-5}
mkdir -p "$dir"
[ -f "$dir/int4-2/model.json" ] || {
    python3 scripts/make_synthetic_checkpoint.py --layers 8 --hidden 2048 --intermediate 5632 --heads 32 --kv-heads 4 --vocab 32000 "$dir/model" >&2
    "$BUILD/tpshard" --tp 2 --quant int4 --force "$dir/model" "$dir/int4-2" --quiet >&2
}
median() { sort -g | awk '{v[NR] = $1} END {print v[int((NR + 1) / 2)]}'; }
decode() {
    "$BUILD/tpengine" bench "$dir/int4-2" --threads 1 --prompt-tokens 16 --gen-tokens 64 --quiet | sed -n 's/.* decode_tokens_per_s=\([^ ]*\).*/\1/p'
}
quiet=$(mktemp)
busy=$(mktemp)
trap 'rm -f "$quiet" "$busy"' EXIT
for _ in $(seq "$rounds"); do
    decode >>"$quiet"
    sh -c 'while :; do :; done' &
    foreign=$!
    decode >>"$busy"
    kill "$foreign"
    wait "$foreign" 2>/dev/null || true
done
awk -v q="$(median <"$quiet")" -v b="$(median <"$busy")" \
    'BEGIN {printf "busy quant=int4 tp_size=2 quiet_tokens_per_s=%s busy_tokens_per_s=%s slowdown=%.2f\n", q, b, q / b}'
