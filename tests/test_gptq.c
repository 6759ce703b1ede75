// Quantizing by second moments: the sums against doubles, the factor against the matrix that it comes from, codes against a plain version of the same
// formulas, equal bytes from every instruction set, any number of threads and any rows beside, and the point of it all: a smaller error of the product.
#include "kernels/gptq.h"

#include "tests/random_help.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { MAX_COLS = 400, MAX_ROWS = 300 };

static double normal(void)
{
    double sum = 0;
    for (int i = 0; i < 12; i++)
        sum += (double)(random_bits() >> 11) * 0x1p-53;
    return sum - 6;
}

static void *room(uint64_t elems, uint64_t bytes)
{
    void *memory = calloc(elems + 1, bytes);
    assert_non_null(memory);
    return memory;
}

static uint64_t at(uint64_t i, uint64_t j) { return i >= j ? i * (i + 1) / 2 + j : j * (j + 1) / 2 + i; }

// Rows whose columns hang together, some of them loud, one of them silent.
static float *make_input(uint64_t rows, uint64_t cols)
{
    float *x = room(rows * cols, sizeof *x);
    for (uint64_t row = 0; row < rows; row++) {
        double common = normal(), last = 0;
        for (uint64_t col = 0; col < cols; col++) {
            last = 0.8 * last + normal();
            x[row * cols + col] = (float)(col == 5 ? 0 : (last + common) * (col % 37 == 3 ? 20 : 1));
        }
    }
    return x;
}

static float *make_moments(const float *x, uint64_t rows, uint64_t cols, struct thread_pool *pool)
{
    float *triangle = room(cols * (cols + 1) / 2, sizeof *triangle);
    float *panels = room(moments_panel_elems(rows, cols), sizeof *panels);
    for (uint64_t row = 0; row < rows; row += 64)
        moments_add(triangle, cols, x + row * cols, (int64_t)cols, rows - row < 64 ? rows - row : 64, panels, pool);
    free(panels);
    return triangle;
}

static struct thread_pool *make_pool(int threads)
{
    struct thread_pool *pool;
    struct error err;
    assert_int_equal(thread_pool_create(&pool, threads, &err), 0);
    return pool;
}

static void test_moments(void **state)
{
    (void)state;
    static const uint64_t widths[] = {1, 16, 63, 64, 65, 200};
    struct thread_pool *one = make_pool(1), *three = make_pool(3);
    for (size_t w = 0; w < sizeof widths / sizeof *widths; w++) {
        uint64_t rows = 150, cols = widths[w], elems = cols * (cols + 1) / 2;
        float *x = make_input(rows, cols), *triangle = make_moments(x, rows, cols, one),
              *again = make_moments(x, rows, cols, three);
        assert_memory_equal(triangle, again, elems * sizeof *triangle);
        for (uint64_t i = 0; i < cols; i++)
            for (uint64_t j = 0; j <= i; j++) {
                double sum = 0, size = 0;
                for (uint64_t row = 0; row < rows; row++) {
                    double product = (double)x[row * cols + i] * x[row * cols + j];
                    sum += product;
                    size += fabs(product);
                }
                if (!(fabs(triangle[at(i, j)] - sum) <= 150 * 0x1p-24 * size)) // a rounding for each row
                    fail_msg("%llu columns: moment %llu, %llu is %g, not %g", (unsigned long long)cols,
                             (unsigned long long)i, (unsigned long long)j, triangle[at(i, j)], sum);
            }
        free(x);
        free(triangle);
        free(again);
    }
    thread_pool_free(one);
    thread_pool_free(three);
}

static void make_factor(struct gptq_factor *factor, const float *triangle, uint64_t cols, struct thread_pool *pool)
{
    struct error err;
    if (gptq_factor_make(factor, triangle, cols, pool, &err))
        fail_msg("%s", err.msg);
}

