// Rows of quantized matrices: read and unpacked to one code for each column and scales for each group. See import.h.
//
// Unpacked integer codes are unsigned, as most formats store them, and so are zero points: w = (code - zero) * scale,
// zero 8 (or 128) where the format is symmetric.
#include "shard/import_internal.h"

#include "formats/checked.h"
#include "formats/number_formats.h"

#include <stdlib.h>
#include <string.h>

// ---- memory ------------------------------------------------------------------------------------------------------

void import_window_free(struct import_window *window)
{
    free(window->memory);
    free(window->raw);
    *window = (struct import_window){0};
}

static int reserve(uint8_t **memory, uint64_t *capacity, uint64_t bytes, struct error *err)
{
    if (bytes <= *capacity)
        return 0;
    free(*memory);
    *capacity = 0;
    if (!(*memory = malloc(bytes)))
        return error_set(err, ERR_MEMORY, "out of memory for %llu bytes of rows", (unsigned long long)bytes);
    *capacity = bytes;
    return 0;
}

bool import_as_values(const struct import_matrix *matrix)
{
    return matrix->form.layout == LAYOUT_NF4 || matrix->form.layout == LAYOUT_PLAIN;
}

static void *place(uint8_t *base, uint64_t *at, uint64_t bytes)
{
    void *here = base ? base + *at : NULL;
    *at += bytes;
    return here;
}

// Returns the size; base NULL: the size alone.
static uint64_t lay_out(struct import_unpacked *out, uint8_t *base, const struct import_matrix *matrix, uint64_t rows)
{
    uint64_t cols = round_up(matrix->cols, 16), groups = round_up(matrix->groups ? matrix->groups : 1, 16), at = 0;
    bool values = import_as_values(matrix);
    out->rows = place(base, &at, round_up(rows * sizeof(uint64_t), 64));
    out->values = place(base, &at, (values ? rows : 1) * cols * sizeof(float));
    out->scales = place(base, &at, rows * groups * sizeof(float));
    out->zeros = place(base, &at, rows * groups * sizeof(float));
    out->codes = place(base, &at, values ? 0 : rows * cols);
    out->scratch = place(base, &at, cols);
    out->scales_u8 = place(base, &at, rows * groups);
    return at;
}

struct import_unpacked import_unpacked_of(const struct import_window *window)
{
    struct import_unpacked out;
    lay_out(&out, window->memory, window->matrix, window->rows);
    return out;
}

// ---- which rows --------------------------------------------------------------------------------------------------

// The source's number of a stored row.
static uint64_t source_row(const struct import_matrix *matrix, uint64_t row)
{
    uint64_t period = matrix->row_period;
    if (matrix->row_leader)
        row = row / period * period + matrix->row_leader->sorted[row % period];
    if (matrix->interleaved)
        row = row < matrix->rows / 2 ? 2 * row : 2 * (row - matrix->rows / 2) + 1;
    return matrix->first_row + row;
}

// ---- layouts whose rows are rows of their tensors -------------------------------------------------------------------

// Rows of one tensor in window->raw: either the whole span they lie in, or one by one.
struct fetched {
    uint64_t first, row_bytes;
    bool span;
};

// Row rows[i] / divisor for each i.
static int fetch(struct fetched *out, const struct import *import, struct import_window *window,
                 const struct safetensors_tensor *tensor, uint64_t row_bytes, const uint64_t *rows, uint64_t divisor,
                 struct error *err)
{
    uint64_t first = UINT64_MAX, last = 0, count = window->rows;
    int rc = 0;
    for (uint64_t i = 0; i < count; i++) {
        first = rows[i] / divisor < first ? rows[i] / divisor : first;
        last = rows[i] / divisor > last ? rows[i] / divisor : last;
    }
    bool span = last - first < 4 * count; // interleaved rows are worth one read
    uint64_t fetched_rows = span ? last - first + 1 : count;
    *out = (struct fetched){first, row_bytes, span};
    if ((rc = reserve(&window->raw, &window->raw_capacity, fetched_rows * row_bytes + 1, err)))
        return rc;
    if (span)
        return checkpoint_read(import->checkpoint, tensor, first * row_bytes, fetched_rows * row_bytes, window->raw,
                               err);
    for (uint64_t i = 0; !rc && i < count; i++)
        rc = checkpoint_read(import->checkpoint, tensor, rows[i] / divisor * row_bytes, row_bytes,
                             window->raw + i * row_bytes, err);
    return rc;
}

