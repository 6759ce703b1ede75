// The device's attention kernels in the emulator: decode and prefill against double arithmetic on the stored keys and values, each
// against the other, and bit for bit against themselves with other rows beside them (law 9). Every slot of the cache that no row may see
// holds NaN.
#include "tests/device/cuda_test.h"

extern "C" {
#include "kernels/kv.h"
#include "kernels/kv_codes.h"
}

// ---- a model's attention with a filled cache -----------------------------------------------------------------------

struct attention_case {
    int64_t head_dim;
    int64_t num_heads, head_begin, heads_per_kv, kv_head_begin, num_kv_heads;
    int64_t window;
    float soft_cap;
    enum kv_format format;
    int64_t rows;
    int32_t position[6]; // decode: of each row (a sequence each); prefill: of the first
    bool sinks = false;
};

enum { MAX_SEQUENCES = 6 };

struct setup {
    const struct attention_case *c;
    struct attention_shape shape;
    struct device_kv kv;
    struct device_rows rows;
    int32_t *sequence, *position, *pages; // on the device
    float *sinks;
    float *qkv, *out; // on the device
    int64_t context, width, num_pages;
    void *scratch;
};

static int64_t element_bytes(const struct setup *s) { return s->c->format == KV_BF16 ? 2 : 1; }
static int64_t codes_bytes(const struct setup *s, int64_t count)
{
    return (int64_t)kv_codes_bytes((uint64_t)count, s->c->format);
}

static int64_t kv_at(const struct setup *s, int64_t sequence, int64_t position, int64_t kv_head)
{
    int64_t page = s->pages[sequence * s->kv.pages_per_sequence + position / KV_PAGE_TOKENS];
    return ((page * s->c->num_kv_heads + kv_head) * KV_PAGE_TOKENS + position % KV_PAGE_TOKENS) * s->c->head_dim;
}

// `at` counts elements; a row's scale has the row's number.
static uint16_t *scale_of(const struct setup *s, const void *cache, int64_t at)
{
    return (cache == s->kv.k ? s->kv.k_scale : s->kv.v_scale) + at / s->c->head_dim;
}

static float kv_value(const struct setup *s, const void *cache, int64_t at)
{
    int64_t head_dim = s->c->head_dim, column = at % head_dim;
    const uint8_t *bytes = (const uint8_t *)cache;
    switch (s->c->format) {
    case KV_E4M3:
        return e4m3_to_f32(bytes[at]);
    case KV_INT8:
        return bf16_to_f32(*scale_of(s, cache, at)) * (float)(int8_t)bytes[at];
    case KV_INT4:
        return bf16_to_f32(*scale_of(s, cache, at)) *
               (float)weight_nl4_level((uint8_t)(bytes[(at - column) / 2 + kv_int4_byte(column, head_dim)] >>
                                                 kv_int4_shift(column, head_dim)));
    default:
        return bf16_to_f32(((const uint16_t *)cache)[at]);
    }
}

static void kv_set(const struct setup *s, void *cache, int64_t at, float value)
{
    int64_t head_dim = s->c->head_dim, column = at % head_dim;
    uint8_t *bytes = (uint8_t *)cache;
    if (kv_format_scaled(s->c->format) && column == 0) // each row has its own
        *scale_of(s, cache, at) = f32_to_bf16((1.25f + value) / (s->c->format == KV_INT8 ? 127 : 34));
    switch (s->c->format) {
    case KV_E4M3:
        bytes[at] = f32_to_e4m3(value);
        break;
    case KV_INT8:
        bytes[at] = (uint8_t)f32_to_int8(value * 127);
        break;
    case KV_INT4: {
        uint8_t *byte = &bytes[(at - column) / 2 + kv_int4_byte(column, head_dim)];
        int shift = kv_int4_shift(column, head_dim);
        *byte = (uint8_t)((*byte & ~(15 << shift)) | kv_code_int4(value * 34, 1) << shift);
        break;
    }
    default:
        ((uint16_t *)cache)[at] = f32_to_bf16(value);
    }
}

// Positions [0, end) of a sequence get keys and values.
static void fill_sequence(struct setup *s, int64_t sequence, int64_t end)
{
    for (int64_t p = 0; p < end; p++)
        for (int64_t kv_head = 0; kv_head < s->c->num_kv_heads; kv_head++) {
            int64_t at = kv_at(s, sequence, p, kv_head);
            for (int64_t i = 0; i < s->c->head_dim; i++) {
                kv_set(s, s->kv.k, at + i, centred());
                kv_set(s, s->kv.v, at + i, centred() + 0.25f);
            }
        }
}