static void test_factor(void **state)
{
    (void)state;
    static const uint64_t widths[] = {1, 17, 64, 130, MAX_COLS};
    struct thread_pool *one = make_pool(1), *three = make_pool(3);
    for (size_t w = 0; w < sizeof widths / sizeof *widths; w++) {
        uint64_t rows = MAX_ROWS, cols = widths[w]; // the widest has fewer rows than columns
        float *x = make_input(rows, cols), *triangle = make_moments(x, rows, cols, one);
        struct gptq_factor factor, again;
        make_factor(&factor, triangle, cols, one);
        make_factor(&again, triangle, cols, three);
        assert_memory_equal(factor.lower, again.lower, cols * (cols + 1) / 2 * sizeof *factor.lower);
        assert_memory_equal(factor.pivots, again.pivots, cols * sizeof *factor.pivots);
        assert_true(factor.damping == 0.01f);
        double mean = 0;
        for (uint64_t i = 0; i < cols; i++)
            mean += triangle[at(i, i)] / (double)cols;
        for (uint64_t i = 0; i < cols; i++) {
            uint64_t row = factor.order[i];
            assert_true(i == 0 || triangle[at(row, row)] >= triangle[at(factor.order[i - 1], factor.order[i - 1])]);
            for (uint64_t j = 0; j <= i; j++) {
                uint64_t col = factor.order[j];
                double sum = 0, wanted = triangle[at(row, col)] + (i == j ? 0.01 * mean : 0);
                for (uint64_t k = 0; k <= j; k++)
                    sum += (double)factor.lower[at(i, k)] * factor.lower[at(j, k)] * factor.pivots[factor.order[k]];
                double size = sqrt((triangle[at(row, row)] + 0.01 * mean) * (triangle[at(col, col)] + 0.01 * mean));
                if (!(fabs(sum - wanted) <= 4e-6 * size)) // of f32: about a rounding for each of 16 partial sums
                    fail_msg("%llu columns: %llu, %llu is %g, not %g", (unsigned long long)cols, (unsigned long long)i,
                             (unsigned long long)j, sum, wanted);
            }
        }
        gptq_factor_free(&factor);
        gptq_factor_free(&again);
        free(x);
        free(triangle);
    }
    thread_pool_free(one);
    thread_pool_free(three);
}

static void test_factor_refuses(void **state)
{
    (void)state;
    struct thread_pool *pool = make_pool(1);
    struct gptq_factor factor;
    struct error err;
    float zeros[6] = {0}, nan[6] = {1, 0, 1, NAN, 0, 1},
          hardly[6] = {1, 1.03f, 1, 0, 0, 1}; // the last is not positive by a little
    assert_int_equal(gptq_factor_make(&factor, zeros, 3, pool, &err), ERR_MODEL);
    assert_int_equal(gptq_factor_make(&factor, nan, 3, pool, &err), ERR_MODEL);
    assert_int_equal(gptq_factor_make(&factor, hardly, 3, pool, &err), 0);
    assert_true(factor.damping == 0.1f);
    gptq_factor_free(&factor);
    thread_pool_free(pool);
}

// ---- codes ---------------------------------------------------------------------------------------------------------

struct rows {
    uint64_t count, cols;
    float *values;
    uint8_t *memory;
    struct packed_row *packed;
};

static struct rows search_rows(uint64_t count, uint64_t cols, enum weight_kind kind, uint32_t group_size,
                               const float *weight)
{
    struct rows rows = {.count = count, .cols = cols};
    uint64_t bytes = packed_row_bytes(kind, group_size, cols);
    struct error err;
    rows.values = room(count * cols, sizeof *rows.values);
    rows.memory = room(count, bytes);
    rows.packed = room(count, sizeof *rows.packed);
    for (uint64_t i = 0; i < count * cols; i++)
        rows.values[i] = (float)(normal() * 0.02 * (i % 97 == 0 ? 8 : 1));
    memset(rows.values, 0, (group_size < cols ? group_size : cols) * sizeof *rows.values); // a group of zeros
    for (uint64_t r = 0; r < count; r++) {
        packed_row_place(&rows.packed[r], rows.memory + r * bytes, kind, group_size, cols);
        assert_int_equal(
            pack_quantize_row(&rows.packed[r], kind, group_size, rows.values + r * cols, cols, weight, &err), 0);
    }
    return rows;
}

static void free_rows(struct rows *rows)
{
    free(rows->values);
    free(rows->memory);
    free(rows->packed);
}

static double product_error(const struct rows *rows, enum weight_kind kind, uint32_t group_size, const float *triangle)
{
    double sum = 0;
    float *q = room(rows->cols, sizeof *q);
    for (uint64_t r = 0; r < rows->count; r++) {
        pack_dequantize_row(q, &rows->packed[r], kind, group_size, rows->cols);
        for (uint64_t i = 0; i < rows->cols; i++)
            for (uint64_t j = 0; j < rows->cols; j++)
                sum += ((double)rows->values[r * rows->cols + i] - q[i]) * triangle[at(i, j)] *
                       ((double)rows->values[r * rows->cols + j] - q[j]);
    }
    free(q);
    return sum;
}