static const uint8_t *fetched_row(const struct fetched *fetched, const struct import_window *window, uint64_t i,
                                  uint64_t row)
{
    return window->raw + (fetched->span ? row - fetched->first : i) * fetched->row_bytes;
}

static uint32_t load_word(const uint8_t *at)
{
    uint32_t word;
    memcpy(&word, at, sizeof word);
    return word;
}

// The codes of one word, lowest bits first, in 32 / bits bytes.
static inline void expand_word(uint8_t *out, uint32_t word, int bits)
{
    if (bits == 8) {
        memcpy(out, &word, sizeof word);
        return;
    }
    uint64_t spread = word;
    spread = (spread | spread << 16) & 0x0000ffff0000ffffu;
    spread = (spread | spread << 8) & 0x00ff00ff00ff00ffu;
    spread = (spread | spread << 4) & 0x0f0f0f0f0f0f0f0fu;
    memcpy(out, &spread, sizeof spread);
}

// Scales [rows / block_rows][groups], or one for all.
static int read_row_scales(struct import *import, struct import_window *window, struct import_unpacked *out,
                           struct error *err)
{
    const struct import_matrix *matrix = window->matrix;
    const struct safetensors_tensor *scales = matrix->scales;
    uint64_t groups = matrix->groups, blocks = matrix->form.block_rows;
    struct fetched fetched;
    if (matrix->scale_per_tensor) {
        float scale;
        int rc = import_read_reals(import, scales, &scale, 1, err);
        for (uint64_t i = 0; !rc && i < window->rows; i++)
            out->scales[i] = scale;
        return rc;
    }
    int rc = fetch(&fetched, import, window, scales, groups * dtype_bytes(scales->dtype), out->rows, blocks, err);
    for (uint64_t i = 0; !rc && i < window->rows; i++) {
        const uint8_t *raw = fetched_row(&fetched, window, i, out->rows[i] / blocks);
        for (uint64_t g = 0; g < groups; g++)
            out->scales[i * groups + g] = import_real(raw, scales->dtype, g);
    }
    return rc;
}

static void fill_zeros(struct import_unpacked *out, uint64_t count, int bits)
{
    for (uint64_t i = 0; i < count; i++)
        out->zeros[i] = (float)(1 << (bits - 1));
}

static int read_packed(struct import *import, struct import_window *window, struct import_unpacked *out,
                       struct error *err)
{
    const struct import_matrix *matrix = window->matrix;
    uint64_t cols = matrix->cols, groups = matrix->groups;
    uint64_t bits = (uint64_t)matrix->form.bits, per_word = GPTQ_WORD_BITS / bits;
    uint32_t mask = (1u << bits) - 1;
    struct fetched fetched;
    int rc = fetch(&fetched, import, window, matrix->codes, div_up(cols, per_word) * 4, out->rows, 1, err);
    if (rc)
        return rc;
    for (uint64_t i = 0; i < window->rows; i++) {
        const uint8_t *raw = fetched_row(&fetched, window, i, out->rows[i]);
        uint8_t *codes = out->codes + i * cols, last[8] = {0};
        for (uint64_t c = 0; c < cols; c += per_word, raw += 4) {
            uint8_t *to = c + per_word <= cols ? codes + c : last;
            expand_word(to, load_word(raw), matrix->form.bits);
            if (to == last)
                memcpy(codes + c, last, cols - c);
        }
    }
    if ((rc = read_row_scales(import, window, out, err)))
        return rc;
    fill_zeros(out, window->rows * groups, matrix->form.bits);
    if (!matrix->zeros)
        return 0;
    if ((rc = fetch(&fetched, import, window, matrix->zeros, groups * 4, out->rows, per_word, err)))
        return rc;
    for (uint64_t i = 0; i < window->rows; i++) {
        const uint8_t *raw = fetched_row(&fetched, window, i, out->rows[i] / per_word);
        for (uint64_t g = 0; g < groups; g++)
            out->zeros[i * groups + g] = (float)(load_word(raw + 4 * g) >> out->rows[i] % per_word * bits & mask);
    }
    return 0;
}

