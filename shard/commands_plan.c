// tpshard plan: what each rank would hold, what a token costs, and whether it fits. Reads config.json alone, so that it can be asked before
// a checkpoint is downloaded; of a quantized checkpoint that is there also what says the order of its columns. See commands.h.
#include "formats/checkpoint.h"
#include "formats/json_file.h"
#include "kernels/kv.h"
#include "shard/commands.h"
#include "shard/plan_answer.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { DEFAULT_CONTEXT = 4096 }; // tpengine's, where the model's own is not shorter

static const uint64_t NOT_SAID = UINT64_MAX;

static struct model_options model_options = MODEL_OPTIONS_DEFAULT;
static struct {
    int64_t context; // -1: not said
    const char *kv_cache;
    uint64_t gpu_memory_bytes;
    bool zstd;
    double link_gb_s; // -1: not said
    int64_t cores;    // -1: not said
} options = {.context = -1, .gpu_memory_bytes = UINT64_MAX, .link_gb_s = -1, .cores = -1};

const struct option_spec plan_options[] = {
    MODEL_OPTION_SPECS(model_options),
    {"context", OPTION_INT, &options.context, "N", 1, 1 << 30,
     "tokens of KV cache to count (default: the model's own context, or what fits the card)"},
    {"kv-cache", OPTION_CHOICE, &options.kv_cache, KV_FORMAT_CHOICES, 0, 0,
     "format of keys and values (default: bf16; with --gpu-memory fp8 where bf16 does not fit)"},
    {"gpu-memory", OPTION_BYTES, &options.gpu_memory_bytes, "BYTES", 0, 0,
     "memory of one rank's card, such as 24GiB: say whether it fits, and propose what --tp, --quant and --kv-cache "
     "leave open: weights as little changed as possible (as they are, int8, fp8, int4), then a KV cache in bf16, then "
     "the fewest ranks"},
    {"zstd", OPTION_FLAG, &options.zstd, NULL, 0, 0,
     "say how long compressed rank files would be (convert --zstd), and with --link whether a start becomes quicker"},
    {"link", OPTION_NUMBER, &options.link_gb_s, "GB/S", 0.001, 10000,
     "with --zstd: 10^9 bytes a second at which the disk or the network gives all rank files together"},
    {"cores", OPTION_INT, &options.cores, "N", 1, 4096,
     "with --zstd: cores that decode during the start (default: this machine's)"},
    {0},
};

// ---- the model ---------------------------------------------------------------------------------------------------

struct subject {
    struct hf_config config;
    struct import_config import; // how the checkpoint is quantized
    // Its tensors, where they are there and tell what config.json does not (act-order); else NULL.
    struct checkpoint *checkpoint;
    enum experts_mode experts;
    const struct model_options *wanted;
    struct mix mix;
    char mix_words[PATH_MAX + 16]; // "--bits 4.5"
};

static bool is_quantized(const struct subject *subject) { return subject->import.method != IMPORT_PLAIN; }

// A model's directory, or a config.json of any name.
static int read_subject(struct subject *subject, const char *path, struct error *err)
{
    struct error ignored; // of a checkpoint that is not there, or not yet as a whole
    struct json_object root = {0};
    struct stat status;
    bool is_file = stat(path, &status) == 0 && S_ISREG(status.st_mode);
    int rc = commands_read_model(&subject->config, &subject->experts, path, is_file, subject->wanted, err);
    if (rc)
        return rc;
    if (is_file) {
        if (!(rc = json_file_open(&root, path, JSON_FILE_CAP_BYTES, ERR_MODEL, err)))
            rc = import_config_parse(&subject->import, &root, NULL, err);
        json_file_close(&root);
        return rc;
    }
    if ((rc = import_config_read(&subject->import, path, err)))
        return rc;
    if (is_quantized(subject) && checkpoint_open(&subject->checkpoint, path, &ignored))
        subject->checkpoint = NULL;
    return 0;
}

// The word of --quant that leaves the weights as they are.
static const char *unchanged(const struct subject *subject) { return is_quantized(subject) ? "keep" : "none"; }

