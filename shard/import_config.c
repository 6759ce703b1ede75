// quantization_config of config.json and ModelOpt's hf_quant_config.json: which modules are quantized, and in which
// form. See import.h.
#include "shard/import.h"

#include "formats/file_io.h"

#include <fnmatch.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

enum { MAX_PATTERNS = 10000, MAX_REGEXES = 256, MAX_GROUP = 1 << 20, REGEX_STEPS = 10000 };

// ---- lists of modules --------------------------------------------------------------------------------------------

struct import_pattern {
    char *text;
    pcre2_code *regex; // NULL: a glob or a name
};

static void free_patterns(struct import_patterns *patterns)
{
    for (size_t i = 0; i < patterns->count; i++) {
        free(patterns->items[i].text);
        pcre2_code_free(patterns->items[i].regex);
    }
    free(patterns->items);
}

void import_config_clear(struct import_config *config)
{
    for (int s = 0; s < config->num_schemes; s++)
        free_patterns(&config->schemes[s].targets);
    free_patterns(&config->ignore);
    *config = (struct import_config){0};
}

static bool is_regex(const char *text) { return strncmp(text, "re:", 3) == 0; }

// As Python's re.match: anchored at the beginning alone.
static int compile_pattern(struct import_pattern *pattern, const struct json_object *object, const char *key,
                           struct error *err)
{
    PCRE2_UCHAR reason[128] = "";
    int code;
    size_t offset;
    if (!is_regex(pattern->text))
        return 0;
    pattern->regex =
        pcre2_compile((PCRE2_SPTR)pattern->text + 3, PCRE2_ZERO_TERMINATED, PCRE2_ANCHORED, &code, &offset, NULL);
    if (pattern->regex)
        return 0;
    if (code == PCRE2_ERROR_HEAP_FAILED)
        return error_set(err, ERR_MEMORY, "%s: out of memory for a pattern", object->file_name);
    pcre2_get_error_message(code, reason, sizeof reason);
    return error_set(err, ERR_MODEL, "%s: %s%s: \"%.80s\" is no regular expression: %s", object->file_name,
                     object->path, key, pattern->text, (const char *)reason);
}

// Appends the strings of an optional array.
static int add_patterns(struct import_patterns *patterns, const struct json_object *object, const char *key,
                        struct error *err)
{
    const json_t *array = NULL;
    size_t regexes = 0;
    int rc = json_file_get_array(&array, object, key, JSON_OPTIONAL, err);
    if (rc || !array || json_array_size(array) == 0)
        return rc;
    size_t more = json_array_size(array);
    if (more > MAX_PATTERNS || patterns->count + more > MAX_PATTERNS)
        return error_set(err, ERR_MODEL, "%s: %s%s lists %zu modules, more than the %d that can be read",
                         object->file_name, object->path, key, more, MAX_PATTERNS);
    struct import_pattern *grown = realloc(patterns->items, (patterns->count + more) * sizeof *grown);
    if (!grown)
        return error_set(err, ERR_MEMORY, "out of memory for a list of modules");
    patterns->items = grown;
    for (size_t i = 0; i < more; i++) {
        const json_t *item = json_array_get(array, i);
        struct import_pattern *pattern = &patterns->items[patterns->count];
        if (!json_is_string(item))
            return json_file_wrong(object, key, "an array of strings", item, err);
        if (is_regex(json_string_value(item)) && ++regexes > MAX_REGEXES)
            return error_set(err, ERR_MODEL, "%s: %s%s holds more than %d regular expressions", object->file_name,
                             object->path, key, MAX_REGEXES);
        *pattern = (struct import_pattern){.text = strdup(json_string_value(item))};
        if (!pattern->text)
            return error_set(err, ERR_MEMORY, "out of memory for a list of modules");
        patterns->count++;
        if ((rc = compile_pattern(pattern, object, key, err)))
            return rc;
    }
    return 0;
}

static int add_ignored(struct import_config *config, const struct json_object *object, const char *key,
                       struct error *err)
{
    return add_patterns(&config->ignore, object, key, err);
}

