#!/usr/bin/env bash
# tpengine on the bundled model, as a user runs it: laws 4, 6, 7 and 9, stop strings, sampling, exit codes, lost ranks.
# shellcheck disable=SC2317 # functions are called by check
cd "$(dirname "$0")/.." || exit 1
. tests/shard_helpers.sh

for tp in 1 2 4; do
    "$tpshard" --tp $tp --quant int4 tests/model "$work/int4-$tp" --quiet || exit 1
done
"$tpshard" --tp 2 --quant none tests/model "$work/none-2" --quiet || exit 1
generate() { "$tpengine" generate "$@" --quiet; }

# ---- law 9: greedy output does not depend on the company -------------------------------------------------------
prompts=("In the beginning" "And the LORD said unto Moses," "Blessed are" "Now there was a man of the tribe of Benjamin, and he went up")
for i in 0 1 2 3; do
    generate "$work/int4-2" --prompt "${prompts[$i]}" --max-tokens 40 --ignore-eos --ids >"$work/alone-$i"
done
check "greedy text is not empty" test -s "$work/alone-0"
for variant in "--ranks thread" "--threads 1" "--threads 2" "--ranks thread --threads 2" "--verify off"; do
    # shellcheck disable=SC2086
    generate "$work/int4-2" --prompt "${prompts[1]}" --max-tokens 40 --ignore-eos --ids $variant >"$work/variant"
    check "greedy tokens equal with $variant" same "$work/variant" "$work/alone-1"
done
generate "$work/int4-2" --prompt "${prompts[0]}" --prompt "${prompts[1]}" --prompt "${prompts[2]}" --prompt "${prompts[3]}" \
    --max-tokens 40 --ignore-eos --ids >"$work/batch"
for i in 0 1 2 3; do
    sed -n "s/^\[$i\] //p" "$work/batch" >"$work/batch-$i"
    check "greedy tokens equal alone and in a batch ($i)" same "$work/batch-$i" "$work/alone-$i"
done
generate "$work/int4-2" --prompt "${prompts[2]}" --prompt "${prompts[0]}" --max-tokens 40 --ignore-eos --ids --threads 2 --ranks thread |
    sed -n 's/^\[1\] //p' >"$work/pair"
check "greedy tokens equal in another batch, with threads" same "$work/pair" "$work/alone-0"

# ---- drafts: the same tokens, whatever is guessed -------------------------------------------------------------------
for tp in 1 2; do
    for how in "--temperature 0" "--temperature 0.8 --seed 3 --top-p 0.9"; do
        # shellcheck disable=SC2086
        generate "$work/int4-$tp" --prompt "${prompts[1]}" --max-tokens 150 --ignore-eos --ids $how >"$work/undrafted"
        # shellcheck disable=SC2086
        "$tpengine" generate "$work/int4-$tp" --prompt "${prompts[1]}" --max-tokens 150 --ignore-eos --ids $how --draft-tokens 6 \
            >"$work/drafted" 2>"$work/err"
        check "tokens equal with drafts, tp $tp, $how" same "$work/drafted" "$work/undrafted"
    done
done
generate "$work/int4-2" --prompt "${prompts[0]}" --prompt "${prompts[1]}" --prompt "${prompts[2]}" --prompt "${prompts[3]}" \
    --max-tokens 40 --ignore-eos --ids --draft-tokens 5 --context 100 >"$work/batch-drafted"
check "greedy tokens of a batch equal with drafts" same "$work/batch-drafted" "$work/batch"
"$tpengine" generate "$work/int4-1" --prompt "a b c a b c a b c a b c a b c a b c" --max-tokens 60 --temperature 0 --ignore-eos --ids \
    --draft-tokens 6 >/dev/null 2>"$work/err"
check "some drafts are accepted" grep -q "^[1-9][0-9]* of [0-9]* drafted tokens accepted" "$work/err"

# ---- sampling ---------------------------------------------------------------------------------------------------
sampled() { generate "$work/int4-2" --prompt "And it came to pass" --max-tokens 30 --temperature 0.9 --top-p 0.95 --top-k 50 --ids "$@"; }
sampled --seed 1 >"$work/seed-1"
sampled --seed 1 >"$work/seed-1-again"
sampled --seed 2 >"$work/seed-2"
check "the same seed gives the same tokens" same "$work/seed-1" "$work/seed-1-again"
if same "$work/seed-1" "$work/seed-2"; then not_ok "another seed gives other tokens"; else ok "another seed gives other tokens"; fi
generate "$work/int4-2" --prompt "In the beginning" --max-tokens 30 --ids --temperature 0.8 --top-k 1 >"$work/top-1"
generate "$work/int4-2" --prompt "In the beginning" --max-tokens 30 --ids >"$work/greedy"
check "top-k 1 is greedy" same "$work/top-1" "$work/greedy"