static void setup_make(struct setup *s, const struct attention_case *c, bool decode)
{
    memset(s, 0, sizeof *s);
    s->c = c;
    s->shape.num_heads = c->num_heads;
    s->shape.head_begin = c->head_begin;
    s->shape.heads_per_kv = c->heads_per_kv;
    s->shape.kv_head_begin = c->kv_head_begin;
    s->shape.scale = 1.0f / sqrtf((float)c->head_dim);
    s->shape.soft_cap = c->soft_cap;
    s->shape.window = c->window;
    s->sinks = device_array<float>(c->num_heads);
    for (int64_t i = 0; i < c->num_heads; i++)
        s->sinks[i] = i == 0 ? 30 : centred() * 6;
    s->shape.sinks = c->sinks ? s->sinks : NULL;
    for (int64_t i = 0; i < (decode ? c->rows : 1); i++) {
        int64_t end = c->position[i] + (decode ? 1 : c->rows);
        s->context = end > s->context ? end : s->context;
    }
    s->context += 70; // there is room behind the longest
    int64_t per_sequence = (s->context + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
    s->num_pages = MAX_SEQUENCES * per_sequence + 1;

    // Pages in a scattered order.
    s->pages = device_array<int32_t>(MAX_SEQUENCES * per_sequence);
    for (int64_t i = 0; i < MAX_SEQUENCES * per_sequence; i++)
        s->pages[i] = (int32_t)i;
    for (int64_t i = MAX_SEQUENCES * per_sequence - 1; i > 0; i--) {
        int64_t other = (int64_t)(random_bits() >> 33) % (i + 1);
        int32_t page = s->pages[i];
        s->pages[i] = s->pages[other];
        s->pages[other] = page;
    }
    int64_t slots = s->num_pages * c->num_kv_heads * KV_PAGE_TOKENS, cache_bytes = codes_bytes(s, slots * c->head_dim);
    s->kv.k = device_new(cache_bytes);
    s->kv.v = device_new(cache_bytes);
    memset(s->kv.k, 0xff, (size_t)cache_bytes); // NaN, or codes with a scale that is
    memset(s->kv.v, 0xff, (size_t)cache_bytes);
    if (kv_format_scaled(c->format)) {
        s->kv.k_scale = device_array<uint16_t>(slots);
        s->kv.v_scale = device_array<uint16_t>(slots);
        memset(s->kv.k_scale, 0xff, (size_t)slots * sizeof *s->kv.k_scale);
        memset(s->kv.v_scale, 0xff, (size_t)slots * sizeof *s->kv.v_scale);
    }
    s->kv.format = c->format;
    s->kv.pages = s->pages;
    s->kv.pages_per_sequence = per_sequence;
    s->kv.num_kv_heads = c->num_kv_heads;
    s->kv.head_dim = c->head_dim;

    s->sequence = device_array<int32_t>(c->rows);
    s->position = device_array<int32_t>(c->rows);
    for (int64_t i = 0; i < c->rows; i++) {
        s->sequence[i] = decode ? (int32_t)(MAX_SEQUENCES - 1 - i) : 2;
        s->position[i] = decode ? c->position[i] : c->position[0] + (int32_t)i;
    }
    s->rows.sequence = s->sequence;
    s->rows.position = s->position;
    s->rows.count = c->rows;
    if (decode)
        for (int64_t i = 0; i < c->rows; i++)
            fill_sequence(s, s->sequence[i], s->position[i] + 1);
    else
        fill_sequence(s, 2, s->position[c->rows - 1] + 1);

    s->width = (c->num_heads + 2 * c->num_kv_heads) * c->head_dim;
    s->qkv = device_array<float>(c->rows * s->width);
    for (int64_t i = 0; i < c->rows * s->width; i++)
        s->qkv[i] = centred() * 4;
    s->out = device_array<float>(c->rows * c->num_heads * c->head_dim);
    s->scratch = device_new((int64_t)attention_scratch_bytes(c->rows, c->num_heads, c->head_dim, s->context));
}

static void setup_free(struct setup *s)
{
    void *const devices[] = {s->pages,    s->kv.k,  s->kv.v, s->kv.k_scale, s->kv.v_scale, s->sequence,
                             s->position, s->sinks, s->qkv,  s->out,        s->scratch};
    for (void *memory : devices)
        cudaFree(memory);
}

static void decode(struct setup *s, float *out, int64_t first_row, int64_t count)
{
    struct device_rows rows = {s->sequence + first_row, s->position + first_row, count};
    finish(
        launch_attention_decode(out, s->qkv + first_row * s->width, s->shape, rows, s->kv, s->context, s->scratch, 0));
}

static void prefill(struct setup *s, float *out, int64_t first_row, int64_t count)
{
    struct device_rows rows = {s->sequence + first_row, s->position + first_row, count};
    finish(launch_attention_prefill(out, s->qkv + first_row * s->width, s->shape, rows, s->kv, 0));
}

// ---- the reference -------------------------------------------------------------------------------------------------

// What query head `head` of a row must give, in double, and how far off a kernel may be for each element. Let u = 2^-24, W = sum of w |v|.
// A score is a sum of head_dim products in f32, then scaled (and capped): off by d = ((head_dim + 8) u + q_error) * scale * sum |q k|, at
// most; the soft cap only shrinks that and adds 8 u of itself. That is 2 d of W, because weights are relative to their sum. exp2f of an
// argument x has 2 ulp and the argument u |x|: counted with (range + 8) u. Weights rounded by p_error; sums of n terms in f32 in
// whatever order: 2 (n + 4) u at most.
static void reference(const struct setup *s, int64_t row, int64_t head, bool tensor_cores, double *out, double *bound)
{
    const double u = 0x1p-24, p_error = tensor_cores ? 0x1p-8 : 0;
    int64_t head_dim = s->c->head_dim, position = s->position[row], sequence = s->sequence[row];
    int64_t kv_head = (s->shape.head_begin + head) / s->shape.heads_per_kv - s->shape.kv_head_begin;
    int64_t first = s->shape.window > 0 && position + 1 > s->shape.window ? position + 1 - s->shape.window : 0;
    const float *q = s->qkv + row * s->width + head * head_dim;
    double *score = (double *)zeroed((position + 1) * 8), largest = -INFINITY, least = INFINITY, off = 0;
    for (int64_t p = first; p <= position; p++) {
        int64_t at = kv_at(s, sequence, p, kv_head);
        double dot = 0, magnitude = 0;
        for (int64_t i = 0; i < head_dim; i++) {
            // The rounding of q to bf16 is part of what prefill is, not an error of it.
            double product =
                (double)(tensor_cores ? bf16_to_f32(f32_to_bf16(q[i])) : q[i]) * kv_value(s, s->kv.k, at + i);
            dot += product;
            magnitude += fabs(product);
        }
        score[p] = dot * s->shape.scale;
        if (s->shape.soft_cap > 0)
            score[p] = s->shape.soft_cap * tanh(score[p] / s->shape.soft_cap);
        largest = score[p] > largest ? score[p] : largest;
        least = score[p] < least ? score[p] : least;
        off = fmax(off, (double)(head_dim + 8) * u * magnitude * s->shape.scale + 8 * u * fabs(score[p]));
    }
    if (s->c->sinks) {
        largest = fmax(largest, (double)s->sinks[head]);
        least = fmin(least, (double)s->sinks[head]);
    }
    double sum = s->c->sinks ? exp((double)s->sinks[head] - largest) : 0;
    memset(out, 0, (size_t)head_dim * 8);
    memset(bound, 0, (size_t)head_dim * 8);
    for (int64_t p = first; p <= position; p++) {
        double weight = exp(score[p] - largest);
        int64_t at = kv_at(s, sequence, p, kv_head);
        sum += weight;
        for (int64_t i = 0; i < head_dim; i++) {
            out[i] += weight * kv_value(s, s->kv.v, at + i);
            bound[i] += weight * fabs((double)kv_value(s, s->kv.v, at + i));
        }
    }
    double relative =
        2 * off + 2 * ((largest - least) * 1.5 + 8) * u + p_error + 2 * (double)(position - first + 5) * u;
    for (int64_t i = 0; i < head_dim; i++) {
        out[i] /= sum;
        bound[i] *= relative / sum;
    }
    free(score);
}

static void check_rows(const struct setup *s, bool tensor_cores, const char *what)
{
    int64_t head_dim = s->c->head_dim;
    double out[KERNELS_MAX_HEAD_DIM], bound[KERNELS_MAX_HEAD_DIM];
    for (int64_t row = 0; row < s->c->rows; row++)
        for (int64_t head = 0; head < s->c->num_heads; head++) {
            reference(s, row, head, tensor_cores, out, bound);
            for (int64_t i = 0; i < head_dim; i++) {
                double got = s->out[(row * s->c->num_heads + head) * head_dim + i];
                if (!(fabs(got - out[i]) <= bound[i]))
                    fail_msg("%s, case with head_dim %lld, window %lld: row %lld at %d, head %lld, element %lld is "
                             "%.9g, not %.9g +- %.2g",
                             what, (long long)head_dim, (long long)s->c->window, (long long)row, s->position[row],
                             (long long)head, (long long)i, got, out[i], bound[i]);
            }
        }
}

static void assert_same_rows(const float *got, const float *want, int64_t count, const char *what)
{
    for (int64_t i = 0; i < count; i++)
        if (!same(got[i], want[i]))
            fail_msg("%s: element %lld is %.9g, not %.9g", what, (long long)i, (double)got[i], (double)want[i]);
}

// ---- decode --------------------------------------------------------------------------------------------------------

// head_dim; heads, head_begin, per kv, kv_head_begin, kv heads; window, cap, format; rows, positions
static const struct attention_case decode_cases[] = {
    {128, 8, 0, 4, 0, 2, 0, 0, KV_BF16, 6, {0, 1, 255, 256, 600, 1000}},
    {64, 4, 0, 1, 0, 4, 0, 0, KV_BF16, 4, {63, 64, 511, 512}},
    {80, 6, 0, 2, 0, 3, 0, 0, KV_BF16, 3, {300, 5, 127}},
    {96, 8, 0, 8, 0, 1, 0, 0, KV_BF16, 2, {257, 100}},
    {256, 4, 0, 2, 0, 2, 0, 0, KV_BF16, 3, {300, 64, 0}},
    {16, 4, 0, 2, 0, 2, 0, 0, KV_BF16, 3, {520, 65, 7}},
    {128, 7, 0, 7, 0, 1, 0, 0, KV_E4M3, 3, {700, 64, 20}},
    {64, 16, 0, 16, 0, 1, 0, 0, KV_E4M3, 2, {258, 31}},
    {32, 27, 0, 27, 0, 1, 0, 0, KV_BF16, 2, {258, 31}}, // more query heads than one pass takes
    {16, 2, 0, 1, 0, 2, 0, 0, KV_E4M3, 2, {300, 3}},
    // a rank with heads 4 to 7 of groups of 3: a part of kv head 1 and of kv head 2
    {64, 4, 4, 3, 1, 2, 0, 0, KV_BF16, 2, {260, 90}},
    {128, 2, 5, 4, 1, 1, 0, 0, KV_E4M3, 2, {260, 90}},
    // windows that begin inside a chunk, at its edge, and wider than everything
    {64, 4, 0, 2, 0, 2, 100, 0, KV_BF16, 6, {50, 99, 100, 355, 611, 1000}},
    {128, 2, 0, 2, 0, 1, 1, 0, KV_BF16, 3, {0, 256, 511}},
    {128, 2, 0, 2, 0, 1, 257, 0, KV_E4M3, 3, {256, 257, 767}},
    {64, 4, 0, 4, 0, 1, 5000, 20, KV_BF16, 3, {700, 3, 255}},
    {96, 2, 0, 1, 0, 2, 300, 5, KV_E4M3, 2, {600, 299}},
    {64, 4, 0, 2, 0, 2, 0, 0, KV_BF16, 3, {300, 0, 70}, true}, // a sink above all, sinks among the scores
    {64, 3, 0, 3, 0, 1, 128, 0, KV_E4M3, 2, {600, 127}, true},
    // widths that no 16-byte load fits
    {20, 4, 0, 2, 0, 2, 0, 0, KV_BF16, 2, {300, 70}},
    {34, 2, 0, 1, 0, 2, 0, 0, KV_E4M3, 2, {70, 1}},
    {2, 1, 0, 1, 0, 1, 0, 0, KV_BF16, 2, {64, 300}},
    {128, 8, 0, 4, 0, 2, 0, 0, KV_INT8, 3, {0, 256, 600}},
    {64, 4, 4, 3, 1, 2, 100, 0, KV_INT8, 3, {260, 90, 0}},
    {80, 3, 0, 3, 0, 1, 0, 20, KV_INT8, 2, {300, 31}, true},
    {34, 2, 0, 1, 0, 2, 0, 0, KV_INT8, 2, {70, 1}},
    {128, 8, 0, 4, 0, 2, 0, 0, KV_INT4, 3, {0, 256, 600}},
    {256, 2, 0, 2, 0, 1, 257, 0, KV_INT4, 2, {257, 700}},
    {96, 2, 0, 1, 0, 2, 0, 5, KV_INT4, 2, {300, 64}, true},
    {34, 2, 0, 1, 0, 2, 0, 0, KV_INT4, 2, {70, 1}},
};

static const uint64_t seeds[] = {1, 5, 99};

static void decode_is_close_to_double(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof decode_cases / sizeof *decode_cases; i += quick() ? 9 : 1) {
        const struct attention_case *c = &decode_cases[i];
        struct setup s;
        setup_make(&s, c, true);
        emulator_seed(seeds[i % 3]);
        decode(&s, s.out, 0, c->rows);
        check_rows(&s, false, "decode");

        // Law 9: each row alone, and the grid of a longer context.
        int64_t row_size = c->num_heads * c->head_dim;
        float *alone = device_array<float>(row_size);
        for (int64_t row = 0; row < c->rows; row += 2) {
            emulator_seed(seeds[(i + 1) % 3]);
            decode(&s, alone, row, 1);
            assert_same_rows(alone, s.out + row * row_size, row_size, "decode of one row alone");
        }
        cudaFree(s.scratch);
        s.context += 1000;
        s.scratch = device_new((int64_t)attention_scratch_bytes(1, c->num_heads, c->head_dim, s.context));
        decode(&s, alone, 0, 1);
        assert_same_rows(alone, s.out, row_size, "decode with a larger grid");
        cudaFree(alone);
        setup_free(&s);
    }
}