static int regex_matches(bool *matches, const struct import_pattern *pattern, const char *text, struct error *err)
{
    pcre2_match_data *match = pcre2_match_data_create_from_pattern(pattern->regex, NULL);
    pcre2_match_context *context = pcre2_match_context_create(NULL);
    int found = PCRE2_ERROR_NOMEMORY;
    if (match && context) {
        pcre2_set_match_limit(context, REGEX_STEPS);
        pcre2_set_depth_limit(context, REGEX_STEPS);
        found = pcre2_match(pattern->regex, (PCRE2_SPTR)text, strlen(text), 0, 0, match, context);
    }
    pcre2_match_context_free(context);
    pcre2_match_data_free(match);
    *matches = found >= 0;
    if (found >= 0 || found == PCRE2_ERROR_NOMATCH)
        return 0;
    if (found == PCRE2_ERROR_NOMEMORY)
        return error_set(err, ERR_MEMORY, "out of memory for a regular expression");
    return error_set(err, ERR_MODEL, "quantization_config: \"%.80s\" takes more than %d steps on \"%.200s\"",
                     pattern->text, REGEX_STEPS, text);
}

// Whole components of the dotted name, anywhere in it: "lm_head", "self_attn", "model.layers.0.mlp".
static bool names_components(const char *pattern, const char *module)
{
    size_t length = strlen(pattern);
    for (const char *at = module; length && (at = strstr(at, pattern)); at++)
        if ((at == module || at[-1] == '.') && (at[length] == 0 || at[length] == '.'))
            return true;
    return false;
}

static int any_matches(bool *matches, const struct import_patterns *patterns, const char *module, struct error *err)
{
    int rc = 0;
    *matches = false;
    for (size_t i = 0; i < patterns->count && !rc && !*matches; i++) {
        const struct import_pattern *pattern = &patterns->items[i];
        if (pattern->regex)
            rc = regex_matches(matches, pattern, module, err);
        else if (strpbrk(pattern->text, "*?["))
            *matches = fnmatch(pattern->text, module, 0) == 0;
        else
            *matches = names_components(pattern->text, module);
    }
    return rc;
}

static bool names_all(const struct import_patterns *targets)
{
    bool all = targets->count == 0;
    for (size_t t = 0; t < targets->count && !all; t++)
        all = strcmp(targets->items[t].text, "Linear") == 0;
    return all;
}

int import_config_form(const struct import_form **out, const struct import_config *config, const char *module,
                       struct error *err)
{
    bool head = strcmp(module, "lm_head") == 0, matches;
    int rc;
    *out = NULL;
    if (config->method == IMPORT_PLAIN || (head && !config->head) || strstr(module, "embed_tokens") ||
        (config->experts_only && !strstr(module, ".experts")))
        return 0;
    if ((rc = any_matches(&matches, &config->ignore, module, err)) || matches)
        return rc;
    for (int s = 0; s < config->num_schemes && !*out; s++) {
        const struct import_scheme *scheme = &config->schemes[s];
        matches = names_all(&scheme->targets);
        if (!matches && (rc = any_matches(&matches, &scheme->targets, module, err)))
            return rc;
        if (matches)
            *out = &scheme->form;
    }
    return 0;
}

// ---- refusals ----------------------------------------------------------------------------------------------------

#define READABLE                                                                                                       \
    "gptq, awq (gemm), compressed-tensors, fp8, fbgemm_fp8, mxfp4, modelopt (NVFP4, FP8), bitsandbytes (4 bits) and "  \
    "hqq"

static int refuse(const struct json_object *object, const char *what, const char *value, const char *needed,
                  struct error *err)
{
    return error_set(err, ERR_MODEL, "%s: the checkpoint is quantized with %s%s \"%.64s\", which cannot be read; %s",
                     object->file_name, object->path, what, value, needed);
}

#define TAKE_ORIGINAL "take the bf16, f16 or f32 checkpoint it was made from"

static int refuse_bits(const struct json_object *object, const char *key, int64_t bits, const char *readable,
                       struct error *err)
{
    return error_set(
        err, ERR_MODEL,
        "%s: the checkpoint is quantized to %lld bits (%s%s), of which only %s can be read; " TAKE_ORIGINAL,
        object->file_name, (long long)bits, object->path, key, readable);
}

