// See checkpoint_source.h.
#include "shard/checkpoint_source.h"

#include "formats/number_formats.h"
#include "shard/text.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ---- rows --------------------------------------------------------------------------------------------------------

static bool is_turned(enum source_form form) { return form == TURNED || form == TURNED_ALTERNATING; }
static bool alternates(enum source_form form) { return form == ALTERNATING || form == TURNED_ALTERNATING; }

// A vector that alternates is a column of rows of one element.
static void source_shape(const struct row_request *request, enum source_form form, uint64_t *rows, uint64_t *cols)
{
    bool upright = request->kind == WEIGHT_F32 && alternates(form);
    *rows = upright ? request->source->source_cols : request->source->source_rows;
    *cols = upright ? 1 : request->source->source_cols;
}

// Rows of the source tensor that hold stored rows [begin, begin + count): a stored row of the upper half is every second.
static void source_rows(enum source_form form, uint64_t all_rows, uint64_t begin, uint64_t count, uint64_t *first,
                        uint64_t *last)
{
    *first = begin;
    *last = begin + count - 1;
    if (!alternates(form))
        return;
    uint64_t half = all_rows / 2;
    bool both = begin < half && begin + count > half;
    *first = both ? 0 : begin % half * 2;
    *last = both ? all_rows - 1 : (begin + count - 1) % half * 2 + 1;
}

// Rows that stand one behind the other are read a few at a time, so that they are still in the cache when they are used.
enum { CACHED_BYTES = 256 << 10 };

static bool in_pieces(const struct row_request *request, enum source_form form)
{
    return request->kind != WEIGHT_F32 && !alternates(form) && !is_turned(form);
}

static uint64_t piece_rows(uint64_t row_bytes)
{
    return row_bytes && row_bytes < CACHED_BYTES ? CACHED_BYTES / row_bytes : 1;
}

static int source_read(const struct row_source *base, struct row_window *window, const struct row_request *request,
                       struct error *err)
{
    const struct checkpoint_source *source = (const struct checkpoint_source *)base;
    const struct plan_source *from = &source->plan->sources[request->tensor][request->part];
    uint64_t rows, cols, first, last;
    int rc;
    window->request = *request;
    const struct safetensors_tensor *tensor = checkpoint_find(source->checkpoint, from->tensor);
    if (!tensor)
        return error_set(err, ERR_MODEL, "tensor %s is not in the checkpoint", from->tensor);
    source_shape(request, from->form, &rows, &cols);
    if (request->kind == WEIGHT_F32) {
        first = 0;
        last = rows - 1;
    } else {
        source_rows(from->form, rows, request->row_begin, request->rows, &first, &last);
    }
    uint64_t bytes = dtype_bytes(tensor->dtype), count = last - first + 1;
    uint64_t begin = (from->index > 0 ? (uint64_t)from->index : 0) * rows * cols; // of the matrix in its stack
    window->raw_format = tensor->dtype;
    if (in_pieces(request, from->form)) {
        window->raw_row = first;
        window->raw_rows = 0;
        checkpoint_read_ahead(source->checkpoint, tensor, (begin + first * cols) * bytes, count * cols * bytes);
        return row_window_reserve(window, piece_rows(cols * bytes) * cols * bytes, cols, err);
    }
    window->raw_row = first;
    window->raw_rows = count;
    if ((rc = row_window_reserve(window, count * cols * bytes, request->source->source_cols, err)))
        return rc;
    if (!is_turned(from->form))
        return checkpoint_read(source->checkpoint, tensor, (begin + first * cols) * bytes, count * cols * bytes,
                               window->raw, err);
    for (uint64_t column = 0; column < cols; column++)
        if ((rc = checkpoint_read(source->checkpoint, tensor, (begin + column * rows + first) * bytes, count * bytes,
                                  window->raw + column * count * bytes, err)))
            return rc;
    return 0;
}

