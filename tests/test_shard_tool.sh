#!/usr/bin/env bash
# tpshard as a user runs it: slicing commutes with quantizing (reshard equals convert, for every kind and in every
# direction), the same bytes at any number of threads, every weight equals its source, every flipped bit is found,
# and every misfit is one sentence with its exit status.
cd "$(dirname "$0")/.." || exit 1
. tests/shard_helpers.sh

leave_out_syncs
synthetic=$work/llama
kinds="none int8 fp8 int4 nl4"
sizes="1 2 3 4 5 8"
with_experts="mixtral qwen2_moe gpt_oss granite_moe deepseek_v3 gemma3 phi3"
flips=25 # of each file
# Slow builds.
if [ -n "${TEST_QUICK:-}" ]; then kinds="none int4" sizes="1 3 4" with_experts="gpt_oss deepseek_v3 phi3" flips=3; fi

make_synthetic() { python3 scripts/make_synthetic_checkpoint.py "$@" >"$work/out"; }

# ---- Laws 1 and 2 --------------------------------------------------------------------------------------------------

# Heads, mlp and vocabulary that divide by nothing; more ranks than kv heads, with int4 than head pairs.
reshard_matrix() {
    local kind=$1 from to
    for to in $sizes; do
        convert --tp "$to" --quant "$kind" --group-size 64 "$synthetic" "$work/$kind-$to" ||
            { not_ok "convert --quant $kind --tp $to: $(cat "$work/err")"; return; }
    done
    for from in $sizes; do
        for to in $sizes; do
            rm -rf "$work/new"
            run "$tpshard" reshard --quiet --tp "$to" "$work/$kind-$from" "$work/new" ||
                { not_ok "reshard $kind $from to $to: $(cat "$work/err")"; return; }
            same "$work/new" "$work/$kind-$to" || { not_ok "reshard $kind $from to $to: $(head -n 1 "$work/diff")"; return; }
        done
    done
    ok "reshard $kind: all of $sizes to all equal convert, byte for byte"
    for to in $sizes; do
        run "$tpshard" verify --against "$synthetic" "$work/$kind-$to" ||
            { not_ok "verify --against $kind tp $to: $(cat "$work/err")"; return; }
        rm -rf "$work/$kind-$to"
    done
    ok "verify --against $kind: every weight equals its source at tp $sizes"
}

# Scales without a search: said by the manifest, kept by reshard, and what verify compares with.
plain_rounding() {
    if ! { convert --tp 2 --quant int4 --scales max "$synthetic" "$work/max-2" &&
        convert --tp 3 --quant int4 --scales max "$synthetic" "$work/max-3" &&
        convert --tp 2 --quant int4 "$synthetic" "$work/search-2"; }; then
        not_ok "convert --scales max: $(cat "$work/err")"
        return
    fi
    rm -rf "$work/new"
    run "$tpshard" reshard --quiet --tp 3 "$work/max-2" "$work/new"
    if same "$work/new" "$work/max-3"; then ok "--scales max: reshard equals convert"; else not_ok "--scales max: $(cat "$work/err" "$work/diff")"; fi
    if same "$work/max-2" "$work/search-2"; then not_ok "--scales max changes nothing"; else ok "--scales max: other weights than the search's"; fi
    expect "--scales max: inspect says so" 0 "plain rounding" "$tpshard" inspect "$work/max-2"
    expect "--scales max: verify --against" 0 "ok" "$tpshard" verify --against "$synthetic" "$work/max-2"
    # Where no head is left to ask, the manifest alone says how.
    for rank in "$work"/max-2/rank-*; do printf X | dd of="$rank" bs=1 seek=100 conv=notrunc status=none; done
    expect "--scales max: repaired from the checkpoint" 0 "" "$tpshard" repair --quiet "$work/max-2" --from "$synthetic"
    expect "--scales max: whole again" 0 "ok" "$tpshard" verify --against "$synthetic" "$work/max-2"
    for scales in search max; do
        expect "an FP8 checkpoint, --scales $scales" 0 "" "$tpshard" --quiet --quant int4 --scales "$scales" tests/golden/imports/ct_fp8 "$work/fp8-$scales"
    done
    if cmp -s "$work"/fp8-{search,max}/rank-00-of-01.tpshard; then
        not_ok "--scales max of a quantized checkpoint changes nothing"
    else
        ok "--scales max of a quantized checkpoint"
    fi
    expect "and verified" 0 "ok" "$tpshard" verify --against tests/golden/imports/ct_fp8 "$work/fp8-max"
    expect "--scales max where four bits stay as they are" 2 "here are none" "$tpshard" --quant keep --scales max tests/golden/imports/gptq "$work/none"
    expect "plan --scales max without four bits" 2 "here are none" "$tpshard" plan --quant int8 --scales max "$synthetic"
    expect "--scales max without four bits" 2 "here are none" "$tpshard" convert --tp 1 --quant int8 --scales max "$synthetic" "$work/none"
    rm -rf "$work"/max-? "$work/search-2" "$work/new" "$work"/fp8-*
}

