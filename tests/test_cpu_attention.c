// The CPU backend's attention over the rows of a step: the same bits however rows, heads and positions are dealt to threads, and whichever rows
// stand in the step. What the numbers should be: tests/test_attention.c, tests/test_decode*.
#include "kernels/cpu_device.h"
#include "kernels/kernels.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/floats_help.h"

enum { CONTEXT = 2600, SEQUENCES = 2, ROWS = 40, PER_SEQUENCE = (CONTEXT + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS };

static const struct shape {
    const char *name;
    int64_t heads, kv_heads, head_dim, window;
    bool sinks;
    struct latent_desc latent;
    enum kv_format format;
} shapes[] = {
    {"one kv head", 8, 1, 32, 0, false, {0}, KV_BF16},
    {"groups", 6, 3, 64, 0, true, {0}, KV_BF16},
    {"window", 4, 2, 48, 1500, false, {0}, KV_BF16},
    {"many heads of one", 130, 1, 16, 0, false, {0}, KV_BF16},
    {"latent", 9, 9, 24, 0, false, {.kv_rank = 40, .nope_dim = 16, .rope_dim = 8, .v_dim = 20}, KV_BF16},
    {"groups, int8", 6, 3, 80, 0, true, {0}, KV_INT8},
    {"groups, int4", 6, 3, 98, 0, true, {0}, KV_INT4},
    {"one kv head, int4", 8, 1, 64, 1500, false, {0}, KV_INT4},
    {"one kv head, int8", 8, 1, 128, 1500, false, {0}, KV_INT8},
};

struct fixture {
    struct model_desc desc;
    struct rank_share share;
    struct layer layer;
    struct weights weights;
    uint16_t *kv_b;
    float *sinks, *qkv; // [ROWS] rows of queries
    enum kv_format format;
    uint16_t *kv; // codes of any format, and scales as far as it has them, are these bf16 numbers' bytes
    int32_t pages[SEQUENCES * PER_SEQUENCE];
};

static void make(struct fixture *f, const struct shape *shape)
{
    *f = (struct fixture){.desc = {.num_layers = 1,
                                   .hidden_size = 64,
                                   .num_heads = shape->heads,
                                   .num_kv_heads = shape->kv_heads,
                                   .head_dim = shape->head_dim,
                                   .latent = shape->latent,
                                   .sliding_window = shape->window,
                                   .attention_scale = 0.2},
                          .share = {.num_heads_local = shape->heads, .num_kv_heads_local = shape->kv_heads}};
    f->format = shape->format;
    f->weights.layers = &f->layer;
    f->layer.flags = shape->window > 0 ? LAYER_WINDOW : 0;
    f->layer.o.shape =
        (struct weight_shape){.kind = WEIGHT_BF16, .cols = (uint64_t)attended_width(&f->desc, &f->share)};
    f->sinks = random_floats(shape->heads);
    f->layer.sinks = shape->sinks ? f->sinks : NULL;
    int64_t rank = shape->latent.kv_rank, out = shape->heads * (shape->latent.nope_dim + shape->latent.v_dim);
    f->kv_b = zeroed((uint64_t)(rank * out) * sizeof *f->kv_b);
    for (int64_t i = 0; i < rank * out; i++)
        f->kv_b[i] = f32_to_bf16(uniform());
    f->layer.kv_b = (struct matrix){.shape = {.cols_padded = (uint64_t)rank}, .data = f->kv_b};
    f->qkv = random_floats(ROWS * buffer_width(&f->desc, &f->share, BUFFER_QKV));
    for (int32_t i = 0; i < SEQUENCES * PER_SEQUENCE; i++)
        f->pages[i] = i % PER_SEQUENCE * SEQUENCES + i / PER_SEQUENCE;
}

static void unmake(struct fixture *f)
{
    free(f->kv_b);
    free(f->sinks);
    free(f->qkv);
    free(f->kv);
}

static struct device *open_device(struct fixture *f, const char *table, int threads)
{
    struct error err = {0};
    struct thread_pool *pool;
    struct device *d;
    struct device_options options = {.tp_size = 1};
    assert_int_equal(kernels_select(&options.kernels, table, &err), 0);
    assert_int_equal(thread_pool_create(&pool, threads, &err), 0);
    options.pool = pool;
    assert_int_equal(backend_cpu.open(&d, &options, &err), 0);
    struct device_shape shape = {.desc = &f->desc,
                                 .share = &f->share,
                                 .max_rows = ROWS,
                                 .max_sequences = SEQUENCES,
                                 .decode_rows = ROWS,
                                 .context = CONTEXT,
                                 .num_pages = SEQUENCES * PER_SEQUENCE,
                                 .kv_format = f->format};
    assert_int_equal(backend_cpu.prepare(d, &shape, &f->weights, &err), 0);
    return d;
}

static void close_device(struct device *d)
{
    struct thread_pool *pool = d->pool;
    backend_cpu.close(d);
    thread_pool_free(pool);
}

// Attention of rows [first, first + count) on a device of its own, to out [count][width].
static void attend(float *out, struct fixture *f, const struct token_row *rows, int64_t first, int64_t count,
                   const char *table, int threads)
{
    struct error err = {0};
    struct device *d = open_device(f, table, threads);
    if (!f->kv) {
        f->kv = zeroed(d->kv_bytes);
        for (uint64_t i = 0; i < d->kv_bytes / 2; i++)
            f->kv[i] = f32_to_bf16(uniform());
    }
    memcpy(d->kv, f->kv, d->kv_bytes);
    int64_t q_width = buffer_width(&f->desc, &f->share, BUFFER_QKV), width = attended_width(&f->desc, &f->share);
    struct kv_pages pages = {.pages = f->pages, .pages_per_sequence = PER_SEQUENCE};
    assert_int_equal(backend_cpu.begin(d, rows + first, count, PHASE_DECODE, &pages, &err), 0);
    memcpy(d->buffers[BUFFER_QKV], f->qkv + first * q_width, (size_t)(count * q_width) * sizeof(float));
    assert_int_equal(backend_cpu.attend(d, 0, &err), 0);
    memcpy(out, d->attended, (size_t)(count * width) * sizeof *out);
    close_device(d);
}

static void test_any_cut(void **state)
{
    (void)state;
    struct token_row rows[ROWS];
    for (int64_t i = 0; i < ROWS; i++) // a chunk of each sequence, and single rows in between
        rows[i] = i < 20   ? (struct token_row){.sequence = 0, .position = 2050 + i - 10}
                  : i < 30 ? (struct token_row){.sequence = (int32_t)(i % SEQUENCES), .position = i * 87}
                           : (struct token_row){.sequence = 1, .position = i - 30};
    static const struct {
        int64_t first, count;
        int threads;
    } cuts[] = {{0, ROWS, 2}, {0, ROWS, 7}, {19, 1, 1}, {19, 1, 3}, {29, 1, 16}, {24, 2, 8}, {5, 9, 12}, {31, 1, 4}};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        struct fixture f;
        make(&f, &shapes[s]);
        int64_t width = attended_width(&f.desc, &f.share);
        float *want = zeroed((uint64_t)(ROWS * width) * sizeof *want),
              *out = zeroed((uint64_t)(ROWS * width) * sizeof *out);
        attend(want, &f, rows, 0, ROWS, "auto", 1);
        for (int64_t row = 0; row < ROWS; row++) {
            double sum = 0;
            for (int64_t i = 0; i < width; i++)
                sum += fabs((double)want[row * width + i]);
            assert_true(isfinite(sum) && sum > 0);
        }
        for (size_t c = 0; c < sizeof cuts / sizeof *cuts; c++) {
            attend(out, &f, rows, cuts[c].first, cuts[c].count, c == 1 ? "scalar" : "auto", cuts[c].threads);
            assert_same(out, want + cuts[c].first * width, cuts[c].count * width, shapes[s].name);
        }
        free(want);
        free(out);
        unmake(&f);
    }
}

