// Attention: heads, latents, biases, windows, scales, rotation. See hf_config.h.
#include "formats/model_json.h"
#include "shard/hf_config_parts.h"

#include <math.h>
#include <string.h>

// ---- heads -------------------------------------------------------------------------------------------------------

static int parse_latent(struct model_desc *model, const struct config *config, struct error *err)
{
    struct latent_desc *latent = &model->latent;
    int rc;
    if ((rc = config_int(&latent->kv_rank, config, "kv_lora_rank", 1, MODEL_MAX_LATENT_KEY_DIM, JSON_REQUIRED, err)) ||
        (rc = config_int(&latent->q_rank, config, "q_lora_rank", 1, MAX_HIDDEN, JSON_OPTIONAL, err)) ||
        (rc = config_int(&latent->nope_dim, config, "qk_nope_head_dim", 1, MODEL_MAX_LATENT_HEAD_DIM, JSON_REQUIRED,
                         err)) ||
        (rc = config_int(&latent->rope_dim, config, "qk_rope_head_dim", 2, MODEL_MAX_LATENT_HEAD_DIM, JSON_REQUIRED,
                         err)) ||
        (rc = config_int(&latent->v_dim, config, "v_head_dim", 1, MODEL_MAX_LATENT_HEAD_DIM, JSON_REQUIRED, err)))
        return rc;
    if (model->num_kv_heads != model->num_heads)
        return error_set(err, ERR_MODEL, "%s: num_key_value_heads (%lld) must be num_attention_heads (%lld) here",
                         config->json.file_name, (long long)model->num_kv_heads, (long long)model->num_heads);
    latent->norm_eps = 1e-6; // transformers makes these norms without config's rms_norm_eps
    model->head_dim = latent->nope_dim + latent->rope_dim;
    if (model->head_dim > MODEL_MAX_LATENT_HEAD_DIM)
        return error_set(err, ERR_MODEL, "%s: qk_nope_head_dim + qk_rope_head_dim is %lld, at most %d are supported",
                         config->json.file_name, (long long)model->head_dim, MODEL_MAX_LATENT_HEAD_DIM);
    return 0;
}

static int parse_heads(struct model_desc *model, const struct config *config, struct error *err)
{
    const char *file = config->json.file_name;
    double none;
    int rc;
    bool optional = family_default(config->family, "num_key_value_heads", &none);
    if ((rc = config_int(&model->num_heads, config, "num_attention_heads", 1, MAX_HEADS, JSON_REQUIRED, err)) ||
        (rc = config_int(&model->num_kv_heads, config, "num_key_value_heads", 1, MAX_HEADS,
                         optional ? JSON_OPTIONAL : JSON_REQUIRED, err)))
        return rc;
    if (model->num_kv_heads == 0)
        model->num_kv_heads = model->num_heads;
    if (model->num_heads % model->num_kv_heads != 0)
        return error_set(err, ERR_MODEL,
                         "%s: num_attention_heads (%lld) is not a multiple of num_key_value_heads (%lld)", file,
                         (long long)model->num_heads, (long long)model->num_kv_heads);
    if (config->family->reads & READS_LATENT)
        return parse_latent(model, config, err);
    if ((rc = config_int(&model->head_dim, config, "head_dim", 1, MODEL_MAX_HEAD_DIM, JSON_OPTIONAL, err)))
        return rc;
    if (model->head_dim == 0) {
        if (model->hidden_size % model->num_heads != 0 || model->hidden_size / model->num_heads > MODEL_MAX_HEAD_DIM)
            return error_set(err, ERR_MODEL,
                             "%s: no head_dim, and hidden_size (%lld) / num_attention_heads (%lld) is no whole number "
                             "up to %d",
                             file, (long long)model->hidden_size, (long long)model->num_heads, MODEL_MAX_HEAD_DIM);
        model->head_dim = model->hidden_size / model->num_heads;
    }
    if (model->head_dim % 2 != 0)
        return error_set(err, ERR_MODEL, "%s: head_dim %lld is odd; rotary positions need pairs", file,
                         (long long)model->head_dim);
    return 0;
}

static int parse_biases(struct model_desc *model, const struct config *config, struct error *err)
{
    const struct family *family = config->family;
    bool attention = false, qkv = false, qk_norm = true;
    int rc;
    if ((rc = config_bool(&attention, config, "attention_bias", err)) ||
        (rc = config_bool(&qkv, config, "qkv_bias", err)) ||
        (family->qk_norm_by_key && (rc = config_bool(&qk_norm, config, "use_qk_norm", err))))
        return rc;
    model->qkv_bias = family->bias == BIAS_QKV || (family->bias == BIAS_ALL_BY_KEY && attention) ||
                      (family->bias == BIAS_QKV_BY_KEY && (attention || qkv));
    model->o_bias = family->bias == BIAS_ALL_BY_KEY && attention;
    model->qk_norm = qk_norm ? family->qk_norm : QK_NORM_NONE;
    model->sinks = family->activation == ACTIVATION_GPT_OSS;
    return 0;
}