static int make_plan(struct plan **out, const struct subject *subject, const char *quant, uint32_t tp_size,
                     enum experts_mode experts, struct error *err)
{
    struct plan_wish wish = commands_wish(subject->wanted, experts);
    struct import *import = NULL;
    int rc = is_quantized(subject) ? import_open(&import, &subject->import, subject->checkpoint, err) : 0;
    bool mixed = strcmp(quant, FIT_MIXED) == 0;
    wish.quant = mixed ? "none" : quant;
    wish.mix = mixed ? &subject->mix.choice : NULL;
    wish.tp_size = tp_size;
    if (!rc)
        rc = plan_of_wish(out, &subject->config.model, &subject->import, import, &wish, err);
    import_close(import);
    return rc;
}

static int plan_of_way(void *arg, struct plan **out, const char *quant, uint32_t tp_size, struct error *err)
{
    const struct subject *subject = arg;
    return make_plan(out, subject, quant, tp_size, subject->experts, err);
}

// ---- the answer --------------------------------------------------------------------------------------------------

static int add_advice(struct plan_answer *answer, const struct fit_question *question, uint32_t fewer_than,
                      struct error *err)
{
    struct fit fit;
    int rc = fit_find(&fit, question, err);
    if (!rc && fit.fits && fit.way.tp_size < fewer_than)
        answer->advice[answer->num_advice++] = fit;
    if (!rc && !fit.fits)
        answer->min_ranks = fit.min_ranks;
    return rc;
}

// Each way to store the weights on its fewest ranks, where that is fewer than with the ways before it.
static int add_ladder(struct plan_answer *answer, const struct fit_question *question, uint32_t fewer_than,
                      struct error *err)
{
    struct fit_question one = *question;
    const char *quant;
    one.tp_size = 0;
    for (int i = 0; (quant = fit_quant_at(question, i)); i++) {
        one.quant = quant;
        int rc = add_advice(answer, &one, fewer_than, err);
        if (rc)
            return rc;
        if (answer->num_advice > 0)
            fewer_than = answer->advice[answer->num_advice - 1].way.tp_size;
    }
    return 0;
}

// Other ways, where they are wanted: all that was asked for does not fit, or the number of cards was left open.
static int add_others(struct plan_answer *answer, const struct fit_question *asked, struct error *err)
{
    struct fit_question question = *asked;
    int rc;
    question.quant = NULL;
    if (answer->fits)
        return asked->tp_size == 0 && !asked->quant ? add_ladder(answer, &question, answer->way.tp_size, err) : 0;
    if (asked->quant || asked->format) { // the same cards, anything else; the same weights, more cards
        if ((rc = add_advice(answer, &question, UINT32_MAX, err)))
            return rc;
        question = *asked;
        question.tp_size = 0;
        if (asked->quant && (rc = add_advice(answer, &question, UINT32_MAX, err)))
            return rc;
        question.quant = NULL;
    }
    return answer->num_advice > 0 ? 0 : add_ladder(answer, &question, UINT32_MAX, err);
}

static int check_question(const struct subject *subject, struct error *err)
{
    if (options.context > subject->config.model.context)
        return error_set(err, ERR_USAGE, "--context %lld: the model was made for at most %lld tokens",
                         (long long)options.context, (long long)subject->config.model.context);
    if (!options.zstd && (options.link_gb_s > 0 || options.cores > 0))
        return error_set(err, ERR_USAGE, "--link and --cores say something of compressed rank files: add --zstd");
    if (options.gpu_memory_bytes != NOT_SAID && memory_plan_available(options.gpu_memory_bytes) == 0)
        return error_set(err, ERR_USAGE,
                         "--gpu-memory %llu bytes: driver and context alone take %d MiB; sizes are written like 24GiB",
                         (unsigned long long)options.gpu_memory_bytes, MEMORY_PLAN_DRIVER_BYTES >> 20);
    return 0;
}

