// The body of every attention_<isa>.c, compiled with its flags and exported as ATTENTION_FN; ATTENTION_VECTORS (1 or 4) times 16 columns
// of ATTENTION_ROWS (at most 6) rows are the sums that fit its registers. Included once per file, by those files alone.
//
// A page at a time is widened to f32 once for all queries of the call, in panels that stream through L1; for queries that fit
// one tile it is widened as it is multiplied. Both products are the same small matrix product: scores [queries][64] = q [queries][k_dim] * keys
// [k_dim][64], which lie turned in the cache, so that no sum goes across lanes; and out [queries][v_dim] += weights [queries][64] * values
// [64][v_dim]. Every element is one chain of fused multiply-adds in ascending order, whatever the tile.
#include "formats/checked.h"
#include "kernels/attention.h"
#include "kernels/kv_codes.h"
#include "kernels/lanes.h"

// The second operand of a product, [depth][columns]: f32 in panels, or codes as they lie in the cache.
enum { IN_PANELS = -1, IN_PAIRS = -2 };
struct operand {
    const uint8_t *at;
    int64_t row_bytes; // of codes; IN_PAIRS: of two rows
    int form;          // IN_PANELS, IN_PAIRS (keys of int4: a byte holds a column of two rows), or enum kv_format
};

// One call's room.
struct work {
    int64_t k_dim, v_dim, count;
    int64_t out_stride;          // v_dim as whole vectors
    float *q;                    // [count][k_dim]
    float *out;                  // [count][out_stride], of the chunk
    float *scores;               // [count][KV_PAGE_TOKENS]
    float *sums;                 // [count][LANES]: of weights, position p in lane p % LANES
    float *panel;                // keys or values of a page
    struct operand keys, values; // of the page
    uint16_t *rows;              // [KV_PAGE_TOKENS][k_dim], and as much behind it, for keys that lie in rows
    float largest[ATTENTION_QUERIES];
    int64_t first[ATTENTION_QUERIES], end[ATTENTION_QUERIES]; // slots of the page
};

static struct work work_in(float *room, const struct kv_view *kv, int64_t count)
{
    struct work w = {.k_dim = kv->k_dim, .v_dim = kv->v_dim, .count = count};
    w.out_stride = (int64_t)round_up((uint64_t)kv->v_dim, LANES);
    int64_t wider = w.k_dim > w.out_stride ? w.k_dim : w.out_stride;
    w.panel = room;
    w.scores = w.panel + KV_PAGE_TOKENS * wider;
    w.sums = w.scores + ATTENTION_QUERIES * KV_PAGE_TOKENS;
    w.out = w.sums + ATTENTION_QUERIES * LANES;
    w.q = w.out + ATTENTION_QUERIES * w.out_stride;
    w.rows = (uint16_t *)(void *)(w.q + ATTENTION_QUERIES * w.k_dim);
    return w;
}

// ---- panels --------------------------------------------------------------------------------------------------------

enum { WIDE_VECTORS = ATTENTION_VECTORS };

// A matrix [depth][columns] in panels of ATTENTION_VECTORS vectors of columns, single ones at the end, each [depth][its columns].
VECTOR_INLINE int64_t panel_width(int64_t column, int64_t columns)
{
    return columns / (ATTENTION_VECTORS * LANES) * (ATTENTION_VECTORS * LANES) > column ? ATTENTION_VECTORS * LANES
                                                                                        : LANES;
}

// Of so many codes, an even number.
VECTOR_INLINE int64_t codes_bytes(int64_t count, enum kv_format format)
{
    return format == KV_BF16 ? 2 * count : format == KV_INT4 ? count / 2 : count;
}

VECTOR_INLINE struct lanes widen(const uint8_t *codes, enum kv_format format)
{
    return format == KV_BF16   ? lanes_bf16(codes)
           : format == KV_E4M3 ? lanes_e4m3(codes)
           : format == KV_INT8 ? lanes_int8(codes)
                               : lanes_int4(codes);
}

