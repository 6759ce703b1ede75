// See hf_config.h. Defaults for missing keys are those of the family's configuration class in transformers.
#include "shard/hf_config.h"

#include "formats/file_io.h"
#include "formats/json_file.h"
#include "formats/model_json.h"
#include "shard/families.h"
#include "shard/hf_config_parts.h"

#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ---- keys with defaults ------------------------------------------------------------------------------------------

// What the family says of a key that the file does not hold at all (null is an answer).
static bool missing(double *value, const struct config *config, const char *key)
{
    return !json_object_get(config->json.json, key) && family_default(config->family, key, value);
}

int config_int(int64_t *out, const struct config *config, const char *key, int64_t min, int64_t max,
               enum json_need need, struct error *err)
{
    double value;
    if (!missing(&value, config, key))
        return json_file_get_int(out, &config->json, key, min, max, need, err);
    *out = (int64_t)value;
    return 0;
}

int config_number(double *out, const struct config *config, const char *key, double min, double max,
                  enum json_need need, struct error *err)
{
    return missing(out, config, key) ? 0 : json_file_get_number(out, &config->json, key, min, max, need, err);
}

int config_bool(bool *out, const struct config *config, const char *key, struct error *err)
{
    double value;
    if (!missing(&value, config, key))
        return json_file_get_bool(out, &config->json, key, JSON_OPTIONAL, err);
    *out = value != 0;
    return 0;
}

// ---- the model ---------------------------------------------------------------------------------------------------

// Keys that change the arithmetic when they are set, and who reads them (0: nobody here).
static int refuse_unknown_arithmetic(const struct config *config, struct error *err)
{
    static const struct {
        const char *key;
        unsigned readers;
        double neutral; // a number that changes nothing; 0: none does
    } keys[] = {
        {"attn_logit_softcapping", READS_ATTENTION_CAP, 0},
        {"final_logit_softcapping", READS_SOFTCAPS, 0},
        {"query_pre_attn_scalar", READS_SOFTCAPS, 0},
        {"logits_scaling", READS_MULTIPLIERS, 1},
        {"embedding_multiplier", READS_MULTIPLIERS, 1},
        {"attention_multiplier", READS_MULTIPLIERS, 0},
        {"residual_multiplier", READS_MULTIPLIERS, 1},
        {"num_local_experts", READS_EXPERTS, 0},
        {"num_experts", READS_EXPERTS, 0},
        {"n_routed_experts", READS_EXPERTS, 0},
        {"kv_lora_rank", READS_LATENT, 0},
        {"no_rope_layers", READS_NO_ROPE, 0},
        {"rope_local_base_freq", READS_LOCAL_ROPE, 0},
        {"text_config", READS_TEXT_CONFIG, 0},
        {"logit_scale", 0, 1},
        {"attention_scale", 0, 0},
        {"clip_qkv", 0, 0},
        {"alibi", 0, 0},
        {"use_bidirectional_attention", 0, 0},
        {"attn_temperature_tuning", 0, 0},
        {"use_parallel_residual", 0, 0},
        {"parallel_attn", 0, 0},
        {"num_kv_shared_layers", 0, 0},
        {"per_layer_config", 0, 0},
    };
    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++) {
        const json_t *value = json_object_get(config->json.json, keys[i].key);
        bool neutral =
            !value || json_is_null(value) || json_is_false(value) ||
            (json_is_number(value) &&
             (json_number_value(value) == 0 || (keys[i].neutral != 0 && json_number_value(value) == keys[i].neutral)));
        if (!neutral && !(config->family->reads & keys[i].readers))
            return error_set(err, ERR_MODEL, "%s: %s changes the model's arithmetic in a way that is not supported",
                             config->json.file_name, keys[i].key);
    }
    return 0;
}

// A family that reads no window is not what a config with a window in use asks for.
static bool drops_window(const struct family *family, const struct json_object *config)
{
    const json_t *window = json_object_get(config->json, "sliding_window");
    const json_t *use = json_object_get(config->json, "use_sliding_window");
    return family->window == WINDOW_NEVER && json_is_integer(window) && !json_is_false(use);
}

