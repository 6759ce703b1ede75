// Moments, factors, and the choice of the inner loops' implementation. See gptq.h; the loops themselves stand in gptq_impl.h.
#include "kernels/gptq.h"

#include "formats/checked.h"
#include "kernels/kernels_internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCK = 64 };

extern const struct gptq_target gptq_base, gptq_avx2, gptq_avx512;

const struct gptq_target *gptq_target_at(size_t index)
{
    const struct gptq_target *supported[3] = {&gptq_base};
    size_t count = 1;
#ifdef __x86_64__
    if (kernels_supported_avx2())
        supported[count++] = &gptq_avx2;
    if (kernels_supported_avx512())
        supported[count++] = &gptq_avx512;
#endif
    return index < count ? supported[index] : NULL;
}

static const struct gptq_target *fastest(void)
{
    size_t last = 0;
    while (gptq_target_at(last + 1))
        last++;
    return gptq_target_at(last);
}

static uint64_t row_begin(uint64_t row) { return row * (row + 1) / 2; }

// Number of the pair (i, j), j <= i, of blocks.
static void block_pair(uint64_t task, uint64_t *i, uint64_t *j)
{
    uint64_t row = (uint64_t)((sqrt(8.0 * (double)task + 1.0) - 1.0) / 2.0);
    while (row_begin(row) > task)
        row--;
    while (row_begin(row + 1) <= task)
        row++;
    *i = row;
    *j = task - row_begin(row);
}

// ---- moments -------------------------------------------------------------------------------------------------------

uint64_t moments_panel_elems(uint64_t rows, uint64_t cols) { return div_up(cols, BLOCK) * BLOCK * rows; }

struct moments_job {
    const struct gptq_target *target;
    float *triangle, *panels;
    const float *x;
    int64_t x_stride;
    uint64_t rows, cols;
};

// 64 columns of all rows, one row behind the other.
static void pack_panel(void *arg, int64_t panel, int thread)
{
    const struct moments_job *job = arg;
    uint64_t first = (uint64_t)panel * BLOCK, count = job->cols - first < BLOCK ? job->cols - first : BLOCK;
    float *to = job->panels + first * job->rows;
    (void)thread;
    for (uint64_t row = 0; row < job->rows; row++, to += BLOCK) {
        memcpy(to, job->x + (int64_t)row * job->x_stride + first, count * sizeof *to);
        memset(to + count, 0, (BLOCK - count) * sizeof *to);
    }
}

static void add_block(void *arg, int64_t task, int thread)
{
    const struct moments_job *job = arg;
    uint64_t i, j;
    float sums[BLOCK * BLOCK];
    (void)thread;
    block_pair((uint64_t)task, &i, &j);
    job->target->moments_block(sums, job->panels + i * BLOCK * job->rows, job->panels + j * BLOCK * job->rows,
                               job->rows);
    for (uint64_t r = 0; r < BLOCK && i * BLOCK + r < job->cols; r++) {
        float *to = job->triangle + row_begin(i * BLOCK + r) + j * BLOCK;
        for (uint64_t c = 0; c < (i == j ? r + 1 : (uint64_t)BLOCK); c++)
            to[c] += sums[r * BLOCK + c];
    }
}

void moments_add(float *triangle, uint64_t cols, const float *x, int64_t x_stride, uint64_t rows, float *panels,
                 struct thread_pool *pool)
{
    struct moments_job job = {fastest(), triangle, panels, x, x_stride, rows, cols};
    uint64_t blocks = div_up(cols, BLOCK);
    thread_pool_run(pool, pack_panel, &job, (int64_t)blocks);
    thread_pool_run(pool, add_block, &job, (int64_t)row_begin(blocks));
}

// ---- factors -------------------------------------------------------------------------------------------------------

struct factor_job {
    const struct gptq_target *target;
    struct gptq_factor *factor;
    const float *triangle;
    float added;
    uint64_t block; // columns that are being worked on
};

struct column_weight {
    float weight;
    uint32_t column;
};