// ---- windows -----------------------------------------------------------------------------------------------------

// layer_types, where given, overrules the family's rule.
static int parse_layer_types(struct model_desc *model, const struct config *config, const json_t **types,
                             struct error *err)
{
    const char *file = config->json.file_name;
    int rc = json_file_get_array(types, &config->json, "layer_types", JSON_OPTIONAL, err);
    if (rc || !*types || json_array_size(*types) == 0) {
        *types = NULL;
        return rc;
    }
    if ((int64_t)json_array_size(*types) != model->num_layers)
        return error_set(err, ERR_MODEL, "%s: layer_types names %zu layers, num_hidden_layers %lld", file,
                         json_array_size(*types), (long long)model->num_layers);
    for (size_t i = 0; i < json_array_size(*types); i++) {
        const char *type = json_string_value(json_array_get(*types, i));
        bool window = type && strcmp(type, "sliding_attention") == 0;
        if (!type || (!window && strcmp(type, "full_attention") != 0))
            return error_set(err, ERR_MODEL, "%s: layer_types[%zu] is not \"full_attention\" or \"sliding_attention\"",
                             file, i);
        if (window && model->sliding_window == 0)
            return error_set(err, ERR_MODEL, "%s: layer_types says sliding_attention, but no sliding_window is in use",
                             file);
        model->layer_flags[i] |= window ? LAYER_WINDOW : 0;
    }
    return 0;
}

// Whether a layer looks back over the window alone, where no layer_types says it.
static bool rule_says_window(enum window_rule rule, int64_t layer, int64_t border, int64_t pattern)
{
    switch (rule) {
    case WINDOW_NEVER:
        return false;
    case WINDOW_ALL_LAYERS:
    case WINDOW_SWITCHED:
        return true;
    case WINDOW_UPPER_LAYERS:
        return layer >= border;
    case WINDOW_LOWER_EVEN:
        return layer % 2 == 0 && layer < border;
    case WINDOW_EVEN_LAYERS:
        return layer % 2 == 0;
    case WINDOW_ALL_BUT_NTH:
        return (layer + 1) % pattern != 0;
    }
    return false;
}

static int parse_window(struct model_desc *model, const struct config *config, struct error *err)
{
    enum window_rule rule = config->family->window;
    bool switched = rule == WINDOW_UPPER_LAYERS || rule == WINDOW_LOWER_EVEN || rule == WINDOW_SWITCHED;
    bool in_use = !switched;
    int64_t border = 0, pattern = 1;
    const json_t *types = NULL;
    int rc;
    if ((rc = config_int(&border, config, "max_window_layers", 0, MAX_CONTEXT, JSON_OPTIONAL, err)) ||
        (rule == WINDOW_ALL_BUT_NTH &&
         (rc = config_int(&pattern, config, "sliding_window_pattern", 1, MAX_CONTEXT, JSON_OPTIONAL, err))) ||
        (switched && (rc = config_bool(&in_use, config, "use_sliding_window", err))) ||
        (rule != WINDOW_NEVER && in_use &&
         (rc = config_int(&model->sliding_window, config, "sliding_window", 1, MAX_CONTEXT, JSON_OPTIONAL, err))) ||
        (rc = parse_layer_types(model, config, &types, err)))
        return rc;
    bool any = false;
    for (int64_t layer = 0; layer < model->num_layers; layer++) {
        uint8_t *flags = &model->layer_flags[layer];
        if (!types && model->sliding_window > 0 && rule_says_window(rule, layer, border, pattern))
            *flags |= LAYER_WINDOW;
        if (*flags & LAYER_WINDOW && config->family->reads & READS_LOCAL_ROPE)
            *flags |= LAYER_LOCAL_ROPE;
        any = any || *flags & LAYER_WINDOW;
    }
    if (!any)
        model->sliding_window = 0;
    return 0;
}

// A 0 in no_rope_layers, or every no_rope_layer_interval-th layer.
static int parse_no_rope(struct model_desc *model, const struct config *config, struct error *err)
{
    const json_t *list = NULL;
    int64_t interval = 4;
    int rc;
    if (!(config->family->reads & READS_NO_ROPE))
        return 0;
    if ((rc = json_file_get_array(&list, &config->json, "no_rope_layers", JSON_OPTIONAL, err)) ||
        (rc = config_int(&interval, config, "no_rope_layer_interval", 1, MAX_CONTEXT, JSON_OPTIONAL, err)))
        return rc;
    if (list && (int64_t)json_array_size(list) < model->num_layers)
        return error_set(err, ERR_MODEL, "%s: no_rope_layers names %zu layers, num_hidden_layers %lld",
                         config->json.file_name, json_array_size(list), (long long)model->num_layers);
    for (int64_t layer = 0; layer < model->num_layers; layer++) {
        const json_t *rotates = json_array_get(list, (size_t)layer);
        if (list && !(json_is_integer(rotates) && json_integer_value(rotates) >= 0 && json_integer_value(rotates) <= 1))
            return error_set(err, ERR_MODEL, "%s: no_rope_layers[%lld] must be 0 or 1", config->json.file_name,
                             (long long)layer);
        if (list ? json_integer_value(rotates) == 0 : (layer + 1) % interval == 0)
            model->layer_flags[layer] |= LAYER_NO_ROPE;
    }
    return 0;
}

