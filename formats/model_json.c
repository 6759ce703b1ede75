// See model_json.h.
#include "formats/model_json.h"

#include <assert.h>
#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <string.h>

enum field_type {
    FIELD_INT,           // int64_t, required
    FIELD_OPTIONAL_INT,  // int64_t, -1 and left out where there is none
    FIELD_POSITIVE_INT,  // int64_t, 0 and left out where there is none
    FIELD_REAL,          // double, required
    FIELD_OPTIONAL_REAL, // double, NaN and left out where there is none
    FIELD_POSITIVE_REAL, // double, 0 and left out where there is none
    FIELD_BOOL,
    FIELD_WORD,   // an enumeration, by name
    FIELD_TEXT,   // char[MODEL_NAME_BYTES]
    FIELD_EOS,    // eos_token_ids and num_eos
    FIELD_LAYERS, // layer_flags: one hexadecimal digit a layer
};

static const char *const qk_norm_words[] = {"none", "head", "full", NULL};
static const char *const activation_words[] = {"silu", "gelu_tanh", "gpt_oss", NULL};
static const char *const router_words[] = {"softmax", "chosen_softmax", "sigmoid", NULL};

#define INT_MAX_DIM 0x7fffffff
#define AT(member) offsetof(struct model_desc, member)

// Sorted by name, as in the text. Ranges are inclusive.
static const struct field {
    const char *name;
    enum field_type type;
    size_t offset;
    double min, max;
    const char *const *words;
} fields[] = {
    {"activation", FIELD_WORD, AT(activation), 0, 0, activation_words},
    {"architecture", FIELD_TEXT, AT(architecture), 0, 0, NULL},
    {"attention_scale", FIELD_REAL, AT(attention_scale), DBL_MIN, 1e6, NULL},
    {"attention_softcap", FIELD_REAL, AT(attention_softcap), 0, 1e6, NULL},
    {"bos_token_id", FIELD_OPTIONAL_INT, AT(bos_token_id), 0, INT_MAX_DIM, NULL},
    {"context", FIELD_INT, AT(context), 1, INT_MAX_DIM, NULL},
    {"default_repetition_penalty", FIELD_OPTIONAL_REAL, AT(default_repetition_penalty), DBL_MIN, 1e6, NULL},
    {"default_temperature", FIELD_OPTIONAL_REAL, AT(default_temperature), 0, 1e6, NULL},
    {"default_top_k", FIELD_OPTIONAL_INT, AT(default_top_k), 0, INT_MAX_DIM, NULL},
    {"default_top_p", FIELD_OPTIONAL_REAL, AT(default_top_p), 0, 1, NULL},
    {"embedding_scale", FIELD_REAL, AT(embedding_scale), DBL_MIN, 1e6, NULL},
    {"eos_token_ids", FIELD_EOS, AT(eos_token_ids), 0, INT_MAX_DIM, NULL},
    {"expert_bias", FIELD_BOOL, AT(experts.bias), 0, 0, NULL},
    {"expert_groups", FIELD_INT, AT(experts.num_groups), 0, MODEL_MAX_EXPERTS, NULL},
    {"expert_groups_per_token", FIELD_INT, AT(experts.groups_per_token), 0, MODEL_MAX_EXPERTS, NULL},
    {"expert_size", FIELD_INT, AT(experts.expert_size), 0, INT_MAX_DIM, NULL},
    {"experts_per_token", FIELD_INT, AT(experts.experts_per_token), 0, MODEL_MAX_EXPERTS_PER_TOKEN, NULL},
    {"head_dim", FIELD_INT, AT(head_dim), 2, MODEL_MAX_LATENT_HEAD_DIM, NULL},
    {"hidden_size", FIELD_INT, AT(hidden_size), 1, INT_MAX_DIM, NULL},
    {"intermediate_size", FIELD_INT, AT(intermediate_size), 0, INT_MAX_DIM, NULL},
    {"latent_kv_rank", FIELD_INT, AT(latent.kv_rank), 0, MODEL_MAX_LATENT_KEY_DIM, NULL},
    {"latent_nope_dim", FIELD_INT, AT(latent.nope_dim), 0, MODEL_MAX_LATENT_HEAD_DIM, NULL},
    {"latent_norm_eps", FIELD_POSITIVE_REAL, AT(latent.norm_eps), DBL_MIN, 1, NULL},
    {"latent_q_rank", FIELD_INT, AT(latent.q_rank), 0, INT_MAX_DIM, NULL},
    {"latent_rope_dim", FIELD_INT, AT(latent.rope_dim), 0, MODEL_MAX_LATENT_HEAD_DIM, NULL},
    {"latent_v_dim", FIELD_INT, AT(latent.v_dim), 0, MODEL_MAX_LATENT_HEAD_DIM, NULL},
    {"layers", FIELD_LAYERS, AT(layer_flags), 0, 0, NULL},
    {"logit_scale", FIELD_REAL, AT(logit_scale), DBL_MIN, 1e6, NULL},
    {"logit_softcap", FIELD_REAL, AT(logit_softcap), 0, 1e6, NULL},
    {"mlp_bias", FIELD_BOOL, AT(mlp_bias), 0, 0, NULL},
    {"mlp_rotation", FIELD_POSITIVE_INT, AT(mlp_rotation), 2, MODEL_MAX_ROTATION, NULL},
    {"norm_eps", FIELD_REAL, AT(norm_eps), 0, 1, NULL},
    {"num_experts", FIELD_INT, AT(experts.num_experts), 0, MODEL_MAX_EXPERTS, NULL},
    {"num_heads", FIELD_INT, AT(num_heads), 1, 65536, NULL},
    {"num_kv_heads", FIELD_INT, AT(num_kv_heads), 1, 65536, NULL},
    {"num_layers", FIELD_INT, AT(num_layers), 1, MODEL_MAX_LAYERS, NULL},
    {"o_bias", FIELD_BOOL, AT(o_bias), 0, 0, NULL},
    {"post_norms", FIELD_BOOL, AT(post_norms), 0, 0, NULL},
    {"pre_norms", FIELD_BOOL, AT(pre_norms), 0, 0, NULL},
    {"qk_norm", FIELD_WORD, AT(qk_norm), 0, 0, qk_norm_words},
    {"qkv_bias", FIELD_BOOL, AT(qkv_bias), 0, 0, NULL},
    {"residual_scale", FIELD_REAL, AT(residual_scale), DBL_MIN, 1e6, NULL},
    {"rope_attention_factor", FIELD_REAL, AT(rope_attention_factor), DBL_MIN, 1e6, NULL},
    {"rope_original_context", FIELD_INT, AT(rope_original_context), 0, INT_MAX_DIM, NULL},
    {"rotary_dim", FIELD_INT, AT(rotary_dim), 2, MODEL_MAX_LATENT_HEAD_DIM, NULL},
    {"rotary_interleaved", FIELD_BOOL, AT(rotary_interleaved), 0, 0, NULL},
    {"router", FIELD_WORD, AT(experts.router), 0, 0, router_words},
    {"router_bias", FIELD_BOOL, AT(experts.router_bias), 0, 0, NULL},
    {"router_choice_bias", FIELD_BOOL, AT(experts.choice_bias), 0, 0, NULL},
    {"router_group_members", FIELD_INT, AT(experts.group_members), 0, MODEL_MAX_EXPERTS, NULL},
    {"router_normalise", FIELD_BOOL, AT(experts.normalise), 0, 0, NULL},
    {"router_scale", FIELD_REAL, AT(experts.scale), 0, 1e6, NULL},
    {"shared_gate", FIELD_BOOL, AT(experts.shared_gate), 0, 0, NULL},
    {"shared_size", FIELD_INT, AT(experts.shared_size), 0, INT_MAX_DIM, NULL},
    {"sinks", FIELD_BOOL, AT(sinks), 0, 0, NULL},
    {"sliding_window", FIELD_INT, AT(sliding_window), 0, INT_MAX_DIM, NULL},
    {"tied_embeddings", FIELD_BOOL, AT(tied_embeddings), 0, 0, NULL},
    {"vocab_size", FIELD_INT, AT(vocab_size), 1, INT_MAX_DIM, NULL},
};
enum { FIELD_COUNT = sizeof fields / sizeof *fields, LAYER_FLAGS_KNOWN = 15 };
_Static_assert(sizeof(enum router) == sizeof(int), "words are stored as int");
_Static_assert(MODEL_MAX_HEAD_DIM == 256 && MODEL_MAX_LATENT_KEY_DIM == 640, "the sentences of check_attention");

