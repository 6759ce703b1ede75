// See own_plan.h.
#include "shard/own_plan.h"

#include "formats/checkpoint.h"
#include "formats/file_io.h"
#include "formats/json_file.h"
#include "shard/checkpoint_source.h"
#include "shard/families.h"
#include "shard/family_tables.h"
#include "shard/hf_config.h"
#include "shard/plan.h"
#include "shard/text.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_RULES = 4096, MODULE_BYTES = 160, MAX_PATTERN_BYTES = 120, SHOWN = 5 };

// What a strategy means for the weights. How inputs and outputs travel is the engine's own matter.
enum meaning {
    CUT_ROWS,
    CUT_COLUMNS,
    CUT_NOTHING,
    WHOLE_EXPERTS,
    NO_WEIGHTS
}; // NO_WEIGHTS: speaks of rows in flight alone

// The union of the names that transformers has had.
static const struct {
    const char *name;
    enum meaning meaning;
} strategies[] = {
    {"colwise", CUT_ROWS},
    {"colwise_gather_output", CUT_ROWS},
    {"colwise_rep", CUT_ROWS},
    {"packed_colwise", CUT_ROWS},
    {"embedding_rowwise", CUT_ROWS},
    {"rowwise", CUT_COLUMNS},
    {"rowwise_split_input", CUT_COLUMNS},
    {"rowwise_rep", CUT_COLUMNS},
    {"packed_rowwise", CUT_COLUMNS},
    {"embedding_colwise", CUT_COLUMNS},
    {"replicate", CUT_NOTHING},
    {"replicated_with_grad_allreduce", CUT_NOTHING},
    {"sequence_parallel", NO_WEIGHTS},
    {"all_reduce", NO_WEIGHTS},
    {"mla_kv_a_proj", NO_WEIGHTS},
    {"moe_tp_experts", NO_WEIGHTS},
    {"moe_identity_expert", NO_WEIGHTS},
    {"ep_router", NO_WEIGHTS},
    {"ep_dispatch_experts", NO_WEIGHTS},
    {"megamoe_router", NO_WEIGHTS},
    {"megamoe_experts", NO_WEIGHTS},
    {"local_params", NO_WEIGHTS},
    {"grouped_gemm", WHOLE_EXPERTS},
};

struct rule {
    char pattern[MAX_PATTERN_BYTES + 1]; // as written
    char module[MODULE_BYTES];           // "layers.*.self_attn.q_proj"
    char strategy[32];
    enum meaning meaning;
};

struct own_plan {
    struct rule *rules;
    size_t count;
    char name[256]; // for messages
};

// ---- reading -----------------------------------------------------------------------------------------------------

// The module that a name or pattern speaks of: without "model." in front and ".weight" or ".bias" behind, numbers being wildcards.
static void module_of(char out[MODULE_BYTES], const char *name)
{
    size_t at = 0;
    while (text_begins(name, "model.") || text_begins(name, "language_model."))
        name = strchr(name, '.') + 1;
    for (const char *c = name; *c && at + 1 < MODULE_BYTES;) {
        bool begins = c == name || c[-1] == '.';
        size_t digits = begins ? strspn(c, "0123456789") : 0;
        if (digits > 0 && (c[digits] == '.' || c[digits] == 0)) {
            out[at++] = '*';
            c += digits;
        } else {
            out[at++] = *c++;
        }
    }
    out[at] = 0;
    static const char *const endings[] = {"[*]", ".weight", ".bias"};
    for (size_t i = 0; i < sizeof endings / sizeof *endings; i++)
        if (text_ends(out, endings[i]))
            out[strlen(out) - strlen(endings[i])] = 0;
}

// "layers.0.mlp": all layers and all experts are cut alike.
static bool has_number(const char *pattern)
{
    for (const char *c = pattern; c; c = strchr(c, '.')) {
        c += *c == '.';
        size_t digits = strspn(c, "0123456789");
        if (digits > 0 && (c[digits] == '.' || c[digits] == 0))
            return true;
    }
    return false;
}

