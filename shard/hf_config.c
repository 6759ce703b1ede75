// See hf_config.h. Defaults for missing keys are those of the family's configuration class in transformers.
#include "shard/hf_config.h"

#include "formats/file_io.h"
#include "formats/json_file.h"
#include "kernels/kernels.h"
#include "shard/families.h"

#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// Larger than any model; small enough that products of two fit easily.
enum {
    MAX_LAYERS = 4096,
    MAX_HIDDEN = 1 << 20,
    MAX_INTERMEDIATE = 1 << 24,
    MAX_HEADS = 1 << 14,
    MAX_HEAD_DIM = KERNELS_MAX_HEAD_DIM, // what the engine can run
    MAX_VOCAB = 1 << 26,
    MAX_CONTEXT = 1 << 30,
};

// Keys of other families and of forks: each changes the arithmetic when it is set.
static const char *const unknown_arithmetic[] = {
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "attention_scale",
    "clip_qkv",
    "alibi",
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "text_config",
};

static int refuse_unknown_arithmetic(const struct json_object *config, struct error *err)
{
    for (size_t i = 0; i < sizeof unknown_arithmetic / sizeof unknown_arithmetic[0]; i++) {
        const json_t *value = json_object_get(config->json, unknown_arithmetic[i]);
        if (value && !json_is_null(value) && !json_is_false(value))
            return error_set(err, ERR_MODEL, "%s: %s changes the model's arithmetic in a way that is not supported",
                             config->file_name, unknown_arithmetic[i]);
    }
    return 0;
}

static int refuse_quantized(const struct json_object *config, struct error *err)
{
    struct json_object quantization = {0};
    const char *method = "without a name";
    int rc;
    if ((rc = json_file_get_object(&quantization, config, "quantization_config", JSON_OPTIONAL, err)))
        return rc;
    if (!quantization.json)
        return 0;
    if ((rc = json_file_get_string(&method, &quantization, "quant_method", JSON_OPTIONAL, err)))
        return rc;
    return error_set(err, ERR_MODEL,
                     "%s: the checkpoint is already quantized (quant_method \"%s\"), which cannot be read; take the "
                     "bf16, f16 or f32 checkpoint it was made from",
                     config->file_name, method);
}

static int find_family(const struct family **out, struct model_desc *model, const struct json_object *config,
                       struct error *err)
{
    const json_t *list = NULL;
    int rc = json_file_get_array(&list, config, "architectures", JSON_REQUIRED, err);
    if (rc)
        return rc;
    const json_t *first = json_array_get(list, 0);
    if (!json_is_string(first))
        return json_file_wrong(config, "architectures[0]", "a string", first, err);
    const char *name = json_string_value(first);
    *out = family_find(name);
    if (!*out)
        return error_set(err, ERR_MODEL, "%s: architecture \"%.64s\" is not supported (known: %s)", config->file_name,
                         name, family_list());
    snprintf(model->architecture, sizeof model->architecture, "%s", name);
    return 0;
}