// ---- checks ---------------------------------------------------------------------------------------------------------

static int layers_with(const struct model_desc *model, uint8_t flag)
{
    int count = 0;
    for (int64_t layer = 0; layer < model->num_layers; layer++)
        count += (model->layer_flags[layer] & flag) != 0;
    return count;
}

static bool check_experts(const struct model_desc *model, char *problem, size_t bytes)
{
    const struct experts_desc *experts = &model->experts;
    static const struct experts_desc none;
    int layers = layers_with(model, LAYER_EXPERTS);
    const char *wrong = NULL;
    if (experts->num_experts == 0) {
        if (layers > 0)
            wrong = "layers with experts need num_experts above 0";
        else if (experts->experts_per_token || experts->expert_size || experts->shared_size || experts->shared_gate ||
                 experts->router != none.router || experts->normalise || experts->scale != 0 || experts->num_groups ||
                 experts->groups_per_token || experts->group_members || experts->router_bias || experts->choice_bias ||
                 experts->bias)
            wrong = "num_experts is 0, but other fields describe experts";
    } else if (layers == 0) {
        wrong = "num_experts is above 0, but no layer has any";
    } else if (experts->experts_per_token < 1 || experts->experts_per_token > experts->num_experts) {
        wrong = "experts_per_token must be from 1 to num_experts";
    } else if (experts->expert_size < 1 || !(experts->scale > 0)) {
        wrong = "expert_size and router_scale must be above 0";
    } else if (experts->num_groups < 1 || experts->num_experts % experts->num_groups) {
        wrong = "expert_groups must divide num_experts";
    } else if (experts->groups_per_token < 1 || experts->groups_per_token > experts->num_groups ||
               experts->groups_per_token * (experts->num_experts / experts->num_groups) < experts->experts_per_token) {
        wrong = "expert_groups_per_token must be from 1 to expert_groups and hold experts_per_token experts";
    } else if (experts->group_members < 1 || experts->group_members > experts->num_experts / experts->num_groups) {
        wrong = "router_group_members must be from 1 to the experts of a group";
    } else if (experts->shared_gate && experts->shared_size == 0) {
        wrong = "shared_gate needs a shared_size above 0";
    }
    if (!wrong && model->intermediate_size == 0 && layers < model->num_layers)
        wrong = "intermediate_size must be above 0 where layers have no experts";
    if (wrong)
        snprintf(problem, bytes, "%s", wrong);
    return !wrong;
}