// ---- prefill -------------------------------------------------------------------------------------------------------

static const struct attention_case prefill_cases[] = {
    {128, 2, 0, 2, 0, 1, 0, 0, KV_BF16, 130, {0}},
    {64, 2, 0, 1, 0, 2, 0, 0, KV_BF16, 65, {63}},
    {64, 2, 0, 2, 0, 1, 0, 0, KV_BF16, 64, {900}},
    {80, 2, 0, 2, 0, 1, 0, 0, KV_BF16, 63, {30}},
    {96, 2, 0, 1, 0, 2, 0, 0, KV_BF16, 2, {64}},
    {256, 2, 0, 2, 0, 1, 0, 0, KV_BF16, 70, {100}},
    {16, 8, 0, 8, 0, 1, 0, 0, KV_BF16, 1, {127}},
    {128, 2, 0, 1, 0, 2, 0, 0, KV_E4M3, 65, {200}},
    {256, 1, 0, 1, 0, 1, 0, 0, KV_E4M3, 3, {126}},
    {80, 3, 5, 4, 1, 1, 0, 0, KV_E4M3, 66, {1}},
    {64, 4, 4, 3, 1, 2, 0, 0, KV_BF16, 65, {10}},
    {64, 2, 0, 2, 0, 1, 100, 0, KV_BF16, 130, {250}},
    {64, 1, 0, 1, 0, 1, 1, 0, KV_BF16, 66, {62}},
    {64, 1, 0, 1, 0, 1, 64, 0, KV_BF16, 2, {127}}, // the second row sees all but the first key of a tile
    {128, 1, 0, 1, 0, 1, 64, 0, KV_E4M3, 100, {500}},
    {64, 2, 0, 2, 0, 1, 0, 20, KV_BF16, 65, {90}},
    {96, 1, 0, 1, 0, 1, 70, 5, KV_E4M3, 65, {90}},
    {64, 4, 0, 2, 0, 2, 0, 0, KV_BF16, 66, {0}, true},
    {64, 3, 0, 3, 0, 1, 128, 0, KV_E4M3, 5, {200}, true},
    {20, 2, 0, 1, 0, 2, 0, 0, KV_BF16, 66, {3}},
    {34, 1, 0, 1, 0, 1, 0, 0, KV_E4M3, 5, {66}},
    {2, 1, 0, 1, 0, 1, 0, 0, KV_BF16, 3, {62}},
    {128, 2, 0, 1, 0, 2, 0, 0, KV_INT8, 66, {200}},
    {80, 3, 5, 4, 1, 1, 100, 20, KV_INT8, 65, {90}, true},
    {34, 1, 0, 1, 0, 1, 0, 0, KV_INT8, 5, {66}},
    {64, 2, 0, 2, 0, 1, 0, 0, KV_INT4, 66, {1}},
    {256, 1, 0, 1, 0, 1, 64, 0, KV_INT4, 3, {126}},
    {34, 1, 0, 1, 0, 1, 0, 0, KV_INT4, 5, {66}},
};