static int parse_dimensions(struct model_desc *model, const struct json_object *config, const struct family *family,
                            struct error *err)
{
    const struct {
        const char *key;
        int64_t *out;
        int64_t max;
    } keys[] = {
        {"num_hidden_layers", &model->num_layers, MAX_LAYERS},
        {"hidden_size", &model->hidden_size, MAX_HIDDEN},
        {"intermediate_size", &model->intermediate_size, MAX_INTERMEDIATE},
        {"num_attention_heads", &model->num_heads, MAX_HEADS},
        {"vocab_size", &model->vocab_size, MAX_VOCAB},
        {"max_position_embeddings", &model->context, MAX_CONTEXT},
    };
    int rc;
    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++)
        if ((rc = json_file_get_int(keys[i].out, config, keys[i].key, 1, keys[i].max, JSON_REQUIRED, err)))
            return rc;

    model->num_kv_heads = model->num_heads;
    if ((rc = json_file_get_int(&model->num_kv_heads, config, "num_key_value_heads", 1, MAX_HEADS,
                                family->kv_heads_optional ? JSON_OPTIONAL : JSON_REQUIRED, err)))
        return rc;
    if (model->num_heads % model->num_kv_heads != 0)
        return error_set(err, ERR_MODEL,
                         "%s: num_attention_heads (%lld) is not a multiple of num_key_value_heads (%lld)",
                         config->file_name, (long long)model->num_heads, (long long)model->num_kv_heads);

    model->head_dim = family->default_head_dim;
    if ((rc = json_file_get_int(&model->head_dim, config, "head_dim", 1, MAX_HEAD_DIM, JSON_OPTIONAL, err)))
        return rc;
    if (model->head_dim == 0) {
        if (model->hidden_size % model->num_heads != 0 || model->hidden_size / model->num_heads > MAX_HEAD_DIM)
            return error_set(err, ERR_MODEL,
                             "%s: no head_dim, and hidden_size (%lld) / num_attention_heads (%lld) is none",
                             config->file_name, (long long)model->hidden_size, (long long)model->num_heads);
        model->head_dim = model->hidden_size / model->num_heads;
    }
    if (model->head_dim % 2 != 0)
        return error_set(err, ERR_MODEL, "%s: head_dim %lld is odd; rotary positions need pairs", config->file_name,
                         (long long)model->head_dim);
    return 0;
}

static int parse_features(struct model_desc *model, const struct json_object *config, const struct family *family,
                          struct error *err)
{
    int rc;
    int64_t pretraining_tp = 1;
    const char *activation = "silu";
    bool attention_bias = false, mlp_bias = false;
    if ((rc = json_file_get_number(&model->norm_eps, config, "rms_norm_eps", 1e-12, 0.1, JSON_REQUIRED, err)) ||
        (rc = json_file_get_string(&activation, config, "hidden_act", JSON_OPTIONAL, err)) ||
        (rc = json_file_get_int(&pretraining_tp, config, "pretraining_tp", 0, 1 << 20, JSON_OPTIONAL, err)) ||
        (rc = json_file_get_bool(&model->tied_embeddings, config, "tie_word_embeddings", JSON_OPTIONAL, err)) ||
        (rc = json_file_get_bool(&attention_bias, config, "attention_bias", JSON_OPTIONAL, err)) ||
        (rc = json_file_get_bool(&mlp_bias, config, "mlp_bias", JSON_OPTIONAL, err)))
        return rc;
    if (strcmp(activation, "silu") != 0)
        return error_set(err, ERR_MODEL, "%s: hidden_act \"%s\" is not supported, only \"silu\"", config->file_name,
                         activation);
    if (pretraining_tp > 1)
        return error_set(err, ERR_MODEL,
                         "%s: pretraining_tp %lld asks for sums in another order, which is not supported; 1 gives "
                         "the plain model",
                         config->file_name, (long long)pretraining_tp);
    model->qkv_bias = family->qkv_bias || (family->attention_bias && attention_bias);
    model->o_bias = family->attention_bias && attention_bias;
    model->mlp_bias = family->mlp_bias && mlp_bias;
    model->qk_norm = family->qk_norm;
    return 0;
}

// layer_types, where given, must be the same for all layers and overrules the older keys.
static int parse_layer_types(int64_t *window, const struct json_object *config, struct error *err)
{
    const json_t *types = NULL;
    int rc = json_file_get_array(&types, config, "layer_types", JSON_OPTIONAL, err);
    if (rc || !types || json_array_size(types) == 0)
        return rc;
    const char *first = NULL;
    for (size_t i = 0; i < json_array_size(types); i++) {
        const char *type = json_string_value(json_array_get(types, i));
        if (!type || (strcmp(type, "full_attention") != 0 && strcmp(type, "sliding_attention") != 0))
            return error_set(err, ERR_MODEL, "%s: layer_types[%zu] is not \"full_attention\" or \"sliding_attention\"",
                             config->file_name, i);
        if (first && strcmp(first, type) != 0)
            return error_set(err, ERR_MODEL, "%s: layer_types mixes %s and %s, which is not supported",
                             config->file_name, first, type);
        first = type;
    }
    if (strcmp(first, "full_attention") == 0)
        *window = 0;
    else if (*window == 0)
        return error_set(err, ERR_MODEL, "%s: layer_types says sliding_attention, but no sliding_window is in use",
                         config->file_name);
    return 0;
}