static const struct {
    enum weight_kind kind;
    uint32_t group_size;
} kinds[] = {{WEIGHT_INT4, 128}, {WEIGHT_INT4, 32},  {WEIGHT_INT4Z, 64},
             {WEIGHT_MXFP4, 32}, {WEIGHT_NVFP4, 16}, {WEIGHT_NL4, 128}};

static void test_codes(void **state)
{
    (void)state;
    struct thread_pool *pool = make_pool(2);
    for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
        uint64_t cols = 272 + 8 * k, count = GPTQ_ROWS - 3;
        float *x = make_input(MAX_ROWS, cols), *triangle = make_moments(x, MAX_ROWS, cols, pool),
              *scratch = room(gptq_scratch_elems(cols), sizeof *scratch);
        struct gptq_factor factor;
        make_factor(&factor, triangle, cols, pool);
        uint64_t begin = random_state;
        struct rows first = search_rows(count, cols, kinds[k].kind, kinds[k].group_size, factor.pivots);
        double before = product_error(&first, kinds[k].kind, kinds[k].group_size, triangle);
        gptq_quantize(first.packed, count, kinds[k].kind, kinds[k].group_size, first.values, &factor, scratch);
        double after = product_error(&first, kinds[k].kind, kinds[k].group_size, triangle);
        if (!(after < 0.6 * before))
            fail_msg("%s: the product's error was %g and is %g", weight_kind_name(kinds[k].kind), before, after);
        uint64_t bytes = packed_row_bytes(kinds[k].kind, kinds[k].group_size, cols);
        for (size_t t = 0; gptq_target_at(t); t++) // each instruction set, in pieces of other sizes
            for (uint64_t piece = 1; piece <= GPTQ_ROWS; piece += 10) {
                random_state = begin;
                struct rows again = search_rows(count, cols, kinds[k].kind, kinds[k].group_size, factor.pivots);
                for (uint64_t r = 0; r < count; r += piece)
                    gptq_target_at(t)->quantize(again.packed + r, count - r < piece ? count - r : piece, kinds[k].kind,
                                                kinds[k].group_size, again.values + r * cols, &factor, scratch);
                if (memcmp(again.memory, first.memory, count * bytes) != 0)
                    fail_msg("%s: %s differs", weight_kind_name(kinds[k].kind), gptq_target_at(t)->name);
                free_rows(&again);
            }
        free_rows(&first);
        gptq_factor_free(&factor);
        free(x);
        free(triangle);
        free(scratch);
    }
    thread_pool_free(pool);
}

// int4 by the formulas themselves, in doubles: codes are the same but where a value lies next to the middle between two.
static void test_plain(void **state)
{
    (void)state;
    enum { GROUP = 64 };
    struct thread_pool *pool = make_pool(1);
    uint64_t cols = 200, differ = 0;
    float *x = make_input(MAX_ROWS, cols), *triangle = make_moments(x, MAX_ROWS, cols, pool),
          *scratch = room(gptq_scratch_elems(cols), sizeof *scratch);
    struct gptq_factor factor;
    make_factor(&factor, triangle, cols, pool);
    struct rows rows = search_rows(4, cols, WEIGHT_INT4, GROUP, NULL);
    gptq_quantize(rows.packed, 4, WEIGHT_INT4, GROUP, rows.values, &factor, scratch);
    for (uint64_t r = 0; r < 4; r++) {
        double aim[MAX_COLS], error[MAX_COLS] = {0};
        for (uint64_t place = cols; place-- > 0;) {
            uint64_t col = factor.order[place];
            aim[place] = rows.values[r * cols + col];
            for (uint64_t j = place + 1; j < cols; j++)
                aim[place] += error[j] * factor.lower[at(j, place)];
            double scale = weight_int4_scale(rows.packed[r].scale_f16[col / GROUP]);
            double code = scale != 0 ? rint(aim[place] / scale) : 0;
            code = code < -8 ? -8 : code > 7 ? 7 : code;
            differ += code != rows.packed[r].q[col];
            error[place] = rows.values[r * cols + col] - rows.packed[r].q[col] * scale; // what was really taken goes on
        }
    }
    assert_true(differ <= 2);
    free_rows(&rows);
    gptq_factor_free(&factor);
    free(x);
    free(triangle);
    free(scratch);
    thread_pool_free(pool);
}

static int set_seed(void **state)
{
    (void)state;
    random_state = 20261122;
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(test_moments, set_seed),        cmocka_unit_test_setup(test_factor, set_seed),
        cmocka_unit_test_setup(test_factor_refuses, set_seed), cmocka_unit_test_setup(test_codes, set_seed),
        cmocka_unit_test_setup(test_plain, set_seed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