// ---- the methods -------------------------------------------------------------------------------------------------

static struct import_form *add_scheme(struct import_config *config, enum import_layout layout)
{
    struct import_scheme *scheme = &config->schemes[config->num_schemes++];
    scheme->form = (struct import_form){.layout = layout, .bits = 4, .block_rows = 1, .symmetric = true};
    return &scheme->form;
}

// group_size: -1 or null means the whole row.
static int get_group(uint64_t *out, const struct json_object *object, const char *key, uint64_t missing,
                     struct error *err)
{
    int64_t group = 0;
    const json_t *found = json_object_get(object->json, key);
    if (!found) {
        *out = missing;
        return 0;
    }
    int rc = json_file_get_int(&group, object, key, -1, MAX_GROUP, JSON_OPTIONAL, err);
    *out = group > 0 ? (uint64_t)group : 0;
    return rc;
}

static int parse_gptq(struct import_config *config, const struct json_object *object, struct error *err)
{
    int64_t bits = 4;
    bool symmetric = true, marlin = false;
    const char *checkpoint_format = "gptq", *pack = "int32";
    struct import_form *form = add_scheme(config, LAYOUT_GPTQ);
    int rc;
    if ((rc = json_file_get_int(&bits, object, "bits", 1, 32, JSON_REQUIRED, err)) ||
        (rc = get_group(&form->group_size, object, "group_size", 0, err)) ||
        (rc = json_file_get_bool(&symmetric, object, "sym", JSON_OPTIONAL, err)) ||
        (rc = json_file_get_bool(&config->act_order, object, "desc_act", JSON_OPTIONAL, err)) ||
        (rc = json_file_get_bool(&marlin, object, "is_marlin_format", JSON_OPTIONAL, err)) ||
        (rc = json_file_get_bool(&config->head, object, "lm_head", JSON_OPTIONAL, err)) ||
        (rc = json_file_get_string(&pack, object, "pack_dtype", JSON_OPTIONAL, err)) ||
        (rc = json_file_get_string(&checkpoint_format, object, "checkpoint_format", JSON_OPTIONAL, err)) ||
        (rc = add_ignored(config, object, "modules_to_not_convert", err)))
        return rc;
    if (marlin || (strcmp(checkpoint_format, "gptq") != 0 && strcmp(checkpoint_format, "gptq_v2") != 0))
        return refuse(object, "checkpoint_format", marlin ? "marlin" : checkpoint_format,
                      "take its checkpoint in the format \"gptq\" or \"gptq_v2\"", err);
    if (strcmp(pack, "int32") != 0)
        return refuse(object, "pack_dtype", pack, "take its checkpoint packed in int32", err);
    if (bits != 4 && bits != 8)
        return refuse_bits(object, "bits", bits, "4 and 8", err);
    form->bits = (int)bits;
    form->symmetric = symmetric;
    config->zero_minus_one = strcmp(checkpoint_format, "gptq") == 0;
    return 0;
}

static int parse_awq(struct import_config *config, const struct json_object *object, struct error *err)
{
    int64_t bits = 4;
    bool zero_point = true;
    const char *version = "gemm";
    struct import_form *form = add_scheme(config, LAYOUT_AWQ);
    const char *bits_key = json_object_get(object->json, "w_bit") ? "w_bit" : "bits";
    const char *group_key = json_object_get(object->json, "q_group_size") ? "q_group_size" : "group_size";
    int rc;
    if ((rc = json_file_get_int(&bits, object, bits_key, 1, 32, JSON_REQUIRED, err)) ||
        (rc = get_group(&form->group_size, object, group_key, 0, err)) ||
        (rc = json_file_get_bool(&zero_point, object, "zero_point", JSON_OPTIONAL, err)) ||
        (rc = json_file_get_string(&version, object, "version", JSON_OPTIONAL, err)) ||
        (rc = add_ignored(config, object, "modules_to_not_convert", err)))
        return rc;
    if (strcasecmp(version, "gemm") != 0)
        return refuse(object, "version", version, "take its checkpoint in version \"gemm\"", err);
    if (bits != 4)
        return refuse_bits(object, bits_key, bits, "4", err);
    if (!zero_point)
        return error_set(err, ERR_MODEL,
                         "%s: %szero_point is false, and awq without zero points cannot be read; take a checkpoint "
                         "with them",
                         object->file_name, object->path);
    form->symmetric = false;
    return 0;
}