// Has the window hold `row`: of what is read in pieces, the piece that begins with it.
static int source_piece(const struct checkpoint_source *source, struct row_window *window,
                        const struct plan_source *from, uint64_t row, struct error *err)
{
    const struct row_request *request = &window->request;
    if (!in_pieces(request, from->form) || (row >= window->raw_row && row - window->raw_row < window->raw_rows))
        return 0;
    uint64_t rows, cols, bytes = dtype_bytes((enum dtype)window->raw_format);
    source_shape(request, from->form, &rows, &cols);
    uint64_t left = request->row_begin + request->rows - row, count = piece_rows(cols * bytes);
    uint64_t first = (from->index > 0 ? (uint64_t)from->index : 0) * rows + row; // in the stack
    window->raw_row = row;
    window->raw_rows = 0; // if this fails
    count = count < left ? count : left;
    int rc = checkpoint_read(source->checkpoint, checkpoint_find(source->checkpoint, from->tensor),
                             first * cols * bytes, count * cols * bytes, window->raw, err);
    if (!rc)
        window->raw_rows = count;
    return rc;
}

static float widen_one(const uint8_t *raw, enum dtype dtype)
{
    float value;
    uint16_t bits;
    if (dtype == DTYPE_F32) {
        memcpy(&value, raw, sizeof value);
        return value;
    }
    memcpy(&bits, raw, sizeof bits);
    return dtype == DTYPE_BF16 ? bf16_to_f32(bits) : f16_to_f32(bits);
}

enum { HALVES = 8 };
typedef uint16_t halves __attribute__((vector_size(HALVES * sizeof(uint16_t))));
typedef uint32_t words __attribute__((vector_size(HALVES * sizeof(uint32_t))));

// `count` elements, `step` elements apart.
static void widen(float *out, const uint8_t *raw, uint64_t step, enum dtype dtype, uint64_t count)
{
    uint64_t i = 0;
    for (; step == 1 && dtype == DTYPE_BF16 && i + HALVES <= count; i += HALVES) {
        halves bits;
        memcpy(&bits, raw + i * sizeof(uint16_t), sizeof bits);
        words wide = __builtin_convertvector(bits, words) << 16;
        memcpy(out + i, &wide, sizeof wide);
    }
    for (; i < count; i++)
        out[i] = widen_one(raw + i * step * dtype_bytes(dtype), dtype);
}

// Takes a row of bf16 that is stored in bf16 as it is. False: it has a value that is not finite, and *out is not filled.
static bool take_bf16(uint16_t *out, const uint8_t *raw, uint64_t count)
{
    const halves exponent = (halves){0} + 0x7f80;
    halves wrong = {0};
    for (uint64_t i = 0; i < count; i += HALVES) {
        halves bits = {0};
        memcpy(&bits, raw + i * sizeof *out, (count - i < HALVES ? count - i : HALVES) * sizeof *out);
        wrong |= (halves)((bits & exponent) == exponent);
    }
    for (int i = 0; i < HALVES; i++)
        if (wrong[i])
            return false;
    memcpy(out, raw, count * sizeof *out);
    return true;
}

// One row, as floats, from the bytes of the window.
static void gather(float *out, const struct row_window *window, enum source_form form, uint64_t row)
{
    const struct row_request *request = &window->request;
    enum dtype dtype = (enum dtype)window->raw_format;
    uint64_t bytes = dtype_bytes(dtype), rows, cols;
    source_shape(request, form, &rows, &cols);
    uint64_t half = rows / 2;
    if (request->kind == WEIGHT_F32 && alternates(form)) {
        widen(out, window->raw, 2, dtype, half);
        widen(out + half, window->raw + bytes, 2, dtype, half);
        return;
    }
    if (alternates(form))
        row = row % half * 2 + row / half;
    row -= window->raw_row;
    if (is_turned(form))
        widen(out, window->raw + row * bytes, window->raw_rows, dtype, cols);
    else
        widen(out, window->raw + row * cols * bytes, 1, dtype, cols);
}

static void take_values(float *out, const struct row_window *window, enum source_form form, uint64_t row)
{
    uint64_t cols = window->request.source->source_cols;
    gather(out, window, form, row);
    for (uint64_t i = 0; form == PLUS_ONE && i < cols; i++)
        out[i] += 1;
}

static int source_row(const struct row_source *base, struct row_window *window, uint64_t row, struct packed_row *out,
                      struct error *err)
{
    const struct checkpoint_source *source = (const struct checkpoint_source *)base;
    const struct row_request *request = &window->request;
    const struct plan_source *from = &source->plan->sources[request->tensor][request->part];
    uint64_t cols = request->source->source_cols;
    int rc = source_piece(source, window, from, row, err);
    if (rc)
        return rc;
    if (request->kind == WEIGHT_BF16 && window->raw_format == DTYPE_BF16 && from->form == AS_IS &&
        take_bf16(out->bf16, window->raw + (row - window->raw_row) * cols * sizeof(uint16_t), cols))
        return 0;
    take_values(window->values, window, from->form, row);
    return row_source_pack(out, request, row, window->values, err);
}