// Rows [first, end) of codes [.][stride] to a panel. `vectors` and format are constants.
VECTOR_INLINE void fill_panel(float *panel, const uint8_t *codes, int64_t stride, int64_t first, int64_t end,
                              int64_t vectors, enum kv_format format)
{
    int64_t vector_bytes = codes_bytes(LANES, format), row_bytes = codes_bytes(stride, format);
    for (int64_t row = first; row < end; row++) {
        const uint8_t *from = codes + row * row_bytes;
        UNROLL
        for (int64_t v = 0; v < vectors; v++) {
            struct lanes value = widen(from + v * vector_bytes, format);
            lanes_store(panel + (row * vectors + v) * LANES, &value);
        }
    }
}

// The last columns, fewer than a vector; what is added to them is zeros.
VECTOR_INLINE void fill_rest(float *panel, const uint8_t *codes, int64_t stride, int64_t first, int64_t end,
                             int64_t columns, enum kv_format format)
{
    for (int64_t row = first; row < end; row++) {
        const uint8_t *from = codes + codes_bytes(row * stride, format);
        float *to = panel + row * LANES;
        if (format == KV_INT4) {
            for (int64_t i = 0; i < LANES; i++)
                to[i] = i < columns ? (float)weight_nl4_level(
                                          (uint8_t)(from[kv_int4_byte(i, columns)] >> kv_int4_shift(i, columns)))
                                    : 0.0f;
            continue;
        }
        uint8_t whole[LANES * 2] = {0};
        memcpy(whole, from, (size_t)codes_bytes(columns, format));
        struct lanes value = widen(whole, format);
        lanes_store(to, &value);
    }
}

// Keys of int4, [depth / 2][KV_PAGE_TOKENS] bytes of two rows, to the panels of [depth][KV_PAGE_TOKENS].
VECTOR_INLINE void fill_pairs(float *panel, const uint8_t *codes, int64_t depth)
{
    for (int64_t column = 0; column < KV_PAGE_TOKENS; column += WIDE_VECTORS * LANES)
        for (int64_t row = 0; row < depth; row += 2) {
            const uint8_t *from = codes + row / 2 * KV_PAGE_TOKENS + column;
            float *to = panel + column * depth + row * WIDE_VECTORS * LANES;
            UNROLL
            for (int64_t v = 0; v < WIDE_VECTORS; v++) {
                struct lanes low, high;
                lanes_int4_pair(&low, &high, from + v * LANES);
                lanes_store(to + v * LANES, &low);
                lanes_store(to + (WIDE_VECTORS + v) * LANES, &high);
            }
        }
}

VECTOR_INLINE void fill_panels(float *panel, const uint8_t *codes, int64_t stride, int64_t depth, int64_t first,
                               int64_t end, int64_t columns, enum kv_format format)
{
    int64_t padded = (int64_t)round_up((uint64_t)columns, LANES);
    for (int64_t column = 0, width; column < padded; column += width) {
        width = panel_width(column, columns);
        float *to = panel + column * depth;
        const uint8_t *from = codes + codes_bytes(column, format);
        if (column + width > columns)
            fill_rest(to, from, stride, first, end, columns - column, format);
        else if (width == LANES)
            fill_panel(to, from, stride, first, end, 1, format);
        else
            fill_panel(to, from, stride, first, end, WIDE_VECTORS, format);
    }
}

// Rows [first, end) of codes [depth][stride], `columns` of each, to the panels of [depth][columns as whole vectors].
static void widen_panels(float *panel, const uint8_t *codes, int64_t stride, int64_t depth, int64_t first, int64_t end,
                         int64_t columns, enum kv_format format)
{
    if (format == KV_BF16)
        fill_panels(panel, codes, stride, depth, first, end, columns, KV_BF16);
    else if (format == KV_E4M3)
        fill_panels(panel, codes, stride, depth, first, end, columns, KV_E4M3);
    else if (format == KV_INT8)
        fill_panels(panel, codes, stride, depth, first, end, columns, KV_INT8);
    else
        fill_panels(panel, codes, stride, depth, first, end, columns, KV_INT4);
}