// weight_block_size [rows, cols].
static int get_block(struct import_form *form, const struct json_object *object, const char *key, struct error *err)
{
    const json_t *block = NULL;
    int rc = json_file_get_array(&block, object, key, JSON_OPTIONAL, err);
    if (rc || !block)
        return rc;
    for (size_t i = 0; i < 2; i++) {
        const json_t *side = json_array_get(block, i);
        if (json_array_size(block) != 2 || !json_is_integer(side) || json_integer_value(side) < 1 ||
            json_integer_value(side) > MAX_GROUP)
            return json_file_wrong(object, key, "two integers", block, err);
    }
    form->block_rows = (uint64_t)json_integer_value(json_array_get(block, 0));
    form->group_size = (uint64_t)json_integer_value(json_array_get(block, 1));
    return 0;
}

static int parse_fp8(struct import_config *config, const struct json_object *object, struct error *err)
{
    const char *format = "e4m3";
    struct import_form *form = add_scheme(config, LAYOUT_FP8);
    int rc;
    form->bits = 8;
    if ((rc = json_file_get_string(&format, object, "fmt", JSON_OPTIONAL, err)) ||
        (rc = get_block(form, object, "weight_block_size", err)) ||
        (rc = add_ignored(config, object, "modules_to_not_convert", err)) ||
        (rc = add_ignored(config, object, "ignored_layers", err)))
        return rc;
    if (strcmp(format, "e4m3") != 0)
        return refuse(object, "fmt", format, "take a checkpoint in \"e4m3\"", err);
    return 0;
}

static int parse_bitsandbytes(struct import_config *config, const struct json_object *object, struct error *err)
{
    bool four = false, eight = false;
    struct import_form *form = add_scheme(config, LAYOUT_NF4);
    int rc;
    form->group_size = 64;
    if ((rc = json_file_get_bool(&four, object, "load_in_4bit", JSON_OPTIONAL, err)) ||
        (rc = json_file_get_bool(&eight, object, "load_in_8bit", JSON_OPTIONAL, err)) ||
        (rc = add_ignored(config, object, "llm_int8_skip_modules", err)))
        return rc;
    if (eight || !four)
        return refuse(object, "quant_method", "bitsandbytes llm_int8",
                      "take the 4-bit checkpoint, or the one it was made from", err);
    return 0;
}

static int parse_hqq(struct import_config *config, const struct json_object *object, struct error *err)
{
    struct json_object quant = {0}, weights = {0};
    int64_t bits = 4, axis = 1;
    struct import_form *form = add_scheme(config, LAYOUT_HQQ);
    int rc;
    form->symmetric = false;
    if ((rc = json_file_get_object(&quant, object, "quant_config", JSON_OPTIONAL, err)) ||
        (quant.json && (rc = json_file_get_object(&weights, &quant, "weight_quant_params", JSON_OPTIONAL, err))))
        return rc;
    const struct json_object *params = weights.json ? &weights : quant.json ? &quant : object;
    if ((rc = json_file_get_int(&bits, params, "nbits", 1, 32, JSON_OPTIONAL, err)) ||
        (rc = json_file_get_int(&axis, params, "axis", 0, 1, JSON_OPTIONAL, err)) ||
        (rc = get_group(&form->group_size, params, "group_size", 64, err)) ||
        (rc = add_ignored(config, object, "skip_modules", err)))
        return rc;
    if (bits != 4)
        return refuse_bits(params, "nbits", bits, "4", err);
    if (axis != 1)
        return error_set(err, ERR_MODEL,
                         "%s: %saxis is 0, and groups that run along a column cannot be read; take a checkpoint with "
                         "axis 1",
                         params->file_name, params->path);
    return 0;
}

