# Shared by tests/test_*.sh: run from the repository's root with BUILD set (default build).
# Sets tpshard, tpengine, model (the bundled model) and work (a scratch folder under BUILD that is removed at the end).
# shellcheck shell=bash disable=SC2034
set -u
BUILD=${BUILD:-build}
tpshard=${TPSHARD:-$BUILD/tpshard}
tpengine=$BUILD/tpengine
model=tests/model
work=$BUILD/tests/$(basename "$0" .sh).$$
failures=0

[ -x "$tpshard" ] || { echo "SKIP no $tpshard: build it first"; exit 77; }
mkdir -p "$work"
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM

# Lets tpshard run without syncs, which cost three quarters of the time of a small model. For tests of many runs that ask nothing of power
# failures: those are test_io_faults.py's. Builds without the shim go on as they are.
leave_out_syncs() {
    local shim=$BUILD/tests/libio_shim.so
    [ -e "$shim" ] || return 0
    printf '#!/bin/sh\nIO_SHIM_SHORT=0 LD_PRELOAD="%s" exec "%s" "$@"\n' "$(realpath "$shim")" "$(realpath "$tpshard")" >"$work/tpshard"
    chmod +x "$work/tpshard"
    tpshard=$work/tpshard
}

ok() { echo "ok $*"; }
not_ok() {
    echo "not ok $*"
    failures=$((failures + 1))
}
finish() { exit $((failures > 0)); }

# check NAME COMMAND...: the command's success.
check() {
    local name=$1
    shift
    if "$@"; then ok "$name"; else not_ok "$name"; fi
}

# Runs quietly; what it says on stderr stands in $work/err, on stdout in $work/out.
run() { "$@" >"$work/out" 2>"$work/err" </dev/null; }

convert() { run "$tpshard" convert --quiet "$@"; }

same() { diff -r "$1" "$2" >"$work/diff" 2>&1; }

# expect NAME STATUS WORDS COMMAND...: the exit status and a part of the sentence.
expect() {
    local name=$1 status=$2 words=$3 got=0
    shift 3
    run "$@" || got=$?
    if [ "$got" -ne "$status" ]; then
        not_ok "$name: exit status $got, wanted $status: $(tail -n 1 "$work/err")"
    elif [ -n "$words" ] && ! grep -qF -- "$words" "$work/err" "$work/out"; then
        not_ok "$name: \"$(tail -n 1 "$work/err")\" does not say \"$words\""
    else
        ok "$name"
    fi
}

# flip FILE OFFSET BIT: changes one bit.
flip() {
    local byte
    byte=$(od -An -tu1 -j "$2" -N 1 "$1")
    # shellcheck disable=SC2059 # the format is the byte
    printf "\\x$(printf %02x $((byte ^ (1 << $3))))" | dd of="$1" bs=1 seek="$2" conv=notrunc status=none
}