// A name that is not in our tables goes into the manifest as it is, with the known one behind it.
static int check_new_name(const char *name, const struct family *family, const struct json_object *config,
                          struct error *err)
{
    const int most = MODEL_NAME_BYTES - 1 - (int)strlen(" as ") - (int)strlen(family->architecture);
    int printable = 0;
    while (name[printable] > 0x20 && name[printable] < 0x7f)
        printable++;
    if (name[printable] || printable == 0 || printable > most)
        return error_set(err, ERR_MODEL,
                         "%s: architectures[0] must be 1 to %d letters without blanks to be read as a %s",
                         config->file_name, most, family->architecture);
    if (family_find(name))
        return error_set(err, ERR_USAGE, "%s: architecture \"%s\" is known and cannot be read as a %s",
                         config->file_name, name, family->architecture);
    if (drops_window(family, config))
        return error_set(err, ERR_MODEL, "%s: sliding_window is in use, and a %s has no windows", config->file_name,
                         family->architecture);
    return 0;
}

static int find_family(const struct family **out, struct model_desc *model, const struct json_object *config,
                       const char *known_as, struct error *err)
{
    const json_t *list = NULL;
    int rc = json_file_get_array(&list, config, "architectures", JSON_REQUIRED, err);
    if (rc)
        return rc;
    const json_t *first = json_array_get(list, 0);
    if (!json_is_string(first))
        return json_file_wrong(config, "architectures[0]", "a string", first, err);
    const char *name = json_string_value(first);
    *out =
        known_as || !strchr(name, ' ') ? family_find(known_as ? known_as : name) : NULL; // "X as Y" is our own spelling
    if (!*out)
        return error_set(
            err, ERR_MODEL,
            "%s: architecture \"%.64s\" is not supported (known: %s); if its layers compute what those of one "
            "of these do, --as NAME says so, else it needs a table in shard/ (shard/families.md)",
            config->file_name, name, family_list());
    bool renamed = known_as && strcmp(known_as, name) != 0;
    if (renamed && (rc = check_new_name(name, *out, config, err)))
        return rc;
    snprintf(model->architecture, sizeof model->architecture, "%s%s%s", name, renamed ? " as " : "",
             renamed ? known_as : "");
    return 0;
}

static int parse_dimensions(struct model_desc *model, const struct config *config, struct error *err)
{
    const struct {
        const char *key;
        int64_t *out;
        int64_t max;
    } keys[] = {
        {"num_hidden_layers", &model->num_layers, MODEL_MAX_LAYERS},
        {"hidden_size", &model->hidden_size, MAX_HIDDEN},
        {"intermediate_size", &model->intermediate_size, MAX_INTERMEDIATE},
        {"vocab_size", &model->vocab_size, MAX_VOCAB},
        {"max_position_embeddings", &model->context, MAX_CONTEXT},
    };
    int rc;
    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++)
        if ((rc = config_int(keys[i].out, config, keys[i].key, 1, keys[i].max, JSON_REQUIRED, err)))
            return rc;
    return 0;
}

// The word for an activation, under the two keys that families use.
static int check_activation(const struct model_desc *model, const struct config *config, struct error *err)
{
    static const char *const keys[] = {"hidden_act", "hidden_activation"};
    bool gelu = model->activation == ACTIVATION_GELU_TANH;
    double limit = 7, alpha = 1.702;
    int rc;
    for (size_t i = 0; i < 2; i++) {
        const char *word = gelu ? "gelu_pytorch_tanh" : "silu";
        if ((rc = json_file_get_string(&word, &config->json, keys[i], JSON_OPTIONAL, err)))
            return rc;
        // Gemma's first configs say gelu and mean its tanh form.
        if (strcmp(word, gelu ? "gelu_pytorch_tanh" : "silu") != 0 && !(gelu && i == 0 && strcmp(word, "gelu") == 0))
            return error_set(err, ERR_MODEL, "%s: %s \"%.40s\" is not supported, only \"%s\"", config->json.file_name,
                             keys[i], word, gelu ? "gelu_pytorch_tanh" : "silu");
    }
    if (model->activation != ACTIVATION_GPT_OSS)
        return 0;
    if ((rc = config_number(&limit, config, "swiglu_limit", 0, 1e300, JSON_OPTIONAL, err)) ||
        (rc = config_number(&alpha, config, "swiglu_alpha", 0, 1e300, JSON_OPTIONAL, err)))
        return rc;
    if (limit != 7 || alpha != 1.702)
        return error_set(err, ERR_MODEL, "%s: swiglu_limit %g and swiglu_alpha %g are not supported, only 7 and 1.702",
                         config->json.file_name, limit, alpha);
    return 0;
}