static void prefill_is_close_to_double(void **state)
{
    (void)state;
    for (size_t i = quick() ? 8 : 0; i < sizeof prefill_cases / sizeof *prefill_cases; i += quick() ? 8 : 1) {
        const struct attention_case *c = &prefill_cases[i];
        struct setup s;
        setup_make(&s, c, false);
        emulator_seed(seeds[i % 3]);
        prefill(&s, s.out, 0, c->rows);
        check_rows(&s, true, "prefill");

        // Law 9: in other launches, begun elsewhere; what a launch does not reach yet is not written yet.
        int64_t row_size = c->num_heads * c->head_dim;
        float *part = device_array<float>(c->rows * row_size);
        static const int64_t cuts[] = {1, 65};
        for (int64_t cut : cuts) {
            if (cut >= c->rows)
                break;
            emulator_seed(seeds[(i + 1) % 3]);
            prefill(&s, part, cut, c->rows - cut);
            assert_same_rows(part, s.out + cut * row_size, (c->rows - cut) * row_size, "prefill begun later");
        }
        int64_t cut = c->rows / 2;
        if (cut > 0) {
            for (int64_t p = s.position[cut]; p <= s.position[c->rows - 1]; p++)
                for (int64_t kv_head = 0; kv_head < c->num_kv_heads; kv_head++) {
                    int64_t at = kv_at(&s, 2, p, kv_head);
                    memset((char *)s.kv.k + codes_bytes(&s, at), 0xff, (size_t)codes_bytes(&s, c->head_dim));
                    memset((char *)s.kv.v + codes_bytes(&s, at), 0xff, (size_t)codes_bytes(&s, c->head_dim));
                    if (kv_format_scaled(c->format))
                        *scale_of(&s, s.kv.k, at) = *scale_of(&s, s.kv.v, at) = 0xffff;
                }
            prefill(&s, part, 0, cut);
            assert_same_rows(part, s.out, cut * row_size, "prefill ended earlier");
        }
        cudaFree(part);
        setup_free(&s);
    }
}

