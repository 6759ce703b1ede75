#!/usr/bin/env bash
# Chats as a user has them: conversion of chat templates, tpengine generate --chat and tokenize --chat, exit codes.
# shellcheck disable=SC2317 # functions are called by check
cd "$(dirname "$0")/.." || exit 1
. tests/shard_helpers.sh
# copy_model NAME: a copy of the bundled model, without a chat template
copy_model() {
    mkdir "$work/$1"
    for file in config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json special_tokens_map.json; do
        ln -s "$PWD/tests/model/$file" "$work/$1/$file"
    done
}
convert_copy() { "$tpshard" --tp 2 --quant int4 "$work/$1" "$work/$1-shards" 2>"$work/$1-notes" >"$work/$1-report"; }
generate() { "$tpengine" generate "$@" --quiet --max-tokens 24 --temperature 0; }

template='{{ bos_token }}{% for m in messages %}{% if m.role == "evil" %}{{ raise_exception("no evil roles") }}{% endif %}{{ m.role }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}{{ "assistant:" }}{% endif %}'

# ---- where a template comes from
copy_model file
printf '%s' "$template" >"$work/file/chat_template.jinja"
check "a model with chat_template.jinja is converted" convert_copy file
copy_model folder
mkdir "$work/folder/additional_chat_templates"
printf 'default' >"$work/folder/additional_chat_templates/default.jinja"
printf 'tools' >"$work/folder/additional_chat_templates/tool_use.jinja"
check "a model with additional_chat_templates is converted" convert_copy folder
copy_model list
rm "$work/list/tokenizer_config.json"
printf '{"bos_token": {"content": "<|begin_of_text|>"}, "chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}' \
    >"$work/list/tokenizer_config.json"
check "a model with a list of templates is converted" convert_copy list
check "the file's template is stored" same "$work/file/chat_template.jinja" "$work/file-shards/chat_template.jinja"
check "the folder's templates are stored" test "$(cat "$work/folder-shards/chat_template.jinja" "$work/folder-shards/chat_template.tool_use.jinja")" = defaulttools
check "the list's templates are stored" test "$(cat "$work/list-shards/chat_template.jinja" "$work/list-shards/chat_template.tool_use.jinja")" = dt
check "special tokens are stored" grep -q '"bos_token": "<|begin_of_text|>"' "$work/list-shards/special_tokens_map.json"
check "the shards verify" "$tpshard" verify "$work/file-shards" --quiet
copy_model broken
printf 'a\n{{ x|nope }}' >"$work/broken/chat_template.jinja"
check "a model with a template that cannot be used is converted" convert_copy broken
check "and a warning says why" grep -q "warning: the chat template cannot be used.*line 2: there is no filter named 'nope'" "$work/broken-notes"
copy_model none
convert_copy none

# ---- tokens
rendered=$(printf 'user: Hi there\nassistant:')
"$tpengine" tokenize "$work/file-shards" "$rendered" >"$work/by-hand"
"$tpengine" tokenize "$work/file-shards" "Hi there" --chat >"$work/by-chat"
check "tokenize --chat gives the tokens of the rendered text" same "$work/by-hand" "$work/by-chat"
end=$("$tpengine" tokenize "$work/file-shards" "<|end_of_text|>" --no-special)
check "a control token is one token" test "${end//[0-9]/}" = ""
"$tpengine" tokenize "$work/file-shards" "<|end_of_text|>" --chat >"$work/forged"
not_in() { ! tr ',' '\n' <"$2" | grep -qx -- "$1"; }
check "a user's control token is text" not_in "$end" "$work/forged"

# ---- text
generate "$work/file-shards" --prompt "$rendered" >"$work/by-hand"
generate "$work/file-shards" --chat --prompt "Hi there" >"$work/by-chat"
check "there is an answer" test -s "$work/by-chat"
check "generate --chat answers as to the rendered prompt" same "$work/by-hand" "$work/by-chat"
generate "$work/file-shards" --prompt "$(printf 'system: Be kind\nuser: Hi there\nassistant:')" >"$work/by-hand"
generate "$work/file-shards" --chat --system "Be kind" --prompt "Hi there" >"$work/by-chat"
check "--system is the first message" same "$work/by-hand" "$work/by-chat"
printf 'In the beginning\n\n  \nAnd then?' | generate "$work/file-shards" --chat >"$work/conversation"
generate "$work/file-shards" --chat --prompt "In the beginning" >"$work/first"
python3 - "$work/first" >"$work/messages.json" <<'END'
import json, sys
answer = open(sys.argv[1], encoding="utf-8").read()[:-1]
print(json.dumps([{"role": "user", "content": "In the beginning"}, {"role": "assistant", "content": answer},
                  {"role": "user", "content": "And then?"}]))
END
generate "$work/file-shards" --messages "$work/messages.json" >"$work/second"
cat "$work/first" "$work/second" >"$work/both"
check "a conversation keeps its history" same "$work/both" "$work/conversation"
generate "$work/file-shards" --chat --prompt "Hi there" --prompt "And?" --json >"$work/batch.json"
check "prompts of a batch are conversations" python3 -c "import json, sys
assert len(json.load(open(sys.argv[1]))['choices']) == 2" "$work/batch.json"

# ---- refusals
expect "a model without a template" 3 "has no chat template" generate "$work/none-shards" --chat --prompt a
expect "a template that cannot be used" 3 "line 2: there is no filter named 'nope'" generate "$work/broken-shards" --chat --prompt a
echo '[{"role": "evil", "content": "x"}]' >"$work/evil.json"
expect "what the template raises" 2 "no evil roles" generate "$work/file-shards" --messages "$work/evil.json"
echo '{"role": 1}' >"$work/evil.json"
expect "messages that are no list" 2 "messages must be a list" generate "$work/file-shards" --messages "$work/evil.json"
echo '[' >"$work/evil.json"
expect "messages that are no JSON" 2 "invalid JSON" generate "$work/file-shards" --messages "$work/evil.json"
printf 'x' >>"$work/file-shards/chat_template.jinja"
expect "a template that is not what the manifest says" 4 "chat_template.jinja: size or checksum differs" \
    generate "$work/file-shards" --chat --prompt a
cp "$work/file/chat_template.jinja" "$work/file-shards/chat_template.jinja"
expect "a system message that is no UTF-8" 2 "the system message must be valid UTF-8" \
    generate "$work/file-shards" --chat --system $'\xff'
expect "a message that is no UTF-8" 2 "the user message must be valid UTF-8" \
    generate "$work/file-shards" --chat --prompt $'\xff'
expect "--system without a chat" 2 "goes with --chat" generate "$work/file-shards" --system a --prompt b
expect "--messages with --prompt" 2 "cannot be given together" generate "$work/file-shards" --messages a --prompt b
expect "a conversation as JSON" 2 "need --prompt or --messages" generate "$work/file-shards" --chat --json
expect "neither prompt nor chat" 2 "generate needs --prompt" generate "$work/file-shards"

finish
