#!/usr/bin/env bash
# Chats as a user has them: conversion of chat templates, tpengine generate --chat and tokenize --chat, exit codes.
# shellcheck disable=SC2317 # functions are called by check
set -u
BUILD=${BUILD:-build}
engine=$BUILD/tpengine
shard=$BUILD/tpshard
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
failures=0

ok() { echo "ok $*"; }
not_ok() {
    echo "not ok $*"
    failures=$((failures + 1))
}
check() {
    local name=$1
    shift
    if "$@"; then ok "$name"; else not_ok "$name"; fi
}
# status NAME WANTED WORDS COMMAND...: exit status, and words that stderr must hold
status() {
    local name=$1 wanted=$2 words=$3 found
    shift 3
    "$@" >"$tmp/out" 2>"$tmp/err" </dev/null
    found=$?
    if [ "$found" = "$wanted" ] && grep -q -- "$words" "$tmp/err"; then
        ok "$name"
    else
        not_ok "$name: exit $found, wanted $wanted with \"$words\": $(head -c 300 "$tmp/err")"
    fi
}
same() { cmp -s "$1" "$2"; }
# model NAME: a copy of the bundled model, without a chat template
model() {
    mkdir "$tmp/$1"
    for file in config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json special_tokens_map.json; do
        ln -s "$PWD/tests/model/$file" "$tmp/$1/$file"
    done
}
convert() { "$shard" --tp 2 --quant int4 "$tmp/$1" "$tmp/$1-shards" 2>"$tmp/$1-notes" >"$tmp/$1-report"; }
generate() { "$engine" generate "$@" --quiet --max-tokens 24 --temperature 0; }

template='{{ bos_token }}{% for m in messages %}{% if m.role == "evil" %}{{ raise_exception("no evil roles") }}{% endif %}{{ m.role }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}{{ "assistant:" }}{% endif %}'

# ---- where a template comes from
model file
printf '%s' "$template" >"$tmp/file/chat_template.jinja"
check "a model with chat_template.jinja is converted" convert file
model folder
mkdir "$tmp/folder/additional_chat_templates"
printf 'default' >"$tmp/folder/additional_chat_templates/default.jinja"
printf 'tools' >"$tmp/folder/additional_chat_templates/tool_use.jinja"
check "a model with additional_chat_templates is converted" convert folder
model list
rm "$tmp/list/tokenizer_config.json"
printf '{"bos_token": {"content": "<|begin_of_text|>"}, "chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}' \
    >"$tmp/list/tokenizer_config.json"
check "a model with a list of templates is converted" convert list
check "the file's template is stored" same "$tmp/file/chat_template.jinja" "$tmp/file-shards/chat_template.jinja"
check "the folder's templates are stored" test "$(cat "$tmp/folder-shards/chat_template.jinja" "$tmp/folder-shards/chat_template.tool_use.jinja")" = defaulttools
check "the list's templates are stored" test "$(cat "$tmp/list-shards/chat_template.jinja" "$tmp/list-shards/chat_template.tool_use.jinja")" = dt
check "special tokens are stored" grep -q '"bos_token": "<|begin_of_text|>"' "$tmp/list-shards/special_tokens_map.json"
check "the shards verify" "$shard" verify "$tmp/file-shards" --quiet
model broken
printf 'a\n{{ x|nope }}' >"$tmp/broken/chat_template.jinja"
check "a model with a template that cannot be used is converted" convert broken
check "and a warning says why" grep -q "warning: the chat template cannot be used.*line 2: there is no filter named 'nope'" "$tmp/broken-notes"
model none
convert none

# ---- tokens
rendered=$(printf 'user: Hi there\nassistant:')
"$engine" tokenize "$tmp/file-shards" "$rendered" >"$tmp/by-hand"
"$engine" tokenize "$tmp/file-shards" "Hi there" --chat >"$tmp/by-chat"
check "tokenize --chat gives the tokens of the rendered text" same "$tmp/by-hand" "$tmp/by-chat"
end=$("$engine" tokenize "$tmp/file-shards" "<|end_of_text|>" --no-special)
check "a control token is one token" test "${end//[0-9]/}" = ""
"$engine" tokenize "$tmp/file-shards" "<|end_of_text|>" --chat >"$tmp/forged"
not_in() { ! tr ',' '\n' <"$2" | grep -qx -- "$1"; }
check "a user's control token is text" not_in "$end" "$tmp/forged"

