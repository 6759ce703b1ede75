// See rope.h. The formulas are those of transformers' modeling_rope_utils.
#include "shard/rope.h"

#include <math.h>
#include <string.h>

enum { ROPE_MAX_CONTEXT = 1 << 30 };

static int parse_llama3(struct rope *out, const struct json_object *scaling, int64_t context, struct error *err)
{
    int rc;
    out->original_context = context;
    if ((rc = json_file_get_number(&out->low_freq_factor, scaling, "low_freq_factor", 1e-3, 1e6, JSON_REQUIRED, err)) ||
        (rc = json_file_get_number(&out->high_freq_factor, scaling, "high_freq_factor", 1e-3, 1e6, JSON_REQUIRED,
                                   err)) ||
        (rc = json_file_get_int(&out->original_context, scaling, "original_max_position_embeddings", 1,
                                ROPE_MAX_CONTEXT, JSON_OPTIONAL, err)))
        return rc;
    if (!(out->high_freq_factor > out->low_freq_factor))
        return error_set(err, ERR_MODEL, "%s: %shigh_freq_factor (%g) must be larger than low_freq_factor (%g)",
                         scaling->file_name, scaling->path, out->high_freq_factor, out->low_freq_factor);
    return 0;
}

static int parse_scaling(struct rope *out, const struct json_object *scaling, int64_t context, struct error *err)
{
    int rc;
    const char *type = "default";
    if ((rc = json_file_get_string(&type, scaling, "type", JSON_OPTIONAL, err)) || // the older spelling
        (rc = json_file_get_string(&type, scaling, "rope_type", JSON_OPTIONAL, err)))
        return rc;
    if (strcmp(type, "default") == 0)
        return 0;
    if (strcmp(type, "linear") == 0)
        out->scaling = ROPE_LINEAR;
    else if (strcmp(type, "llama3") == 0)
        out->scaling = ROPE_LLAMA3;
    else
        return error_set(err, ERR_MODEL,
                         "%s: rope scaling of type \"%s\" is not supported (known: default, linear, llama3)",
                         scaling->file_name, type);
    rc = json_file_get_number(&out->factor, scaling, "factor", 1e-3, 1e6, JSON_REQUIRED, err);
    if (rc || out->scaling == ROPE_LINEAR)
        return rc;
    return parse_llama3(out, scaling, context, err);
}

static int refuse_partial_rotary(const struct json_object *object, struct error *err)
{
    double share = 1;
    int rc = json_file_get_number(&share, object, "partial_rotary_factor", 0, 1, JSON_OPTIONAL, err);
    if (!rc && share != 1)
        return error_set(err, ERR_MODEL, "%s: %spartial_rotary_factor %g is not supported, only 1", object->file_name,
                         object->path, share);
    return rc;
}

int rope_parse(struct rope *out, const struct json_object *config, int64_t context, struct error *err)
{
    int rc;
    struct rope rope = {.scaling = ROPE_PLAIN, .theta = 10000, .factor = 1};
    struct json_object parameters = {0}, scaling = {0};
    if ((rc = json_file_get_number(&rope.theta, config, "rope_theta", 1, 1e15, JSON_OPTIONAL, err)) ||
        (rc = refuse_partial_rotary(config, err)) ||
        (rc = json_file_get_object(&parameters, config, "rope_parameters", JSON_OPTIONAL, err)) ||
        (rc = json_file_get_object(&scaling, config, "rope_scaling", JSON_OPTIONAL, err)))
        return rc;
    if (parameters.json) {
        if ((rc = json_file_get_number(&rope.theta, &parameters, "rope_theta", 1, 1e15, JSON_OPTIONAL, err)) ||
            (rc = refuse_partial_rotary(&parameters, err)))
            return rc;
        scaling = parameters;
    }
    if (scaling.json && (rc = parse_scaling(&rope, &scaling, context, err)))
        return rc;
    *out = rope;
    return 0;
}

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

void rope_inv_freq(float *out, const struct rope *rope, int64_t head_dim)
{
    for (int64_t i = 0; i < head_dim / 2; i++) {
        double frequency = pow(rope->theta, -2.0 * (double)i / (double)head_dim);
        if (rope->scaling == ROPE_LINEAR)
            frequency /= rope->factor;
        else if (rope->scaling == ROPE_LLAMA3)
            frequency = llama3_frequency(frequency, rope);
        out[i] = (float)frequency;
    }
}