static bool check_attention(const struct model_desc *model, char *problem, size_t bytes)
{
    const struct latent_desc *latent = &model->latent;
    const char *wrong = NULL;
    if (model->num_heads % model->num_kv_heads) {
        snprintf(problem, bytes, "num_kv_heads must divide num_heads, found %" PRId64 " and %" PRId64,
                 model->num_kv_heads, model->num_heads);
        return false;
    }
    if (model->head_dim % 2) {
        snprintf(problem, bytes, "head_dim must be even, found %" PRId64, model->head_dim);
        return false;
    }
    if (model->rotary_dim % 2 || model->rotary_dim > model->head_dim)
        wrong = "rotary_dim must be even and at most head_dim";
    else if (latent->kv_rank == 0 &&
             (latent->q_rank || latent->nope_dim || latent->rope_dim || latent->v_dim || latent->norm_eps != 0))
        wrong = "latent_kv_rank is 0, but other fields describe latent attention";
    else if (latent->kv_rank == 0 && model->head_dim > MODEL_MAX_HEAD_DIM)
        wrong = "head_dim must be at most 256";
    else if (latent->kv_rank + latent->rope_dim > MODEL_MAX_LATENT_KEY_DIM)
        wrong = "latent_kv_rank + latent_rope_dim must be at most 640";
    else if (latent->kv_rank > 0 &&
             (latent->nope_dim < 1 || latent->rope_dim < 1 || latent->v_dim < 1 ||
              latent->nope_dim + latent->rope_dim != model->head_dim || latent->rope_dim != model->rotary_dim))
        wrong = "latent_nope_dim + latent_rope_dim must be head_dim, latent_rope_dim rotary_dim, latent_v_dim above 0";
    else if (latent->kv_rank > 0 && (model->num_kv_heads != model->num_heads || model->qk_norm != QK_NORM_NONE))
        wrong = "latent attention has as many kv heads as heads, and no qk_norm";
    else if ((model->sliding_window > 0) != (layers_with(model, LAYER_WINDOW) > 0))
        wrong = "sliding_window must be above 0 where layers use it, and 0 where none does";
    if (wrong)
        snprintf(problem, bytes, "%s", wrong);
    return !wrong;
}