// Decode and prefill of the same rows: apart by what bf16 queries and weights cost.
static void prefill_is_close_to_decode(void **state)
{
    (void)state;
    static const struct attention_case c = {64, 4, 0, 2, 0, 2, 0, 0, KV_BF16, 6, {300}};
    struct setup s;
    setup_make(&s, &c, false);
    for (int64_t i = 0; i < c.rows * s.width; i++) // queries that bf16 holds: what remains is the weights' rounding
        s.qkv[i] = bf16_to_f32(f32_to_bf16(s.qkv[i]));
    float *other = device_array<float>(c.rows * c.num_heads * c.head_dim);
    prefill(&s, s.out, 0, c.rows);
    decode(&s, other, 0, c.rows);
    double out[KERNELS_MAX_HEAD_DIM], bound[KERNELS_MAX_HEAD_DIM];
    for (int64_t row = 0; row < c.rows; row++)
        for (int64_t head = 0; head < c.num_heads; head++) {
            reference(&s, row, head, true, out, bound);
            for (int64_t i = 0; i < c.head_dim; i++) {
                int64_t at = (row * c.num_heads + head) * c.head_dim + i;
                if (!(fabs((double)s.out[at] - (double)other[at]) <= 1.5 * bound[i]))
                    fail_msg("row %lld, head %lld, element %lld: prefill %.9g, decode %.9g", (long long)row,
                             (long long)head, (long long)i, (double)s.out[at], (double)other[at]);
            }
        }
    cudaFree(other);
    setup_free(&s);
}

