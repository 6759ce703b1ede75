// The answer of `tpshard plan` on one screen: 24 lines of 100 columns.
#include "formats/checked.h"
#include "kernels/kv.h"
#include "shard/mix_text.h"
#include "shard/plan_answer.h"
#include "shard/progress.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SCREEN_COLUMNS = 100, INDENT = 10, MAX_ROWS = 8 };

// "label     text", broken between words where a line would be too long.
static void __attribute__((format(printf, 2, 3))) paragraph(const char *label, const char *fmt, ...)
{
    char text[1024];
    va_list arguments;
    va_start(arguments, fmt);
    vsnprintf(text, sizeof text, fmt, arguments);
    va_end(arguments);
    int column = printf("%-*s", INDENT, label);
    for (const char *word = text; *word;) {
        int length = (int)strcspn(word, " ");
        if (column > INDENT && column + 1 + length > SCREEN_COLUMNS)
            column = printf("\n%*s", INDENT, "") - 1;
        column += printf("%s%.*s", column > INDENT ? " " : "", length, word);
        word += length + (word[length] == ' ');
    }
    printf("\n");
}

// ---- numbers -----------------------------------------------------------------------------------------------------

enum { TEXT_BYTES = 32 };

// "17.92 GiB"; three digits or more in front of the unit's fraction.
static const char *size_text(char out[TEXT_BYTES], uint64_t bytes)
{
    static const char *const units[] = {"bytes", "KiB", "MiB", "GiB", "TiB"};
    double value = (double)bytes;
    int unit = 0;
    for (; value >= 1024 && unit < 4; unit++)
        value /= 1024;
    snprintf(out, TEXT_BYTES, "%.*f %s", unit == 0 || (double)(uint64_t)value == value ? 0 : 2, value, units[unit]);
    return out;
}

// ---- the table of ranks --------------------------------------------------------------------------------------------

enum { MAX_TABLE_COLUMNS = 14 };
struct table {
    int columns, rows; // row 0 holds the titles
    char cells[MAX_ROWS + 1][MAX_TABLE_COLUMNS][TEXT_BYTES];
    bool right[MAX_TABLE_COLUMNS];
};

static void range_text(char out[TEXT_BYTES], int64_t begin, int64_t count)
{
    if (count == 0)
        snprintf(out, TEXT_BYTES, "none");
    else if (count == 1)
        snprintf(out, TEXT_BYTES, "%lld", (long long)begin);
    else
        snprintf(out, TEXT_BYTES, "%lld-%lld", (long long)begin, (long long)(begin + count - 1));
}

// A rank's experts: numbers of whole ones, or how much of each.
static void experts_text(char out[TEXT_BYTES], const struct plan *plan, const struct rank_share *share)
{
    if (plan->experts == EXPERTS_EP)
        range_text(out, share->expert_begin, share->num_experts_local);
    else
        snprintf(out, TEXT_BYTES, "%lld x %lld", (long long)share->num_experts_local,
                 (long long)share->expert_size_local);
}

// Each with its title in row 0.
static void add_range(struct table *table, const char *title, int row, int64_t begin, int64_t count)
{
    snprintf(table->cells[0][table->columns], TEXT_BYTES, "%s", title);
    range_text(table->cells[row][table->columns++], begin, count);
}

static void add_size(struct table *table, const char *title, int row, uint64_t bytes, bool gib)
{
    snprintf(table->cells[0][table->columns], TEXT_BYTES, "%s", title);
    table->right[table->columns] = true;
    snprintf(table->cells[row][table->columns++], TEXT_BYTES, "%.2f", (double)bytes / (gib ? 0x1p30 : 0x1p20));
}