// A block that is cut by no end of a matrix. Shares are the engine's to check.
static bool check_rotation(const struct model_desc *model, char *problem, size_t bytes)
{
    int64_t block = model->mlp_rotation;
    if (block == 0 || ((block & (block - 1)) == 0 && model->intermediate_size % block == 0 &&
                       model->experts.expert_size % block == 0 && model->experts.shared_size % block == 0))
        return true;
    snprintf(problem, bytes, "mlp_rotation must be a power of two that divides the intermediate sizes, found %" PRId64,
             block);
    return false;
}

bool model_json_check(const struct model_desc *model, char *problem, size_t problem_bytes)
{
    return check_attention(model, problem, problem_bytes) && check_experts(model, problem, problem_bytes) &&
           check_rotation(model, problem, problem_bytes);
}

// ---- writing --------------------------------------------------------------------------------------------------------

void model_json_emit(struct json_emit *to, const struct model_desc *model)
{
    json_emit_open(to, "model", '{');
    for (int i = 0; i < FIELD_COUNT; i++) {
        const struct field *field = &fields[i];
        const void *value = (const char *)model + field->offset;
        char layers[MODEL_MAX_LAYERS + 1] = "";
        switch (field->type) {
        case FIELD_INT:
            json_emit_int(to, field->name, *(const int64_t *)value);
            break;
        case FIELD_OPTIONAL_INT:
            if (*(const int64_t *)value >= 0)
                json_emit_int(to, field->name, *(const int64_t *)value);
            break;
        case FIELD_POSITIVE_INT:
            if (*(const int64_t *)value != 0)
                json_emit_int(to, field->name, *(const int64_t *)value);
            break;
        case FIELD_REAL:
            json_emit_real(to, field->name, *(const double *)value);
            break;
        case FIELD_OPTIONAL_REAL:
            if (!isnan(*(const double *)value))
                json_emit_real(to, field->name, *(const double *)value);
            break;
        case FIELD_POSITIVE_REAL:
            if (*(const double *)value != 0)
                json_emit_real(to, field->name, *(const double *)value);
            break;
        case FIELD_BOOL:
            json_emit_bool(to, field->name, *(const bool *)value);
            break;
        case FIELD_WORD:
            json_emit_string(to, field->name, field->words[*(const int *)value]);
            break;
        case FIELD_TEXT:
            json_emit_string(to, field->name, value);
            break;
        case FIELD_EOS:
            json_emit_open(to, field->name, '[');
            for (int k = 0; k < model->num_eos; k++)
                json_emit_int(to, NULL, model->eos_token_ids[k]);
            json_emit_close(to, ']');
            break;
        case FIELD_LAYERS:
            for (int64_t layer = 0; layer < model->num_layers && layer < MODEL_MAX_LAYERS; layer++)
                layers[layer] = "0123456789abcdef"[model->layer_flags[layer] & LAYER_FLAGS_KNOWN];
            json_emit_string(to, field->name, layers);
            break;
        }
    }
    json_emit_close(to, '}');
}

// ---- reading --------------------------------------------------------------------------------------------------------

static int parse_eos(struct model_desc *model, const struct json_object *object, const struct field *field,
                     struct error *err)
{
    const json_t *ids = NULL;
    int rc = json_file_get_array(&ids, object, field->name, JSON_REQUIRED, err);
    if (rc)
        return rc;
    if (json_array_size(ids) > MODEL_MAX_EOS)
        return error_set(err, object->bad_code, "%s: %s%s must hold at most %d ids, found %zu", object->file_name,
                         object->path, field->name, MODEL_MAX_EOS, json_array_size(ids));
    for (size_t i = 0; i < json_array_size(ids); i++) {
        const json_t *id = json_array_get(ids, i);
        int64_t value = json_is_integer(id) ? json_integer_value(id) : -1;
        if (value < (int64_t)field->min || value > (int64_t)field->max)
            return error_set(err, object->bad_code, "%s: %s%s[%zu] must be a token id", object->file_name, object->path,
                             field->name, i);
        model->eos_token_ids[model->num_eos++] = value;
    }
    return 0;
}