static bool find_strategy(struct rule *rule)
{
    for (size_t i = 0; i < sizeof strategies / sizeof *strategies; i++)
        if (strcmp(strategies[i].name, rule->strategy) == 0) {
            rule->meaning = strategies[i].meaning;
            return true;
        }
    return false;
}

// Adds a name to a list for people; after SHOWN of them only "...".
static void add_name(char *list, size_t list_bytes, int count, const char *name)
{
    size_t at = strlen(list);
    if (count <= SHOWN)
        snprintf(list + at, list_bytes - at, "%s%s", count > 1 ? ", " : "", count < SHOWN ? name : "...");
}

static int parse_rules(struct own_plan *plan, const struct json_object *root, struct error *err)
{
    const char *key;
    json_t *value;
    char unknown[256] = "";
    int num_unknown = 0;
    if (json_object_size(root->json) == 0 || json_object_size(root->json) > MAX_RULES)
        return error_set(err, ERR_USAGE, "%s: a tp_plan has 1 to %d patterns, found %zu", plan->name, MAX_RULES,
                         json_object_size(root->json));
    if (!(plan->rules = calloc(json_object_size(root->json), sizeof *plan->rules)))
        return error_set(err, ERR_MEMORY, "%s: out of memory", plan->name);
    json_object_foreach((json_t *)root->json, key, value)
    {
        struct rule *rule = &plan->rules[plan->count++];
        const char *strategy = json_string_value(value);
        size_t printable = 0;
        while (key[printable] > 0x20 && key[printable] < 0x7f)
            printable++;
        if (key[printable] || printable == 0 || printable > MAX_PATTERN_BYTES)
            return error_set(err, ERR_USAGE, "%s: a pattern is 1 to %d letters without blanks, found \"%.40s\"",
                             plan->name, MAX_PATTERN_BYTES, key);
        if (has_number(key))
            return error_set(
                err, ERR_USAGE,
                "%s: \"%s\" speaks of one layer or expert alone; all are cut alike, write * for the number", plan->name,
                key);
        if (!strategy)
            return error_set(
                err, ERR_USAGE,
                "%s: \"%s\" must be the name of a strategy, found %s; the file is one object of patterns and "
                "strategies, as in base_model_tp_plan",
                plan->name, key, json_file_type_name(value));
        snprintf(rule->pattern, sizeof rule->pattern, "%s", key);
        snprintf(rule->strategy, sizeof rule->strategy, "%s", strategy);
        module_of(rule->module, key);
        if (!find_strategy(rule))
            add_name(unknown, sizeof unknown, ++num_unknown, rule->strategy);
    }
    if (num_unknown == 0)
        return 0;
    char known[640] = "";
    for (size_t i = 0; i < sizeof strategies / sizeof *strategies; i++)
        snprintf(known + strlen(known), sizeof known - strlen(known), "%s%s", i ? ", " : "", strategies[i].name);
    return error_set(err, ERR_USAGE, "%s: no meaning is known for %s (known: %s)", plan->name, unknown, known);
}

int own_plan_parse(struct own_plan **out, const char *text, size_t bytes, const char *name, struct error *err)
{
    struct json_object root = {0};
    int rc = json_file_parse(&root, text, bytes, name, ERR_USAGE, err);
    if (rc)
        return rc;
    struct own_plan *plan = calloc(1, sizeof *plan);
    if (plan) {
        snprintf(plan->name, sizeof plan->name, "%s", name);
        rc = parse_rules(plan, &root, err);
    } else {
        rc = error_set(err, ERR_MEMORY, "%s: out of memory", name);
    }
    json_file_close(&root);
    if (rc)
        own_plan_free(plan);
    else
        *out = plan;
    return rc;
}

int own_plan_read(struct own_plan **out, const char *path, struct error *err)
{
    uint8_t *text;
    uint64_t bytes;
    int rc = file_read_all(&text, &bytes, path, JSON_FILE_CAP_BYTES, ERR_USAGE, err);
    if (rc)
        return rc;
    rc = own_plan_parse(out, (const char *)text, bytes, path, err);
    free(text);
    return rc;
}

void own_plan_free(struct own_plan *plan)
{
    if (!plan)
        return;
    free(plan->rules);
    free(plan);
}