families() {
    local family
    for family in llama-biases mistral qwen2 qwen3; do
        make_synthetic --family "$family" --files 2 "$work/$family" || { not_ok "synthetic $family"; continue; }
        if convert --tp 3 --quant int4 --group-size 32 "$work/$family" "$work/$family-3" &&
            run "$tpshard" verify --against "$work/$family" "$work/$family-3" &&
            run "$tpshard" reshard --quiet --tp 5 "$work/$family-3" "$work/$family-5" &&
            run "$tpshard" verify --against "$work/$family" "$work/$family-5"; then
            ok "family $family: converted, resharded, equal to its source"
        else
            not_ok "family $family: $(cat "$work/err")"
        fi
        rm -rf "${work:?}/$family" "$work/$family-3" "$work/$family-5"
    done
}

# The weights themselves, by a reader that shares no code with tpshard.
slices() {
    local kind
    make_synthetic --family llama-biases --layers 1 "$work/biases"
    for kind in none int8 int4; do
        convert --tp 4 --quant $kind --group-size 32 "$work/biases" "$work/slices-$kind"
        expect "slices of $kind" 0 "hold what they should" \
            python3 tests/check_slices.py "$tpshard" "$work/biases" "$work/slices-$kind"
    done
    rm -rf "$work/biases" "$work"/slices-*
}

# f16 and f32 are read too, and rounded to bf16 where they are stored so.
source_dtypes() {
    local dtype
    for dtype in F16 F32; do
        make_synthetic --dtype $dtype "$work/$dtype"
        expect "$dtype source" 0 "rounded to bf16" "$tpshard" --tp 2 "$work/$dtype" "$work/$dtype-bf16"
        expect "$dtype source as bf16" 0 "ok" "$tpshard" verify --against "$work/$dtype" "$work/$dtype-bf16"
        convert --tp 2 --quant int8 "$work/$dtype" "$work/$dtype-int8"
        expect "$dtype source as int8" 0 "ok" "$tpshard" verify --against "$work/$dtype" "$work/$dtype-int8"
    done
    rm -rf "$work"/F16* "$work"/F32*
}

bundled_model() {
    local threads
    convert --tp 2 --quant int4 "$model" "$work/model-2" || { not_ok "bundled model: $(cat "$work/err")"; return; }
    for threads in 1 2 3 7; do
        rm -rf "$work/again"
        convert --tp 2 --quant int4 --threads "$threads" "$model" "$work/again"
        if same "$work/model-2" "$work/again"; then
            ok "same bytes with $threads threads"
        else
            not_ok "other bytes with $threads threads: $(cat "$work/diff" "$work/err")"
        fi
    done
    rm -rf "$work/again"
    run "$tpshard" reshard --quiet --tp 5 "$work/model-2" "$work/model-5"
    run "$tpshard" reshard --quiet --tp 2 "$work/model-5" "$work/again"
    if same "$work/model-2" "$work/again"; then ok "2 to 5 to 2 ranks and back"; else not_ok "2 to 5 to 2 ranks"; fi
    rm -rf "$work/again" "$work/model-5"
}