static int parse_features(struct model_desc *model, const struct config *config, struct error *err)
{
    const struct family *family = config->family;
    int rc;
    int64_t pretraining_tp = 1;
    model->activation = family->activation;
    if ((rc = config_number(&model->norm_eps, config, "rms_norm_eps", 1e-12, 0.1, JSON_REQUIRED, err)) ||
        (rc = check_activation(model, config, err)) ||
        (rc = config_int(&pretraining_tp, config, "pretraining_tp", 0, 1 << 20, JSON_OPTIONAL, err)) ||
        (rc = config_bool(&model->tied_embeddings, config, "tie_word_embeddings", err)) ||
        (family->reads & READS_MLP_BIAS && (rc = config_bool(&model->mlp_bias, config, "mlp_bias", err))))
        return rc;
    if (pretraining_tp > 1)
        return error_set(err, ERR_MODEL,
                         "%s: pretraining_tp %lld asks for sums in another order, which is not supported; 1 gives "
                         "the plain model",
                         config->json.file_name, (long long)pretraining_tp);
    model->pre_norms = !family->no_pre_norms;
    model->post_norms = family->post_norms;
    model->embedding_scale = family->embedding_sqrt ? sqrt((double)model->hidden_size) : 1;
    model->residual_scale = model->logit_scale = 1;
    return 0;
}

// ---- tokens ------------------------------------------------------------------------------------------------------

// An id, a list of ids, or null.
static int parse_eos(struct model_desc *model, const struct json_object *object, struct error *err)
{
    const json_t *value = json_object_get(object->json, "eos_token_id");
    if (!json_is_array(value)) {
        int64_t id = -1;
        int rc = json_file_get_int(&id, object, "eos_token_id", 0, model->vocab_size - 1, JSON_OPTIONAL, err);
        if (!rc && id >= 0) {
            model->eos_token_ids[0] = id;
            model->num_eos = 1;
        }
        return rc;
    }
    size_t count = json_array_size(value);
    if (count > MODEL_MAX_EOS)
        return error_set(err, ERR_MODEL, "%s: eos_token_id lists %zu ids, at most %d are supported", object->file_name,
                         count, MODEL_MAX_EOS);
    for (size_t i = 0; i < count; i++) {
        const json_t *id = json_array_get(value, i);
        if (!json_is_integer(id) || json_integer_value(id) < 0 || json_integer_value(id) >= model->vocab_size)
            return error_set(err, ERR_MODEL, "%s: eos_token_id[%zu] must be an integer from 0 to %lld",
                             object->file_name, i, (long long)model->vocab_size - 1);
        model->eos_token_ids[i] = json_integer_value(id);
    }
    model->num_eos = (int)count;
    return 0;
}

static int parse_token_ids(struct model_desc *model, const struct json_object *object, struct error *err)
{
    int rc =
        json_file_get_int(&model->bos_token_id, object, "bos_token_id", 0, model->vocab_size - 1, JSON_OPTIONAL, err);
    return rc ? rc : parse_eos(model, object, err);
}

static int parse_generation(struct model_desc *model, const struct json_object *object, struct error *err)
{
    int rc;
    bool do_sample = true; // as servers read the file: a temperature counts unless do_sample says no
    if ((rc = parse_token_ids(model, object, err)) ||
        (rc = json_file_get_number(&model->default_temperature, object, "temperature", 0, 1000, JSON_OPTIONAL, err)) ||
        (rc = json_file_get_number(&model->default_top_p, object, "top_p", 0, 1, JSON_OPTIONAL, err)) ||
        (rc = json_file_get_number(&model->default_repetition_penalty, object, "repetition_penalty", 1e-3, 1000,
                                   JSON_OPTIONAL, err)) ||
        (rc = json_file_get_int(&model->default_top_k, object, "top_k", 0, INT_MAX, JSON_OPTIONAL, err)) ||
        (rc = json_file_get_bool(&do_sample, object, "do_sample", JSON_OPTIONAL, err)))
        return rc;
    if (!do_sample || model->default_top_p == 0) // no mass is left but the likeliest token's
        model->default_temperature = 0;          // greedy, whatever else the file says
    if (model->default_top_p == 0)
        model->default_top_p = NAN;
    return 0;
}