static int source_values(const struct row_source *base, struct row_window *window, uint64_t row, float *out,
                         struct error *err)
{
    const struct checkpoint_source *source = (const struct checkpoint_source *)base;
    const struct plan_source *from = &source->plan->sources[window->request.tensor][window->request.part];
    int rc = source_piece(source, window, from, row, err);
    if (!rc)
        take_values(out, window, from->form, row);
    return rc;
}

static int source_computed(const struct row_source *base, uint64_t tensor, float *out, uint64_t values,
                           struct error *err)
{
    const struct checkpoint_source *source = (const struct checkpoint_source *)base;
    enum tensor_role role = source->plan->ranks[0].tensors[tensor].role;
    const struct rope *rope = role == ROLE_ROPE_LOCAL ? &source->config->rope_local : &source->config->rope;
    if (role != ROLE_ROPE_INV_FREQ && role != ROLE_ROPE_LONG && role != ROLE_ROPE_LOCAL)
        return error_set(err, ERR_OTHER, "%s cannot be computed from config.json", tensor_role_name(role));
    if ((uint64_t)rope->dim / 2 != values)
        return error_set(err, ERR_MODEL, "%s: %lld rotating columns instead of %llu", tensor_role_name(role),
                         (long long)rope->dim, (unsigned long long)(2 * values));
    rope_inv_freq(out, rope, role == ROLE_ROPE_LONG);
    return 0;
}

// ---- checks ------------------------------------------------------------------------------------------------------

// The shape that the checkpoint's tensor must have: a stack has one dimension more.
static int wanted_shape(uint64_t dims[3], const struct shard_part *part, const struct plan_source *from,
                        enum weight_kind kind, const struct plan *plan)
{
    int count = 0;
    bool turned = is_turned(from->form);
    if (from->index >= 0)
        dims[count++] = (uint64_t)plan->model.experts.num_experts;
    if (kind != WEIGHT_F32)
        dims[count++] = turned ? part->source_cols : part->source_rows;
    dims[count++] = turned ? part->source_rows : part->source_cols;
    return count;
}

static int check_tensor(struct checkpoint_source *source, const struct shard_part *part, const struct plan_source *from,
                        enum weight_kind kind, struct error *err)
{
    const struct safetensors_tensor *tensor = checkpoint_find(source->checkpoint, from->tensor);
    if (!tensor)
        return error_set(err, ERR_MODEL, "tensor %s, which config.json calls for, is not in the checkpoint",
                         from->tensor);
    const char *file = checkpoint_file_name(source->checkpoint, (size_t)tensor->file);
    if (tensor->dtype != DTYPE_BF16 && tensor->dtype != DTYPE_F16 && tensor->dtype != DTYPE_F32)
        return error_set(err, ERR_MODEL, "%s: tensor %s is %s; only BF16, F16 and F32 weights can be read", file,
                         from->tensor, dtype_name(tensor->dtype));
    uint64_t dims[3];
    int count = wanted_shape(dims, part, from, kind, source->plan);
    bool fits = tensor->num_dims == count;
    for (int d = 0; d < count; d++)
        fits = fits && tensor->dims[d] == dims[d];
    if (!fits) {
        char found[128], text[128];
        text_shape(found, sizeof found, tensor->dims, tensor->num_dims);
        text_shape(text, sizeof text, dims, count);
        return error_set(err, ERR_MODEL, "%s: tensor %s is %s, config.json calls for %s", file, from->tensor, found,
                         text);
    }
    if (kind == WEIGHT_BF16 && tensor->dtype != DTYPE_BF16)
        source->rounds_to_bf16 = true;
    return 0;
}

