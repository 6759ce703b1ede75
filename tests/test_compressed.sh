#!/usr/bin/env bash
# tpshard --zstd: the same bytes whatever the way, nothing lost, every flipped bit found, sizes as `plan` and the README say.
#
#   FLIPS   flipped bits of each rank file (default 40)
cd "$(dirname "$0")/.." || exit 1
. tests/shard_helpers.sh

flips=${FLIPS:-40}

# ratio DIR: stored bytes / payload bytes of all its ranks.
ratio() {
    "$tpshard" inspect --json "$1" | python3 -c '
import json, sys
ranks = json.load(sys.stdin)["ranks"]
print(sum(rank["stored"]["bytes"] for rank in ranks) / sum(rank["payload_bytes"] for rank in ranks))'
}
# shellcheck disable=SC2317 # called by check
at_most() { python3 -c 'import sys; sys.exit(not float(sys.argv[1]) <= float(sys.argv[2]))' "$1" "$2"; }

# The bundled model's weights are trained ones. Scales that lose least make codes of four bits all but equally frequent.
sizes() {
    local quant most got
    for quant in none:0.67 int8:0.93 fp8:0.835 int4:0.93; do
        most=${quant#*:} quant=${quant%:*}
        convert --tp 2 --quant "$quant" --zstd "$model" "$work/$quant" || { not_ok "$quant: $(cat "$work/err")"; continue; }
        expect "$quant: verify --against" 0 "every weight equals" "$tpshard" verify --against "$model" "$work/$quant"
        got=$(ratio "$work/$quant")
        check "$quant: ratio $got is at most $most" at_most "$got" "$most"
        predicted "$quant"
    done
}

predicted() {
    local answer
    answer=$("$tpshard" plan --json --tp 2 --quant "$1" --zstd --link 1 --cores 2 "$model" | python3 -c '
import json, os, sys
plan = json.load(sys.stdin)["compressed"]
bytes = sum(os.path.getsize(f"{sys.argv[1]}/rank-0{rank}-of-02.tpshard") for rank in range(2))
print(abs(plan["bytes"] - bytes) / bytes < 0.03, plan["plain_bytes"] > plan["bytes"], plan["helps"])' "$work/$1")
    check "$1: plan --zstd predicts the files' sizes ($answer)" [ "$answer" = "True True True" ]
}

same_bytes() {
    local threads
    convert --tp 2 --quant none "$model" "$work/plain"
    for threads in 1 3 7; do
        rm -rf "$work/again"
        convert --tp 2 --quant none --zstd --threads "$threads" "$model" "$work/again"
        check "same bytes with $threads threads" same "$work/none" "$work/again"
    done
    rm -rf "$work/again"
    run "$tpshard" reshard --quiet --zstd --tp 2 "$work/plain" "$work/again"
    check "reshard --zstd makes what convert --zstd makes" same "$work/none" "$work/again"
    rm -rf "$work/again"
    run "$tpshard" reshard --quiet --tp 2 "$work/none" "$work/again"
    check "and reshard of it what convert makes" same "$work/plain" "$work/again"
    rm -rf "$work/again"
    run "$tpshard" reshard --quiet --zstd --tp 1 "$work/none" "$work/again" # more leaves than stay decoded
    expect "1 rank: verify --against" 0 "every weight equals" "$tpshard" verify --against "$model" "$work/again"
    rm -rf "$work/again"
    run "$tpshard" reshard --quiet --zstd --tp 5 "$work/int4" "$work/five"
    run "$tpshard" reshard --quiet --zstd --tp 2 "$work/five" "$work/again"
    check "2 to 5 to 2 ranks and back" same "$work/int4" "$work/again"
    rm -rf "$work/again" "$work/five"
}

flipped_bits() {
    local dir=$work/flip file=$work/flip/rank-01-of-02.tpshard bytes step offset found=0 missed=0
    cp -r "$work/fp8" "$dir"
    RANDOM=5
    bytes=$(stat -c %s "$file")
    step=$(((bytes - 2097152) / flips))
    for ((offset = 2097152; offset < bytes; offset += step)); do
        flip "$file" "$offset" $((RANDOM % 8))
        if run "$tpshard" verify "$dir"; then missed=$((missed + 1)); else found=$((found + 1)); fi
        cp "$work/fp8/rank-01-of-02.tpshard" "$file"
    done
    for offset in 16 $((bytes - 1)); do # the feature's bit; the zeros at the end
        flip "$file" "$offset" 0
        if run "$tpshard" verify "$dir"; then missed=$((missed + 1)); else found=$((found + 1)); fi
        cp "$work/fp8/rank-01-of-02.tpshard" "$file"
    done
    check "$found flipped bits found, $missed missed" [ $missed -eq 0 ]
    flip "$file" $((2097152 + 12345)) 3
    expect "a flipped bit is named" 4 "rank 1: tensor embedding" "$tpshard" verify "$dir"
    expect "with the command that repairs it" 4 "repair it: tpshard repair $dir --from SOURCE" "$tpshard" verify "$dir"
    expect "reshard makes nothing of it" 4 "checksum mismatch" "$tpshard" reshard --tp 1 "$dir" "$work/x"
    rm -rf "$dir"
}

# Codes that have nothing to spare: the files are those that convert makes without --zstd.
nothing_to_gain() {
    local options=(--quant nvfp4 --embed nvfp4 --head nvfp4)
    convert "${options[@]}" "$model" "$work/float"
    convert "${options[@]}" --zstd "$model" "$work/float-zstd"
    check "what does not become shorter stays as it is" same "$work/float" "$work/float-zstd"
    rm -rf "$work/float" "$work/float-zstd"
}

advice() {
    expect "a slow link: it helps" 0 "it helps" "$tpshard" plan --zstd --link 0.2 --cores 1 "$model"
    expect "a fast one: it does not" 0 "it does not help" "$tpshard" plan --zstd --link 20 --cores 2 "$model"
    expect "none: where it would" 0 "for each core that decodes" "$tpshard" plan --zstd "$model"
    expect "a link without --zstd" 2 "add --zstd" "$tpshard" plan --link 1 "$model"
    expect "the manual names the price" 0 "the disk holds both forms" "$tpshard" --help-man
    expect "inspect tells lengths and codes" 0 "planes)" "$tpshard" inspect "$work/none"
}

sizes
same_bytes
flipped_bits
nothing_to_gain
advice
finish