static int compare_weights(const void *a, const void *b)
{
    const struct column_weight *x = a, *y = b;
    if (x->weight != y->weight)
        return x->weight < y->weight ? -1 : 1;
    return x->column > y->column ? -1 : 1; // of equals, the column that comes first is taken first, from the end
}

static int choose_order(struct gptq_factor *factor, const float *triangle, double *mean, struct error *err)
{
    struct column_weight *weights = malloc(factor->cols * sizeof *weights);
    double sum = 0;
    if (!weights)
        return error_set(err, ERR_MEMORY, "out of memory for an order of %llu columns",
                         (unsigned long long)factor->cols);
    for (uint64_t i = 0; i < factor->cols; i++) {
        weights[i] = (struct column_weight){triangle[row_begin(i) + i], (uint32_t)i};
        sum += weights[i].weight;
    }
    qsort(weights, factor->cols, sizeof *weights, compare_weights);
    for (uint64_t i = 0; i < factor->cols; i++)
        factor->order[i] = weights[i].column;
    free(weights);
    *mean = sum / (double)factor->cols;
    return 0;
}

// H in the order of places, damped.
static void place_row(void *arg, int64_t row, int thread)
{
    const struct factor_job *job = arg;
    const uint32_t *order = job->factor->order;
    float *to = job->factor->lower + row_begin((uint64_t)row);
    uint64_t col = order[row];
    (void)thread;
    for (int64_t k = 0; k < row; k++)
        to[k] = job->triangle[order[k] < col ? row_begin(col) + order[k] : row_begin(order[k]) + col];
    to[row] = job->triangle[row_begin(col) + col] + job->added;
}

// Rows of one block, as far as the columns of an earlier or the same block stand before them.
static uint64_t block_rows(const struct gptq_factor *factor, uint64_t block, float **rows)
{
    uint64_t first = block * BLOCK, count = factor->cols - first < BLOCK ? factor->cols - first : BLOCK;
    for (uint64_t i = 0; i < count; i++)
        rows[i] = factor->lower + row_begin(first + i);
    return count;
}

// The block on the diagonal: what earlier columns leave of it, and its own factor. False: it is not positive definite.
static bool factor_diagonal(const struct factor_job *job)
{
    float *rows[BLOCK] = {0};
    uint64_t count = block_rows(job->factor, job->block, rows), first = job->block * BLOCK;
    job->target->subtract_products(rows, count, (const float *const *)rows, count, first, true);
    for (uint64_t j = 0; j < count; j++) {
        float *row = rows[j] + first;
        float pivot = row[j];
        for (uint64_t k = 0; k < j; k++)
            pivot -= row[k] * row[k];
        if (!(pivot > 0 && pivot <= 0x1p126f))
            return false;
        row[j] = sqrtf(pivot);
        for (uint64_t i = j + 1; i < count; i++) {
            float value = rows[i][first + j];
            for (uint64_t k = 0; k < j; k++)
                value -= rows[i][first + k] * row[k];
            rows[i][first + j] = value / row[j];
        }
    }
    return true;
}

// The same columns of a block of rows below.
static void factor_below(void *arg, int64_t task, int thread)
{
    const struct factor_job *job = arg;
    float *by[BLOCK] = {0}, *rows[BLOCK] = {0};
    uint64_t first = job->block * BLOCK, columns = block_rows(job->factor, job->block, by);
    uint64_t count = block_rows(job->factor, job->block + 1 + (uint64_t)task, rows);
    (void)thread;
    job->target->subtract_products(rows, count, (const float *const *)by, columns, first, false);
    for (uint64_t i = 0; i < count; i++)
        for (uint64_t j = 0; j < columns; j++) {
            float value = rows[i][first + j];
            for (uint64_t k = 0; k < j; k++)
                value -= rows[i][first + k] * by[j][first + k];
            rows[i][first + j] = value / by[j][first + j];
        }
}