// ---- latent rows -----------------------------------------------------------------------------------------------------

struct latent_case {
    int64_t heads, kv_rank, rope_dim;
    enum kv_format format;
    int64_t window, rows;
    int32_t position[3]; // of each row, a sequence each
};
static const struct latent_case latent_cases[] = {
    {18, 64, 16, KV_BF16, 0, 3, {1100, 0, 511}},
    {3, 100, 6, KV_E4M3, 0, 2, {600, 63}},
    {1, 40, 5, KV_BF16, 70, 2, {130, 1023}},
    {4, 512, 64, KV_BF16, 0, 2, {70, 512}},
};

// Scores and weights as in `reference`, with tensor cores; all in double.
static void check_latent_row(const struct setup *s, const struct latent_case *c, const float *query, const float *mixed,
                             int64_t row, const char *what)
{
    const double u = 0x1p-24;
    int64_t dim = c->kv_rank + c->rope_dim, position = s->position[row];
    int64_t first = c->window > 0 && position + 1 > c->window ? position + 1 - c->window : 0;
    double *score = (double *)zeroed((position + 1) * 8);
    for (int64_t head = 0; head < c->heads; head++) {
        const float *q = query + (row * c->heads + head) * dim;
        double largest = -INFINITY, least = INFINITY, off = 0, sum = 0;
        for (int64_t p = first; p <= position; p++) {
            int64_t at = kv_at(s, s->sequence[row], p, 0);
            double magnitude = 0;
            score[p] = 0;
            for (int64_t i = 0; i < dim; i++) {
                double product = (double)bf16_to_f32(f32_to_bf16(q[i])) * kv_value(s, s->kv.k, at + i);
                score[p] += product * s->shape.scale;
                magnitude += fabs(product) * s->shape.scale;
            }
            largest = fmax(largest, score[p]);
            least = fmin(least, score[p]);
            off = fmax(off, (double)(dim + 8) * u * magnitude);
        }
        for (int64_t p = first; p <= position; p++)
            sum += exp(score[p] - largest);
        double relative =
            2 * off + 2 * ((largest - least) * 1.5 + 8) * u + 0x1p-8 + 2 * (double)(position - first + 5) * u;
        for (int64_t i = 0; i < c->kv_rank; i++) {
            double want = 0, bound = 0, got = mixed[(row * c->heads + head) * c->kv_rank + i];
            for (int64_t p = first; p <= position; p++) {
                double value = kv_value(s, s->kv.k, kv_at(s, s->sequence[row], p, 0) + i);
                want += exp(score[p] - largest) / sum * value;
                bound += exp(score[p] - largest) / sum * fabs(value) * relative;
            }
            if (!(fabs(got - want) <= bound))
                fail_msg("%s, latent of %lld, row at %lld, head %lld, column %lld: %.9g, not %.9g +- %.2g", what,
                         (long long)c->kv_rank, (long long)position, (long long)head, (long long)i, got, want, bound);
        }
    }
    free(score);
}

