// tpshard plan: what each rank would hold, and whether it fits. Reads config.json alone, so that it can be asked before
// a checkpoint is downloaded. See commands.h.
#include "shard/commands.h"
#include "shard/hf_config.h"
#include "shard/memory_plan.h"
#include "shard/plan.h"
#include "shard/progress.h"

#include <stdio.h>
#include <stdlib.h>

static struct {
    int64_t context;
    uint64_t gpu_memory_bytes;
} options = {.context = -1};

const struct option_spec plan_options[] = {
    MODEL_OPTION_SPECS,
    {"context", OPTION_INT, &options.context, "N", 1, 1 << 30,
     "tokens of KV cache to count (default: the model's own context)"},
    {"gpu-memory", OPTION_BYTES, &options.gpu_memory_bytes, "BYTES", 0, 0,
     "memory of one device, such as 24GiB: say whether each rank fits"},
    {0},
};

struct question {
    int64_t context_tokens;
    uint64_t gpu_memory_bytes; // 0: not asked
};

static uint64_t largest_total(const struct plan *plan, const struct question *question)
{
    uint64_t largest = 0;
    for (uint32_t rank = 0; rank < plan->tp_size; rank++) {
        struct rank_memory memory;
        memory_plan_rank(&memory, plan, rank, question->context_tokens);
        largest = memory.total_bytes > largest ? memory.total_bytes : largest;
    }
    return largest;
}

// ---- JSON --------------------------------------------------------------------------------------------------------

static json_t *rank_json(const struct plan *plan, uint32_t rank, const struct question *question)
{
    struct rank_memory memory;
    const struct rank_share *share = &plan->ranks[rank].share;
    json_t *kinds = json_object();
    memory_plan_rank(&memory, plan, rank, question->context_tokens);
    for (int kind = 0; kind < WEIGHT_KIND_COUNT; kind++)
        if (memory.kind_bytes[kind])
            json_object_set_new(kinds, weight_kind_name((enum weight_kind)kind),
                                json_integer((json_int_t)memory.kind_bytes[kind]));
    return json_pack(
        "{s:i, s:I, s:I, s:o, s:I, s:I, s:I, s:I, s:[I,I], s:[I,I], s:[I,I], s:[I,I]}", "rank", (int)rank, "bytes",
        (json_int_t)memory.file_bytes, "weight_bytes", (json_int_t)memory.weight_bytes, "kind_bytes", kinds,
        "padding_bytes", (json_int_t)memory.padding_bytes, "kv_bytes_per_token", (json_int_t)memory.kv_bytes_per_token,
        "kv_bytes", (json_int_t)memory.kv_bytes, "total_bytes", (json_int_t)memory.total_bytes, "heads",
        (json_int_t)share->head_begin, (json_int_t)(share->head_begin + share->num_heads_local), "kv_heads",
        (json_int_t)share->kv_head_begin, (json_int_t)(share->kv_head_begin + share->num_kv_heads_local),
        "intermediate", (json_int_t)share->mlp_begin, (json_int_t)(share->mlp_begin + share->intermediate_local),
        "vocab", (json_int_t)share->vocab_begin, (json_int_t)(share->vocab_begin + share->vocab_local));
}

static int print_json(const struct plan *plan, const struct question *question, struct error *err)
{
    json_t *ranks = json_array();
    char line[256];
    bool empty_shares = plan_empty_shares(plan, line, sizeof line);
    json_t *fits = question->gpu_memory_bytes
                       ? json_boolean(largest_total(plan, question) <= question->gpu_memory_bytes)
                       : json_null();
    for (uint32_t rank = 0; rank < plan->tp_size; rank++)
        json_array_append_new(ranks, rank_json(plan, rank, question));
    return commands_print_json(
        json_pack("{s:i, s:s, s:I, s:i, s:{s:s, s:s, s:s, s:i}, s:I, s:I, s:I, s:o, s:b, s:o}", "schema_version", 1,
                  "architecture", plan->model.architecture, "parameters", (json_int_t)memory_plan_parameters(plan),
                  "tp_size", (int)plan->tp_size, "quant", "layers", weight_kind_name(plan->quant.linear), "embedding",
                  weight_kind_name(plan->quant.embedding), "head", weight_kind_name(plan->quant.head), "group_size",
                  (int)plan->quant.group_size, "context", (json_int_t)question->context_tokens, "working_bytes",
                  (json_int_t)MEMORY_PLAN_WORKING_BYTES, "gpu_memory_bytes", (json_int_t)question->gpu_memory_bytes,
                  "fits", fits, "empty_shares", empty_shares, "ranks", ranks),
        err);
}

// ---- for people --------------------------------------------------------------------------------------------------

static const char *range_text(char buffer[32], int64_t begin, int64_t count)
{
    if (count == 0)
        return "none";
    snprintf(buffer, 32, "%lld-%lld", (long long)begin, (long long)(begin + count - 1));
    return buffer;
}