static int read_bytes(struct import *import, struct import_window *window, struct import_unpacked *out,
                      struct error *err)
{
    const struct import_matrix *matrix = window->matrix;
    uint64_t cols = matrix->cols;
    uint8_t flip = matrix->form.layout == LAYOUT_INT8 ? 0x80 : 0; // signed to unsigned
    struct fetched fetched;
    int rc = fetch(&fetched, import, window, matrix->codes, cols, out->rows, 1, err);
    if (rc)
        return rc;
    for (uint64_t i = 0; i < window->rows; i++) {
        const uint8_t *raw = fetched_row(&fetched, window, i, out->rows[i]);
        for (uint64_t c = 0; c < cols; c++)
            out->codes[i * cols + c] = raw[c] ^ flip;
    }
    fill_zeros(out, window->rows * matrix->groups, 8);
    return read_row_scales(import, window, out, err);
}

static int read_fp4(struct import *import, struct import_window *window, struct import_unpacked *out, struct error *err)
{
    const struct import_matrix *matrix = window->matrix;
    uint64_t cols = matrix->cols, groups = matrix->groups;
    struct fetched fetched;
    int rc = fetch(&fetched, import, window, matrix->codes, cols / 2, out->rows, 1, err);
    if (rc)
        return rc;
    for (uint64_t i = 0; i < window->rows; i++) {
        const uint8_t *raw = fetched_row(&fetched, window, i, out->rows[i]);
        for (uint64_t c = 0; c < cols / 2; c++) {
            out->codes[i * cols + 2 * c] = nibble_low(raw[c]);
            out->codes[i * cols + 2 * c + 1] = nibble_high(raw[c]);
        }
    }
    if ((rc = fetch(&fetched, import, window, matrix->scales, groups, out->rows, 1, err)))
        return rc;
    for (uint64_t i = 0; i < window->rows; i++)
        memcpy(out->scales_u8 + i * groups, fetched_row(&fetched, window, i, out->rows[i]), groups);
    return 0;
}

static int read_plain(struct import *import, struct import_window *window, struct import_unpacked *out,
                      struct error *err)
{
    const struct import_matrix *matrix = window->matrix;
    const struct safetensors_tensor *tensor = matrix->codes;
    struct fetched fetched;
    int rc = fetch(&fetched, import, window, tensor, matrix->cols * dtype_bytes(tensor->dtype), out->rows, 1, err);
    for (uint64_t i = 0; !rc && i < window->rows; i++) {
        const uint8_t *raw = fetched_row(&fetched, window, i, out->rows[i]);
        for (uint64_t c = 0; c < matrix->cols; c++)
            out->values[i * matrix->cols + c] = import_real(raw, tensor->dtype, c);
    }
    return rc;
}

// ---- hqq and bitsandbytes: flat blocks -----------------------------------------------------------------------------

