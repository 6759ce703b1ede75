// See rope.h. The formulas are those of transformers' modeling_rope_utils.
#include "shard/rope.h"

#include <math.h>
#include <string.h>

enum { ROPE_MAX_CONTEXT = 1 << 30 };

// ---- reading -----------------------------------------------------------------------------------------------------

static double yarn_mscale(double factor, double mscale) { return factor <= 1 ? 1 : 0.1 * mscale * log(factor) + 1; }

// A factor for each pair.
static int parse_factors(double out[ROPE_MAX_PAIRS], const struct json_object *scaling, const char *key, int64_t pairs,
                         struct error *err)
{
    const json_t *list = NULL;
    int rc = json_file_get_array(&list, scaling, key, JSON_REQUIRED, err);
    if (rc)
        return rc;
    if ((int64_t)json_array_size(list) != pairs)
        return error_set(err, ERR_MODEL, "%s: %s%s must hold a number for each of %lld pairs, found %zu",
                         scaling->file_name, scaling->path, key, (long long)pairs, json_array_size(list));
    for (int64_t i = 0; i < pairs; i++) {
        const json_t *item = json_array_get(list, (size_t)i);
        out[i] = json_is_number(item) ? json_number_value(item) : 0;
        if (!(out[i] >= 1e-3 && out[i] <= 1e6))
            return error_set(err, ERR_MODEL, "%s: %s%s[%lld] must be a number from 0.001 to 1000000",
                             scaling->file_name, scaling->path, key, (long long)i);
    }
    return 0;
}

static int parse_llama3(struct rope *out, const struct json_object *scaling, struct error *err)
{
    int rc;
    if ((rc = json_file_get_number(&out->low_freq_factor, scaling, "low_freq_factor", 1e-3, 1e6, JSON_REQUIRED, err)) ||
        (rc = json_file_get_number(&out->high_freq_factor, scaling, "high_freq_factor", 1e-3, 1e6, JSON_REQUIRED, err)))
        return rc;
    if (!(out->high_freq_factor > out->low_freq_factor))
        return error_set(err, ERR_MODEL, "%s: %shigh_freq_factor (%g) must be larger than low_freq_factor (%g)",
                         scaling->file_name, scaling->path, out->high_freq_factor, out->low_freq_factor);
    return 0;
}

static int parse_yarn(struct rope *out, const struct json_object *scaling, struct error *err)
{
    int rc;
    double mscale = 0;
    out->beta_fast = 32;
    out->beta_slow = 1;
    out->truncate = true;
    if ((rc = json_file_get_number(&out->beta_fast, scaling, "beta_fast", 1e-3, 1e6, JSON_OPTIONAL, err)) ||
        (rc = json_file_get_number(&out->beta_slow, scaling, "beta_slow", 1e-3, 1e6, JSON_OPTIONAL, err)) ||
        (rc = json_file_get_bool(&out->truncate, scaling, "truncate", JSON_OPTIONAL, err)) ||
        (rc = json_file_get_number(&mscale, scaling, "mscale", 0, 1e3, JSON_OPTIONAL, err)) ||
        (rc = json_file_get_number(&out->mscale_all_dim, scaling, "mscale_all_dim", 0, 1e3, JSON_OPTIONAL, err)))
        return rc;
    if (mscale > 0 && out->mscale_all_dim > 0)
        out->attention_factor = yarn_mscale(out->factor, mscale) / yarn_mscale(out->factor, out->mscale_all_dim);
    else
        out->attention_factor = yarn_mscale(out->factor, 1);
    return 0;
}

static int parse_long(struct rope *out, const struct json_object *scaling, struct error *err)
{
    int rc;
    if ((rc = parse_factors(out->short_factor, scaling, "short_factor", out->dim / 2, err)) ||
        (rc = parse_factors(out->long_factor, scaling, "long_factor", out->dim / 2, err)))
        return rc;
    if (out->original_context < 2)
        return error_set(err, ERR_MODEL, "%s: original_max_position_embeddings must be above 1", scaling->file_name);
    if (out->factor > 1)
        out->attention_factor = sqrt(1 + log(out->factor) / log((double)out->original_context));
    return 0;
}