// ---- compressed-tensors ------------------------------------------------------------------------------------------

static int scheme_of_format(struct import_form *form, const struct json_object *weights, const char *format,
                            struct error *err)
{
    int64_t bits = 8;
    bool symmetric = true;
    const char *type = "int", *strategy = "tensor";
    int rc;
    if ((rc = json_file_get_int(&bits, weights, "num_bits", 1, 32, JSON_REQUIRED, err)) ||
        (rc = json_file_get_string(&type, weights, "type", JSON_OPTIONAL, err)) ||
        (rc = json_file_get_bool(&symmetric, weights, "symmetric", JSON_OPTIONAL, err)) ||
        (rc = json_file_get_string(&strategy, weights, "strategy", JSON_OPTIONAL, err)) ||
        (rc = get_group(&form->group_size, weights, "group_size", 0, err)) ||
        (rc = get_block(form, weights, "block_structure", err)))
        return rc;
    if (strcmp(strategy, "tensor") == 0 || strcmp(strategy, "channel") == 0)
        form->group_size = 0;
    bool is_float = strcmp(type, "float") == 0;
    bool right = false;
    if (strcmp(format, "pack-quantized") == 0) {
        form->layout = LAYOUT_PACKED;
        right = !is_float && (bits == 4 || bits == 8);
    } else if (strcmp(format, "int-quantized") == 0) {
        form->layout = LAYOUT_INT8;
        right = !is_float && bits == 8 && symmetric;
    } else if (strcmp(format, "float-quantized") == 0) {
        form->layout = LAYOUT_FP8;
        right = is_float && bits == 8;
    } else if (strcmp(format, "naive-quantized") == 0) {
        form->layout = is_float ? LAYOUT_FP8 : LAYOUT_INT8;
        right = bits == 8 && symmetric;
    } else if (strcmp(format, "nvfp4-pack-quantized") == 0) {
        form->layout = LAYOUT_NVFP4;
        form->group_size = 16;
        right = is_float && bits == 4;
    } else if (strcmp(format, "mxfp4-pack-quantized") == 0 || strcmp(format, "mxfp4") == 0) {
        form->layout = LAYOUT_MXFP4;
        form->group_size = 32;
        right = is_float && bits == 4;
    } else {
        return refuse(weights, "format", format,
                      "readable are pack-quantized, int-quantized, float-quantized, naive-quantized, "
                      "nvfp4-pack-quantized and mxfp4-pack-quantized; " TAKE_ORIGINAL,
                      err);
    }
    if (!right)
        return error_set(err, ERR_MODEL,
                         "%s: %.*s has weights of %lld bits, type \"%.32s\"%s in format \"%.64s\", which cannot be "
                         "read; " TAKE_ORIGINAL,
                         weights->file_name, (int)strlen(weights->path) - 1, weights->path, (long long)bits, type,
                         symmetric ? "" : ", asymmetric", format);
    form->bits = (int)bits;
    form->symmetric = symmetric;
    return 0;
}

// An object or array with members.
static bool holds_something(const struct json_object *object, const char *key)
{
    const json_t *value = json_object_get(object->json, key);
    return json_object_size(value) > 0 || json_array_size(value) > 0;
}

static int parse_groups(struct import_config *config, const struct json_object *object, const char *whole_format,
                        struct error *err)
{
    struct json_object groups = {0};
    const char *name;
    json_t *value;
    int rc = json_file_get_object(&groups, object, "config_groups", JSON_REQUIRED, err);
    if (rc)
        return rc;
    json_object_foreach((json_t *)groups.json, name, value)
    {
        struct json_object group = {0}, weights = {0};
        const char *format = NULL;
        if ((rc = json_file_get_object(&group, &groups, name, JSON_REQUIRED, err)) ||
            (rc = json_file_get_object(&weights, &group, "weights", JSON_OPTIONAL, err)) ||
            (rc = json_file_get_string(&format, &group, "format", JSON_OPTIONAL, err)))
            return rc;
        if (!weights.json)
            continue; // activations alone
        if (config->num_schemes == IMPORT_MAX_SCHEMES)
            return error_set(err, ERR_MODEL, "%s: %sconfig_groups has more than %d groups", object->file_name,
                             object->path, IMPORT_MAX_SCHEMES);
        format = format ? format : whole_format;
        struct import_form *form = add_scheme(config, LAYOUT_PLAIN);
        struct import_scheme *scheme = &config->schemes[config->num_schemes - 1];
        if ((rc = scheme_of_format(form, &weights, format, err)) ||
            (rc = add_patterns(&scheme->targets, &group, "targets", err)))
            return rc;
    }
    if (config->num_schemes == 0)
        return error_set(err, ERR_MODEL, "%s: %sconfig_groups quantizes no weights", object->file_name, object->path);
    return 0;
}