// Weights are measured where they are there.
static int make_mix(struct subject *subject, const char *path, struct error *err)
{
    const struct model_options *wanted = subject->wanted;
    struct checkpoint *checkpoint = NULL;
    struct error ignored; // of a checkpoint that is not there, or not yet as a whole
    struct stat status;
    bool is_file = stat(path, &status) == 0 && S_ISREG(status.st_mode);
    bool has_weights = !is_file && checkpoint_open(&checkpoint, path, &ignored) == 0;
    checkpoint_close(checkpoint);
    if (wanted->bits > 0)
        snprintf(subject->mix_words, sizeof subject->mix_words, "--bits %g", wanted->bits);
    else if (wanted->kinds)
        snprintf(subject->mix_words, sizeof subject->mix_words, "--kinds %s", wanted->kinds);
    return commands_make_mix(&subject->mix, &subject->config, path, has_weights, wanted, thread_pool_default_threads(),
                             err);
}

// Chooses what was left open, so that it fits where that is possible.
static int choose_way(struct plan_answer *answer, struct subject *subject, struct error *err)
{
    const struct model_options *wanted = subject->wanted;
    const struct model_desc *model = &subject->config.model;
    enum kv_format named = kv_format_from_name(options.kv_cache ? options.kv_cache : "bf16");
    const enum kv_format *format = options.kv_cache ? &named : NULL;
    bool keep = wanted->quant && strcmp(wanted->quant, "keep") == 0;
    struct fit_question question = {
        .quant = subject->mix.choice.list ? FIT_MIXED
                 : keep                   ? unchanged(subject)
                                          : wanted->quant,
        .format = format,
        .tp_size = wanted->tp > 0 ? (uint32_t)wanted->tp : 0,
        .pp_size = wanted->pp > 0 ? (uint32_t)wanted->pp : 1,
        .available_bytes = answer->available_bytes,
        .context_tokens = options.context > 0                ? options.context
                          : model->context < DEFAULT_CONTEXT ? model->context
                                                             : DEFAULT_CONTEXT,
        .unchanged = unchanged(subject),
        .plan = plan_of_way,
        .arg = subject,
    };
    struct fit fit;
    int rc = kv_format_check(model, named, err);
    if (rc)
        return rc;
    answer->way = (struct fit_way){question.quant ? question.quant : question.unchanged, format ? *format : KV_BF16,
                                   question.tp_size ? question.tp_size : 1};
    if (!answer->card_bytes)
        return 0;
    if ((rc = fit_find(&fit, &question, err)))
        return rc;
    answer->fits = fit.fits;
    answer->max_context = fit.max_context;
    answer->min_ranks = fit.min_ranks;
    if (fit.fits || !question.quant || !question.tp_size)
        answer->way = fit.way;
    if (!fit.fits && !question.tp_size)
        answer->way.tp_size = FIT_MAX_TP / question.pp_size;
    answer->proposed = !question.quant || !question.tp_size || (!format && answer->way.kv_format != KV_BF16);
    return add_others(answer, &question, err);
}

// The same ways of storing with experts dealt out otherwise.
static int count_other_experts(struct plan_answer *answer, const struct subject *subject, struct error *err)
{
    struct plan *plan;
    if (answer->plan->model.experts.num_experts == 0)
        return 0;
    answer->other_experts = answer->plan->experts == EXPERTS_TP ? EXPERTS_EP : EXPERTS_TP;
    int rc = make_plan(&plan, subject, answer->way.quant, answer->way.tp_size, answer->other_experts, err);
    if (rc)
        return rc;
    for (uint32_t rank = 0; rank < plan->num_ranks; rank++) {
        struct rank_memory memory;
        memory_plan_rank(&memory, plan, rank, answer->context_tokens, answer->way.kv_format);
        if (memory.total_bytes > answer->other_largest_bytes)
            answer->other_largest_bytes = memory.total_bytes;
        if (memory.read_bytes > answer->other_read_bytes)
            answer->other_read_bytes = memory.read_bytes;
    }
    plan_free(plan);
    return 0;
}