// ---- keys that lie in rows -----------------------------------------------------------------------------------------

typedef uint16_t u16x8 __attribute__((vector_size(16)));

// out[8][KV_PAGE_TOKENS] = the transposed of in[8][stride].
VECTOR_INLINE void turn_8x8(uint16_t *out, const uint16_t *in, int64_t stride)
{
    u16x8 a[8], b[8];
    for (int i = 0; i < 8; i++)
        memcpy(&a[i], in + i * stride, sizeof a[i]);
    for (int i = 0; i < 4; i++) { // three times the halves of the vectors are interleaved
        b[2 * i] = VECTOR_SHUFFLE(u16x8, a[i], a[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
        b[2 * i + 1] = VECTOR_SHUFFLE(u16x8, a[i], a[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
    }
    for (int i = 0; i < 4; i++) {
        a[2 * i] = VECTOR_SHUFFLE(u16x8, b[i], b[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
        a[2 * i + 1] = VECTOR_SHUFFLE(u16x8, b[i], b[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
    }
    for (int i = 0; i < 4; i++) {
        b[2 * i] = VECTOR_SHUFFLE(u16x8, a[i], a[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
        b[2 * i + 1] = VECTOR_SHUFFLE(u16x8, a[i], a[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; i++)
        memcpy(out + i * KV_PAGE_TOKENS, &b[i], sizeof b[i]);
}

// The keys of a page as bf16 [k_dim][KV_PAGE_TOKENS].
static const uint8_t *turn_rows(const struct work *w, const uint8_t *codes, enum kv_format format)
{
    const uint16_t *rows = (const uint16_t *)(const void *)codes;
    uint16_t *turned = w->rows + KV_PAGE_TOKENS * w->k_dim;
    if (format == KV_E4M3) {
        for (int64_t i = 0; i < KV_PAGE_TOKENS * w->k_dim; i++)
            w->rows[i] = (uint16_t)(f32_bits(e4m3_to_f32(codes[i])) >> 16);
        rows = w->rows;
    }
    int64_t d = 0;
    for (; d + 8 <= w->k_dim; d += 8)
        for (int64_t s = 0; s < KV_PAGE_TOKENS; s += 8)
            turn_8x8(turned + d * KV_PAGE_TOKENS + s, rows + s * w->k_dim + d, w->k_dim);
    for (; d < w->k_dim; d++)
        for (int64_t s = 0; s < KV_PAGE_TOKENS; s++)
            turned[d * KV_PAGE_TOKENS + s] = rows[s * w->k_dim + d];
    return (const uint8_t *)turned;
}

// ---- products ------------------------------------------------------------------------------------------------------

// What is read next, brought to the L2 cache while products are computed (misses of the L1 cache would hold them up): `step` bytes with each term of a sum.
struct ahead {
    const uint8_t *from;
    int64_t step;
};
// For the first tile of a panel; for the others, a line that is there.
static struct ahead ahead_of(const struct ahead *page, int64_t terms, bool first)
{
    return first ? (struct ahead){page->from + terms * page->step, page->step} : (struct ahead){page->from, 0};
}

// IN_PAIRS: of row d, which is even, or of the one behind it.
VECTOR_INLINE struct lanes column_of(const uint8_t *b, int64_t d, int64_t behind, int64_t row_bytes, int v,
                                     const int form)
{
    if (form == IN_PAIRS)
        return lanes_int4_of_pair(b + d / 2 * row_bytes + v * LANES, behind);
    if (form == IN_PANELS)
        return lanes_load((const float *)(const void *)(b + d * row_bytes) + v * LANES);
    return widen(b + d * row_bytes + codes_bytes(v * LANES, (enum kv_format)form), (enum kv_format)form);
}

// c[r][v] (+)= sum over d < depth, ascending, of a[r][d] * b[d][v], for `rows` rows and `vectors` vectors of columns.
VECTOR_INLINE void tile(float *c, int64_t c_stride, const float *a, int64_t a_stride, const uint8_t *b,
                        int64_t row_bytes, int64_t depth, struct ahead ahead, int rows, int vectors, const int form,
                        bool add)
{
    struct lanes sum[ATTENTION_ROWS * ATTENTION_VECTORS];
    UNROLL
    for (int i = 0; i < rows * vectors; i++)
        sum[i] = add ? lanes_load(c + i / vectors * c_stride + i % vectors * LANES) : lanes_zero();
    const int64_t step = form == IN_PAIRS ? 2 : 1;
    for (int64_t d = 0; d < depth; d += step) {
        UNROLL
        for (int64_t behind = 0; behind < step; behind++) {
            const uint8_t *next = ahead.from + (d + behind) * ahead.step;
            __builtin_prefetch(next, 0, 2);
            __builtin_prefetch(next + ahead.step / 2, 0, 2);
            struct lanes column[ATTENTION_VECTORS];
            UNROLL
            for (int v = 0; v < vectors; v++)
                column[v] = column_of(b, d, behind, row_bytes, v, form);
            UNROLL
            for (int r = 0; r < rows; r++) {
                struct lanes x = lanes_all(a[r * a_stride + d + behind]);
                UNROLL
                for (int v = 0; v < vectors; v++)
                    lanes_fmadd(&sum[r * vectors + v], x, column[v]);
            }
        }
    }
    UNROLL
    for (int i = 0; i < rows * vectors; i++)
        lanes_store(c + i / vectors * c_stride + i % vectors * LANES, &sum[i]);
}

#define TILE_CASE(n)                                                                                                   \
    case n:                                                                                                            \
        if (width == LANES)                                                                                            \
            tile(c, c_stride, a, a_stride, b, row_bytes, depth, ahead, n, 1, form, add);                               \
        else                                                                                                           \
            tile(c, c_stride, a, a_stride, b, row_bytes, depth, ahead, n, WIDE_VECTORS, form, add);                    \
        break

// `width` columns of b; rows as tile_tokens gives them.
#define MULTIPLY(name, form_of_b, adds)                                                                                \
    static void name(float *c, int64_t c_stride, const float *a, int64_t a_stride, const uint8_t *b,                   \
                     int64_t row_bytes, int64_t depth, int64_t rows, int64_t width, struct ahead ahead)                \
    {                                                                                                                  \
        const int form = form_of_b;                                                                                    \
        const bool add = adds;                                                                                         \
        switch (rows) {                                                                                                \
            TILE_CASE(1);                                                                                              \
            TILE_CASE(2);                                                                                              \
            TILE_CASE(4);                                                                                              \
            TILE_CASE(6);                                                                                              \
        }                                                                                                              \
    }
MULTIPLY(score_panels, IN_PANELS, false)
MULTIPLY(score_bf16, KV_BF16, false)
MULTIPLY(score_e4m3, KV_E4M3, false)
MULTIPLY(score_int8, KV_INT8, false)
MULTIPLY(score_pairs, IN_PAIRS, false)
MULTIPLY(mix_panels, IN_PANELS, true)
MULTIPLY(mix_bf16, KV_BF16, true)
MULTIPLY(mix_e4m3, KV_E4M3, true)
MULTIPLY(mix_int8, KV_INT8, true)
MULTIPLY(mix_int4, KV_INT4, true)
#undef MULTIPLY
#undef TILE_CASE

typedef void multiply_fn(float *c, int64_t c_stride, const float *a, int64_t a_stride, const uint8_t *b,
                         int64_t row_bytes, int64_t depth, int64_t rows, int64_t width, struct ahead ahead);

static multiply_fn *const score_by[] = {[KV_BF16] = score_bf16, [KV_E4M3] = score_e4m3, [KV_INT8] = score_int8};
static multiply_fn *const mix_by[] = {
    [KV_BF16] = mix_bf16, [KV_E4M3] = mix_e4m3, [KV_INT8] = mix_int8, [KV_INT4] = mix_int4};

// Columns from `column` on of rows from `row` on, and the bytes from a row of them to the next.
static const uint8_t *operand_at(const struct operand *b, int64_t depth, int64_t row, int64_t column, int64_t width,
                                 int64_t *row_bytes)
{
    if (b->form == IN_PAIRS) { // keys: all rows
        *row_bytes = b->row_bytes;
        return b->at + column;
    }
    if (b->form != IN_PANELS) {
        *row_bytes = b->row_bytes;
        return b->at + row * b->row_bytes + codes_bytes(column, (enum kv_format)b->form);
    }
    *row_bytes = width * (int64_t)sizeof(float);
    return b->at + (column * depth + row * width) * (int64_t)sizeof(float);
}

// bytes: of `next`.
static void score(const struct work *w, const uint8_t *next, int64_t bytes)
{
    multiply_fn *multiply = w->keys.form == IN_PANELS  ? score_panels
                            : w->keys.form == IN_PAIRS ? score_pairs
                                                       : score_by[w->keys.form];
    int64_t panels = KV_PAGE_TOKENS / panel_width(0, KV_PAGE_TOKENS), panel = 0;
    const struct ahead page = {next, bytes / (panels * w->k_dim)};
    for (int64_t column = 0, width; column < KV_PAGE_TOKENS; column += width, panel++) {
        width = panel_width(column, KV_PAGE_TOKENS);
        int64_t row_bytes;
        const uint8_t *keys = operand_at(&w->keys, w->k_dim, 0, column, width, &row_bytes);
        for (int64_t i = 0, rows; i < w->count; i += rows) {
            rows = tile_tokens(w->count - i);
            multiply(w->scores + i * KV_PAGE_TOKENS + column, KV_PAGE_TOKENS, w->q + i * w->k_dim, w->k_dim, keys,
                     row_bytes, w->k_dim, rows, width, ahead_of(&page, panel * w->k_dim, i == 0));
        }
    }
}

// Slots [first, end) of query i.
VECTOR_INLINE void mix_slots(const struct work *w, int64_t i, int64_t rows, int64_t column, int64_t width,
                             int64_t first, int64_t end, struct ahead ahead)
{
    if (first >= end)
        return;
    multiply_fn *multiply = w->values.form == IN_PANELS ? mix_panels : mix_by[w->values.form];
    int64_t row_bytes;
    const uint8_t *values = operand_at(&w->values, KV_PAGE_TOKENS, first, column, width, &row_bytes);
    multiply(w->out + i * w->out_stride + column, w->out_stride, w->scores + i * KV_PAGE_TOKENS + first, KV_PAGE_TOKENS,
             values, row_bytes, end - first, rows, width, ahead);
}

// Slots that all queries of a tile attend to are multiplied together, those before and behind for each query alone: a slot that is not
// attended to may hold a NaN.
static void mix(const struct work *w, const uint8_t *next, int64_t bytes)
{
    int64_t panels = 0, panel = 0;
    for (int64_t column = 0; column < w->out_stride; column += panel_width(column, w->v_dim))
        panels++;
    const struct ahead page = {next, bytes / (panels * KV_PAGE_TOKENS)}, none = {next, 0};
    for (int64_t column = 0, width; column < w->out_stride; column += width, panel++) {
        width = panel_width(column, w->v_dim);
        for (int64_t i = 0, rows; i < w->count; i += rows) {
            rows = tile_tokens(w->count - i);
            int64_t first = 0, end = KV_PAGE_TOKENS;
            for (int64_t r = i; r < i + rows; r++) {
                first = w->first[r] > first ? w->first[r] : first;
                end = w->end[r] < end ? w->end[r] : end;
            }
            bool together = first < end;
            for (int64_t r = i; r < i + rows; r++)
                mix_slots(w, r, 1, column, width, w->first[r], together ? first : w->end[r], none);
            mix_slots(w, i, rows, column, width, first, end, ahead_of(&page, panel * KV_PAGE_TOKENS, i == 0));
            for (int64_t r = i; together && r < i + rows; r++)
                mix_slots(w, r, 1, column, width, end, w->end[r], none);
        }
    }
}

// ---- softmax -------------------------------------------------------------------------------------------------------

enum { PAGE_VECTORS = KV_PAGE_TOKENS / LANES };

VECTOR_INLINE void largest_halves(float *lane, int half)
{
    for (int i = 0; i < half; i++)
        lane[i] = lane[i + half] > lane[i] ? lane[i + half] : lane[i];
}

// The largest of all lanes and `largest`; a NaN is passed over.
VECTOR_INLINE float largest_of(const f32x16 x[PAGE_VECTORS], float largest)
{
    f32x16 most = {0};
    most += largest;
    for (int v = 0; v < PAGE_VECTORS; v++) {
        i32x16 more = x[v] > most;
        select16(&most, &more, &x[v], &most);
    }
    float lane[LANES];
    store16(lane, &most);
    largest_halves(lane, 8);
    largest_halves(lane, 4);
    largest_halves(lane, 2);
    largest_halves(lane, 1);
    return lane[0];
}

// exp of x <= 0 as exp16 has it, but 0 below -87, where a weight is lost beside the largest, which is 1. Step by step for all vectors, whose
// chains run side by side.
VECTOR_INLINE void exp_page(f32x16 x[PAGE_VECTORS])
{
    static const float factors[] = {8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    f32x16 power[PAGE_VECTORS], r[PAGE_VECTORS], p[PAGE_VECTORS];
    i32x16 inside[PAGE_VECTORS];
    UNROLL
    for (int v = 0; v < PAGE_VECTORS; v++) {
        inside[v] = ~(x[v] < -87.0f); // and NaN
        power[v] = x[v] * 0x1.715476p+0f + 12582912.0f;
    }
    UNROLL
    for (int v = 0; v < PAGE_VECTORS; v++) {
        f32x16 n = power[v] - 12582912.0f;
        r[v] = x[v] - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f;
        p[v] = r[v] * 1.9875691500e-4f + 1.3981999507e-3f;
    }
    UNROLL
    for (int i = 0; i < 4; i++) {
        UNROLL
        for (int v = 0; v < PAGE_VECTORS; v++)
            p[v] = p[v] * r[v] + factors[i];
    }
    UNROLL
    for (int v = 0; v < PAGE_VECTORS; v++) {
        p[v] = p[v] * (r[v] * r[v]) + r[v] + 1.0f;
        p[v] = p[v] * (f32x16)(((u32x16)power[v] << 23) + 0x3f800000u); // the low bits of power are n
        x[v] = (f32x16)((i32x16)p[v] & inside[v]);
    }
}

// The page's scales of keys and values, bf16 [KV_PAGE_TOKENS]; NULL: the format has none.
struct scales {
    const uint16_t *k, *v;
};

// x *= bf16 scales.
VECTOR_INLINE void multiply_scales(f32x16 *x, const uint16_t *scales)
{
    struct lanes wide = lanes_bf16((const uint8_t *)scales);
    f32x16 factor;
    memcpy(&factor, &wide, sizeof factor);
    *x = *x * factor;
}

// Scores of query i in this page become weights, exp(score - largest); what was summed up before is brought to the new largest.
static void weigh(struct work *w, int64_t i, const struct attention_scores *how, struct scales scales)
{
    float *scores = w->scores + i * KV_PAGE_TOKENS;
    f32x16 x[PAGE_VECTORS], none = {0}, sum;
    none -= INFINITY;
    UNROLL
    for (int v = 0; v < PAGE_VECTORS; v++) {
        load16(&x[v], scores + v * LANES);
        if (scales.k)
            multiply_scales(&x[v], scales.k + v * LANES);
        x[v] = x[v] * how->scale;
    }
    for (int v = 0; v < PAGE_VECTORS && how->softcap > 0; v++) {
        x[v] = x[v] / how->softcap;
        tanh16(&x[v], &x[v]);
        x[v] = x[v] * how->softcap;
    }
    if (w->first[i] > 0 || w->end[i] < KV_PAGE_TOKENS) {
        i32x16 slot = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        for (int v = 0; v < PAGE_VECTORS; v++) {
            i32x16 inside = (slot >= (int32_t)w->first[i]) & (slot < (int32_t)w->end[i]);
            select16(&x[v], &inside, &x[v], &none);
            slot += LANES;
        }
    }
    load16(&sum, w->sums + i * LANES);
    float largest = largest_of(x, w->largest[i]);
    if (largest > w->largest[i]) {
        f32x16 factor = {0}, out;
        factor += w->largest[i] - largest;
        exp16(&factor, &factor);
        sum *= factor;
        for (int64_t d = 0; d < w->out_stride; d += LANES) {
            load16(&out, w->out + i * w->out_stride + d);
            out *= factor;
            store16(w->out + i * w->out_stride + d, &out);
        }
        w->largest[i] = largest;
    }
    UNROLL
    for (int v = 0; v < PAGE_VECTORS; v++)
        x[v] = x[v] - largest;
    exp_page(x);
    UNROLL
    for (int v = 0; v < PAGE_VECTORS; v++) {
        sum += x[v];
        if (scales.v)
            multiply_scales(&x[v], scales.v + v * LANES);
        store16(scores + v * LANES, &x[v]);
    }
    store16(w->sums + i * LANES, &sum);
}

// ---- pages and chunks ----------------------------------------------------------------------------------------------

static int64_t clamp_slot(int64_t slot) { return slot < 0 ? 0 : slot > KV_PAGE_TOKENS ? KV_PAGE_TOKENS : slot; }

static int64_t place_of(const struct kv_view *kv, int64_t kv_head, int64_t position)
{
    return kv->pages[position / KV_PAGE_TOKENS] * kv->num_kv_heads + kv_head;
}
// Keys of the page of a position; with `values`, its values.
static const uint8_t *page_of(const struct kv_view *kv, int64_t kv_head, int64_t position, bool values)
{
    int64_t page = place_of(kv, kv_head, position);
    return (const uint8_t *)(values ? kv->v : kv->k) +
           codes_bytes(page * KV_PAGE_TOKENS * (values ? kv->v_stride : kv->k_dim), kv->format);
}

static struct scales scales_of(const struct kv_view *kv, int64_t kv_head, int64_t position)
{
    int64_t at = place_of(kv, kv_head, position) * KV_PAGE_TOKENS;
    if (!kv_format_scaled(kv->format))
        return (struct scales){NULL, NULL};
    return (struct scales){kv->k_scale + at, kv->v_scale + at};
}

// Codes that few queries read are not worth widening to panels first.
static bool read_as_they_lie(const struct work *w) { return w->count <= ATTENTION_ROWS; }

static void take_keys(struct work *w, const struct kv_view *kv, const uint8_t *codes)
{
    w->keys = (struct operand){(const uint8_t *)w->panel, 0, IN_PANELS};
    if (kv_in_rows(kv))
        widen_panels(w->panel, turn_rows(w, codes, kv->format), KV_PAGE_TOKENS, w->k_dim, 0, w->k_dim, KV_PAGE_TOKENS,
                     KV_BF16);
    else if (read_as_they_lie(w) && kv->format == KV_INT4)
        w->keys = (struct operand){codes, KV_PAGE_TOKENS, IN_PAIRS};
    else if (kv->format == KV_INT4)
        fill_pairs(w->panel, codes, w->k_dim);
    else if (read_as_they_lie(w))
        w->keys = (struct operand){codes, codes_bytes(KV_PAGE_TOKENS, kv->format), (int)kv->format};
    else
        widen_panels(w->panel, codes, KV_PAGE_TOKENS, w->k_dim, 0, w->k_dim, KV_PAGE_TOKENS, kv->format);
}

// Slots [first, end) of the page.
static void take_values(struct work *w, const struct kv_view *kv, const uint8_t *codes, int64_t first, int64_t end)
{
    w->values = (struct operand){(const uint8_t *)w->panel, 0, IN_PANELS};
    if (read_as_they_lie(w) && w->v_dim == w->out_stride)
        w->values = (struct operand){codes, codes_bytes(kv->v_stride, kv->format), (int)kv->format};
    else
        widen_panels(w->panel, codes, kv->v_stride, KV_PAGE_TOKENS, first, end, w->v_dim, kv->format);
}

// The page of position `begin`, its first; `last`: no page is behind it.
static void attend_page(struct work *w, const struct attention_query *queries, const struct kv_view *kv,
                        int64_t kv_head, int64_t begin, bool last, const struct attention_scores *how)
{
    const uint8_t *k = page_of(kv, kv_head, begin, false), *v = page_of(kv, kv_head, begin, true);
    const uint8_t *next = last ? k : page_of(kv, kv_head, begin + KV_PAGE_TOKENS, false);
    int64_t first = KV_PAGE_TOKENS, end = 0;
    for (int64_t i = 0; i < w->count; i++) {
        w->first[i] = clamp_slot(queries[i].first - begin);
        w->end[i] = clamp_slot(queries[i].end - begin);
        if (w->first[i] >= w->end[i])
            continue;
        first = w->first[i] < first ? w->first[i] : first;
        end = w->end[i] > end ? w->end[i] : end;
    }
    if (first >= end)
        return;

    int64_t k_bytes = codes_bytes(KV_PAGE_TOKENS * w->k_dim, kv->format);
    int64_t v_bytes = codes_bytes(KV_PAGE_TOKENS * kv->v_stride, kv->format);
    take_keys(w, kv, k);
    score(w, v, v_bytes);
    const struct scales scales = scales_of(kv, kv_head, begin);
    for (int64_t i = 0; i < w->count; i++)
        if (w->first[i] < w->end[i])
            weigh(w, i, how, scales);
    take_values(w, kv, v, first, end);
    mix(w, next, k_bytes);
}

static void attend_chunk(struct work *w, struct attention_query *queries, const struct kv_view *kv, int64_t kv_head,
                         int64_t begin, int64_t end, const struct attention_scores *how)
{
    memset(w->out, 0, (size_t)(w->count * w->out_stride) * sizeof *w->out);
    memset(w->sums, 0, (size_t)(w->count * LANES) * sizeof *w->sums);
    for (int64_t i = 0; i < w->count; i++)
        w->largest[i] = -INFINITY;
    for (int64_t p = begin / KV_PAGE_TOKENS * KV_PAGE_TOKENS; p < end; p += KV_PAGE_TOKENS)
        attend_page(w, queries, kv, kv_head, p, p + KV_PAGE_TOKENS >= end, how);
    for (int64_t i = 0; i < w->count; i++) {
        f32x16 sum;
        load16(&sum, w->sums + i * LANES);
        struct attention_query part = {.out = w->out + i * w->out_stride, .largest = w->largest[i]};
        part.sum = sum_lanes(&sum);
        attention_join(&queries[i], &part, w->v_dim);
    }
}

void ATTENTION_FN(struct attention_query *queries, int64_t count, const struct kv_view *kv, int64_t kv_head,
                  int64_t begin, int64_t end, const struct attention_scores *scores, float *room)
{
    struct work w = work_in(room, kv, count);
    int64_t first = INT64_MAX, last = 0;
    for (int64_t i = 0; i < count; i++) {
        memcpy(w.q + i * w.k_dim, queries[i].q, (size_t)w.k_dim * sizeof *w.q);
        if (queries[i].first >= queries[i].end)
            continue;
        first = queries[i].first < first ? queries[i].first : first;
        last = queries[i].end > last ? queries[i].end : last;
    }
    begin = first > begin ? first : begin;
    end = last < end ? last : end;
    for (int64_t stop; begin < end; begin = stop) {
        stop = (begin / KV_CHUNK_TOKENS + 1) * KV_CHUNK_TOKENS;
        attend_chunk(&w, queries, kv, kv_head, begin, stop < end ? stop : end, scores);
    }
}