static void fill_row(struct table *table, int row, const struct plan_answer *answer, uint32_t rank)
{
    const struct plan *plan = answer->plan;
    const struct model_desc *model = &plan->model;
    const struct rank_share *share = &plan->ranks[rank].share;
    const struct rank_memory *memory = &answer->ranks[rank];
    bool gib = answer->largest_bytes >= 1 << 30;
    table->columns = 0;
    table->right[0] = true;
    snprintf(table->cells[0][table->columns], TEXT_BYTES, "rank");
    snprintf(table->cells[row][table->columns++], TEXT_BYTES, "%u", rank);
    if (plan->pp_size > 1) {
        int64_t layer_begin, num_layers;
        manifest_stage(plan->stage_layers, rank / plan->tp_size, &layer_begin, &num_layers);
        snprintf(table->cells[0][table->columns], TEXT_BYTES, "stage");
        snprintf(table->cells[row][table->columns++], TEXT_BYTES, "%u", rank / plan->tp_size);
        add_range(table, "layers", row, layer_begin, num_layers);
    }
    add_range(table, "heads", row, share->head_begin, share->num_heads_local);
    if (model->latent.kv_rank == 0)
        add_range(table, "kv heads", row, share->kv_head_begin, share->num_kv_heads_local);
    if (model->intermediate_size > 0)
        add_range(table, "mlp", row, share->mlp_begin, share->intermediate_local);
    if (model->experts.shared_size > 0)
        add_range(table, "shared", row, share->shared_begin, share->shared_size_local);
    if (model->experts.num_experts > 0) {
        snprintf(table->cells[0][table->columns], TEXT_BYTES, "experts");
        experts_text(table->cells[row][table->columns++], plan, share);
    }
    add_range(table, "vocabulary", row, share->vocab_begin, share->vocab_local);
    add_size(table, gib ? "GiB: weights" : "MiB: weights", row, memory->weight_bytes, gib);
    add_size(table, "KV cache", row, memory->kv_bytes, gib);
    add_size(table, "buffers", row, memory->scratch_bytes, gib);
    add_size(table, "total", row, memory->total_bytes, gib);
}

static void print_ranks(const struct plan_answer *answer, int max_rows)
{
    struct table table = {0};
    uint32_t ranks = answer->plan->num_ranks;
    bool all = ranks <= (uint32_t)max_rows;
    table.rows = (int)(all ? ranks : (uint32_t)max_rows) + 1;
    for (int row = 1; row < table.rows;
         row++) // the last row is the last rank, and the one above it stands for the rest
        fill_row(&table, row, answer, row == table.rows - 1 ? ranks - 1 : (uint32_t)row - 1);
    if (!all)
        for (int c = 0; c < table.columns; c++)
            snprintf(table.cells[table.rows - 2][c], TEXT_BYTES, "...");
    int width[MAX_TABLE_COLUMNS] = {0}, all_columns = 0;
    for (int c = 0; c < table.columns; c++) {
        for (int row = 0; row < table.rows; row++)
            if ((int)strlen(table.cells[row][c]) > width[c])
                width[c] = (int)strlen(table.cells[row][c]);
        all_columns += width[c] + 2;
    }
    const char *gap = all_columns - 2 > SCREEN_COLUMNS ? " " : "  ";
    for (int row = 0; row < table.rows; row++)
        for (int c = 0; c < table.columns; c++)
            printf("%*s%s", table.right[c] ? width[c] : -width[c], table.cells[row][c],
                   c == table.columns - 1 ? "\n" : gap);
}

// ---- what it says --------------------------------------------------------------------------------------------------

static void print_title(const struct plan_answer *answer)
{
    const struct plan *plan = answer->plan;
    const struct model_desc *model = &plan->model;
    char active[64] = "", groups[32] = "";
    uint64_t parameters = memory_plan_parameters(plan), of_token = memory_plan_active_parameters(plan);
    if (of_token < parameters)
        snprintf(active, sizeof active, ", %.2f of them active", (double)of_token / 1e9);
    if (plan->quant.group_size)
        snprintf(groups, sizeof groups, " (groups of %u)", plan->quant.group_size);
    printf("%s: %.2f billion parameters%s, %lld layers, context %lld\n", model->architecture, (double)parameters / 1e9,
           active, (long long)model->num_layers, (long long)model->context);
    printf("tp %u, ", plan->tp_size);
    if (plan->pp_size > 1)
        printf("pp %u, ", plan->pp_size);
    if (strcmp(answer->way.quant, "keep") == 0)
        printf("weights as they are (%s)", answer->source_format);
    else if (plan->quant.millibits)
        printf("weights mixed (%.3f bits), embedding %s, head %s%s", answer->mix_average,
               weight_kind_name(plan->quant.embedding), weight_kind_name(plan->quant.head),
               model->tied_embeddings ? " (tied)" : "");
    else
        printf("weights %s%s, embedding %s, head %s%s", weight_kind_name(plan->quant.linear), groups,
               weight_kind_name(plan->quant.embedding), weight_kind_name(plan->quant.head),
               model->tied_embeddings ? " (tied)" : "");
    if (plan->quant.rotation)
        printf(", rotated");
    if (model->experts.num_experts > 0)
        printf(", experts %s", experts_mode_name(plan->experts));
    printf(", KV cache %s%s\n\n", kv_format_name(answer->way.kv_format), answer->proposed ? "; proposed" : "");
}