static int find_answer(struct plan_answer *answer, struct subject *subject, struct error *err)
{
    int rc;
    if (options.gpu_memory_bytes != NOT_SAID) {
        answer->card_bytes = options.gpu_memory_bytes;
        answer->available_bytes = memory_plan_available(answer->card_bytes);
    }
    if ((rc = choose_way(answer, subject, err)) ||
        (rc = plan_of_way(subject, &answer->plan, answer->way.quant, answer->way.tp_size, err)))
        return rc;
    int64_t own = answer->plan->model.context;
    if (answer->card_bytes) // the way may be another one than the last that was tried
        answer->max_context = memory_plan_max_context(answer->plan, answer->way.kv_format, answer->available_bytes);
    bool shorter = answer->fits && answer->max_context < own;
    answer->context_tokens = options.context > 0 ? options.context : shorter ? answer->max_context : own;
    answer->context_is = options.context > 0 ? "asked for" : shorter ? "as many as fit" : "the model's own context";
    answer->ranks = calloc(answer->plan->num_ranks, sizeof *answer->ranks);
    if (!answer->ranks)
        return error_set(err, ERR_MEMORY, "out of memory for the plan of %u ranks", answer->plan->num_ranks);
    for (uint32_t rank = 0; rank < answer->plan->num_ranks; rank++)
        memory_plan_rank(&answer->ranks[rank], answer->plan, rank, answer->context_tokens, answer->way.kv_format);
    answer->largest_bytes = memory_plan_largest(answer->plan, answer->context_tokens, answer->way.kv_format);
    answer->compress = options.zstd;
    answer->link_gb_s = options.link_gb_s > 0 ? options.link_gb_s : 0;
    answer->cores = options.cores > 0 ? options.cores : thread_pool_default_threads();
    compress_plan_make(&answer->compressed, answer->ranks, answer->plan);
    return count_other_experts(answer, subject, err);
}

// ---- JSON --------------------------------------------------------------------------------------------------------

static json_t *range_json(int64_t begin, int64_t count)
{
    return json_pack("[I,I]", (json_int_t)begin, (json_int_t)(begin + count));
}

static void set_bytes(json_t *object, const char *key, uint64_t bytes)
{
    json_object_set_new(object, key, json_integer((json_int_t)bytes));
}

static json_t *rank_json(const struct plan_answer *answer, uint32_t rank)
{
    const struct rank_memory *memory = &answer->ranks[rank];
    const struct rank_share *share = &answer->plan->ranks[rank].share;
    json_t *kinds = json_object(), *object = json_object();
    for (int kind = 0; kind < WEIGHT_KIND_COUNT; kind++)
        if (memory->kind_bytes[kind])
            set_bytes(kinds, weight_kind_name((enum weight_kind)kind), memory->kind_bytes[kind]);
    int64_t layer_begin, num_layers;
    manifest_stage(answer->plan->stage_layers, rank / answer->plan->tp_size, &layer_begin, &num_layers);
    json_object_set_new(object, "rank", json_integer(rank));
    json_object_set_new(object, "stage", json_integer(rank / answer->plan->tp_size));
    json_object_set_new(object, "layers", range_json(layer_begin, num_layers));
    set_bytes(object, "bytes", memory->file_bytes);
    set_bytes(object, "weight_bytes", memory->weight_bytes);
    json_object_set_new(object, "kind_bytes", kinds);
    set_bytes(object, "padding_bytes", memory->padding_bytes);
    set_bytes(object, "kv_bytes_per_token", memory->kv_bytes_per_token);
    set_bytes(object, "kv_bytes", memory->kv_bytes);
    set_bytes(object, "scratch_bytes", memory->scratch_bytes);
    set_bytes(object, "cpu_scratch_bytes", memory->cpu_scratch_bytes);
    set_bytes(object, "total_bytes", memory->total_bytes);
    set_bytes(object, "read_bytes_per_token", memory->read_bytes);
    set_bytes(object, "kv_read_bytes_per_token", memory->kv_read_bytes);
    set_bytes(object, "sent_bytes_per_token", memory->sent_bytes);
    json_object_set_new(object, "heads", range_json(share->head_begin, share->num_heads_local));
    json_object_set_new(object, "kv_heads", range_json(share->kv_head_begin, share->num_kv_heads_local));
    json_object_set_new(object, "intermediate", range_json(share->mlp_begin, share->intermediate_local));
    json_object_set_new(object, "experts", range_json(share->expert_begin, share->num_experts_local));
    json_object_set_new(object, "expert_intermediate", range_json(share->expert_mlp_begin, share->expert_size_local));
    json_object_set_new(object, "shared_intermediate", range_json(share->shared_begin, share->shared_size_local));
    json_object_set_new(object, "vocab", range_json(share->vocab_begin, share->vocab_local));
    return object;
}