# ---- Law 3 -----------------------------------------------------------------------------------------------------------

# The manifest's name of the program that wrote it is information for people: nothing covers it.
in_tool_name() { # file, offset
    local at
    [ "${1##*/}" = model.json ] || return 1
    at=$(grep -bo '"tool": "[^"]*"' "$1")
    [ "$2" -ge "${at%%:*}" ] && [ "$2" -lt $((${at%%:*} + $(printf %s "${at#*:}" | wc -c))) ]
}

# One bit in each of many places of every file: head, index, leaves, padding, weights, manifest, extras.
flipped_bits() {
    local dir=$work/flip file bytes offset step found=0 missed=0
    cp -r "$work/model-2" "$dir"
    RANDOM=7
    for file in "$dir"/*; do
        bytes=$(stat -c %s "$file")
        step=$((bytes / flips + 1))
        for ((offset = 0; offset < bytes; offset += 1 + step / 2 + (RANDOM * 32768 + RANDOM) % step)); do
            ! in_tool_name "$file" "$offset" || continue
            flip "$file" "$offset" $((RANDOM % 8))
            if run "$tpshard" verify "$dir"; then
                missed=$((missed + 1))
                echo "# missed: $(basename "$file") byte $offset"
            else
                found=$((found + 1))
            fi
            cp "$work/model-2/$(basename "$file")" "$file"
        done
        flip "$file" $((bytes - 1)) 0 # the last byte, which is padding in a rank file
        if run "$tpshard" verify "$dir"; then missed=$((missed + 1)); else found=$((found + 1)); fi
        cp "$work/model-2/$(basename "$file")" "$file"
    done
    if [ "$missed" -eq 0 ] && [ "$found" -gt $((4 * flips)) ]; then
        ok "$found flipped bits, all found"
    else
        not_ok "flipped bits: $found found, $missed missed"
    fi
    flip "$dir/rank-01-of-02.tpshard" $((2 * 1024 * 1024 + 12345)) 3
    expect "a flipped bit is named" 4 "rank-01-of-02.tpshard: rank 1: tensor embedding" "$tpshard" verify "$dir"
    rm -rf "$dir"
}

changed_source() {
    cp -r "$model" "$work/changed"
    flip "$work/changed/model.safetensors" 3000001 6
    expect "a changed source weight is named" 4 "layers.0.self_attn.o_proj.weight, row " \
        "$tpshard" verify --against "$work/changed" "$work/model-2"
    rm -rf "$work/changed"
}

# ---- Law 7 -----------------------------------------------------------------------------------------------------------

# A small model whose config is changed by a sed expression.
with_config() {
    rm -rf "$work/bad"
    mkdir "$work/bad"
    cp "$synthetic"/* "$work/bad"
    sed -i "$1" "$work/bad/config.json"
}

misfits_of_models() {
    expect "no such directory" 3 "no config.json" "$tpshard" "$work/nothing" "$work/x"
    with_config 's/LlamaForCausalLM/OPTForCausalLM/'
    expect "unknown architecture" 3 '"OPTForCausalLM" is not supported' "$tpshard" "$work/bad" "$work/x"
    with_config 's/"intermediate_size": 688/"intermediate_size": 689/'
    expect "wrong shape" 3 "gate_proj.weight is 688 x 256, config.json calls for 689 x 256" \
        "$tpshard" "$work/bad" "$work/x"
    with_config 's/"num_hidden_layers": 2/"num_hidden_layers": 3/'
    expect "missing tensor" 3 "model.layers.2.input_layernorm.weight" "$tpshard" "$work/bad" "$work/x"
    with_config 's/"num_hidden_layers": 2/"num_hidden_layers": 1/'
    expect "unused tensor" 3 "tensor model.layers.1.input_layernorm.weight has no place" \
        "$tpshard" "$work/bad" "$work/x"
    with_config 's/"hidden_act"/"quantization_config": {"quant_method": "exl3"}, "hidden_act"/'
    expect "unknown quantization" 3 '"exl3"' "$tpshard" "$work/bad" "$work/x"
    with_config 's/x/x/'
    truncate -s -1 "$work/bad/model-00002-of-00003.safetensors"
    expect "truncated checkpoint" 3 "model-00002-of-00003.safetensors" "$tpshard" "$work/bad" "$work/x"
    with_config 's/x/x/'
    rm "$work/bad/model-00002-of-00003.safetensors"
    expect "incomplete checkpoint" 3 "model-00002-of-00003.safetensors" "$tpshard" "$work/bad" "$work/x"
    local file status quant
    for file in tokenizer.json tokenizer_config.json generation_config.json config.json; do
        status=5
        [ $file = tokenizer.json ] && status=3
        with_config 's/x/x/'
        rm -f "$work/bad/$file"
        mkfifo "$work/bad/$file"
        expect "a FIFO as $file is never waited for" $status "$file" timeout 10 "$tpshard" "$work/bad" "$work/x"
    done
    with_config 's/x/x/'
    ln -s tokenizer.json "$work/bad/tokenizer.json"
    expect "a link that loops" 5 "tokenizer.json" "$tpshard" "$work/bad" "$work/x"
    expect "a file-size limit" 5 "File too large" prlimit --fsize=2000000 "$tpshard" --tp 2 "$model" "$work/limited"
    rm -rf "$work/limited"
    make_synthetic "$work/nan"
    printf '\xc0\x7f' | dd of="$work/nan/model.safetensors" bs=1 conv=notrunc status=none \
        seek=$(($(stat -c %s "$work/nan/model.safetensors") - 2))
    for quant in int8 none; do
        expect "NaN in a weight, --quant $quant" 3 "tensor lm_head.weight, row 999: column 255 is NaN" \
            "$tpshard" convert --quant $quant "$work/nan" "$work/x"
    done
    if [ -e "$work/x" ]; then
        not_ok "a refused run leaves something: $(ls -A "$work/x")"
        rm -rf "$work/x"
    else
        ok "a refused run leaves nothing"
    fi
}

# A head beside "tie_word_embeddings": true must be the embedding, to the last byte; it is compared in pieces of 1 MiB.
tied_heads() {
    local file=$work/tied/model.safetensors bytes=$((5000 * 256 * 2)) size header offset
    make_synthetic --vocab 5000 "$work/tied"
    sed -i 's/"tie_word_embeddings": false/"tie_word_embeddings": true/' "$work/tied/config.json"
    expect "a tied head that is another matrix" 3 "lm_head.weight is another matrix than model.embed_tokens.weight" \
        "$tpshard" "$work/tied" "$work/x"
    header=$(od -An -tu8 -N 8 "$file")
    size=$(stat -c %s "$file")
    tail -c +$((8 + header + 1)) "$file" | head -c $bytes >"$work/embedding" # the first tensor; the head is the last
    truncate -s -$bytes "$file"
    cat "$work/embedding" >>"$file"
    expect "a tied head that is the embedding" 0 "" "$tpshard" "$work/tied" "$work/tied-1"
    for offset in $((size - bytes)) $((size - bytes / 2)) $((size - 1)); do
        flip "$file" "$offset" 0
        expect "a tied head with another bit in byte $((offset - size + bytes))" 3 "lm_head.weight is another matrix" \
            "$tpshard" "$work/tied" "$work/x"
        flip "$file" "$offset" 0
    done
    rm -rf "$work/tied" "$work/tied-1" "$work/embedding" "$work/x"
}

misfits_of_options() {
    expect "--tp 65" 2 "from 1 to 64" "$tpshard" --tp 65 "$model" "$work/x"
    expect "unknown option" 2 "did you mean --quant" "$tpshard" --quan int4 "$model" "$work/x"
    expect "unknown kind" 2 "none|int8|fp8|int4|int4z|nl4|mxfp4|nvfp4" "$tpshard" --quant int3 "$model" "$work/x"
    expect "no out_dir" 2 "two arguments" "$tpshard" "$model"
    expect "tied kinds" 2 "must agree" "$tpshard" --embed int8 --head int4 "$model" "$work/x"
    expect "model is there" 2 "--force" "$tpshard" "$model" "$work/model-2"
    mkdir "$work/foreign"
    echo text >"$work/foreign/notes.txt"
    expect "foreign directory" 2 "notes.txt" "$tpshard" --force "$model" "$work/foreign"
    mkdir -p "$work/folders/rank-00-of-02.tpshard"
    expect "a directory named like a rank file" 2 "rank-00-of-02.tpshard" "$tpshard" --force "$model" "$work/folders"
    mkdir "$work/linked" "$work/elsewhere"
    touch "$work/elsewhere/kept"
    ln -s ../elsewhere "$work/linked/.tmp-tpshard"
    expect "a link as the work folder" 2 ".tmp-tpshard" "$tpshard" --resume "$model" "$work/linked"
    check "what it leads to is kept" [ -e "$work/elsewhere/kept" ]
    expect "the model itself as out_dir" 2 "which tpshard did not write" "$tpshard" --force "$synthetic" "$synthetic"
    expect "no place for out_dir" 5 "cannot create" "$tpshard" "$model" "$work/not/there"
    expect "reshard onto itself" 2 "is out_dir itself" "$tpshard" reshard --tp 1 --force "$work/model-2" "$work/model-2/"
    expect "reshard without --tp" 2 "--tp" "$tpshard" reshard "$work/model-2" "$work/x"
    expect "more ranks than heads" 0 "warning: of 16 ranks 12 hold no heads" \
        "$tpshard" --tp 16 --quant int4 "$model" "$work/sixteen"
    expect "and they verify" 0 "ok" "$tpshard" verify --against "$model" "$work/sixteen"
    rm -rf "$work/sixteen" "$work/foreign"
}

misfits_of_shards() {
    local a=$work/a b=$work/b
    convert --tp 2 --quant int8 "$synthetic" "$a"
    convert --tp 2 --quant fp8 "$synthetic" "$b"
    cp -r "$a" "$work/mixed"
    mv "$work/mixed/rank-00-of-02.tpshard" "$work/mixed/t"
    mv "$work/mixed/rank-01-of-02.tpshard" "$work/mixed/rank-00-of-02.tpshard"
    mv "$work/mixed/t" "$work/mixed/rank-01-of-02.tpshard"
    expect "swapped ranks" 4 "it is the file of rank 1 of 2, but rank 0 of 2 belongs there" \
        "$tpshard" verify "$work/mixed"
    cp "$a/rank-00-of-02.tpshard" "$b/rank-01-of-02.tpshard" "$work/mixed"
    expect "file of another run" 4 "contract is" "$tpshard" verify "$work/mixed"
    expect "reshard refuses it too" 4 "contract is" "$tpshard" reshard --tp 1 "$work/mixed" "$work/x"
    expect "inspect refuses it too" 4 "contract is" "$tpshard" inspect "$work/mixed"
    rm "$work/mixed/rank-01-of-02.tpshard"
    expect "missing rank" 4 "rank-01-of-02.tpshard" "$tpshard" verify "$work/mixed"
    cp "$a/rank-01-of-02.tpshard" "$work/mixed"
    truncate -s -4096 "$work/mixed/rank-01-of-02.tpshard"
    expect "truncated rank" 4 "rank-01-of-02.tpshard" "$tpshard" verify "$work/mixed"
    rm "$work/mixed/model.json"
    expect "no manifest" 4 "model.json" "$tpshard" verify "$work/mixed"
    rm -rf "$a" "$b" "$work/mixed"
}

# ---- Replacing, locks, reports ---------------------------------------------------------------------------------------

replacing() {
    cp -r "$work/model-2" "$work/old"
    if convert --tp 3 --quant int8 --force "$model" "$work/old" && convert --tp 3 --quant int8 "$model" "$work/fresh" &&
        same "$work/old" "$work/fresh"; then
        ok "--force leaves nothing of the old model"
    else
        not_ok "--force: $(cat "$work/err" "$work/diff")"
    fi
    # What cannot be replaced whole is not touched.
    rm "$work"/old/rank-*
    mkdir "$work/old/rank-00-of-03.tpshard"
    (cd "$work/old" && echo *) >"$work/before"
    expect "an old model with a directory for a rank file" 2 "rank-00-of-03.tpshard" \
        "$tpshard" convert --tp 3 --quant int8 --force "$model" "$work/old"
    check "nothing of it was removed" [ "$(cd "$work/old" && echo *)" = "$(cat "$work/before")" ]
    rmdir "$work/old/rank-00-of-03.tpshard"
    rm -rf "$work/old" "$work/fresh"
}

two_at_once() {
    mkdir "$work/locked"
    exec 9<"$work/locked"
    flock -n 9 || not_ok "flock"
    expect "two tpshard on one directory" 2 "another tpshard" "$tpshard" "$model" "$work/locked"
    exec 9<&-
    rm -rf "$work/locked"
}

reports() {
    local answer
    answer=$("$tpshard" plan --json --tp 2 --quant int4 --context 1000 --gpu-memory 24GiB "$model" | python3 -c '
import json, os, sys
plan = json.load(sys.stdin)
files = [os.path.getsize(f"{sys.argv[1]}/rank-0{r}-of-02.tpshard") for r in range(2)]
print(plan["schema_version"], plan["fits"], [r["bytes"] for r in plan["ranks"]] == files, len(plan["ranks"]))
print(plan["ranks"][0]["kv_bytes"] == 1024 * 2 * 4 * 2 * 64 * 2)' "$work/model-2" | tr '\n' ' ')
    if [ "$answer" = "2 True True 2 True " ]; then ok "plan --json tells the files' sizes"; else not_ok "plan --json: $answer"; fi
    answer=$("$tpshard" plan --json --tp 2 --gpu-memory 600MB "$model" | grep fits)
    if [[ $answer == *false* ]]; then ok "plan: does not fit"; else not_ok "plan: $answer"; fi
    answer=$("$tpshard" inspect --json "$work/model-2" | python3 -c '
import json, sys
report = json.load(sys.stdin)
tensors = report["ranks"][0]["tensors"]
print(report["schema_version"], report["manifest"]["tp_size"], len(tensors), tensors[3]["role"], len(tensors[3]["parts"]))')
    if [ "$answer" = "1 2 27 qkv 3" ]; then ok "inspect --json"; else not_ok "inspect --json: $answer"; fi
    answer=$("$tpshard" verify --json "$work/model-2" | python3 -c 'import json, sys; r = json.load(sys.stdin); print(r["ok"], r["failures"])')
    if [ "$answer" = "True []" ]; then ok "verify --json"; else not_ok "verify --json: $answer"; fi
    expect "convert --dry-run writes nothing" 0 "all ranks" "$tpshard" --dry-run --tp 2 "$model" "$work/dry"
    [ ! -e "$work/dry" ] || not_ok "--dry-run made a directory"
    expect "--help" 0 "--group-size" "$tpshard" convert --help
    expect "--version" 0 "tpshard" "$tpshard" --version
}

# Experts dealt out whole and cut, stacks, fused and turned sources, latents: the same bytes whatever the way.
experts_and_stacks() {
    local family kind from to source
    for family in $with_experts; do
        source=tests/golden/families/$family
        for kind in none int4; do
            for from in tp ep; do
                if ! { convert --tp 3 --quant "$kind" --group-size 32 --experts $from "$source" "$work/$family-$from" &&
                    run "$tpshard" verify --quiet --against "$source" "$work/$family-$from"; }; then
                    not_ok "$family $kind $from: $(cat "$work/err" "$work/out")"
                fi
                for to in tp ep; do
                    if ! { convert --tp 2 --quant "$kind" --group-size 32 --experts $to "$source" "$work/whole" &&
                        run "$tpshard" reshard --quiet --tp 2 --experts $to "$work/$family-$from" "$work/again" &&
                        same "$work/whole" "$work/again"; }; then
                        not_ok "$family $kind, $from to $to: $(cat "$work/err" "$work/diff")"
                    fi
                    rm -rf "$work/whole" "$work/again"
                done
                rm -rf "$work/$family-$from"
            done
        done
        ok "$family: experts whole and cut, verified and resharded both ways"
    done
}

own_plans() {
    local source=tests/golden/families/mixtral
    echo '{"layers.*.mlp.experts.gate_up_proj": "grouped_gemm", "layers.*.mlp.experts.down_proj": "grouped_gemm"}' >"$work/plan.json"
    expect "--plan decides that experts stay whole" 0 "says nothing of" "$tpshard" --tp 2 --plan "$work/plan.json" "$source" "$work/own"
    convert --tp 2 --experts ep "$source" "$work/whole"
    if same "$work/whole" "$work/own"; then ok "which is --experts ep"; else not_ok "--plan: $(cat "$work/diff")"; fi
    echo '{"layers.*.self_attn.q_proj": "colwize"}' >"$work/plan.json"
    expect "--plan with an unknown strategy" 2 "no meaning is known for colwize" "$tpshard" --plan "$work/plan.json" "$source" "$work/x"
    echo '{"layers.*.attention.wq": "colwise"}' >"$work/plan.json"
    expect "--plan with an unknown name" 3 "name no tensor of a MixtralForCausalLM: layers.*.attention.wq" \
        "$tpshard" --plan "$work/plan.json" "$source" "$work/x"
    cp -r tests/golden/families/llama2 "$work/unknown"
    sed -i 's/LlamaForCausalLM/NewForCausalLM/' "$work/unknown/config.json"
    echo '{"layers.*.self_attn.q_proj": "colwise", "layers.*.self_attn.o_proj": "rowwise"}' >"$work/plan.json"
    expect "unknown architecture" 3 "\"NewForCausalLM\" is not supported (known: LlamaForCausalLM" "$tpshard" "$work/unknown" "$work/x"
    expect "a plan finds what it is like" 3 "are those of a LlamaForCausalLM, but no file says whether it computes the same" \
        "$tpshard" --tp 3 --plan "$work/plan.json" "$work/unknown" "$work/x"
    expect "--as nothing known" 2 "no such architecture is known" "$tpshard" --as BertModel "$work/unknown" "$work/x"
    expect "--as something else" 2 "\"MixtralForCausalLM\" is known and cannot be read as a LlamaForCausalLM" \
        "$tpshard" --as LlamaForCausalLM "$source" "$work/x"
    expect "which --as says" 0 "read as a LlamaForCausalLM" \
        "$tpshard" --tp 3 --as LlamaForCausalLM --plan "$work/plan.json" "$work/unknown" "$work/new-3"
    expect "and verified" 0 "every weight equals the checkpoint's" "$tpshard" verify --against "$work/unknown" "$work/new-3"
    expect "and resharded" 0 "" "$tpshard" reshard --quiet --tp 2 "$work/new-3" "$work/new-2"
}

make_synthetic --files 3 --hidden 256 --intermediate 688 --heads 6 --kv-heads 2 --head-dim 32 --vocab 1000 "$synthetic" ||
    { echo "SKIP no python3"; exit 77; }
for kind in $kinds; do
    reshard_matrix "$kind"
done
plain_rounding
families
experts_and_stacks
own_plans
slices
source_dtypes
bundled_model
flipped_bits
changed_source
misfits_of_models
tied_heads
misfits_of_options
misfits_of_shards
replacing
two_at_once
reports
finish