static void print_stored(const struct plan_answer *answer)
{
    uint64_t bytes[WEIGHT_KIND_COUNT] = {0}, padding = 0, files = 0;
    char text[256], size[TEXT_BYTES], files_size[TEXT_BYTES];
    int used = 0;
    for (uint32_t rank = 0; rank < answer->plan->num_ranks; rank++) {
        padding += answer->ranks[rank].padding_bytes;
        files += answer->ranks[rank].file_bytes;
        for (int kind = 0; kind < WEIGHT_KIND_COUNT; kind++)
            bytes[kind] += answer->ranks[rank].kind_bytes[kind];
    }
    for (int kind = 0; kind < WEIGHT_KIND_COUNT; kind++)
        if (bytes[kind])
            used += snprintf(text + used, sizeof text - (size_t)used, "%s %s, ",
                             weight_kind_name((enum weight_kind)kind), size_text(size, bytes[kind]));
    text[used > 2 ? used - 2 : 0] = '\0';
    paragraph("stored", "all ranks: %s (%s of it padding); files %s", text, size_text(size, padding),
              size_text(files_size, files));
}

static void print_cache(const struct plan_answer *answer)
{
    const struct model_desc *model = &answer->plan->model;
    char token[TEXT_BYTES], window[160] = "";
    uint64_t largest = 0;
    int with_window = 0;
    for (uint32_t rank = 0; rank < answer->plan->num_ranks; rank++)
        if (answer->ranks[rank].kv_bytes_per_token > largest)
            largest = answer->ranks[rank].kv_bytes_per_token;
    for (int64_t layer = 0; layer < model->num_layers; layer++)
        with_window += (model->layer_flags[layer] & LAYER_WINDOW) != 0;
    if (with_window > 0)
        snprintf(window, sizeof window, "; %d layers read no more than the last %lld, but keep all", with_window,
                 (long long)model->sliding_window);
    paragraph("KV cache", "%s a token on a rank%s; above for %lld tokens, %s%s", size_text(token, largest),
              model->latent.kv_rank > 0 ? " (latent rows, the same on every rank)" : "",
              (long long)answer->context_tokens, answer->context_is, window);
}

static void print_speed(const struct plan_answer *answer)
{
    char read[TEXT_BYTES], cache[TEXT_BYTES], sent[TEXT_BYTES], sends[96] = "";
    uint64_t read_bytes = 0, cache_bytes = 0;
    for (uint32_t rank = 0; rank < answer->plan->num_ranks; rank++) {
        const struct rank_memory *memory = &answer->ranks[rank];
        read_bytes = memory->read_bytes > read_bytes ? memory->read_bytes : read_bytes;
        cache_bytes = memory->kv_read_bytes > cache_bytes ? memory->kv_read_bytes : cache_bytes;
    }
    if (answer->plan->num_ranks > 1)
        snprintf(sends, sizeof sends, ", sends %s", size_text(sent, answer->ranks[0].sent_bytes));
    paragraph("decoding", "a rank reads %s of weights%s and up to %s of KV cache a token%s",
              size_text(read, read_bytes), answer->plan->experts == EXPERTS_EP ? " (on average)" : "",
              size_text(cache, cache_bytes), sends);
    if (answer->plan->model.experts.num_experts == 0 || answer->plan->tp_size == 1)
        return;
    char total[TEXT_BYTES];
    paragraph("experts", "--experts %s instead: fullest rank %s, reads %s of weights%s, sends as much",
              experts_mode_name(answer->other_experts), size_text(total, answer->other_largest_bytes),
              size_text(read, answer->other_read_bytes), answer->other_experts == EXPERTS_EP ? " on average" : "");
}