// Rows that are stored and attended to: attention over a cache of few bits is that over bf16, as far as these bits go; that queries, keys and
// values are rotated, and results rotated back, is not seen.
static void test_formats(void **state)
{
    (void)state;
    static const int64_t dims[] = {2, 80, 96, 128, 256};
    // Of the results' root mean square; keys and values have outliers, so that scores of several tens weigh few positions, which err most.
    static const double bounds[KV_FORMAT_COUNT] = {0, 0.05, 0.015, 0.25};
    for (size_t i = 0; i < sizeof dims / sizeof *dims; i++) {
        const struct shape shape = {"stored", 6, 2, dims[i], 0, false, {0}, KV_BF16};
        struct token_row rows[ROWS];
        for (int64_t r = 0; r < ROWS; r++)
            rows[r] = (struct token_row){.sequence = (int32_t)(r % SEQUENCES), .position = r / SEQUENCES};
        struct fixture f;
        struct error err;
        make(&f, &shape);
        f.layer.flags |= LAYER_NO_ROPE;
        f.desc.attention_scale = 0.3 / sqrt((double)dims[i]);
        int64_t width = attended_width(&f.desc, &f.share), q_width = buffer_width(&f.desc, &f.share, BUFFER_QKV);
        float *want = zeroed((uint64_t)(ROWS * width) * sizeof *want);
        for (int format = 0; format < KV_FORMAT_COUNT; format++) {
            f.format = (enum kv_format)format;
            struct device *d = open_device(&f, "auto", 2);
            struct kv_pages pages = {.pages = f.pages, .pages_per_sequence = PER_SEQUENCE};
            assert_int_equal(backend_cpu.begin(d, rows, ROWS, PHASE_PREFILL, &pages, &err), 0);
            memcpy(d->buffers[BUFFER_QKV], f.qkv, (size_t)(ROWS * q_width) * sizeof(float));
            assert_int_equal(backend_cpu.finish_qkv(d, 0, &err), 0);
            assert_int_equal(backend_cpu.attend(d, 0, &err), 0);
            double sum = 0, wrong = 0;
            for (int64_t e = 0; e < ROWS * width; e++) {
                double difference = (double)d->attended[e] - (double)want[e];
                sum += (double)want[e] * (double)want[e];
                wrong += difference * difference;
            }
            if (format == KV_BF16)
                memcpy(want, d->attended, (size_t)(ROWS * width) * sizeof *want);
            else if (!(sqrt(wrong / sum) <= bounds[format]))
                fail_msg("head_dim %d, format %d: error %.4f, at most %.4f", (int)dims[i], format, sqrt(wrong / sum),
                         bounds[format]);
            close_device(d);
        }
        free(want);
        unmake(&f);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_any_cut), cmocka_unit_test(test_formats)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