static json_t *other_experts_json(const struct plan_answer *answer)
{
    if (answer->plan->model.experts.num_experts == 0)
        return json_null();
    return json_pack("{s:s, s:I, s:I}", "experts", experts_mode_name(answer->other_experts), "largest_total_bytes",
                     (json_int_t)answer->other_largest_bytes, "read_bytes_per_token",
                     (json_int_t)answer->other_read_bytes);
}

static json_t *compressed_json(const struct plan_answer *answer)
{
    const struct compress_plan *plan = &answer->compressed;
    if (!answer->compress)
        return json_null();
    json_t *object = json_pack("{s:I, s:I, s:f, s:f, s:I}", "bytes", (json_int_t)plan->stored_bytes, "plain_bytes",
                               (json_int_t)plan->plain_bytes, "ratio", plan->ratio, "core_gb_s", plan->core_gb_s,
                               "cores", (json_int_t)answer->cores);
    bool link = answer->link_gb_s > 0;
    struct compress_advice advice = {0};
    if (link)
        advice = compress_plan_advise(plan, answer->link_gb_s, answer->cores);
    json_object_set_new(object, "link_gb_s", link ? json_real(answer->link_gb_s) : json_null());
    json_object_set_new(object, "rate_gb_s", link ? json_real(advice.rate_gb_s) : json_null());
    json_object_set_new(object, "plain_seconds", link ? json_real(advice.plain_s) : json_null());
    json_object_set_new(object, "seconds", link ? json_real(advice.compressed_s) : json_null());
    json_object_set_new(object, "helps", link ? json_boolean(advice.helps) : json_null());
    return object;
}

// NULL where kinds are chosen matrix by matrix, which no word of --quant asks for.
static const char *quant_word(const struct fit_way *way)
{
    return strcmp(way->quant, FIT_MIXED) == 0 ? NULL : way->quant;
}

// The values of --bits and --kinds that belong to a way; null, as its word is where there are some.
static void set_mix(json_t *object, const struct fit_way *way, const struct model_options *wanted)
{
    bool mixed = !quant_word(way);
    json_object_set_new(object, "bits", mixed && wanted->bits > 0 ? json_real(wanted->bits) : json_null());
    json_object_set_new(object, "kinds", mixed && wanted->kinds ? json_string(wanted->kinds) : json_null());
}