static void latent_rows_are_close_to_double(void **state)
{
    (void)state;
    for (size_t n = 0; n < sizeof latent_cases / sizeof *latent_cases; n += quick() ? 3 : 1) {
        const struct latent_case *c = &latent_cases[n];
        int64_t dim = c->kv_rank + c->rope_dim, out_size = c->heads * c->kv_rank;
        struct attention_case plain = {dim, 1, 0, 1, 0, 1, c->window, 0, c->format, c->rows, {0}};
        memcpy(plain.position, c->position, sizeof c->position);
        struct setup s;
        setup_make(&s, &plain, true);
        struct device_latent latent = {c->heads, c->kv_rank, c->rope_dim, 0, 0};
        float *query = device_array<float>(c->rows * c->heads * dim), *mixed = device_array<float>(c->rows * out_size);
        float *alone = device_array<float>(out_size);
        void *scratch = device_new((int64_t)latent_scratch_bytes(c->rows, latent, s.context));
        for (int64_t i = 0; i < c->rows * c->heads * dim; i++)
            query[i] = centred() * 4;
        for (int prefill = 0; prefill < 2; prefill++) {
            emulator_seed(seeds[n % 3]);
            finish(launch_latent_attention(mixed, query, s.shape, latent, s.rows, s.kv, s.context,
                                           prefill ? NULL : scratch, 0));
            for (int64_t row = 0; row < c->rows; row++)
                check_latent_row(&s, c, query, mixed, row, prefill ? "prefill" : "decode");
            struct device_rows last = {s.sequence + c->rows - 1, s.position + c->rows - 1, 1};
            emulator_seed(seeds[(n + 1) % 3]);
            finish(launch_latent_attention(alone, query + (c->rows - 1) * c->heads * dim, s.shape, latent, last, s.kv,
                                           s.context, prefill ? NULL : scratch, 0));
            assert_same_rows(alone, mixed + (c->rows - 1) * out_size, out_size, "a latent row alone");
        }
        void *const devices[] = {query, mixed, alone, scratch};
        for (void *memory : devices)
            cudaFree(memory);
        setup_free(&s);
    }
}

// ---- NaN and Inf ---------------------------------------------------------------------------------------------------

// Broken numbers show in the rows that see them, and in no other bit.
static void broken_values_stay_where_they_are_seen(void **state)
{
    (void)state;
    if (quick())
        skip(); // the same accesses as above
    static const struct attention_case cases[] = {{64, 2, 0, 2, 0, 1, 0, 0, KV_BF16, 70, {40}},
                                                  {128, 2, 0, 1, 0, 2, 50, 0, KV_BF16, 80, {40}},
                                                  {96, 1, 0, 1, 0, 1, 50, 0, KV_E4M3, 70, {70}}};
    enum { IN_Q, IN_K, IN_V, INF_IN_V, PLACES };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int place = 0; place < PLACES; place++)
            for (int tensor_cores = 0; tensor_cores < 2; tensor_cores++) {
                const struct attention_case *c = &cases[i];
                struct setup s;
                setup_make(&s, c, false);
                int64_t row_size = c->num_heads * c->head_dim, count = tensor_cores ? c->rows : 20, broken_row = 13,
                        dim = 5;
                float *clean = floats(count * row_size);
                emulator_seed(seeds[i]);
                tensor_cores ? prefill(&s, s.out, 0, count) : decode(&s, s.out, 0, count);
                memcpy(clean, s.out, (size_t)(count * row_size) * 4);

                float broken = place == INF_IN_V ? INFINITY : NAN;
                int64_t at = kv_at(&s, 2, s.position[broken_row], 0);
                if (place == IN_Q)
                    s.qkv[broken_row * s.width + dim] = broken; // of query head 0
                else
                    kv_set(&s, place == IN_K ? s.kv.k : s.kv.v, at + dim, broken);
                tensor_cores ? prefill(&s, s.out, 0, count) : decode(&s, s.out, 0, count);
                for (int64_t row = 0; row < count; row++)
                    for (int64_t head = 0; head < c->num_heads; head++)
                        for (int64_t j = 0; j < c->head_dim; j++) {
                            bool sees = row >= broken_row && head / c->heads_per_kv == 0 &&
                                        (c->window == 0 || row < broken_row + c->window);
                            bool bad = place == IN_Q   ? row == broken_row && head == 0
                                       : place == IN_K ? sees
                                                       : sees && j == dim;
                            float got = s.out[row * row_size + head * c->head_dim + j];
                            float want = clean[row * row_size + head * c->head_dim + j];
                            if (bad ? isfinite(got) : !same(got, want))
                                fail_msg(
                                    "case %zu, place %d, %s: row %lld, head %lld, element %lld is %.9g (clean: %.9g)",
                                    i, place, tensor_cores ? "prefill" : "decode", (long long)row, (long long)head,
                                    (long long)j, (double)got, (double)want);
                        }
                free(clean);
                setup_free(&s);
            }
}