// Group i of the flattened matrix stands in the upper nibbles of line i, group i + half in the lower ones.
static int read_hqq(struct import *import, struct import_window *window, struct import_unpacked *out, struct error *err)
{
    const struct import_matrix *matrix = window->matrix;
    uint64_t cols = matrix->cols, groups = matrix->groups, group = cols / groups;
    uint64_t half = matrix->rows * groups / 2;
    struct fetched fetched;
    int rc = reserve(&window->raw, &window->raw_capacity, cols, err);
    for (uint64_t i = 0; !rc && i < window->rows; i++) {
        uint64_t begin = out->rows[i] * groups, g = 0;
        while (!rc && g < groups) { // a row may lie in both halves
            bool upper = begin + g < half;
            uint64_t line = upper ? begin + g : begin + g - half;
            uint64_t count = upper && half - line < groups - g ? half - line : groups - g;
            uint8_t *codes = out->codes + i * cols + g * group;
            rc = checkpoint_read(import->checkpoint, matrix->codes, line * group, count * group, window->raw, err);
            for (uint64_t c = 0; !rc && c < count * group; c++)
                codes[c] = upper ? nibble_high(window->raw[c]) : nibble_low(window->raw[c]);
            g += count;
        }
    }
    const struct safetensors_tensor *reals[] = {matrix->scales, matrix->zeros};
    for (int t = 0; !rc && t < 2; t++) {
        float *to = t ? out->zeros : out->scales;
        rc = fetch(&fetched, import, window, reals[t], groups * dtype_bytes(reals[t]->dtype), out->rows, 1, err);
        for (uint64_t i = 0; !rc && i < window->rows; i++)
            for (uint64_t g = 0; g < groups; g++)
                to[i * groups + g] = import_real(fetched_row(&fetched, window, i, out->rows[i]), reals[t]->dtype, g);
    }
    return rc;
}

// Scales of blocks [first, first + count) of a flat matrix.
static int read_absmax(const struct import *import, const struct import_matrix *matrix, uint64_t first, uint64_t count,
                       float *out, struct error *err)
{
    if (!matrix->nested_table)
        return checkpoint_read(import->checkpoint, matrix->scales, first * sizeof *out, count * sizeof *out, out, err);
    uint64_t nested_first = first / matrix->nested_block;
    uint64_t nested_count = (first + count - 1) / matrix->nested_block - nested_first + 1;
    float *nested = malloc(nested_count * sizeof *nested + count);
    if (!nested)
        return error_set(err, ERR_MEMORY, "out of memory for scales");
    uint8_t *codes = (uint8_t *)(nested + nested_count);
    int rc = checkpoint_read(import->checkpoint, matrix->nested_scales, nested_first * sizeof *nested,
                             nested_count * sizeof *nested, nested, err);
    if (!rc)
        rc = checkpoint_read(import->checkpoint, matrix->scales, first, count, codes, err);
    for (uint64_t i = 0; !rc && i < count; i++) {
        float product = matrix->nested_table[codes[i]] * nested[(first + i) / matrix->nested_block - nested_first];
        out[i] = product + matrix->nested_offset;
    }
    free(nested);
    return rc;
}

static int read_nf4(struct import *import, struct import_window *window, struct import_unpacked *out, struct error *err)
{
    const struct import_matrix *matrix = window->matrix;
    uint64_t cols = matrix->cols, block = matrix->form.group_size;
    float *absmax = malloc((cols / block + 2) * sizeof *absmax);
    int rc = absmax ? reserve(&window->raw, &window->raw_capacity, cols / 2 + 2, err)
                    : error_set(err, ERR_MEMORY, "out of memory for scales");
    for (uint64_t i = 0; !rc && i < window->rows; i++) {
        uint64_t begin = out->rows[i] * cols, end = begin + cols;
        if ((rc = checkpoint_read(import->checkpoint, matrix->codes, begin / 2, div_up(end, 2) - begin / 2, window->raw,
                                  err)) ||
            (rc = read_absmax(import, matrix, begin / block, (end - 1) / block - begin / block + 1, absmax, err)))
            break;
        for (uint64_t c = begin; c < end; c++) {
            uint8_t byte = window->raw[c / 2 - begin / 2];
            uint8_t code = c % 2 ? nibble_low(byte) : nibble_high(byte);
            out->values[i * cols + c - begin] = matrix->table[code] * absmax[c / block - begin / block];
        }
    }
    free(absmax);
    return rc;
}

// ---- gptq and awq: rows are columns of their tensors ----------------------------------------------------------------

// Nibble of an AWQ word that holds column j of its eight.
static const uint8_t awq_nibble[8] = {0, 4, 1, 5, 2, 6, 3, 7};

// One tensor [lines][width]: for every wanted row, the elements of `bytes` bytes at index row / divisor of each line.
// take is given runs of consecutive rows, so that what one cache line holds of them is used while it is there.
enum { RUN_ROWS = 32 };