static int find_scaling(enum rope_scaling *out, const struct json_object *scaling, bool longrope_only,
                        struct error *err)
{
    // Beyond the model's context `dynamic` changes the base as a sequence grows; within it, and no engine goes beyond,
    // it is the plain table.
    static const struct {
        const char *name;
        enum rope_scaling scaling;
    } types[] = {
        {"default", ROPE_PLAIN}, {"dynamic", ROPE_PLAIN}, {"linear", ROPE_LINEAR},
        {"llama3", ROPE_LLAMA3}, {"yarn", ROPE_YARN},     {"longrope", ROPE_LONG},
    };
    const char *type = "default";
    int rc;
    if ((rc = json_file_get_string(&type, scaling, "type", JSON_OPTIONAL, err)) || // the older spelling
        (rc = json_file_get_string(&type, scaling, "rope_type", JSON_OPTIONAL, err)))
        return rc;
    const json_t *beta = json_object_get(scaling->json, "llama_4_scaling_beta");
    if (beta && json_number_value(beta) != 0)
        return error_set(err, ERR_MODEL,
                         "%s: %sllama_4_scaling_beta scales queries by their position, which is not supported",
                         scaling->file_name, scaling->path);
    if (json_object_get(scaling->json, "mrope_section"))
        return error_set(err, ERR_MODEL, "%s: %smrope_section (positions in several dimensions) is not supported",
                         scaling->file_name, scaling->path);
    if (longrope_only && (strcmp(type, "su") == 0 || strcmp(type, "yarn") == 0))
        type = "longrope";
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (strcmp(type, types[i].name) == 0) {
            *out = types[i].scaling;
            return 0;
        }
    return error_set(err, ERR_MODEL,
                     "%s: rope scaling of type \"%s\" is not supported (known: default, dynamic, linear, llama3, "
                     "yarn, longrope)",
                     scaling->file_name, type);
}

static int parse_scaling(struct rope *out, const struct json_object *scaling, const struct json_object *config,
                         const struct rope_defaults *defaults, struct error *err)
{
    int rc = find_scaling(&out->scaling, scaling, defaults->longrope_only, err);
    if (rc || out->scaling == ROPE_PLAIN)
        return rc;
    bool computed_factor = out->scaling == ROPE_LONG || out->scaling == ROPE_YARN;
    out->original_context = defaults->context;
    out->factor = 0;
    // Where the model says how long it was first made for outside its rope parameters, that counts.
    if ((rc = json_file_get_int(&out->original_context, scaling, "original_max_position_embeddings", 1,
                                ROPE_MAX_CONTEXT, JSON_OPTIONAL, err)) ||
        (rc = json_file_get_int(&out->original_context, config, "original_max_position_embeddings", 1, ROPE_MAX_CONTEXT,
                                JSON_OPTIONAL, err)) ||
        (rc = json_file_get_number(&out->factor, scaling, "factor", 1e-3, 1e6,
                                   computed_factor ? JSON_OPTIONAL : JSON_REQUIRED, err)))
        return rc;
    if (out->factor == 0)
        out->factor = (double)defaults->context / (double)out->original_context;
    rc = out->scaling == ROPE_LLAMA3 ? parse_llama3(out, scaling, err)
         : out->scaling == ROPE_YARN ? parse_yarn(out, scaling, err)
         : out->scaling == ROPE_LONG ? parse_long(out, scaling, err)
                                     : 0;
    if (!rc && computed_factor)
        rc = json_file_get_number(&out->attention_factor, scaling, "attention_factor", 1e-3, 1e3, JSON_OPTIONAL, err);
    return rc;
}

static int set_dim(struct rope *out, const struct json_object *config, const struct rope_defaults *defaults,
                   double share, struct error *err)
{
    out->dim = (int64_t)((double)defaults->head_dim * share);
    if (out->dim < 2 || out->dim % 2 || out->dim / 2 > ROPE_MAX_PAIRS)
        return error_set(err, ERR_MODEL,
                         "%s: partial_rotary_factor %g of %lld columns is %lld; rotary positions need pairs, 1 to %d",
                         config->file_name, share, (long long)defaults->head_dim, (long long)out->dim, ROPE_MAX_PAIRS);
    return 0;
}

// The object that holds the parameters of a layer type; .json NULL where there is none.
static int find_parameters(struct json_object *out, const struct json_object *config, const char *layer_type,
                           bool nested, struct error *err)
{
    struct json_object parameters = {0}, inner = {0};
    int rc = json_file_get_object(&parameters, config, "rope_parameters", JSON_OPTIONAL, err);
    if (rc || !parameters.json)
        return rc;
    bool by_type = json_is_object(json_object_get(parameters.json, "full_attention")) ||
                   json_is_object(json_object_get(parameters.json, "sliding_attention"));
    if (by_type && !nested)
        return error_set(err, ERR_MODEL, "%s: rope_parameters by layer type are not supported for this architecture",
                         config->file_name);
    if (by_type) {
        if ((rc = json_file_get_object(&inner, &parameters, layer_type, JSON_OPTIONAL, err)))
            return rc;
        *out = inner;
    } else if (strcmp(layer_type, "full_attention") == 0) {
        *out = parameters;
    }
    return 0;
}