// ---- checking ----------------------------------------------------------------------------------------------------

// transformers' modules are not always the checkpoint's: it holds the experts of a layer in one module, whatever the file calls them.
static bool names_experts(const char *module, enum tensor_role role)
{
    if (role == ROLE_ROUTER || role == ROLE_ROUTER_BIAS)
        return text_ends(module, ".mlp.gate") || text_ends(module, ".mlp.router") ||
               text_ends(module, ".block_sparse_moe.gate") || text_ends(module, ".block_sparse_moe.router");
    bool gate_up = role == ROLE_EXPERT_GATE_UP || role == ROLE_EXPERT_GATE_UP_BIAS;
    bool down = role == ROLE_EXPERT_DOWN || role == ROLE_EXPERT_DOWN_BIAS;
    if (text_ends(module, ".experts"))
        return gate_up || down;
    return gate_up ? text_ends(module, ".experts.gate_up_proj") || text_ends(module, ".experts.gate_up_proj_bias")
                   : down && (text_ends(module, ".experts.down_proj") || text_ends(module, ".experts.down_proj_bias"));
}

static bool rule_names(const struct rule *rule, const struct family_tensor *entry, const char *module)
{
    if (strcmp(rule->module, module) == 0 || names_experts(rule->module, entry->role))
        return true;
    size_t bytes = strlen(rule->module); // of a block of modules it can be said what its rows do
    return rule->meaning == NO_WEIGHTS && text_begins(module, rule->module) && module[bytes] == '.';
}

static bool is_vector(const struct family_tensor *entry)
{
    return text_ends(entry->source, "bias") || text_ends(entry->source, "bias[*]") || strstr(entry->source, "norm") ||
           entry->role == ROLE_SINKS;
}

static const char *cut_text(enum split split)
{
    return split == SPLIT_OUT ? "by rows (colwise)" : split == SPLIT_IN ? "by columns (rowwise)" : "not at all";
}

// What a rule says of one matrix must be what the engine computes with.
static int check_entry(const struct own_plan *plan, const struct rule *rule, const struct family_tensor *entry,
                       enum experts_mode *experts, bool *experts_said, struct error *err)
{
    enum split split = family_split(entry);
    bool of_experts = entry->cut == CUT_EXPERT;
    if (is_vector(entry) || rule->meaning == NO_WEIGHTS) // a vector follows its matrix
        return 0;
    if (of_experts && rule->meaning != CUT_NOTHING) {
        enum experts_mode mode = rule->meaning == WHOLE_EXPERTS ? EXPERTS_EP : EXPERTS_TP;
        if (*experts_said && *experts != mode)
            return error_set(err, ERR_USAGE,
                             "%s: \"%s\": \"%s\" and another line contradict each other: experts are dealt "
                             "out whole or cut, all of them alike",
                             plan->name, rule->pattern, rule->strategy);
        *experts = mode;
        *experts_said = true;
    }
    bool agrees = rule->meaning == CUT_ROWS      ? split == SPLIT_OUT
                  : rule->meaning == CUT_COLUMNS ? split == SPLIT_IN
                  : rule->meaning == CUT_NOTHING ? split == REPLICATE
                                                 : of_experts;
    if (agrees)
        return 0;
    return error_set(err, ERR_MODEL, "%s: \"%s\": \"%s\" cannot be followed: the engine computes with %s cut %s",
                     plan->name, rule->pattern, rule->strategy, entry->source, cut_text(split));
}

// Somewhere in the model.
static bool is_present(const struct family_tensor *entry, const struct model_desc *model)
{
    bool layers = strchr(entry->source, '*') != NULL, present = !layers && family_tensor_present(entry, model, -1);
    for (int32_t layer = 0; layers && layer < model->num_layers; layer++)
        present = present || family_tensor_present(entry, model, layer);
    return present;
}