static int parse_window(struct model_desc *model, const struct json_object *config, const struct family *family,
                        struct error *err)
{
    int rc;
    int64_t window = 0, first_layer = 28;
    bool in_use = family->window == WINDOW_ALL_LAYERS;
    if (family->window == WINDOW_NEVER)
        return 0;
    if (!json_object_get(config->json, "sliding_window"))
        window = 4096;
    if ((rc = json_file_get_int(&window, config, "sliding_window", 1, MAX_CONTEXT, JSON_OPTIONAL, err)))
        return rc;
    if (family->window == WINDOW_UPPER_LAYERS) {
        if ((rc = json_file_get_bool(&in_use, config, "use_sliding_window", JSON_OPTIONAL, err)) ||
            (rc = json_file_get_int(&first_layer, config, "max_window_layers", 0, INT_MAX, JSON_OPTIONAL, err)))
            return rc;
        if (in_use && window > 0 && first_layer > 0 && first_layer < model->num_layers)
            return error_set(err, ERR_MODEL,
                             "%s: use_sliding_window with max_window_layers %lld of %lld layers gives layers of two "
                             "kinds, which is not supported",
                             config->file_name, (long long)first_layer, (long long)model->num_layers);
        in_use = in_use && first_layer == 0;
    }
    model->sliding_window = in_use ? window : 0;
    return parse_layer_types(&model->sliding_window, config, err);
}

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

static int parse_config(struct hf_config *out, const struct json_object *config, struct error *err)
{
    int rc;
    const struct family *family = NULL;
    struct model_desc *model = &out->model;
    model->rope_attention_factor = 1;
    model->bos_token_id = -1;
    model->default_temperature = model->default_top_p = model->default_repetition_penalty = NAN;
    model->default_top_k = -1;
    if ((rc = find_family(&family, model, config, err)) || (rc = refuse_quantized(config, err)) ||
        (rc = refuse_unknown_arithmetic(config, err)) || (rc = parse_dimensions(model, config, family, err)) ||
        (rc = parse_features(model, config, family, err)) || (rc = parse_window(model, config, family, err)) ||
        (rc = rope_parse(&out->rope, config, model->context, err)))
        return rc;
    return parse_token_ids(model, config, err);
}

int hf_config_parse(struct hf_config *out, const char *config, size_t config_bytes, const char *config_name,
                    const char *generation, size_t generation_bytes, const char *generation_name, struct error *err)
{
    struct hf_config parsed = {.has_generation_config = generation != NULL};
    struct json_object root = {0}, generation_root = {0};
    int rc;
    if ((rc = json_file_parse(&root, config, config_bytes, config_name, ERR_MODEL, err)))
        return rc;
    rc = parse_config(&parsed, &root, err);
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

int hf_config_read(struct hf_config *out, const char *model_dir, struct error *err)
{
    char config_path[PATH_MAX], generation_path[PATH_MAX];
    uint8_t *config = NULL, *generation = NULL;
    uint64_t config_bytes = 0, generation_bytes = 0;
    int rc;
    snprintf(config_path, sizeof config_path, "%s/config.json", model_dir);
    snprintf(generation_path, sizeof generation_path, "%s/generation_config.json", model_dir);
    if (access(config_path, F_OK))
        return error_set(err, ERR_MODEL, "%s: no config.json; is this the directory of a Hugging Face model?",
                         model_dir);
    if ((rc = file_read_all(&config, &config_bytes, config_path, JSON_FILE_CAP_BYTES, ERR_MODEL, err)))
        return rc;
    if (access(generation_path, F_OK) == 0 &&
        (rc = file_read_all(&generation, &generation_bytes, generation_path, JSON_FILE_CAP_BYTES, ERR_MODEL, err)))
        goto done;
    rc = hf_config_parse(out, (const char *)config, config_bytes, config_path, (const char *)generation,
                         generation_bytes, generation_path, err);
done:
    free(config);
    free(generation);
    return rc;
}
