#!/usr/bin/env bash
# tpshard killed at random moments: nothing that verify or inspect accepts is left unless it is the whole model, --resume
# comes to the same bytes, a replaced model is the old one, the new one or none. Signals, a full disk, a changed source.
#
#   CRASHES   kills of each kind (default 40, of --zstd 15; in slow builds, TEST_QUICK=1, 8 and 5)
cd "$(dirname "$0")/.." || exit 1
. tests/shard_helpers.sh

leave_out_syncs
usual=40 usual_zstd=15
if [ -n "${TEST_QUICK:-}" ]; then usual=8 usual_zstd=5; fi
crashes=${CRASHES:-$usual}
RANDOM=11
source=$work/source
out=$work/shards
options=(--tp 3 --quant int4 --group-size 32)

python3 scripts/make_synthetic_checkpoint.py --family llama-biases "$source" >"$work/out" || { echo "SKIP no python3"; exit 77; }
# One whole run with these options: what all others have to come to, and how long they may take.
measure() {
    local started
    options=("$@")
    rm -rf "$work/whole"
    started=$(date +%s%N)
    convert "${options[@]}" "$source" "$work/whole" || { not_ok "convert ${options[*]}: $(cat "$work/err")"; finish; }
    run_us=$((($(date +%s%N) - started) / 1000))
    window_us=$((run_us * 5 / 4))
}
measure "${options[@]}"
convert --tp 2 --quant int8 "$source" "$work/other"

# Starts tpshard with these arguments and kills it within window_us, which follows the machine's speed while the tests run.
too_late() { window_us=$((window_us * 9 / 10)); }
too_early() { window_us=$((window_us * 31 / 30)); }
start_and_kill() {
    local wait_us=$(((RANDOM * 32768 + RANDOM) % window_us))
    "$tpshard" convert --quiet "$@" >"$work/out" 2>"$work/err" &
    local pid=$!
    sleep "$(printf '%d.%06d' $((wait_us / 1000000)) $((wait_us % 1000000)))"
    kill -9 $pid 2>/dev/null
    wait $pid 2>/dev/null
}

# Equal but for the work folder, which a kill may leave.
same_model() { diff -r -x .tmp-tpshard "$1" "$2" >"$work/diff" 2>&1; }

accepted() { run "$tpshard" verify "$1" || run "$tpshard" inspect "$1"; }

kill_and_resume() {
    local i torn=0 whole=0 unfinished=0 differs=0 wanted=$((crashes / 4))
    # More of them where most came after the end, until enough came before it: each that came late shortens the window.
    for ((i = 0; i < crashes || (unfinished < wanted && i < crashes * 10); i++)); do
        rm -rf "$out"
        start_and_kill "${options[@]}" "$source" "$out"
        [ $((i % 3)) -ne 0 ] || [ -e "$out/model.json" ] || start_and_kill "${options[@]}" --resume "$source" "$out"
        if [ -e "$out/model.json" ]; then
            whole=$((whole + 1))
            too_late
            { same_model "$out" "$work/whole" && run "$tpshard" verify "$out"; } || torn=$((torn + 1))
        else
            unfinished=$((unfinished + 1))
            too_early
            ! accepted "$out" || torn=$((torn + 1))
            convert "${options[@]}" --resume "$source" "$out" || { differs=$((differs + 1)); cat "$work/err"; }
            same "$out" "$work/whole" || differs=$((differs + 1))
        fi
    done
    if [ $torn -eq 0 ] && [ $differs -eq 0 ]; then
        ok "$i kills of ${options[*]}: $unfinished unfinished, none accepted, all resumed to the same bytes; $whole whole"
    else
        not_ok "$i kills of ${options[*]}: $torn torn, $differs other after --resume (of $unfinished)"
    fi
    [ "$unfinished" -ge $wanted ] || not_ok "kills came too late to test anything: $unfinished of $i"
}