struct strip {
    const struct safetensors_tensor *tensor;
    uint64_t lines, divisor, bytes, stride;
    void (*take)(const struct strip *strip, const struct import_matrix *matrix, struct import_unpacked *out, uint64_t i,
                 uint64_t count, const uint8_t *first);
};

// Rows from i on that follow each other and whose elements end before byte `end` of each line.
static uint64_t run_length(const struct strip *strip, const struct import_unpacked *out, uint64_t i, uint64_t rows,
                           uint64_t end)
{
    uint64_t count = 1;
    while (count < RUN_ROWS && i + count < rows && out->rows[i + count] == out->rows[i] + count &&
           out->rows[i + count] / strip->divisor * strip->bytes < end)
        count++;
    return count;
}

static int walk_strip(struct strip *strip, struct import *import, struct import_window *window,
                      struct import_unpacked *out, struct error *err)
{
    const struct import_matrix *matrix = window->matrix;
    bool anywhere = matrix->row_leader != NULL; // rows may lie all over the tensor
    for (uint64_t i = 0; i < window->rows;) {
        struct slab slab;
        int rc = slab_get(&slab, import->slabs, strip->tensor, strip->lines,
                          out->rows[i] / strip->divisor * strip->bytes, anywhere, err);
        if (rc)
            return rc;
        strip->stride = slab.width;
        while (i < window->rows) {
            uint64_t at = out->rows[i] / strip->divisor * strip->bytes;
            if (at < slab.begin || at >= slab.begin + slab.width)
                break;
            uint64_t count = run_length(strip, out, i, window->rows, slab.begin + slab.width);
            strip->take(strip, matrix, out, i, count, slab.bytes + at - slab.begin);
            i += count;
        }
        slab_put(import->slabs, &slab);
    }
    return 0;
}

// Row i + j stands so many bytes behind row i.
static uint64_t element_of(const struct strip *strip, const struct import_unpacked *out, uint64_t i, uint64_t j)
{
    return (out->rows[i + j] / strip->divisor - out->rows[i] / strip->divisor) * strip->bytes;
}

static void take_gptq_codes(const struct strip *strip, const struct import_matrix *matrix, struct import_unpacked *out,
                            uint64_t i, uint64_t count, const uint8_t *first)
{
    uint64_t per_word = GPTQ_WORD_BITS / (uint64_t)matrix->form.bits;
    for (uint64_t line = 0; line < strip->lines; line++, first += strip->stride)
        for (uint64_t j = 0; j < count; j++)
            expand_word(out->codes + (i + j) * matrix->cols + line * per_word, load_word(first + 4 * j),
                        matrix->form.bits);
}

static void take_awq_codes(const struct strip *strip, const struct import_matrix *matrix, struct import_unpacked *out,
                           uint64_t i, uint64_t count, const uint8_t *first)
{
    uint64_t offset[RUN_ROWS];
    int shift[RUN_ROWS];
    for (uint64_t j = 0; j < count; j++) {
        offset[j] = element_of(strip, out, i, j);
        shift[j] = 4 * awq_nibble[out->rows[i + j] % 8];
    }
    for (uint64_t line = 0; line < strip->lines; line++, first += strip->stride)
        for (uint64_t j = 0; j < count; j++)
            out->codes[(i + j) * matrix->cols + line] = (uint8_t)(load_word(first + offset[j]) >> shift[j] & 15);
}

static void take_scales(const struct strip *strip, const struct import_matrix *matrix, struct import_unpacked *out,
                        uint64_t i, uint64_t count, const uint8_t *first)
{
    for (uint64_t line = 0; line < strip->lines; line++, first += strip->stride)
        for (uint64_t j = 0; j < count; j++)
            out->scales[(i + j) * strip->lines + line] = import_real(first, matrix->scales->dtype, j);
}