static void print_rank(const struct plan *plan, uint32_t rank, const struct question *question)
{
    struct rank_memory memory;
    const struct rank_share *share = &plan->ranks[rank].share;
    char heads[32], kv_heads[32], mlp[32], vocab[32], file[32], padding[32], kv[32], total[32];
    memory_plan_rank(&memory, plan, rank, question->context_tokens);
    printf("%4u  %-9s %-9s %-13s %-15s %9s %9s %9s %9s\n", rank,
           range_text(heads, share->head_begin, share->num_heads_local),
           range_text(kv_heads, share->kv_head_begin, share->num_kv_heads_local),
           range_text(mlp, share->mlp_begin, share->intermediate_local),
           range_text(vocab, share->vocab_begin, share->vocab_local), progress_bytes_text(file, memory.file_bytes),
           progress_bytes_text(padding, memory.padding_bytes), progress_bytes_text(kv, memory.kv_bytes),
           progress_bytes_text(total, memory.total_bytes));
}

static void print_kinds(const struct plan *plan)
{
    uint64_t bytes[WEIGHT_KIND_COUNT] = {0};
    char text[32];
    for (uint32_t rank = 0; rank < plan->tp_size; rank++) {
        struct rank_memory memory;
        memory_plan_rank(&memory, plan, rank, 0);
        for (int kind = 0; kind < WEIGHT_KIND_COUNT; kind++)
            bytes[kind] += memory.kind_bytes[kind];
    }
    printf("all ranks:");
    for (int kind = 0; kind < WEIGHT_KIND_COUNT; kind++)
        if (bytes[kind])
            printf(" %s %s", weight_kind_name((enum weight_kind)kind), progress_bytes_text(text, bytes[kind]));
    printf("\n");
}

static int print_text(const struct plan *plan, const struct question *question, struct error *err)
{
    char line[256], working[32], needed[32], there[32], token[32];
    struct rank_memory first;
    memory_plan_rank(&first, plan, 0, 0);
    printf("%s, %.2f billion parameters, tp %u; layers %s", plan->model.architecture,
           (double)memory_plan_parameters(plan) / 1e9, plan->tp_size, weight_kind_name(plan->quant.linear));
    if (plan->quant.group_size)
        printf(" (groups of %u)", plan->quant.group_size);
    printf(", embedding %s, head %s%s\n\n", weight_kind_name(plan->quant.embedding), weight_kind_name(plan->quant.head),
           plan->model.tied_embeddings ? " (tied)" : "");
    printf("rank  %-9s %-9s %-13s %-15s %9s %9s %9s %9s\n", "heads", "kv heads", "mlp", "vocabulary", "file", "padding",
           "kv cache", "memory");
    for (uint32_t rank = 0; rank < plan->tp_size; rank++)
        print_rank(plan, rank, question);
    printf("\n");
    print_kinds(plan);
    printf(
        "kv cache is for %lld tokens (rank 0: %s a token, bf16); memory is weights, kv cache and %s of working room\n",
        (long long)question->context_tokens, progress_bytes_text(token, first.kv_bytes_per_token),
        progress_bytes_text(working, MEMORY_PLAN_WORKING_BYTES));
    if (plan_empty_shares(plan, line, sizeof line))
        printf("note: %s\n", line);
    if (question->gpu_memory_bytes) {
        uint64_t largest = largest_total(plan, question);
        printf("fits: %s (the largest rank needs %s of %s)\n", largest <= question->gpu_memory_bytes ? "yes" : "no",
               progress_bytes_text(needed, largest), progress_bytes_text(there, question->gpu_memory_bytes));
    }
    return fflush(stdout) ? error_set_errno(err, "cannot write the result to stdout") : 0;
}

int plan_report(const char *model_dir, int64_t context_tokens, uint64_t gpu_memory_bytes, struct error *err)
{
    struct hf_config config;
    struct manifest_quant quant;
    struct plan *plan = NULL;
    int rc;
    if ((rc = hf_config_read(&config, model_dir, err)) ||
        (rc = plan_quant(&quant, model_options.quant, model_options.embed, model_options.head,
                         atoi(model_options.group_size), config.model.tied_embeddings, err)) ||
        (rc = plan_make(&plan, &config.model, &quant, (uint32_t)model_options.tp, err)))
        return rc;
    struct question question = {context_tokens > 0 ? context_tokens : config.model.context, gpu_memory_bytes};
    rc = common.json ? print_json(plan, &question, err) : print_text(plan, &question, err);
    plan_free(plan);
    return rc;
}

int plan_run(int argc, char **argv, struct error *err)
{
    (void)argc;
    return plan_report(argv[0], options.context, options.gpu_memory_bytes, err);
}