static int parse_layers(struct model_desc *model, const struct json_object *object, const struct field *field,
                        struct error *err)
{
    const char *text = NULL;
    int rc = json_file_get_string(&text, object, field->name, JSON_REQUIRED, err);
    if (rc)
        return rc;
    size_t layers = strspn(text, "0123456789abcdef");
    if (text[layers] || layers > MODEL_MAX_LAYERS)
        return error_set(err, object->bad_code, "%s: %s%s must be one of 0 to 9 and a to f for each layer",
                         object->file_name, object->path, field->name);
    for (size_t i = 0; i < layers; i++)
        model->layer_flags[i] = (uint8_t)(text[i] <= '9' ? text[i] - '0' : text[i] - 'a' + 10);
    return 0;
}

static int parse_word(int *value, const struct json_object *object, const struct field *field, struct error *err)
{
    const char *text = NULL;
    int rc = json_file_get_string(&text, object, field->name, JSON_REQUIRED, err);
    if (rc)
        return rc;
    for (int i = 0; field->words[i]; i++)
        if (strcmp(text, field->words[i]) == 0) {
            *value = i;
            return 0;
        }
    return error_set(err, object->bad_code, "%s: %s%s must be %s or the like, found %.40s", object->file_name,
                     object->path, field->name, field->words[0], text);
}

static int parse_text(char *value, const struct json_object *object, const struct field *field, struct error *err)
{
    const char *text = NULL;
    int rc = json_file_get_string(&text, object, field->name, JSON_REQUIRED, err);
    if (rc)
        return rc;
    size_t clean = 0;
    while ((unsigned char)text[clean] >= 0x20 && text[clean] != 0x7f)
        clean++;
    if (text[clean] || clean >= MODEL_NAME_BYTES)
        return error_set(err, object->bad_code, "%s: %s%s must be at most %d bytes without control characters",
                         object->file_name, object->path, field->name, MODEL_NAME_BYTES - 1);
    memcpy(value, text, clean + 1);
    return 0;
}

static int parse_field(struct model_desc *model, const struct json_object *object, const struct field *field,
                       struct error *err)
{
    void *value = (char *)model + field->offset;
    enum json_need need = JSON_REQUIRED;
    switch (field->type) {
    case FIELD_OPTIONAL_INT:
    case FIELD_POSITIVE_INT:
        *(int64_t *)value = field->type == FIELD_OPTIONAL_INT ? -1 : 0;
        need = JSON_OPTIONAL;
        // fallthrough
    case FIELD_INT:
        return json_file_get_int(value, object, field->name, (int64_t)field->min, (int64_t)field->max, need, err);
    case FIELD_OPTIONAL_REAL:
    case FIELD_POSITIVE_REAL:
        *(double *)value = field->type == FIELD_OPTIONAL_REAL ? NAN : 0;
        need = JSON_OPTIONAL;
        // fallthrough
    case FIELD_REAL:
        return json_file_get_number(value, object, field->name, field->min, field->max, need, err);
    case FIELD_BOOL:
        return json_file_get_bool(value, object, field->name, JSON_REQUIRED, err);
    case FIELD_WORD:
        return parse_word(value, object, field, err);
    case FIELD_TEXT:
        return parse_text(value, object, field, err);
    case FIELD_EOS:
        return parse_eos(model, object, field, err);
    case FIELD_LAYERS:
        return parse_layers(model, object, field, err);
    }
    return 0;
}

int model_json_parse(struct model_desc *out, const struct json_object *object, struct error *err)
{
    char problem[160];
    const json_t *layers;
    const char *names[FIELD_COUNT + 1] = {NULL};
    for (int i = 0; i < FIELD_COUNT; i++)
        names[i] = fields[i].name;
    int rc = json_file_check_keys(object, names, err);
    for (int i = 0; i < FIELD_COUNT && !rc; i++)
        rc = parse_field(out, object, &fields[i], err);
    if (rc)
        return rc;
    layers = json_object_get(object->json, "layers");
    if ((int64_t)json_string_length(layers) != out->num_layers)
        return error_set(err, object->bad_code, "%s: %slayers speaks of %zu layers, num_layers of %" PRId64,
                         object->file_name, object->path, json_string_length(layers), out->num_layers);
    if (!model_json_check(out, problem, sizeof problem))
        return error_set(err, object->bad_code, "%s: %s%s", object->file_name, object->path, problem);
    return 0;
}