static int parse_config(struct hf_config *out, const struct json_object *root, const char *known_as, struct error *err)
{
    int rc;
    struct config config = {.json = *root};
    struct model_desc *model = &out->model;
    char problem[160];
    model->bos_token_id = -1;
    model->default_temperature = model->default_top_p = model->default_repetition_penalty = NAN;
    model->default_top_k = -1;
    if ((rc = find_family(&config.family, model, root, known_as, err)))
        return rc;
    if (config.family->reads & READS_TEXT_CONFIG &&
        (rc = json_file_get_object(&config.json, root, "text_config", JSON_REQUIRED, err)))
        return rc;
    if ((rc = refuse_unknown_arithmetic(&config, err)) || (rc = parse_dimensions(model, &config, err)) ||
        (rc = parse_features(model, &config, err)) || (rc = config_attention(out, &config, err)) ||
        (rc = config_experts(model, &config, err)) || (rc = parse_token_ids(model, &config.json, err)))
        return rc;
    if (config.json.json != root->json && (rc = parse_token_ids(model, root, err))) // of the larger model
        return rc;
    if (!model_json_check(model, problem, sizeof problem))
        return error_set(err, ERR_MODEL, "%s: %s", root->file_name, problem);
    return 0;
}

int hf_config_parse(struct hf_config *out, const char *config, size_t config_bytes, const char *config_name,
                    const char *generation, size_t generation_bytes, const char *generation_name, const char *known_as,
                    struct error *err)
{
    struct hf_config parsed = {.has_generation_config = generation != NULL};
    struct json_object root = {0}, generation_root = {0};
    int rc;
    if ((rc = json_file_parse(&root, config, config_bytes, config_name, ERR_MODEL, err)))
        return rc;
    rc = parse_config(&parsed, &root, known_as, err);
    json_file_close(&root);
    if (rc)
        return rc;
    if (generation) {
        if ((rc = json_file_parse(&generation_root, generation, generation_bytes, generation_name, ERR_MODEL, err)))
            return rc;
        rc = parse_generation(&parsed.model, &generation_root, err);
        json_file_close(&generation_root);
        if (rc)
            return rc;
    }
    *out = parsed;
    return 0;
}

int hf_config_read(struct hf_config *out, const char *model_dir, const char *known_as, struct error *err)
{
    char config_path[PATH_MAX], generation_path[PATH_MAX];
    uint8_t *config = NULL, *generation = NULL;
    uint64_t config_bytes = 0, generation_bytes = 0;
    bool has_config, has_generation;
    int rc;
    snprintf(config_path, sizeof config_path, "%s/config.json", model_dir);
    snprintf(generation_path, sizeof generation_path, "%s/generation_config.json", model_dir);
    if ((rc = file_is_there(&has_config, config_path, err)) ||
        (rc = file_is_there(&has_generation, generation_path, err)))
        return rc;
    if (!has_config)
        return error_set(err, ERR_MODEL, "%s: no config.json; is this the directory of a Hugging Face model?",
                         model_dir);
    if ((rc = file_read_all(&config, &config_bytes, config_path, JSON_FILE_CAP_BYTES, ERR_MODEL, err)))
        return rc;
    if (has_generation &&
        (rc = file_read_all(&generation, &generation_bytes, generation_path, JSON_FILE_CAP_BYTES, ERR_MODEL, err)))
        goto done;
    rc = hf_config_parse(out, (const char *)config, config_bytes, config_path, (const char *)generation,
                         generation_bytes, generation_path, known_as, err);
done:
    free(config);
    free(generation);
    return rc;
}