static int parse_compressed(struct import_config *config, const struct json_object *object, struct error *err)
{
    struct json_object sparsity = {0};
    const char *format = "dense", *sparse = "dense";
    int rc;
    config->head = true;
    if ((rc = json_file_get_string(&format, object, "format", JSON_OPTIONAL, err)) ||
        (rc = json_file_get_object(&sparsity, object, "sparsity_config", JSON_OPTIONAL, err)) ||
        (sparsity.json && (rc = json_file_get_string(&sparse, &sparsity, "format", JSON_OPTIONAL, err))) ||
        (rc = add_ignored(config, object, "ignore", err)))
        return rc;
    if (strcmp(sparse, "dense") != 0)
        return refuse(&sparsity, "format", sparse, "take a checkpoint whose weights are not stored sparsely", err);
    if (holds_something(object, "transform_config"))
        return error_set(err, ERR_MODEL,
                         "%s: %stransform_config rotates activations at run time, which is not supported; take a "
                         "checkpoint without transforms",
                         object->file_name, object->path);
    snprintf(config->name, sizeof config->name, "compressed-tensors %.64s", format);
    return parse_groups(config, object, format, err);
}

// ---- ModelOpt ----------------------------------------------------------------------------------------------------

static int parse_modelopt(struct import_config *config, const struct json_object *object, struct error *err)
{
    const char *algorithm = "";
    int rc;
    if ((rc = json_file_get_string(&algorithm, object, "quant_algo", JSON_REQUIRED, err)) ||
        (rc = add_ignored(config, object, "exclude_modules", err)) || (rc = add_ignored(config, object, "ignore", err)))
        return rc;
    config->head = true;
    snprintf(config->name, sizeof config->name, "modelopt %.64s", algorithm);
    if (strcmp(algorithm, "NVFP4") == 0) {
        add_scheme(config, LAYOUT_NVFP4)->group_size = 16;
    } else if (strcmp(algorithm, "FP8") == 0) {
        add_scheme(config, LAYOUT_FP8)->bits = 8;
    } else if (strcmp(algorithm, "FP8_PB_WO") == 0) {
        struct import_form *form = add_scheme(config, LAYOUT_FP8);
        form->bits = 8;
        form->block_rows = form->group_size = 128;
    } else {
        return refuse(object, "quant_algo", algorithm, "readable are NVFP4, FP8 and FP8_PB_WO; " TAKE_ORIGINAL, err);
    }
    return 0;
}

// ---- the whole ---------------------------------------------------------------------------------------------------