int own_plan_check(const struct own_plan *plan, const struct model_desc *model, enum experts_mode *experts, char *note,
                   size_t note_bytes, struct error *err)
{
    const struct family *family = family_find(model->architecture);
    char list[512] = "", last[MODULE_BYTES] = "";
    bool experts_said = false;
    int rc, unmatched = 0, open = 0;
    note[0] = 0;
    if (!family)
        return error_set(err, ERR_MODEL, "architecture \"%s\" is not supported", model->architecture);
    for (size_t r = 0; r < plan->count; r++) {
        bool named = false;
        for (const struct family_tensor *entry = family->tensors; entry->source; entry++) {
            char module[MODULE_BYTES];
            module_of(module, entry->source);
            if (strcmp(entry->source, FAMILY_COMPUTED) == 0 || !rule_names(&plan->rules[r], entry, module))
                continue;
            named = true;
            if ((rc = check_entry(plan, &plan->rules[r], entry, experts, &experts_said, err)))
                return rc;
        }
        if (!named)
            add_name(list, sizeof list, ++unmatched, plan->rules[r].pattern);
    }
    if (unmatched > 0)
        return error_set(err, ERR_MODEL, "%s: of %zu patterns %d name no tensor of a %s: %s", plan->name, plan->count,
                         unmatched, model->architecture, list);
    for (const struct family_tensor *entry = family->tensors; entry->source; entry++) {
        bool named = family_split(entry) == REPLICATE || is_vector(entry) || !is_present(entry, model);
        char module[MODULE_BYTES];
        module_of(module, entry->source);
        for (size_t r = 0; r < plan->count && !named; r++)
            named = rule_names(&plan->rules[r], entry, module);
        if (!named && strcmp(module, last) != 0)
            add_name(list, sizeof list, ++open, module);
        snprintf(last, sizeof last, "%s", module);
    }
    if (open > 0)
        snprintf(note, note_bytes, "%s says nothing of %s: cut as for every %s", plan->name, list,
                 family->architecture);
    return 0;
}

// ---- unknown architectures ---------------------------------------------------------------------------------------

// Whether keys and tensors are those of the family: what cannot be read, and what would be left over, speaks against it.
static int try_family(const struct family *family, const char *model_dir, const struct checkpoint *checkpoint,
                      struct error *err)
{
    struct hf_config *config = malloc(sizeof *config);
    struct plan_options options = {.quant = {.linear = WEIGHT_BF16,
                                             .embedding = WEIGHT_BF16,
                                             .head = WEIGHT_BF16,
                                             .scales = WEIGHT_SCALES_SEARCHED},
                                   .tp_size = 1};
    struct checkpoint_source source;
    struct plan *plan = NULL;
    int rc;
    if (!config)
        return error_set(err, ERR_MEMORY, "%s: out of memory", model_dir);
    if (!(rc = hf_config_read(config, model_dir, family->architecture, err)) &&
        !(rc = plan_make(&plan, &config->model, &options, err)))
        rc = checkpoint_source_init(&source, checkpoint, plan, config, NULL, err);
    plan_free(plan);
    free(config);
    return rc;
}

int own_plan_find_family(const char **known_as, const char *model_dir, struct error *err)
{
    char path[4096];
    struct json_object json = {0};
    struct checkpoint *checkpoint = NULL;
    struct error first, other;
    *known_as = NULL;
    snprintf(path, sizeof path, "%s/config.json", model_dir);
    int rc = json_file_open(&json, path, JSON_FILE_CAP_BYTES, ERR_MODEL, err);
    if (rc)
        return rc;
    const char *name = json_string_value(json_array_get(json_object_get(json.json, "architectures"), 0));
    if (!name || family_find(name)) // known, or for hf_config to refuse
        goto done;
    if ((rc = checkpoint_open(&checkpoint, model_dir, err)))
        goto done;
    for (int i = 0; i < family_count && !*known_as; i++) {
        rc = try_family(&families[i], model_dir, checkpoint, i ? &other : &first);
        if (!rc)
            *known_as = families[i].architecture;
    }
    if (!*known_as)
        rc = error_set(err, ERR_MODEL,
                       "%s: architecture \"%.64s\" is not known, and no known one has its keys and tensors; as %s: %s",
                       model_dir, name, families[0].architecture, first.msg);
done:
    checkpoint_close(checkpoint);
    json_file_close(&json);
    return rc;
}