static void take_zeros(const struct strip *strip, const struct import_matrix *matrix, struct import_unpacked *out,
                       uint64_t i, uint64_t count, const uint8_t *first)
{
    uint64_t bits = (uint64_t)matrix->form.bits;
    for (uint64_t j = 0; j < count; j++) {
        uint64_t in_word = out->rows[i + j] % strip->divisor;
        uint64_t shift = matrix->form.layout == LAYOUT_AWQ ? 4 * (uint64_t)awq_nibble[in_word] : bits * in_word;
        const uint8_t *at = first + element_of(strip, out, i, j);
        for (uint64_t line = 0; line < strip->lines; line++)
            out->zeros[(i + j) * strip->lines + line] =
                (float)(load_word(at + line * strip->stride) >> shift & ((1u << bits) - 1));
    }
}

static int read_columns(struct import *import, struct import_window *window, struct import_unpacked *out,
                        struct error *err)
{
    const struct import_matrix *matrix = window->matrix;
    bool awq = matrix->form.layout == LAYOUT_AWQ;
    uint64_t per_word = GPTQ_WORD_BITS / (uint64_t)matrix->form.bits;
    struct strip strips[] = {
        {matrix->codes, awq ? matrix->cols : matrix->cols / per_word, awq ? per_word : 1, 4, 0,
         awq ? take_awq_codes : take_gptq_codes},
        {matrix->scales, matrix->groups, 1, dtype_bytes(matrix->scales->dtype), 0, take_scales},
        {matrix->zeros, matrix->groups, per_word, 4, 0, take_zeros},
    };
    int rc = 0;
    for (size_t s = 0; !rc && s < sizeof strips / sizeof strips[0]; s++)
        rc = walk_strip(&strips[s], import, window, out, err);
    if (rc || awq || !import->config->zero_minus_one)
        return rc;
    for (uint64_t i = 0; i < window->rows * matrix->groups; i++)
        out->zeros[i] += 1;
    return 0;
}

// ---- reading -----------------------------------------------------------------------------------------------------

// Columns in their stored order.
static void reorder(const struct import_matrix *matrix, struct import_unpacked *out, uint64_t rows)
{
    for (uint64_t i = 0; i < rows; i++) {
        uint8_t *codes = out->codes + i * matrix->cols;
        memcpy(out->scratch, codes, matrix->cols);
        for (uint64_t c = 0; c < matrix->cols; c++)
            codes[c] = out->scratch[matrix->sorted[c]];
    }
}

int import_read(struct import *import, struct import_window *window, const char *source, uint64_t row_begin,
                uint64_t rows, struct error *err)
{
    struct import_matrix *matrix = import_find(import, source);
    struct import_unpacked out;
    int rc;
    if (!matrix || row_begin > matrix->rows || rows > matrix->rows - row_begin)
        return error_set(err, ERR_OTHER, "tensor %s: rows are wanted that it does not have", source);
    window->matrix = matrix;
    window->row_begin = row_begin;
    window->rows = rows;
    if ((rc = reserve(&window->memory, &window->memory_capacity, lay_out(&out, NULL, matrix, rows), err)))
        return rc;
    out = import_unpacked_of(window);
    for (uint64_t i = 0; i < rows; i++)
        out.rows[i] = source_row(matrix, row_begin + i);
    switch (matrix->form.layout) {
    case LAYOUT_PLAIN:
        return read_plain(import, window, &out, err);
    case LAYOUT_NF4:
        return read_nf4(import, window, &out, err);
    case LAYOUT_GPTQ:
    case LAYOUT_AWQ:
        rc = read_columns(import, window, &out, err);
        break;
    case LAYOUT_PACKED:
        rc = read_packed(import, window, &out, err);
        break;
    case LAYOUT_INT8:
    case LAYOUT_FP8:
        rc = read_bytes(import, window, &out, err);
        break;
    case LAYOUT_NVFP4:
    case LAYOUT_MXFP4:
        rc = read_fp4(import, window, &out, err);
        break;
    case LAYOUT_HQQ:
        rc = read_hqq(import, window, &out, err);
        break;
    }
    if (!rc && matrix->reordered)
        reorder(matrix, &out, rows);
    return rc;
}
