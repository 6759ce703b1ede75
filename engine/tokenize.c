// tpengine tokenize: text to ids and back, from the compiled tokenizer alone; no rank is started.
#include "engine/commands.h"
#include "engine/generate_chat.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct {
    bool decode, no_special, chat;
} options;

const struct option_spec tokenize_options[] = {
    {"decode", OPTION_FLAG, &options.decode, NULL, 0, 0, "TEXT holds ids, comma separated; print the text"},
    {"no-special", OPTION_FLAG, &options.no_special, NULL, 0, 0,
     "add no special tokens; with --decode, leave them out"},
    {"chat", OPTION_FLAG, &options.chat, NULL, 0, 0, "TEXT is a message to the model's chat template"},
    PLACE_OPTION_LINES,
    {NULL, OPTION_FLAG, NULL, NULL, 0, 0, NULL},
};

// "1,2,3" with optional blanks. Also used by tpengine logits.
int parse_token_ids(const char *text, struct token_list *out, struct error *err)
{
    while (*text) {
        char *end;
        errno = 0;
        unsigned long id = strtoul(text, &end, 10);
        if (end == text || errno || id > UINT32_MAX || *text == '-')
            return error_set(err, ERR_USAGE, "token ids are numbers separated by commas, not \"%.40s\"", text);
        if (out->count == out->capacity) {
            size_t capacity = out->capacity ? 2 * out->capacity : 64;
            uint32_t *larger = realloc(out->ids, capacity * sizeof *larger);
            if (!larger)
                return error_set(err, ERR_MEMORY, "no memory for the token ids");
            out->ids = larger;
            out->capacity = capacity;
        }
        out->ids[out->count++] = (uint32_t)id;
        text = end + strspn(end, " \t\r\n");
        if (*text == ',')
            text += 1 + strspn(text + 1, " \t\r\n");
        else if (*text)
            return error_set(err, ERR_USAGE, "token ids are numbers separated by commas, not \"%.40s\"", text);
    }
    return 0;
}

static int print_ids(const struct token_list *ids, struct error *err)
{
    if (!common_options.json) {
        for (size_t i = 0; i < ids->count; i++)
            printf("%s%u", i ? "," : "", ids->ids[i]);
        printf("\n");
        return 0;
    }
    json_t *array = json_array();
    for (size_t i = 0; i < ids->count; i++)
        json_array_append_new(array, json_integer(ids->ids[i]));
    return print_report(json_pack("{s:i, s:o}", "schema_version", 1, "token_ids", array), err);
}

static int encode(const struct tokenizer *tokenizer, const char *text, size_t bytes, struct error *err)
{
    struct token_list ids = {0};
    int rc = tokenizer_encode(tokenizer, text, bytes, options.no_special ? 0 : TOKENIZER_ADD_SPECIAL, &ids, err);
    if (rc == 0)
        rc = print_ids(&ids, err);
    free(ids.ids);
    return rc;
}

static int decode(const struct tokenizer *tokenizer, const char *text, struct error *err)
{
    struct token_list ids = {0};
    char *decoded = NULL;
    size_t bytes = 0;
    int rc = parse_token_ids(text, &ids, err);
    if (rc == 0)
        rc = tokenizer_decode(tokenizer, ids.ids, ids.count, options.no_special, &decoded, &bytes, err);
    if (rc == 0 && common_options.json)
        rc = print_report(json_pack("{s:i, s:s%}", "schema_version", 1, "text", decoded, bytes), err);
    else if (rc == 0 && (fwrite(decoded, 1, bytes, stdout) != bytes || putchar('\n') == EOF))
        rc = error_set(err, ERR_IO, "the output could not be written");
    free(decoded);
    free(ids.ids);
    return rc;
}

static int encode_chat(struct store *store, const struct manifest *manifest, const struct tokenizer *tokenizer,
                       const char *text, size_t bytes, struct error *err)
{
    struct token_list ids = {0};
    struct chat *chat;
    int rc = store_chat(&chat, store, manifest, err);
    if (rc)
        return rc;
    rc = generate_chat_prompt(chat, tokenizer, NULL, text, bytes, &ids, err);
    if (rc == 0)
        rc = print_ids(&ids, err);
    free(ids.ids);
    chat_close(chat);
    return rc;
}

int tokenize_run(int argc, char **argv, struct error *err)
{
    (void)argc;
    struct store *store = NULL;
    struct store_options place;
    struct manifest *manifest = NULL;
    struct tokenizer_file file = {0};
    char *text = NULL;
    size_t bytes = strlen(argv[1]);
    int rc;
    if ((rc = choose_store(&place, argv[0], err)) || (rc = store_open(&store, argv[0], &place, err)) ||
        (rc = store_manifest(&manifest, store, err)) || (rc = tokenizer_file_open(&file, store, manifest, err)))
        goto done;
    if (strcmp(argv[1], "-") == 0 && (rc = read_text("-", &text, &bytes, err)))
        goto done;
    const char *input = text ? text : argv[1];
    if (options.chat && (options.decode || options.no_special))
        rc = error_set(err, ERR_USAGE, "--chat goes with neither --decode nor --no-special");
    else if (options.chat)
        rc = encode_chat(store, manifest, file.tokenizer, input, bytes, err);
    else
        rc = options.decode ? decode(file.tokenizer, input, err) : encode(file.tokenizer, input, bytes, err);
done:
    free(text);
    tokenizer_file_close(&file);
    manifest_free(manifest);
    store_close(store);
    return rc;
}