// Scores of -Inf have no weight; a row that has nothing else is NaN, as on the CPU.
static void infinite_scores(void **state)
{
    (void)state;
    static const struct attention_case c = {64, 1, 0, 1, 0, 1, 0, 0, KV_BF16, 3, {300}};
    for (int tensor_cores = 0; tensor_cores < 2; tensor_cores++) {
        struct setup s;
        setup_make(&s, &c, false);
        for (int64_t row = 0; row < c.rows; row++)
            s.qkv[row * s.width] = 1.0f;
        for (int64_t p = 0; p <= s.position[c.rows - 1]; p++)
            if (p != 290) // the only one that counts for the first two rows
                kv_set(&s, s.kv.k, kv_at(&s, 2, p, 0), -INFINITY);
        s.qkv[2 * s.width] = 0.0f; // 0 * -Inf
        tensor_cores ? prefill(&s, s.out, 0, c.rows) : decode(&s, s.out, 0, c.rows);
        for (int64_t j = 0; j < c.head_dim; j++) {
            float only = kv_value(&s, s.kv.v, kv_at(&s, 2, 290, 0) + j);
            assert_true(same(s.out[j], only) && same(s.out[c.head_dim + j], only));
            assert_true(isnan(s.out[2 * c.head_dim + j]));
        }
        kv_set(&s, s.kv.k, kv_at(&s, 2, 290, 0), -INFINITY);
        tensor_cores ? prefill(&s, s.out, 0, c.rows) : decode(&s, s.out, 0, c.rows);
        for (int64_t j = 0; j < c.rows * c.head_dim; j++)
            assert_true(isnan(s.out[j]));
        setup_free(&s);
    }
}

// ---- counters ------------------------------------------------------------------------------------------------------

// Keys and values by whole sectors, shared memory without conflicts: in positions that fill chunks and tiles.
static void memory_is_read_in_whole_sectors(void **state)
{
    (void)state;
    if (!emulator_present() || quick())
        skip(); // nothing is counted
    static const int64_t head_dims[] = {64, 80, 96, 128, 256};
    for (int64_t head_dim : head_dims)
        for (int format = KV_BF16; format <= KV_E4M3; format++)
            for (int tensor_cores = 0; tensor_cores < 2; tensor_cores++) {
                struct attention_case c = {head_dim, 4, 0, 4, 0, 1, 0, 0, (enum kv_format)format, tensor_cores ? 64 : 1,
                                           {0}};
                c.position[0] = tensor_cores ? 64 : 511;
                struct setup s;
                setup_make(&s, &c, !tensor_cores);
                emulator_stats_reset();
                tensor_cores ? prefill(&s, s.out, 0, c.rows) : decode(&s, s.out, 0, c.rows);
                struct emulator_stats stats = emulator_count(tensor_cores ? "attend_tile" : "attend_chunk");
                if (stats.launches != 1 || stats.global_requests == 0 || stats.shared_requests == 0)
                    fail_msg("the kernel was not counted");
                // Where widened rows of 80 or 96 are loaded, some lanes have nothing to do: the counter, which pairs the lanes' nth
                // accesses, then mixes requests.
                bool paired = format == KV_BF16 || head_dim % 64 == 0 || !tensor_cores;
                if (paired && stats.shared_conflicts != 0)
                    fail_msg("head_dim %lld: %llu bank conflicts", (long long)head_dim,
                             (unsigned long long)stats.shared_conflicts);
                bool whole = head_dim * element_bytes(&s) % 32 == 0; // rows begin at sectors
                if (paired && stats.global_sectors > stats.global_ideal_sectors * (whole ? 100 : 120) / 100)
                    fail_msg("head_dim %lld: %llu sectors, not %llu", (long long)head_dim,
                             (unsigned long long)stats.global_sectors, (unsigned long long)stats.global_ideal_sectors);
                // Keys and values once for all query heads of the group (decode), once for each (prefill).
                uint64_t bytes = 512 * (uint64_t)(head_dim * 2 * element_bytes(&s)), other = 0;
                if (tensor_cores) {
                    bytes = 4 * 128 * (uint64_t)(head_dim * 2 * element_bytes(&s));
                    other = 2 * 4 * 64 * (uint64_t)head_dim * 4; // queries and results
                }
                if (paired && whole && stats.global_sectors * 32 != bytes + other)
                    fail_msg("head_dim %lld: %llu sectors for %llu bytes", (long long)head_dim,
                             (unsigned long long)stats.global_sectors, (unsigned long long)(bytes + other));
                setup_free(&s);
            }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(decode_is_close_to_double),
        cmocka_unit_test(prefill_is_close_to_double),
        cmocka_unit_test(prefill_is_close_to_decode),
        cmocka_unit_test(latent_rows_are_close_to_double),
        cmocka_unit_test(broken_values_stay_where_they_are_seen),
        cmocka_unit_test(infinite_scores),
        cmocka_unit_test(memory_is_read_in_whole_sectors),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