kill_while_replacing() {
    local i old=0 new=0 none=0 torn=0 window_us=$((run_us * 2))
    for ((i = 0; i < crashes / 3; i++)); do
        rm -rf "$out"
        cp -r "$work/other" "$out"
        start_and_kill "${options[@]}" --force "$source" "$out"
        if [ ! -e "$out/model.json" ]; then
            none=$((none + 1))
            ! accepted "$out" || torn=$((torn + 1))
            convert "${options[@]}" "$source" "$out" && same "$out" "$work/whole" || torn=$((torn + 1))
        elif same_model "$out" "$work/other"; then
            old=$((old + 1))
        elif same_model "$out" "$work/whole"; then
            new=$((new + 1))
        else
            torn=$((torn + 1))
        fi
    done
    if [ $torn -eq 0 ]; then
        ok "kills while replacing: $old old, $new new, $none none, never a mixture"
    else
        not_ok "kills while replacing: $torn mixtures"
    fi
}

signals() {
    local signal wanted got
    for signal in INT:130 TERM:143; do
        wanted=${signal#*:} got=0
        rm -rf "$out"
        # A background job of a script ignores SIGINT unless it is told otherwise.
        python3 - "$tpshard" "${signal%:*}" "$out" "$model" >"$work/out" 2>"$work/err" <<'PYTHON' || got=$?
import os, signal, subprocess, sys, time
program, name, out, model = sys.argv[1:]
number = getattr(signal, "SIG" + name)
signal.signal(number, signal.SIG_DFL)
child = subprocess.Popen([program, "--quant", "int4", "--threads", "1", model, out])
deadline = time.monotonic() + 20
journal = os.path.join(out, ".tmp-tpshard", "journal")
while time.monotonic() < deadline and not (os.path.exists(journal) and os.path.getsize(journal) > 100):
    time.sleep(0.001)
child.send_signal(number)
sys.exit(child.wait())
PYTHON
        if [ $got -ne "$wanted" ]; then
            not_ok "SIG${signal%:*}: exit status $got, wanted $wanted: $(cat "$work/err")"
        elif ! grep -q -- --resume "$work/err" || accepted "$out"; then
            not_ok "SIG${signal%:*}: $(cat "$work/err")"
        elif convert --quant int4 --resume "$model" "$out" && run "$tpshard" verify --against "$model" "$out" &&
            [ ! -e "$out/.tmp-tpshard" ]; then
            ok "SIG${signal%:*}: exit status $wanted, says how to go on, and goes on"
        else
            not_ok "SIG${signal%:*}: --resume: $(cat "$work/err")"
        fi
    done
}

# Killed while weights were written: some are in the journal, no file is at its final place.
unfinished() {
    [ "$(wc -l <"$out/.tmp-tpshard/journal")" -gt 1 ] && [ -z "$(find "$out" -maxdepth 1 -type f)" ]
} 2>/dev/null

again_unfinished() {
    rm -rf "$out"
    cp -r "$work/unfinished" "$out"
}

other_resumes() {
    local killed=0
    until unfinished; do
        rm -rf "$out"
        start_and_kill "${options[@]}" "$source" "$out"
        if [ -e "$out/model.json" ]; then too_late; else too_early; fi
        killed=$((killed + 1))
        [ $killed -lt 100 ] || { not_ok "no unfinished run in 100"; return; }
    done
    cp -r "$out" "$work/unfinished"
    expect "--resume with other options" 2 "leave out --resume" \
        "$tpshard" convert --resume --tp 2 --quant int4 --group-size 32 "$source" "$out"
    expect "and it leaves the unfinished run" 0 "" "$tpshard" convert --quiet "${options[@]}" --resume "$source" "$out"
    if same "$out" "$work/whole"; then ok "which goes on"; else not_ok "which goes on: $(cat "$work/diff")"; fi
    again_unfinished
    expect "--resume --force starts anew" 0 "" "$tpshard" convert --quiet --tp 2 --quant int8 --resume --force "$source" "$out"
    if same "$out" "$work/other"; then ok "with the new options' bytes"; else not_ok "new bytes: $(cat "$work/diff")"; fi

    # What the journal says is not believed: the files are.
    again_unfinished
    for rank in "$out"/.tmp-tpshard/rank-*; do flip "$rank" $((2 * 1024 * 1024 + 100)) 1; done
    convert "${options[@]}" --resume "$source" "$out"
    if same "$out" "$work/whole"; then ok "damage in an unfinished run is mended"; else not_ok "damage stays: $(cat "$work/diff" "$work/err")"; fi
    again_unfinished
    printf 'torn 0123' >>"$out/.tmp-tpshard/journal"
    convert "${options[@]}" --resume "$source" "$out"
    if same "$out" "$work/whole"; then ok "a torn line of the journal"; else not_ok "torn line: $(cat "$work/diff" "$work/err")"; fi
    again_unfinished
    cp "$work/whole/config.json" "$out" # killed while it committed, taken up, and killed again
    convert "${options[@]}" --resume "$source" "$out"
    if same "$out" "$work/whole"; then ok "extras beside the work folder"; else not_ok "extras beside it: $(cat "$work/diff" "$work/err")"; fi
}

# Disks that hold the raw files, but not the compressed ones beside them: on a larger one --resume goes on with what was compressed, whatever
# has become of it.
full_disk_compressed() {
    local disk=$work/disk kib got refused=0 begun=0 bad=0 file
    mkdir "$disk"
    mount -t tmpfs none "$disk" || { echo "ok # SKIP full disk: no right to mount a small one"; return; }
    for ((kib = 0; kib <= 20000; kib += 2000)); do
        mount -o "remount,size=$((kib + 4))k" "$disk"
        got=0
        convert "${options[@]}" "$source" "$disk/shards" || got=$?
        if [ $got -eq 5 ]; then
            refused=$((refused + 1))
            ! accepted "$disk/shards" || bad=$((bad + 1))
            mount -o "remount,size=30000k" "$disk"
            for file in "$disk"/shards/.tmp-tpshard/rank-*.tpshard; do
                [ -e "$file" ] || continue
                begun=$((begun + 1))
                [ $((begun % 3)) -ne 0 ] || flip "$file" 2097252 1 2>/dev/null
                [ $((begun % 3)) -ne 1 ] || # lengths and codes beyond all bounds
                    head -c 65536 /dev/zero | tr '\0' '\377' | dd of="$file" conv=notrunc status=none
            done
            convert "${options[@]}" --resume "$source" "$disk/shards" || { bad=$((bad + 1)); cat "$work/err"; }
        elif [ $got -ne 0 ]; then
            bad=$((bad + 1))
            cat "$work/err"
        fi
        same "$disk/shards" "$work/whole" || bad=$((bad + 1))
        rm -rf "$disk/shards"
    done
    umount "$disk"
    rmdir "$disk"
    if [ $bad -eq 0 ] && [ $refused -gt 0 ] && [ $begun -gt 0 ]; then
        ok "full disk with --zstd: $refused times refused, all resumed, $begun of the files begun"
    else
        not_ok "full disk with --zstd: $bad bad, $refused refused, $begun begun"
    fi
}

# Small disks of every size, in a mount namespace of its own: they go with it.
full_disk() {
    local disk=$work/disk kib got refused=0 whole=0 bad=0
    mkdir "$disk"
    mount -t tmpfs none "$disk" || { echo "ok # SKIP full disk: no right to mount a small one"; return; }
    for ((kib = 0; kib <= 12000; kib += 600)); do
        mount -o "remount,size=$((kib + 4))k" "$disk"
        got=0
        convert "${options[@]}" "$source" "$disk/shards" || got=$?
        if [ $got -eq 0 ] && same "$disk/shards" "$work/whole"; then
            whole=$((whole + 1))
        elif [ $got -eq 5 ] && grep -q "No space left" "$work/err" && ! accepted "$disk/shards"; then
            refused=$((refused + 1))
        else
            bad=$((bad + 1))
            echo "# $kib KiB: exit status $got: $(cat "$work/err")"
        fi
        rm -rf "$disk/shards"
    done
    umount "$disk"
    rmdir "$disk"
    if [ $bad -eq 0 ] && [ $refused -gt 0 ] && [ $whole -gt 0 ]; then
        ok "full disk: $refused times refused, $whole times enough"
    else
        not_ok "full disk: $bad bad, $refused refused, $whole enough"
    fi
}

if [ "${1:-}" = --full-disk ]; then
    full_disk
    measure "${options[@]}" --zstd
    full_disk_compressed
    finish
fi
plain=("${options[@]}")
kill_and_resume
measure "${plain[@]}" --zstd
crashes=${CRASHES:-$usual_zstd}
kill_and_resume
crashes=${CRASHES:-$usual}
measure "${plain[@]}"
kill_while_replacing
signals
other_resumes
if unshare -rm true 2>/dev/null; then
    unshare -rm "tests/$(basename "$0")" --full-disk || failures=$((failures + 1))
else
    echo "ok # SKIP full disk: no right to make a mount namespace"
fi
finish
