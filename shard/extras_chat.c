// See extras_chat.h.
#include "shard/extras_chat.h"

#include "formats/chat.h"
#include "formats/file_io.h"
#include "formats/json_file.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TEMPLATE_CAP_BYTES = 4 << 20, CONFIG_CAP_BYTES = 16 << 20 };

static bool has_file(const struct extras *extras, const char *name)
{
    for (size_t i = 0; i < extras->count; i++)
        if (!strcmp(extras->files[i].name, name))
            return true;
    return false;
}

// Takes a template, unless a place that comes first had one. bytes: malloc'ed, the callee's.
static int add_template(struct extras *extras, const char *name, uint8_t *bytes, uint64_t num_bytes, struct error *err)
{
    struct template *tmpl;
    struct error reason;
    if (has_file(extras, name)) {
        free(bytes);
        return 0;
    }
    if (template_compile(&tmpl, (const char *)bytes, num_bytes, name, &reason) == 0)
        template_free(tmpl);
    else if (reason.code == ERR_MEMORY) { // says nothing about the template
        free(bytes);
        return error_set(err, ERR_MEMORY, "%s", reason.msg);
    } else if (!extras->warning[0])
        snprintf(extras->warning, sizeof extras->warning,
                 "the chat template cannot be used, so chatting will not work: %.600s", reason.msg);
    return extras_add(extras, name, bytes, num_bytes, err);
}

static int add_file(struct extras *extras, const char *dir, const char *from, const char *name, struct error *err)
{
    char path[PATH_MAX];
    uint8_t *bytes;
    uint64_t num_bytes;
    bool there;
    int rc;
    if ((rc = extras_there(&there, path, dir, from, err)) || !there ||
        (rc = file_read_all(&bytes, &num_bytes, path, TEMPLATE_CAP_BYTES, ERR_MODEL, err)))
        return rc;
    return add_template(extras, name, bytes, num_bytes, err);
}

static int add_text(struct extras *extras, const char *name, const json_t *text, struct error *err)
{
    if (!json_is_string(text))
        return 0;
    size_t bytes = json_string_length(text);
    char *copy = malloc(bytes + 1);
    if (!copy)
        return error_set(err, ERR_MEMORY, "out of memory for the chat template");
    memcpy(copy, json_string_value(text), bytes + 1);
    return add_template(extras, name, (uint8_t *)copy, bytes, err);
}

// The member chat_template of tokenizer_config.json: a text, or a list of {name, template}.
static int add_from_config(struct extras *extras, const json_t *config, struct error *err)
{
    const json_t *value = json_object_get(config, "chat_template");
    int rc = add_text(extras, CHAT_TEMPLATE_FILE, value, err);
    for (size_t i = 0; i < json_array_size(value) && !rc; i++) {
        const json_t *item = json_array_get(value, i), *text = json_object_get(item, "template");
        const char *name = json_string_value(json_object_get(item, "name"));
        if (name && !strcmp(name, "default"))
            rc = add_text(extras, CHAT_TEMPLATE_FILE, text, err);
        else if (name && !strcmp(name, "tool_use"))
            rc = add_text(extras, CHAT_TOOL_TEMPLATE_FILE, text, err);
    }
    return rc;
}

// Members such as "bos_token", which are a text or an object with a text in "content", into map, unless they are there.
static int add_special_tokens(json_t *map, const json_t *config)
{
    json_t *members = (json_t *)config, *value; // iterating takes no const
    const char *key;
    int failed = 0;
    json_object_foreach(members, key, value)
    {
        size_t bytes = strlen(key);
        json_t *text = json_is_object(value) ? json_object_get(value, "content") : value;
        if (bytes > 6 && !strcmp(key + bytes - 6, "_token") && json_is_string(text) && !json_object_get(map, key))
            failed |= json_object_set(map, key, text);
    }
    return failed;
}

static int write_special_tokens(struct extras *extras, json_t *map, struct error *err)
{
    char *text = json_dumps(map, JSON_INDENT(2) | JSON_SORT_KEYS);
    if (!text)
        return error_set(err, ERR_MEMORY, "out of memory for the special tokens");
    return extras_add(extras, CHAT_SPECIAL_TOKENS_FILE, (uint8_t *)text, strlen(text), err);
}

int extras_chat_add(struct extras *extras, const char *model_dir, struct error *err)
{
    static const char *const configs[] = {"tokenizer_config.json", "special_tokens_map.json"};
    char path[PATH_MAX];
    int rc;
    json_t *map = json_object();
    if (!map)
        return error_set(err, ERR_MEMORY, "out of memory for the special tokens");
    if ((rc = add_file(extras, model_dir, "chat_template.jinja", CHAT_TEMPLATE_FILE, err)) ||
        (rc = add_file(extras, model_dir, "additional_chat_templates/default.jinja", CHAT_TEMPLATE_FILE, err)) ||
        (rc = add_file(extras, model_dir, "additional_chat_templates/tool_use.jinja", CHAT_TOOL_TEMPLATE_FILE, err)))
        goto done;
    for (int i = 0; i < 2; i++) {
        struct json_object config = {0};
        bool there;
        if ((rc = extras_there(&there, path, model_dir, configs[i], err)))
            goto done;
        if (!there)
            continue;
        if ((rc = json_file_open(&config, path, CONFIG_CAP_BYTES, ERR_MODEL, err)))
            goto done;
        if (i == 0)
            rc = add_from_config(extras, config.json, err);
        if (add_special_tokens(map, config.json) && !rc)
            rc = error_set(err, ERR_MEMORY, "out of memory for the special tokens");
        json_file_close(&config);
        if (rc)
            goto done;
    }
    if (has_file(extras, CHAT_TEMPLATE_FILE) && json_object_size(map))
        rc = write_special_tokens(extras, map, err);
done:
    json_decref(map);
    return rc;
}