generate "$work/int4-2" --prompt "In the beginning" --max-tokens 30 --ids --temperature 1e-39 >"$work/cold"
check "a temperature near 0 is greedy" same "$work/cold" "$work/greedy"

# ---- stop strings, streaming ------------------------------------------------------------------------------------
generate "$work/int4-2" --prompt "In the beginning" --max-tokens 60 >"$work/text"
stop=$(python3 -c 'import sys; t=open(sys.argv[1]).read(); print(t[20:24], end="")' "$work/text")
generate "$work/int4-2" --prompt "In the beginning" --max-tokens 60 --stop "$stop" >"$work/stopped"
check "text ends before the stop string" python3 -c '
import sys
text, stopped = open(sys.argv[1]).read(), open(sys.argv[2]).read()
sys.exit(stopped[:-1] != text[:text.index(sys.argv[3])])' "$work/text" "$work/stopped" "$stop"
generate "$work/int4-2" --prompt "In the beginning" --max-tokens 60 --json >"$work/json"
check "--json reports the same text" python3 -c '
import json, sys
choice = json.load(open(sys.argv[1]))["choices"][0]
sys.exit(choice["text"] + "\n" != open(sys.argv[2]).read() or choice["generated_tokens"] != len(choice["token_ids"]))' "$work/json" "$work/text"
echo "In the beginning" | tr -d '\n' | generate "$work/int4-2" --prompt - --max-tokens 60 >"$work/piped"
check "the prompt may come from standard input" same "$work/piped" "$work/text"

# ---- tokenize ---------------------------------------------------------------------------------------------------
text='Naïve “quotes”, 1234 and tabs	too. 日本'
ids=$("$tpengine" tokenize "$work/int4-2" "$text" --no-special)
check "tokenize and back" test "$("$tpengine" tokenize "$work/int4-2" "$ids" --decode)" = "$text"

# ---- law 7: a misfit is one clear sentence and its exit code ----------------------------------------------------
expect "no such directory" 5 "No such file" "$tpengine" generate "$work/nowhere" --prompt x
mkdir "$work/empty"
expect "a directory that is no model" 4 "model.json" "$tpengine" generate "$work/empty" --prompt x
expect "unknown option" 2 "did you mean --prompt" "$tpengine" generate "$work/int4-2" --promt x
expect "no prompt" 2 "needs --prompt" "$tpengine" generate "$work/int4-2"
expect "context beyond the model's" 2 "at most" "$tpengine" generate "$work/int4-2" --prompt x --context 100000
expect "prompt longer than the context" 2 "fit the context" "$tpengine" generate "$work/int4-2" --prompt "a b c d e f g h" --context 4
expect "a window of one token" 2 "at least 2" "$tpengine" eval "$work/int4-2" --text tests/model/heldout.txt --context 1
full() { # COMMAND...: output that cannot be written is exit 5
    "$@" >/dev/full 2>"$work/err"
    [ "$?" = 5 ] && grep -q "written\|No space" "$work/err"
}
for words in "generate DIR --prompt x --max-tokens 3" "generate DIR --prompt x --max-tokens 3 --json" "tokenize DIR x" "tokenize DIR x --json" \
    "eval DIR --text tests/model/heldout.txt --max-tokens 5" "bench DIR --prompt-tokens 4 --gen-tokens 2" "bench DIR --gen-tokens 2 --json"; do
    # shellcheck disable=SC2086
    check "full output: $words" full "$tpengine" ${words//DIR/$work/int4-2} --quiet
done
expect "token out of the vocabulary" 2 "vocabulary" "$tpengine" logits "$work/int4-2" --token-ids 1,99999 --output "$work/x.npy"
expect "unknown backend" 2 "auto" "$tpengine" generate "$work/int4-2" --prompt x --backend tpu
expect "missing CUDA backend" 6 "/nonexistent" "$tpengine" generate "$work/int4-2" --prompt x --backend cuda --cuda-library /nonexistent
cp -r "$work/int4-2" "$work/swapped"
mv "$work/swapped/rank-00-of-02.tpshard" "$work/swapped/x"
mv "$work/swapped/rank-01-of-02.tpshard" "$work/swapped/rank-00-of-02.tpshard"
mv "$work/swapped/x" "$work/swapped/rank-01-of-02.tpshard"
expect "two ranks' files swapped" 4 "rank 1 of 2" "$tpengine" generate "$work/swapped" --prompt x
cp -r "$work/int4-2" "$work/mixed"
cp "$work/none-2/rank-01-of-02.tpshard" "$work/mixed/"
expect "a file of another run" 4 "another run" "$tpengine" generate "$work/mixed" --prompt x
rm "$work/mixed/rank-01-of-02.tpshard"
expect "a missing rank" 5 "rank-01-of-02" "$tpengine" generate "$work/mixed" --prompt x
cp -r "$work/int4-2" "$work/flipped"
bytes=$(stat -c %s "$work/flipped/rank-01-of-02.tpshard")
flip "$work/flipped/rank-01-of-02.tpshard" $((bytes - 70000)) 2
expect "one flipped bit" 4 "checksum" "$tpengine" generate "$work/flipped" --prompt x
check "the flipped bit names rank, tensor and bytes" grep -q "rank 1.*layers\|rank 1.*norm\|rank 1.*embed" "$work/err"
check "and passes with --verify off" generate "$work/flipped" --prompt x --max-tokens 2 --verify off
truncate -s -4096 "$work/flipped/rank-01-of-02.tpshard"
expect "a truncated file" 4 "rank-01-of-02" "$tpengine" generate "$work/flipped" --prompt x
# Address space in steps, from too little to load the program's libraries to enough: never a crash, never a hang, never another code.
only_memory_codes() { # 8 at least once, besides it success and what a loader that cannot start says
    local code seen=1
    for code in $memory_codes; do
        case $code in
        8) seen=0 ;;
        0 | 127) ;;
        *) return 1 ;;
        esac
    done
    return "$seen"
}
memory_codes=""
own_kib=$(($(size "$tpengine" | awk 'NR == 2 { print $4 }') / 1024 + 1000)) # below that the kernel cannot even map the program and its stack
for limit in $(seq "$own_kib" 500 $((own_kib + 7000))); do
    (ulimit -v "$limit"; exec timeout 20 "$tpengine" generate "$work/int4-2" --prompt x --context 1024 --max-tokens 2 --quiet >"$work/out" 2>"$work/err")
    memory_codes+=" $?"