int rope_parse(struct rope *out, const struct json_object *config, const struct rope_defaults *defaults,
               struct error *err)
{
    int rc;
    double share = defaults->partial_rotary_factor;
    struct rope rope = {.scaling = ROPE_PLAIN, .theta = defaults->theta, .factor = 1, .attention_factor = 1};
    struct json_object scaling = {0}, parameters = {0};
    if ((rc = json_file_get_number(&rope.theta, config, "rope_theta", 1, 1e15, JSON_OPTIONAL, err)) ||
        (rc = json_file_get_number(&share, config, "partial_rotary_factor", 0, 1, JSON_OPTIONAL, err)) ||
        (rc = json_file_get_object(&scaling, config, "rope_scaling", JSON_OPTIONAL, err)) ||
        (rc = find_parameters(&parameters, config, "full_attention", defaults->nested, err)))
        return rc;
    if (!scaling.json)
        scaling = parameters;
    if (scaling.json &&
        ((rc = json_file_get_number(&rope.theta, &scaling, "rope_theta", 1, 1e15, JSON_OPTIONAL, err)) ||
         (rc = json_file_get_number(&share, &scaling, "partial_rotary_factor", 0, 1, JSON_OPTIONAL, err))))
        return rc;
    if ((rc = set_dim(&rope, config, defaults, share, err)) ||
        (scaling.json && (rc = parse_scaling(&rope, &scaling, config, defaults, err))))
        return rc;
    *out = rope;
    return 0;
}

int rope_parse_local(struct rope *out, const struct json_object *config, const struct rope_defaults *defaults,
                     double theta, struct error *err)
{
    int rc;
    struct rope rope = {.scaling = ROPE_PLAIN, .theta = theta, .factor = 1, .attention_factor = 1};
    struct json_object parameters = {0};
    if ((rc = json_file_get_number(&rope.theta, config, "rope_local_base_freq", 1, 1e15, JSON_OPTIONAL, err)) ||
        (rc = find_parameters(&parameters, config, "sliding_attention", true, err)) ||
        (rc = set_dim(&rope, config, defaults, defaults->partial_rotary_factor, err)))
        return rc;
    if (parameters.json &&
        ((rc = json_file_get_number(&rope.theta, &parameters, "rope_theta", 1, 1e15, JSON_OPTIONAL, err)) ||
         (rc = parse_scaling(&rope, &parameters, config, defaults, err))))
        return rc;
    if (rope.scaling != ROPE_PLAIN && rope.scaling != ROPE_LINEAR)
        return error_set(err, ERR_MODEL, "%s: rope scaling of layers with a window is not supported, save linear",
                         config->file_name);
    *out = rope;
    return 0;
}

// ---- tables ------------------------------------------------------------------------------------------------------

// Long waves are slowed down by factor, short ones stay, those between go over smoothly.
static double llama3_frequency(double frequency, const struct rope *rope)
{
    double wave_tokens = 2 * M_PI / frequency;
    double context = (double)rope->original_context;
    if (wave_tokens < context / rope->high_freq_factor)
        return frequency;
    if (wave_tokens > context / rope->low_freq_factor)
        return frequency / rope->factor;
    double smooth = (context / wave_tokens - rope->low_freq_factor) / (rope->high_freq_factor - rope->low_freq_factor);
    return (1 - smooth) * frequency / rope->factor + smooth * frequency;
}

// The pair that turns so many times over the original context.
static double yarn_pair(const struct rope *rope, double turns)
{
    return (double)rope->dim * log((double)rope->original_context / (turns * 2 * M_PI)) / (2 * log(rope->theta));
}

// Pairs that turn often stay, those that turn seldom are slowed down by factor, those between go over linearly.
static double yarn_frequency(double frequency, int64_t pair, const struct rope *rope)
{
    double low = yarn_pair(rope, rope->beta_fast), high = yarn_pair(rope, rope->beta_slow);
    if (rope->truncate) {
        low = floor(low);
        high = ceil(high);
    }
    low = fmax(low, 0);
    high = fmin(high, (double)(rope->dim - 1));
    if (low == high)
        high += 0.001;
    double slowed = fmin(fmax(((double)pair - low) / (high - low), 0), 1);
    return frequency / rope->factor * slowed + frequency * (1 - slowed);
}

void rope_inv_freq(float *out, const struct rope *rope, bool long_table)
{
    for (int64_t i = 0; i < rope->dim / 2; i++) {
        double frequency = pow(rope->theta, -2.0 * (double)i / (double)rope->dim);
        switch (rope->scaling) {
        case ROPE_PLAIN:
            break;
        case ROPE_LINEAR:
            frequency /= rope->factor;
            break;
        case ROPE_LLAMA3:
            frequency = llama3_frequency(frequency, rope);
            break;
        case ROPE_YARN:
            frequency = yarn_frequency(frequency, i, rope);
            break;
        case ROPE_LONG:
            frequency /= long_table ? rope->long_factor[i] : rope->short_factor[i];
            break;
        }
        out[i] = (float)frequency;
    }
}

double rope_attention_scale(const struct rope *rope)
{
    double mscale = rope->mscale_all_dim > 0 ? yarn_mscale(rope->factor, rope->mscale_all_dim) : 1;
    return mscale * mscale;
}
