// Mixtures of experts: how many, how large, which layers, how a token chooses. See hf_config.h.
#include "formats/model_json.h"
#include "shard/hf_config_parts.h"

#include <string.h>

static bool lists(const json_t *list, int64_t number)
{
    for (size_t i = 0; i < json_array_size(list); i++)
        if (json_integer_value(json_array_get(list, i)) == number && json_is_integer(json_array_get(list, i)))
            return true;
    return false;
}

static int parse_layers(struct model_desc *model, const struct config *config, struct error *err)
{
    int64_t step = 1, first = 0, frequency = 1;
    const json_t *mlp_only = NULL;
    enum expert_layers rule = config->family->experts->layers;
    int rc = 0;
    if (rule == EXPERTS_BY_STEP &&
        (rc = config_int(&step, config, "decoder_sparse_step", 0, 1 << 20, JSON_OPTIONAL, err)))
        return rc;
    if (rule == EXPERTS_BY_STEP &&
        (rc = json_file_get_array(&mlp_only, &config->json, "mlp_only_layers", JSON_OPTIONAL, err)))
        return rc;
    if (rule == EXPERTS_BEHIND_DENSE &&
        ((rc = config_int(&first, config, "first_k_dense_replace", 0, 1 << 20, JSON_OPTIONAL, err)) ||
         (rc = config_int(&frequency, config, "moe_layer_freq", 0, 1 << 20, JSON_OPTIONAL, err))))
        return rc;
    if (frequency != 1)
        return error_set(err, ERR_MODEL, "%s: moe_layer_freq %lld is not supported, only 1", config->json.file_name,
                         (long long)frequency);
    for (int64_t layer = 0; layer < model->num_layers; layer++)
        if (layer >= first && step > 0 && (layer + 1) % step == 0 && !lists(mlp_only, layer))
            model->layer_flags[layer] |= LAYER_EXPERTS;
    return 0;
}

static int parse_shared(struct experts_desc *out, const struct config *config, struct error *err)
{
    const struct family_experts *family = config->family->experts;
    int64_t count = 0;
    int rc = 0;
    if (family->shared_size_key)
        rc = config_int(&out->shared_size, config, family->shared_size_key, 0, MAX_INTERMEDIATE, JSON_REQUIRED, err);
    else if (family->shared_count)
        rc = config_int(&count, config, "n_shared_experts", 0, 1024, JSON_OPTIONAL, err);
    if (family->shared_count)
        out->shared_size = count * out->expert_size;
    out->shared_gate = family->shared_gate && out->shared_size > 0;
    return rc;
}

static int check_word(const struct config *config, const char *key, const char *const *words, const char **found,
                      struct error *err)
{
    *found = words[0];
    int rc = json_file_get_string(found, &config->json, key, JSON_OPTIONAL, err);
    for (int i = 0; !rc && words[i]; i++)
        if (strcmp(words[i], *found) == 0)
            return 0;
    return rc ? rc
              : error_set(err, ERR_MODEL, "%s: %s \"%.40s\" is not supported for this architecture, only \"%s\"%s%s%s",
                          config->json.file_name, key, *found, words[0], words[1] ? " and \"" : "",
                          words[1] ? words[1] : "", words[1] ? "\"" : "");
}

// Only the best groups count: DeepSeek V2 rates a group by its best expert, V3 by its two best.
static int parse_groups(struct experts_desc *out, const struct config *config, struct error *err)
{
    static const char *const v2_methods[] = {"greedy", "group_limited_greedy", NULL};
    static const char *const v3_methods[] = {"noaux_tc", NULL};
    static const char *const softmax[] = {"softmax", NULL}, *const sigmoid[] = {"sigmoid", NULL};
    bool v3 = out->router == ROUTER_SIGMOID;
    const char *method, *scoring;
    int rc;
    if ((rc = check_word(config, "topk_method", v3 ? v3_methods : v2_methods, &method, err)) ||
        (rc = check_word(config, "scoring_func", v3 ? sigmoid : softmax, &scoring, err)) ||
        (rc = config_number(&out->scale, config, "routed_scaling_factor", 1e-6, 1e6, JSON_OPTIONAL, err)))
        return rc;
    if (strcmp(method, "greedy") == 0)
        return 0;
    if ((rc = config_int(&out->num_groups, config, "n_group", 1, out->num_experts, JSON_REQUIRED, err)) ||
        (rc = config_int(&out->groups_per_token, config, "topk_group", 1, out->num_groups, JSON_REQUIRED, err)))
        return rc;
    out->group_members = v3 && out->num_groups > 1 ? 2 : 1;
    return 0;
}

int config_experts(struct model_desc *model, const struct config *config, struct error *err)
{
    const struct family_experts *family = config->family->experts;
    struct experts_desc experts = {.scale = 1, .num_groups = 1, .groups_per_token = 1, .group_members = 1};
    bool normalise = false;
    int64_t dense = 0;
    int rc;
    if (!family)
        return 0;
    experts.router = family->router;
    experts.router_bias = family->router_bias;
    experts.choice_bias = family->choice_bias;
    experts.bias = family->bias;
    if ((rc = config_int(&experts.num_experts, config, family->count_key, 1, MODEL_MAX_EXPERTS, JSON_REQUIRED, err)) ||
        (rc = config_int(&experts.experts_per_token, config, "num_experts_per_tok", 1, MODEL_MAX_EXPERTS_PER_TOKEN,
                         JSON_REQUIRED, err)) ||
        (rc = config_int(&experts.expert_size, config, family->size_key, 1, MAX_INTERMEDIATE, JSON_REQUIRED, err)) ||
        (rc = config_bool(&normalise, config, "norm_topk_prob", err)) || (rc = parse_shared(&experts, config, err)) ||
        (family->groups && (rc = parse_groups(&experts, config, err))) || (rc = parse_layers(model, config, err)))
        return rc;
    if (family->normalise == NORMALISE_NEVER && normalise)
        return error_set(err, ERR_MODEL, "%s: norm_topk_prob is not supported for this architecture",
                         config->json.file_name);
    experts.normalise = family->normalise == NORMALISE_ALWAYS || normalise;
    for (int64_t layer = 0; layer < model->num_layers; layer++)
        dense += !(model->layer_flags[layer] & LAYER_EXPERTS);
    if (dense == 0)
        model->intermediate_size = 0;
    if (dense < model->num_layers)
        model->experts = experts;
    return 0;
}