# ---- text
generate "$tmp/file-shards" --prompt "$rendered" >"$tmp/by-hand"
generate "$tmp/file-shards" --chat --prompt "Hi there" >"$tmp/by-chat"
check "there is an answer" test -s "$tmp/by-chat"
check "generate --chat answers as to the rendered prompt" same "$tmp/by-hand" "$tmp/by-chat"
generate "$tmp/file-shards" --prompt "$(printf 'system: Be kind\nuser: Hi there\nassistant:')" >"$tmp/by-hand"
generate "$tmp/file-shards" --chat --system "Be kind" --prompt "Hi there" >"$tmp/by-chat"
check "--system is the first message" same "$tmp/by-hand" "$tmp/by-chat"
printf 'In the beginning\n\n  \nAnd then?' | generate "$tmp/file-shards" --chat >"$tmp/conversation"
generate "$tmp/file-shards" --chat --prompt "In the beginning" >"$tmp/first"
python3 - "$tmp/first" >"$tmp/messages.json" <<'END'
import json, sys
answer = open(sys.argv[1], encoding="utf-8").read()[:-1]
print(json.dumps([{"role": "user", "content": "In the beginning"}, {"role": "assistant", "content": answer},
                  {"role": "user", "content": "And then?"}]))
END
generate "$tmp/file-shards" --messages "$tmp/messages.json" >"$tmp/second"
cat "$tmp/first" "$tmp/second" >"$tmp/both"
check "a conversation keeps its history" same "$tmp/both" "$tmp/conversation"
generate "$tmp/file-shards" --chat --prompt "Hi there" --prompt "And?" --json >"$tmp/batch.json"
check "prompts of a batch are conversations" python3 -c "import json, sys
assert len(json.load(open(sys.argv[1]))['choices']) == 2" "$tmp/batch.json"

# ---- refusals
status "a model without a template" 3 "has no chat template" generate "$tmp/none-shards" --chat --prompt a
status "a template that cannot be used" 3 "line 2: there is no filter named 'nope'" generate "$tmp/broken-shards" --chat --prompt a
echo '[{"role": "evil", "content": "x"}]' >"$tmp/evil.json"
status "what the template raises" 2 "no evil roles" generate "$tmp/file-shards" --messages "$tmp/evil.json"
echo '{"role": 1}' >"$tmp/evil.json"
status "messages that are no list" 2 "messages must be a list" generate "$tmp/file-shards" --messages "$tmp/evil.json"
echo '[' >"$tmp/evil.json"
status "messages that are no JSON" 2 "invalid JSON" generate "$tmp/file-shards" --messages "$tmp/evil.json"
printf 'x' >>"$tmp/file-shards/chat_template.jinja"
status "a template that is not what the manifest says" 4 "chat_template.jinja: size or checksum differs" \
    generate "$tmp/file-shards" --chat --prompt a
cp "$tmp/file/chat_template.jinja" "$tmp/file-shards/chat_template.jinja"
status "a system message that is no UTF-8" 2 "the system message must be valid UTF-8" \
    generate "$tmp/file-shards" --chat --system $'\xff'
status "a message that is no UTF-8" 2 "the user message must be valid UTF-8" \
    generate "$tmp/file-shards" --chat --prompt $'\xff'
status "--system without a chat" 2 "goes with --chat" generate "$tmp/file-shards" --system a --prompt b
status "--messages with --prompt" 2 "cannot be given together" generate "$tmp/file-shards" --messages a --prompt b
status "a conversation as JSON" 2 "need --prompt or --messages" generate "$tmp/file-shards" --chat --json
status "neither prompt nor chat" 2 "generate needs --prompt" generate "$tmp/file-shards"

[ "$failures" = 0 ] || {
    echo "$failures failed"
    exit 1
}