static void print_advice(const struct plan_answer *answer)
{
    char stages[24] = "";
    if (answer->plan->pp_size > 1)
        snprintf(stages, sizeof stages, " --pp %u", answer->plan->pp_size);
    for (int i = 0; i < answer->num_advice; i++) {
        const struct fit *fit = &answer->advice[i];
        bool mixed = strcmp(fit->way.quant, FIT_MIXED) == 0;
        paragraph(i > 0          ? ""
                  : answer->fits ? "also"
                                 : "instead",
                  "--tp %u%s %s%s%s%s: up to %lld tokens", fit->way.tp_size, stages, mixed ? "" : "--quant ",
                  mixed ? answer->mix_words : fit->way.quant, fit->way.kv_format == KV_BF16 ? "" : " --kv-cache ",
                  fit->way.kv_format == KV_BF16 ? "" : kv_format_name(fit->way.kv_format), (long long)fit->max_context);
    }
}

static void print_fit(const struct plan_answer *answer)
{
    char card[TEXT_BYTES], available[TEXT_BYTES], needed[TEXT_BYTES];
    if (!answer->card_bytes)
        return;
    size_text(card, answer->card_bytes);
    size_text(available, answer->available_bytes);
    size_text(needed, answer->largest_bytes);
    if (answer->fits)
        paragraph("fits", "yes: %s of %s (%s less driver and context); up to %lld tokens", needed, available, card,
                  (long long)answer->max_context);
    else if (answer->max_context > 0)
        paragraph("fits", "no: %s needed of %s (%s less driver and context); up to %lld tokens would fit", needed,
                  available, card, (long long)answer->max_context);
    else
        paragraph("fits", "no: %s needed of %s (%s less driver and context)", needed, available, card);
    print_advice(answer);
    if (!answer->fits && answer->num_advice == 0)
        paragraph("", "the model does not fit on %u card%s of %s in any way; stored as int4 it needs %u or more",
                  answer->plan->num_ranks, answer->plan->num_ranks == 1 ? "" : "s", card, answer->min_ranks);
}

static void print_compressed(const struct plan_answer *answer)
{
    const struct compress_plan *plan = &answer->compressed;
    char plain[TEXT_BYTES], stored[TEXT_BYTES];
    if (!answer->compress)
        return;
    size_text(plain, plan->plain_bytes);
    size_text(stored, plan->stored_bytes);
    if (answer->link_gb_s <= 0) {
        paragraph("zstd",
                  "files %s instead of %s; a start becomes quicker where the link gives less than %.1f GB/s for "
                  "each core that decodes (say --link GB/S)",
                  stored, plain, plan->core_gb_s);
        return;
    }
    struct compress_advice advice = compress_plan_advise(plan, answer->link_gb_s, answer->cores);
    paragraph("zstd",
              "%s: files %s instead of %s; at %g GB/s they arrive in %.3g s as they are, compressed in %.3g s, "
              "with %lld core%s that decode %.1f GB/s",
              advice.helps ? "it helps" : "it does not help", stored, plain, answer->link_gb_s, advice.plain_s,
              advice.compressed_s, (long long)answer->cores, answer->cores == 1 ? "" : "s",
              (double)answer->cores * plan->core_gb_s);
}

static int print_mix(const struct plan_answer *answer, struct error *err)
{
    struct matrix_kind *list;
    size_t count;
    char line[768];
    int rc = answer->plan->quant.millibits ? plan_matrices(&list, &count, answer->plan, err) : 0;
    if (rc || !answer->plan->quant.millibits)
        return rc;
    mix_text_line(line, sizeof line, list, count);
    paragraph("matrices", "%s%s", line,
              answer->mix_measured ? "" : " (as if weights were normal: convert measures them)");
    free(list);
    return 0;
}

int plan_screen_print(const struct plan_answer *answer, struct error *err)
{
    char line[256], cpu[TEXT_BYTES];
    bool empty = plan_empty_shares(answer->plan, line, sizeof line);
    print_title(answer);
    print_ranks(answer, MAX_ROWS - (empty ? 2 : 0) - (answer->num_advice > 1 ? answer->num_advice - 1 : 0));
    printf("\n");
    print_stored(answer);
    int rc = print_mix(answer, err);
    if (rc)
        return rc;
    print_compressed(answer);
    print_cache(answer);
    paragraph("buffers", "of a step of 2048 rows and the backend's reserve, on a GPU; on CPUs %s",
              size_text(cpu, answer->ranks[0].cpu_scratch_bytes));
    print_speed(answer);
    if (empty)
        paragraph("note", "%s", line);
    print_fit(answer);
    return fflush(stdout) ? error_set_errno(err, "cannot write the result to stdout") : 0;
}