static int print_json(const struct plan_answer *answer, const struct mix *mix, const struct model_options *wanted,
                      struct error *err)
{
    const struct plan *plan = answer->plan;
    const struct model_desc *model = &plan->model;
    json_t *ranks = json_array(), *advice = json_array(), *object;
    int64_t with_window = 0;
    char line[256];
    for (uint32_t rank = 0; rank < plan->num_ranks; rank++)
        json_array_append_new(ranks, rank_json(answer, rank));
    for (int i = 0; i < answer->num_advice; i++) {
        const struct fit *fit = &answer->advice[i];
        json_array_append_new(advice, json_pack("{s:i, s:s?, s:s, s:I}", "tp_size", (int)fit->way.tp_size, "quant",
                                                quant_word(&fit->way), "kv_cache", kv_format_name(fit->way.kv_format),
                                                "max_context", (json_int_t)fit->max_context));
        set_mix(json_array_get(advice, (size_t)i), &fit->way, wanted);
    }
    for (int64_t layer = 0; layer < model->num_layers; layer++)
        with_window += (model->layer_flags[layer] & LAYER_WINDOW) != 0;
    bool cards = answer->card_bytes > 0, experts = model->experts.num_experts > 0;
    object =
        json_pack("{s:i, s:s, s:I, s:I, s:i, s:s?, s:s?, s:{s:s, s:s, s:s, s:i}, s:s?, s:s, s:b}", "schema_version", 2,
                  "architecture", model->architecture, "parameters", (json_int_t)memory_plan_parameters(plan),
                  "active_parameters", (json_int_t)memory_plan_active_parameters(plan), "tp_size", (int)plan->tp_size,
                  "way", quant_word(&answer->way), "source_format", answer->source_format, "quant", "layers",
                  weight_kind_name(plan->quant.linear), "embedding", weight_kind_name(plan->quant.embedding), "head",
                  weight_kind_name(plan->quant.head), "group_size", (int)plan->quant.group_size, "experts",
                  experts ? experts_mode_name(plan->experts) : NULL, "kv_cache", kv_format_name(answer->way.kv_format),
                  "proposed", answer->proposed);
    json_object_set_new(object, "pp_size", json_integer(plan->pp_size));
    json_object_set_new(json_object_get(object, "quant"), "rotation", json_integer(plan->quant.rotation));
    set_mix(object, &answer->way, wanted);
    set_bytes(object, "model_context", (uint64_t)model->context);
    set_bytes(object, "context", (uint64_t)answer->context_tokens);
    set_bytes(object, "window", (uint64_t)(with_window ? model->sliding_window : 0));
    set_bytes(object, "window_layers", (uint64_t)with_window);
    set_bytes(object, "largest_total_bytes", answer->largest_bytes);
    json_object_set_new(object, "gpu_memory_bytes", cards ? json_integer((json_int_t)answer->card_bytes) : json_null());
    json_object_set_new(object, "available_bytes",
                        cards ? json_integer((json_int_t)answer->available_bytes) : json_null());
    json_object_set_new(object, "fits", cards ? json_boolean(answer->fits) : json_null());
    json_object_set_new(object, "max_context", cards ? json_integer(answer->max_context) : json_null());
    json_object_set_new(object, "others", advice);
    json_object_set_new(object, "other_experts", other_experts_json(answer));
    json_object_set_new(object, "compressed", compressed_json(answer));
    json_object_set_new(object, "empty_shares", json_boolean(plan_empty_shares(plan, line, sizeof line)));
    json_object_set_new(object, "mixed", mix->choice.list ? commands_mix_json(mix) : json_null());
    json_object_set_new(object, "ranks", ranks);
    return commands_print_json(object, err);
}

// ---- the command -------------------------------------------------------------------------------------------------

int plan_report(const char *model_path, const struct model_options *wanted, struct error *err)
{
    struct subject subject = {.wanted = wanted};
    struct plan_answer answer = {0};
    int rc;
    if ((rc = commands_check_mix(wanted, err)) || (rc = commands_check_scales(wanted, true, err)) ||
        (rc = read_subject(&subject, model_path, err)) || (rc = check_question(&subject, err)) ||
        (rc = make_mix(&subject, model_path, err)))
        goto done;
    answer.mix_words = subject.mix.choice.list ? subject.mix_words : NULL;
    answer.mix_average = subject.mix.average;
    answer.mix_measured = subject.mix.bits.measured || wanted->kinds;
    if ((rc = find_answer(&answer, &subject, err)))
        goto done;
    answer.source_format = is_quantized(&subject) ? subject.import.name : NULL;
    rc = common.json ? print_json(&answer, &subject.mix, wanted, err) : plan_screen_print(&answer, err);
done:
    plan_free(answer.plan);
    free(answer.ranks);
    checkpoint_close(subject.checkpoint);
    import_config_clear(&subject.import);
    commands_mix_clear(&subject.mix);
    return rc;
}

int plan_run(int argc, char **argv, struct error *err)
{
    (void)argc;
    return plan_report(argv[0], &model_options, err);
}