static int parse_method(struct import_config *config, const struct json_object *object, const char *method,
                        struct error *err)
{
    snprintf(config->name, sizeof config->name, "%.64s", method);
    if (strcmp(method, "gptq") == 0) {
        config->method = IMPORT_GPTQ;
        return parse_gptq(config, object, err);
    }
    if (strcmp(method, "awq") == 0) {
        config->method = IMPORT_AWQ;
        return parse_awq(config, object, err);
    }
    if (strcmp(method, "compressed-tensors") == 0) {
        config->method = IMPORT_COMPRESSED_TENSORS;
        return parse_compressed(config, object, err);
    }
    if (strcmp(method, "fp8") == 0) {
        config->method = IMPORT_FP8;
        return parse_fp8(config, object, err);
    }
    if (strcmp(method, "fbgemm_fp8") == 0) {
        config->method = IMPORT_FBGEMM_FP8;
        add_scheme(config, LAYOUT_FP8)->bits = 8;
        return add_ignored(config, object, "modules_to_not_convert", err);
    }
    if (strcmp(method, "mxfp4") == 0) {
        config->method = IMPORT_MXFP4;
        config->experts_only = true;
        add_scheme(config, LAYOUT_MXFP4)->group_size = 32;
        return add_ignored(config, object, "modules_to_not_convert", err);
    }
    if (strcmp(method, "modelopt") == 0 || strcmp(method, "modelopt_fp4") == 0) {
        config->method = IMPORT_MODELOPT;
        return parse_modelopt(config, object, err);
    }
    if (strcmp(method, "bitsandbytes") == 0) {
        config->method = IMPORT_BITSANDBYTES;
        return parse_bitsandbytes(config, object, err);
    }
    if (strcmp(method, "hqq") == 0) {
        config->method = IMPORT_HQQ;
        return parse_hqq(config, object, err);
    }
    return refuse(object, "quant_method", method, "readable are " READABLE "; " TAKE_ORIGINAL, err);
}

static int parse(struct import_config *config, const struct json_object *root,
                 const struct json_object *hf_quant_config, struct error *err)
{
    static const char *const keys[] = {"quantization_config", "compression_config"};
    struct json_object object = {0}, text = {0};
    const char *method = NULL;
    int rc;
    for (size_t i = 0; i < 2 && !object.json; i++)
        if ((rc = json_file_get_object(&object, root, keys[i], JSON_OPTIONAL, err)))
            return rc;
    if (!object.json) { // composite models keep the language model's own config inside
        if ((rc = json_file_get_object(&text, root, "text_config", JSON_OPTIONAL, err)) ||
            (text.json && (rc = json_file_get_object(&object, &text, keys[0], JSON_OPTIONAL, err))))
            return rc;
    }
    if (object.json) {
        if ((rc = json_file_get_string(&method, &object, "quant_method", JSON_OPTIONAL, err)))
            return rc;
        if (!method && json_object_get(object.json, "load_in_4bit")) // older versions of transformers wrote no name
            method = "bitsandbytes";
        if (!method)
            return error_set(err, ERR_MODEL,
                             "%s: %squant_method is not there; readable are " READABLE "; " TAKE_ORIGINAL,
                             object.file_name, object.path);
        return parse_method(config, &object, method, err);
    }
    if (!hf_quant_config)
        return 0;
    if ((rc = json_file_get_object(&object, hf_quant_config, "quantization", JSON_REQUIRED, err)))
        return rc;
    config->method = IMPORT_MODELOPT;
    return parse_modelopt(config, &object, err);
}

int import_config_parse(struct import_config *out, const struct json_object *config,
                        const struct json_object *hf_quant_config, struct error *err)
{
    struct import_config parsed = {0};
    int rc = parse(&parsed, config, hf_quant_config, err);
    if (rc)
        import_config_clear(&parsed);
    else
        *out = parsed;
    return rc;
}

int import_config_read(struct import_config *out, const char *model_dir, struct error *err)
{
    char path[PATH_MAX], hf_quant_path[PATH_MAX];
    struct json_object root = {0}, hf_quant = {0};
    int rc;
    snprintf(path, sizeof path, "%s/config.json", model_dir);
    snprintf(hf_quant_path, sizeof hf_quant_path, "%s/hf_quant_config.json", model_dir);
    if ((rc = json_file_open(&root, path, JSON_FILE_CAP_BYTES, ERR_MODEL, err)))
        return rc;
    bool has_hf_quant;
    if ((rc = file_is_there(&has_hf_quant, hf_quant_path, err)))
        ;
    else if (!has_hf_quant || !(rc = json_file_open(&hf_quant, hf_quant_path, JSON_FILE_CAP_BYTES, ERR_MODEL, err)))
        rc = import_config_parse(out, &root, has_hf_quant ? &hf_quant : NULL, err);
    json_file_close(&root);
    json_file_close(&hf_quant);
    return rc;
}
