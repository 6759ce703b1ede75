#!/usr/bin/env bash
# shellcheck disable=SC2016 # awk programs
# Decode and prefill of a whole model, as a share of what the memory gives: a synthetic Llama (1.1 billion parameters unless LAYERS says
# otherwise), INT4, INT8 and bf16, tp 1 with all threads and tp 2 with half of them each. Runs are interleaved with the bandwidth test, ROUNDS
# times; the lines show medians. Needs about 6 GB in $BUILD/bench-model, which is kept for the next run (MODEL_DIR to choose another place).
#
#   model quant=int4 tp_size=2 threads=1 ... decode_tokens_per_s=.. weights_gb_s=.. bandwidth_gb_s=.. share=..
set -eu
BUILD=${BUILD:-build}
dir=${MODEL_DIR:-$BUILD/bench-model}
rounds=${ROUNDS:-5}
layers=${LAYERS:-22}
cores=$(nproc)

mkdir -p "$dir"
[ -f "$dir/model/config.json" ] || python3 scripts/make_synthetic_checkpoint.py --layers "$layers" --hidden 2048 --intermediate 5632 --heads 32 \
    --kv-heads 4 --vocab 32000 "$dir/model" >&2
for quant in int4 int8 none; do
    for tp in 1 2; do
        [ -f "$dir/$quant-$tp/model.json" ] ||
            "$BUILD/tpshard" --tp "$tp" --quant "$quant" --force "$dir/model" "$dir/$quant-$tp" --quiet >&2
    done
done

median() { sort -g | awk '{v[NR] = $1} END {print NR % 2 ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2}'; }
field() { sed -n "s/.* $1=\([^ ]*\).*/\1/p"; }

results=$(mktemp)
trap 'rm -f "$results"' EXIT
for _ in $(seq "$rounds"); do
    for quant in int4 int8 none; do
        for tp in 1 2; do
            threads=$((tp < cores ? cores / tp : 1))
            bandwidth=$("$BUILD/bench/bench_bandwidth" "$cores" | field gb_s)
            line=$("$BUILD/tpengine" bench "$dir/$quant-$tp" --threads "$threads" --prompt-tokens 128 --gen-tokens 24 --quiet)
            echo "$quant $tp $threads $bandwidth $(field decode_tokens_per_s <<<"$line") $(field prefill_tokens_per_s <<<"$line") \
$(field load_s <<<"$line") $(field rss_mib <<<"$line") $(field file_mib <<<"$line")" >>"$results"
        done
    done
done
embedding_mib=125 # 32000 x 2048 bf16: read one row a token
while read -r quant tp threads; do
    pick() { awk -v q="$quant" -v t="$tp" -v e="$embedding_mib" "\$1 == q && \$2 == t {print $1}" "$results" | median; }
    echo "model params=1.1b quant=$quant tp_size=$tp threads=$threads decode_tokens_per_s=$(pick '$5') prefill_tokens_per_s=$(pick '$6')" \
        "weights_gb_s=$(pick '$5 * ($9 - e) * 1.048576 / 1000') bandwidth_gb_s=$(pick '$4')" \
        "share=$(pick '$5 * ($9 - e) * 1.048576 / 1000 / $4') load_s=$(pick '$7') rss_mib=$(pick '$8') file_mib=$(pick '$9')"
done < <(awk '{print $1, $2, $3}' "$results" | sort -u)