static int compare_names(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

// A tensor that nothing uses means that the model is not what its config says.
static int refuse_unused(const struct checkpoint *checkpoint, const struct plan *plan, const struct model_desc *model,
                         const struct checkpoint_claims *claims, struct error *err)
{
    const struct family *family = family_find(plan->model.architecture);
    const char **used = malloc(plan->tensor_count * SHARD_MAX_PARTS * sizeof *used);
    size_t count = 0;
    int rc = 0;
    if (!used)
        return error_set(err, ERR_MEMORY, "out of memory for the list of tensors");
    for (uint64_t i = 0; i < plan->tensor_count; i++)
        for (int p = 0; p < plan->ranks[0].tensors[i].num_parts; p++)
            used[count++] = plan->sources[i][p].tensor;
    qsort(used, count, sizeof *used, compare_names);
    for (size_t i = 0; !rc && i < checkpoint_tensor_count(checkpoint); i++) {
        const struct safetensors_tensor *tensor = checkpoint_tensor(checkpoint, i);
        if (!bsearch(&tensor->name, used, count, sizeof *used, compare_names) &&
            !family_ignores(family, model, tensor->name) && !(claims && claims->reads(claims, tensor)))
            rc = error_set(err, ERR_MODEL, "%s: tensor %s has no place in a %s with this config.json",
                           checkpoint_file_name(checkpoint, (size_t)tensor->file), tensor->name,
                           plan->model.architecture);
    }
    free(used);
    return rc;
}

// A config that says "tied" beside a head of its own: which of the two is meant decides every logit.
static int check_tied_head(const struct checkpoint *checkpoint, const struct plan *plan, const struct model_desc *model,
                           struct error *err)
{
    enum { PIECE_BYTES = 1 << 20 };
    const struct safetensors_tensor *head = checkpoint_find(checkpoint, "lm_head.weight"), *embedding = NULL;
    for (uint64_t i = 0; i < plan->tensor_count && !embedding; i++)
        if (plan->ranks[0].tensors[i].role == ROLE_EMBEDDING)
            embedding = checkpoint_find(checkpoint, plan->sources[i][0].tensor);
    if (!model->tied_embeddings || !head || !embedding)
        return 0;
    uint64_t bytes = head->bytes;
    bool same = head->dtype == embedding->dtype && embedding->bytes == bytes;
    uint8_t *pieces = malloc(2 * PIECE_BYTES);
    int rc = pieces ? 0 : error_set(err, ERR_MEMORY, "out of memory for comparing the head with the embedding");
    for (uint64_t at = 0; !rc && same && at < bytes; at += PIECE_BYTES) {
        uint64_t count = bytes - at < PIECE_BYTES ? bytes - at : PIECE_BYTES;
        if (!(rc = checkpoint_read(checkpoint, head, at, count, pieces, err)) &&
            !(rc = checkpoint_read(checkpoint, embedding, at, count, pieces + PIECE_BYTES, err)))
            same = memcmp(pieces, pieces + PIECE_BYTES, count) == 0;
    }
    free(pieces);
    if (!rc && !same)
        rc = error_set(
            err, ERR_MODEL,
            "%s: config.json ties the head to the embedding, but lm_head.weight is another matrix than %s; set "
            "tie_word_embeddings to false, or leave lm_head.weight out",
            checkpoint_file_name(checkpoint, (size_t)head->file), embedding->name);
    return rc;
}

int checkpoint_source_init(struct checkpoint_source *out, const struct checkpoint *checkpoint, const struct plan *plan,
                           const struct hf_config *config, const struct checkpoint_claims *claims, struct error *err)
{
    int rc;
    struct checkpoint_source source = {.source = {source_read, source_computed, source_row, source_values, NULL},
                                       .checkpoint = checkpoint,
                                       .plan = plan,
                                       .config = config};
    for (uint64_t i = 0; i < plan->tensor_count; i++) {
        const struct shard_tensor *tensor = &plan->ranks[0].tensors[i];
        for (int p = 0; p < tensor->num_parts; p++)
            if (!(claims && claims->makes(claims, &plan->sources[i][p])) &&
                (rc = check_tensor(&source, &tensor->parts[p], &plan->sources[i][p], tensor->shape.kind, err)))
                return rc;
    }
    // What the checkpoint holds its own config says; a plan may store the head apart from the embedding all the same.
    if ((rc = refuse_unused(checkpoint, plan, &config->model, claims, err)) ||
        (rc = check_tied_head(checkpoint, plan, &config->model, err)))
        return rc;
    *out = source;
    return 0;
}