done
case $BUILD in
*asan* | *tsan*) ok "too little memory # SKIP sanitizers need address space of their own" ;;
*) check "too little memory: exit codes$memory_codes" only_memory_codes ;;
esac

# ---- law 6: lost, silent and orphaned ranks ---------------------------------------------------------------------
long=(--max-tokens 1000 --ignore-eos --quiet --context 1024)
for _ in $(seq 24); do long+=(--prompt "And the king said"); done
ranks_of() { awk -v parent="$1" '$4 == parent {printf "%s ", $1}' /proc/[0-9]*/stat 2>/dev/null; }
# start: a long generation in the background; sets $parent and $ranks (array)
start() {
    "$tpengine" generate "$work/int4-2" "${long[@]}" "$@" >/dev/null 2>"$work/err" &
    parent=$!
    for _ in $(seq 100); do
        read -ra ranks <<<"$(ranks_of $parent)"
        [ "${#ranks[@]}" -ge 2 ] && break
        sleep 0.05
    done
    sleep 0.4
}
gone() {
    for pid in "$@"; do
        [ -e "/proc/$pid" ] && ! grep -q '^State:.Z' "/proc/$pid/status" 2>/dev/null && return 1
    done
    return 0
}
now_ms() { date +%s%3N; }

# Of ours: what others on this machine do there meanwhile is theirs.
in_shm() { find /dev/shm -mindepth 1 -maxdepth 1 \( -name '*tpengine*' -o -name '*tpshard*' -o -name 'sem.*' \) 2>/dev/null | wc -l; }
shm_before=$(in_shm)
for victim in 0 1; do
    start
    begin=$(now_ms)
    kill -9 "${ranks[$victim]}"
    wait $parent
    found=$?
    took=$(($(now_ms) - begin))
    if [ $found = 7 ] && grep -q "rank $victim.*signal 9" "$work/err" && [ $took -lt 5000 ]; then
        ok "rank $victim killed: exit 7 after $took ms"
    else
        not_ok "rank $victim killed: exit $found after $took ms: $(cat "$work/err")"
    fi
    check "no rank is left" gone "${ranks[@]}"
done

start --timeout 1
begin=$(now_ms)
kill -STOP "${ranks[1]}"
wait $parent
found=$?
took=$(($(now_ms) - begin))
if [ $found = 7 ] && grep -q "rank 1" "$work/err" && grep -Eq "attention|mlp|embed|head|sample" "$work/err" && [ $took -lt 6000 ]; then
    ok "rank 1 stopped: exit 7 after $took ms, names rank and operation"
else
    not_ok "rank 1 stopped: exit $found after $took ms: $(cat "$work/err")"
fi
check "no rank is left" gone "${ranks[@]}"

start
kill -9 $parent
wait $parent 2>/dev/null
sleep 1
check "parent killed: no orphan after 1 s" gone "${ranks[@]}"

start
kill -INT $parent
wait $parent
check "interrupt: exit 130" test $? = 130
check "no rank is left" gone "${ranks[@]}"
start
kill -TERM $parent
wait $parent
check "terminated: exit 143" test $? = 143
check "nothing is left in /dev/shm" test "$(in_shm)" = "$shm_before"

finish