static void divide_row(void *arg, int64_t row, int thread)
{
    const struct factor_job *job = arg;
    const struct gptq_factor *factor = job->factor;
    float *to = factor->lower + row_begin((uint64_t)row);
    (void)thread;
    for (int64_t k = 0; k < row; k++) // pivots hold the diagonal so far, by place
        to[k] /= factor->pivots[k];
    to[row] = 1;
}

// By place to by column, squared.
static int finish_pivots(struct gptq_factor *factor, struct error *err)
{
    float *by_column = malloc(factor->cols * sizeof *by_column);
    if (!by_column)
        return error_set(err, ERR_MEMORY, "out of memory for %llu columns", (unsigned long long)factor->cols);
    for (uint64_t i = 0; i < factor->cols; i++)
        by_column[factor->order[i]] = factor->pivots[i] * factor->pivots[i];
    free(factor->pivots);
    factor->pivots = by_column;
    return 0;
}

static bool try_factor(struct factor_job *job, struct thread_pool *pool)
{
    struct gptq_factor *factor = job->factor;
    uint64_t blocks = div_up(factor->cols, BLOCK);
    thread_pool_run(pool, place_row, job, (int64_t)factor->cols);
    for (job->block = 0; job->block < blocks; job->block++) {
        if (!factor_diagonal(job))
            return false;
        thread_pool_run(pool, factor_below, job, (int64_t)(blocks - job->block - 1));
    }
    for (uint64_t i = 0; i < factor->cols; i++)
        factor->pivots[i] = factor->lower[row_begin(i) + i];
    thread_pool_run(pool, divide_row, job, (int64_t)factor->cols);
    return true;
}

int gptq_factor_make(struct gptq_factor *out, const float *triangle, uint64_t cols, struct thread_pool *pool,
                     struct error *err)
{
    static const float dampings[] = {0.01f, 0.1f, 1.0f, 10.0f};
    struct gptq_factor factor = {.cols = cols};
    struct factor_job job = {.target = fastest(), .factor = &factor, .triangle = triangle};
    double mean;
    bool done = false;
    int rc;
    factor.order = malloc(cols * sizeof *factor.order);
    factor.lower = malloc(row_begin(cols) * sizeof *factor.lower);
    factor.pivots = malloc(cols * sizeof *factor.pivots);
    if (!factor.order || !factor.lower || !factor.pivots) {
        rc = error_set(err, ERR_MEMORY, "out of memory for the second moments of %llu columns (%llu bytes)",
                       (unsigned long long)cols, (unsigned long long)(row_begin(cols) * sizeof *factor.lower));
        goto fail;
    }
    if ((rc = choose_order(&factor, triangle, &mean, err)))
        goto fail;
    for (size_t i = 0; i < sizeof dampings / sizeof *dampings && !done && mean >= 0x1p-100; i++) {
        factor.damping = dampings[i];
        job.added = (float)(mean * factor.damping);
        done = try_factor(&job, pool);
    }
    if (!done) {
        rc = error_set(err, ERR_MODEL,
                       "the second moments of %llu columns cannot be factored: they are zero, or not finite",
                       (unsigned long long)cols);
        goto fail;
    }
    if ((rc = finish_pivots(&factor, err)))
        goto fail;
    *out = factor;
    return 0;
fail:
    gptq_factor_free(&factor);
    return rc;
}

void gptq_factor_free(struct gptq_factor *factor)
{
    free(factor->order);
    free(factor->lower);
    free(factor->pivots);
    *factor = (struct gptq_factor){0};
}

// ---- codes ---------------------------------------------------------------------------------------------------------

bool gptq_has(enum weight_kind kind) { return weight_is_tiled(kind); }

uint64_t gptq_scratch_elems(uint64_t cols) { return GPTQ_ROWS * (cols + 128); }

void gptq_quantize(struct packed_row *rows, uint64_t count, enum weight_kind kind, uint32_t group_size,
                   const float *values, const struct gptq_factor *factor, float *scratch)
{
    fastest()->quantize(rows, count, kind, group_size, values, factor, scratch);
}
