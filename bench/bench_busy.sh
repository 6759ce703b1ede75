#!/usr/bin/env bash
# What one foreign busy core costs: decode of one rank with two threads and of two ranks with one thread each, alone and beside a process that
# never sleeps, in turns: one that the kernel moves as it likes, and one that keeps to the first core. A fair share on two cores would cost 1.3
# to 2 times; ranks that only spin lose far more.
#
#   busy quant=int4 tp_size=2 threads=1 foreign=free|pinned quiet_tokens_per_s=.. busy_tokens_per_s=.. slowdown=..
set -eu
BUILD=${BUILD:-build}
dir=${MODEL_DIR:-$BUILD/bench-busy}
rounds=${ROUNDS:-5}
mkdir -p "$dir"
for tp in 1 2; do
    [ -f "$dir/int4-$tp/model.json" ] && continue
    [ -f "$dir/model/config.json" ] ||
        python3 scripts/make_synthetic_checkpoint.py --layers 8 --hidden 2048 --intermediate 5632 --heads 32 --kv-heads 4 --vocab 32000 "$dir/model" >&2
    "$BUILD/tpshard" --tp "$tp" --quant int4 --force "$dir/model" "$dir/int4-$tp" --quiet >&2
done
median() { sort -g | awk '{v[NR] = $1} END {print v[int((NR + 1) / 2)]}'; }
decode() { # tp
    "$BUILD/tpengine" bench "$dir/int4-$1" --threads $((2 / $1)) --prompt-tokens 16 --gen-tokens 64 --quiet |
        sed -n 's/.* decode_tokens_per_s=\([^ ]*\).*/\1/p'
}
results=$(mktemp -d)
pid=
trap 'rm -r "$results"; [ -z "$pid" ] || kill "$pid" 2>/dev/null || true' EXIT
first=$(taskset -cp $$ | sed 's/.*: \([0-9]*\).*/\1/')
for _ in $(seq "$rounds"); do
    for tp in 1 2; do
        decode "$tp" >>"$results/$tp-quiet"
        for foreign in free pinned; do
            if [ $foreign = free ]; then sh -c 'while :; do :; done' & else taskset -c "$first" sh -c 'while :; do :; done' & fi
            pid=$!
            decode "$tp" >>"$results/$tp-$foreign"
            kill "$pid" 2>/dev/null || true
            wait "$pid" 2>/dev/null || true
            pid=
        done
    done
done
for tp in 1 2; do
    for foreign in free pinned; do
        awk -v t="$tp" -v f="$foreign" -v q="$(median <"$results/$tp-quiet")" -v b="$(median <"$results/$tp-$foreign")" \
            'BEGIN {printf "busy quant=int4 tp_size=%d threads=%d foreign=%s quiet_tokens_per_s=%s busy_tokens_per_s=%s slowdown=%.2f\n", t, 2 / t, f, q, b, q / b}'
    done
done