// ---- scales and rotation -----------------------------------------------------------------------------------------

static int parse_rope(struct hf_config *out, const struct config *config, struct error *err)
{
    struct model_desc *model = &out->model;
    const struct family *family = config->family;
    struct rope_defaults defaults = {
        .theta = 10000,
        .partial_rotary_factor = 1,
        .head_dim = model->latent.kv_rank ? model->latent.rope_dim : model->head_dim,
        .context = model->context,
        .longrope_only = family->longrope_only,
        .nested = family->reads & READS_LOCAL_ROPE,
    };
    int rc;
    if (family->activation == ACTIVATION_GPT_OSS &&
        !json_is_object(json_object_get(config->json.json, "rope_scaling")) &&
        !json_is_object(json_object_get(config->json.json, "rope_parameters"))) // whose own default is no plain table
        return error_set(err, ERR_MODEL, "%s: rope_scaling must be an object for this architecture",
                         config->json.file_name);
    family_default(family, "rope_theta", &defaults.theta);
    family_default(family, "partial_rotary_factor", &defaults.partial_rotary_factor);
    if ((rc = rope_parse(&out->rope, &config->json, &defaults, err)))
        return rc;
    double local_theta = out->rope.theta;
    family_default(family, "rope_local_base_freq", &local_theta);
    if (defaults.nested && (rc = rope_parse_local(&out->rope_local, &config->json, &defaults, local_theta, err)))
        return rc;
    model->rotary_dim = out->rope.dim;
    model->rope_attention_factor = out->rope.attention_factor;
    model->rope_original_context = out->rope.scaling == ROPE_LONG ? out->rope.original_context : 0;
    model->rotary_interleaved = family->rotary_interleaved;
    if (json_is_boolean(json_object_get(config->json.json, "rope_interleave")))
        return json_file_get_bool(&model->rotary_interleaved, &config->json, "rope_interleave", JSON_REQUIRED, err);
    return 0;
}

static int parse_scales(struct hf_config *out, const struct config *config, struct error *err)
{
    struct model_desc *model = &out->model;
    unsigned reads = config->family->reads;
    double query_scalar = (double)model->head_dim, logits_scaling = 1;
    int rc;
    model->attention_scale = 1 / sqrt((double)model->head_dim);
    if (reads & READS_LATENT)
        model->attention_scale *= rope_attention_scale(&out->rope);
    if (reads & READS_SOFTCAPS) {
        if ((rc = config_number(&query_scalar, config, "query_pre_attn_scalar", 1e-3, 1e6, JSON_OPTIONAL, err)) ||
            (rc = config_number(&model->attention_softcap, config, "attn_logit_softcapping", 1e-3, 1e6, JSON_OPTIONAL,
                                err)) ||
            (rc = config_number(&model->logit_softcap, config, "final_logit_softcapping", 1e-3, 1e6, JSON_OPTIONAL,
                                err)))
            return rc;
        model->attention_scale = 1 / sqrt(query_scalar);
    }
    if (reads & READS_MULTIPLIERS) {
        model->attention_scale = 1;
        if ((rc = config_number(&model->attention_scale, config, "attention_multiplier", 1e-6, 1e6, JSON_OPTIONAL,
                                err)) ||
            (rc = config_number(&model->embedding_scale, config, "embedding_multiplier", 1e-6, 1e6, JSON_OPTIONAL,
                                err)) ||
            (rc =
                 config_number(&model->residual_scale, config, "residual_multiplier", 1e-6, 1e6, JSON_OPTIONAL, err)) ||
            (rc = config_number(&logits_scaling, config, "logits_scaling", 1e-6, 1e6, JSON_OPTIONAL, err)))
            return rc;
        model->logit_scale = 1 / logits_scaling;
    }
    return 0;
}

int config_attention(struct hf_config *out, const struct config *config, struct error *err)
{
    int rc;
    if ((rc = parse_heads(&out->model, config, err)) || (rc = parse_biases(&out->model, config, err)) ||
        (rc = parse_window(&out->model, config, err)) || (rc = parse_no_rope(&out->model, config, err)) ||
        (rc = parse_rope(out, config, err)))
        return rc;
    return parse_scales(out, config, err);
}
