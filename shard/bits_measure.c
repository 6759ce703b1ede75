// See bits_measure.h.
#include "shard/bits_measure.h"

#include "formats/number_formats.h"
#include "kernels/pack.h"
#include "shard/pool_error.h"
#include "shard/stop.h"

#include <stdlib.h>
#include <string.h>

enum { RUN_ROWS = 16 }; // consecutive rows that are measured together

// A run of rows of one stored matrix.
struct sample {
    uint64_t tensor, first_row, rows;
    struct bits_unit *unit;
};

// Squares of weights, and of what the candidates make of them.
struct sums {
    double weights, errors[BITS_CANDIDATES];
};

// One thread's memory.
struct worker {
    struct row_window window;
    void *memory; // a packed row in bf16, one in a candidate's kind, and two rows of floats
    uint64_t capacity;
};

struct measuring {
    const struct plan *plan;
    const struct row_source *source;
    enum weight_scales scales;
    const bool *left_out;
    const struct sample *samples;
    struct sums *sums; // of each sample
    struct worker *workers;
    struct progress *progress;
    struct pool_error failure;
};

// ---- which rows --------------------------------------------------------------------------------------------------

static uint64_t smaller_of(uint64_t a, uint64_t b) { return a < b ? a : b; }

// Every expert whose number is the first of its share of BITS_EXPERTS.
static bool is_measured(const struct plan *plan, const struct shard_tensor *tensor)
{
    uint64_t experts = (uint64_t)plan->model.experts.num_experts, e = (uint64_t)tensor->expert;
    if (!tensor_role_is_linear(tensor->role))
        return false;
    return tensor->expert < 0 || experts <= BITS_EXPERTS || e == 0 ||
           e * BITS_EXPERTS / experts != (e - 1) * BITS_EXPERTS / experts;
}

static uint64_t runs_of(const struct shard_tensor *tensor)
{
    uint64_t wanted = tensor->expert < 0 ? BITS_ROWS : BITS_EXPERT_ROWS;
    return smaller_of((tensor->shape.rows + RUN_ROWS - 1) / RUN_ROWS, wanted / RUN_ROWS);
}

// Run `run` of `runs` stands somewhere in its share of the rows: not at the same place in each, since heads repeat.
static struct sample sample_of(const struct shard_tensor *tensor, uint64_t index, uint64_t run, uint64_t runs)
{
    uint64_t all = (tensor->shape.rows + RUN_ROWS - 1) / RUN_ROWS; // runs that there are
    uint64_t begin = run * all / runs, end = (run + 1) * all / runs;
    uint64_t at = begin + run * UINT64_C(2654435761) % (end - begin);
    uint64_t first = at * RUN_ROWS;
    return (struct sample){
        .tensor = index, .first_row = first, .rows = smaller_of(RUN_ROWS, tensor->shape.rows - first)};
}

static uint64_t count_samples(const struct plan *plan)
{
    uint64_t count = 0;
    for (uint64_t i = 0; i < plan->tensor_count; i++)
        if (is_measured(plan, &plan->ranks[0].tensors[i]))
            count += runs_of(&plan->ranks[0].tensors[i]);
    return count;
}

uint64_t bits_measure_bytes(const struct plan *plan)
{
    uint64_t bytes = 0;
    for (uint64_t i = 0; i < plan->tensor_count; i++) {
        const struct shard_tensor *tensor = &plan->ranks[0].tensors[i];
        if (is_measured(plan, tensor))
            bytes += smaller_of(runs_of(tensor) * RUN_ROWS, tensor->shape.rows) * tensor->shape.cols * sizeof(uint16_t);
    }
    return bytes;
}

static void list_samples(struct sample *out, const struct plan *plan, const struct bits *bits)
{
    for (uint64_t i = 0; i < plan->tensor_count; i++) {
        const struct shard_tensor *tensor = &plan->ranks[0].tensors[i];
        if (!is_measured(plan, tensor))
            continue;
        for (uint64_t run = 0, runs = runs_of(tensor); run < runs; run++) {
            *out = sample_of(tensor, i, run, runs);
            out++->unit = bits_find(bits, tensor->layer, tensor->role);
        }
    }
}

// ---- errors ------------------------------------------------------------------------------------------------------

static int reserve(struct worker *worker, uint64_t bytes, struct error *err)
{
    if (bytes <= worker->capacity)
        return 0;
    free(worker->memory);
    worker->capacity = 0;
    if (!(worker->memory = malloc(bytes)))
        return error_set(err, ERR_MEMORY, "out of memory to measure rows");
    worker->capacity = bytes;
    return 0;
}

// Of x - y (y NULL: of x). In eight lanes and a fixed order, so that every compiler gives the same sum.
static double sum_of_squares(const float *x, const float *y, uint64_t count)
{
    enum { LANES = 8 };
    double lanes[LANES] = {0}, sum = 0;
    for (uint64_t i = 0; i < count; i++) {
        double difference = (double)x[i] - (y ? (double)y[i] : 0);
        lanes[i % LANES] += difference * difference;
    }
    for (int lane = 0; lane < LANES; lane++)
        sum += lanes[lane];
    return sum;
}

// x: one row. packed and back [cols] are room.
static int add_row(struct sums *sums, const float *x, uint64_t cols, void *packed, float *back,
                   enum weight_scales scales, const bool *left_out, struct error *err)
{
    sums->weights += sum_of_squares(x, NULL, cols);
    for (int c = 0; c < BITS_CANDIDATES; c++) {
        enum weight_kind kind = bits_candidates[c].kind;
        uint32_t group_size = bits_candidates[c].group_size;
        if (left_out[c])
            continue;
        struct packed_row row;
        packed_row_place(&row, packed, kind, group_size, cols);
        int rc = scales == WEIGHT_SCALES_LARGEST ? pack_round_row(&row, kind, group_size, x, cols, err)
                                                 : pack_quantize_row(&row, kind, group_size, x, cols, NULL, err);
        if (rc)
            return rc;
        pack_dequantize_row(back, &row, kind, group_size, cols);
        sums->errors[c] += sum_of_squares(x, back, cols);
    }
    return 0;
}

static uint64_t largest_row_bytes(uint64_t cols)
{
    uint64_t largest = 0;
    for (int c = 0; c < BITS_CANDIDATES; c++) {
        uint64_t bytes = packed_row_bytes(bits_candidates[c].kind, bits_candidates[c].group_size, cols);
        if (bytes > largest)
            largest = bytes;
    }
    return largest;
}

// Rows [begin, end) of a part of the sample's matrix.
static int measure_part(struct measuring *m, const struct sample *sample, int part, uint64_t begin, uint64_t end,
                        struct worker *worker, struct sums *sums, struct error *err)
{
    const struct shard_part *slice = &m->plan->ranks[0].tensors[sample->tensor].parts[part];
    uint64_t cols = slice->source_cols, bf16_bytes = packed_row_bytes(WEIGHT_BF16, 0, cols);
    uint64_t row_bytes = largest_row_bytes(cols), float_bytes = (cols * sizeof(float) + 15) / 16 * 16;
    struct row_request request = {.tensor = sample->tensor,
                                  .part = part,
                                  .source = slice,
                                  .kind = WEIGHT_BF16,
                                  .row_begin = begin,
                                  .rows = end - begin};
    struct packed_row row;
    struct error cause;
    int rc;
    if ((rc = m->source->read(m->source, &worker->window, &request, err)) ||
        (rc = reserve(worker, bf16_bytes + row_bytes + 2 * float_bytes, err)))
        return rc;
    uint8_t *packed = (uint8_t *)worker->memory + bf16_bytes;
    float *x = (float *)(void *)(packed + row_bytes), *back = (float *)(void *)(packed + row_bytes + float_bytes);
    packed_row_place(&row, worker->memory, WEIGHT_BF16, 0, cols);
    for (uint64_t r = begin; r < end; r++) {
        if ((rc = m->source->row(m->source, &worker->window, r, &row, err)))
            return rc;
        for (uint64_t i = 0; i < cols; i++)
            x[i] = bf16_to_f32(row.bf16[i]);
        if ((rc = add_row(sums, x, cols, packed, back, m->scales, m->left_out, &cause)))
            return error_set(err, rc, "tensor %s, row %llu: %s", slice->source, (unsigned long long)r, cause.msg);
    }
    progress_add(m->progress, (end - begin) * cols * sizeof(uint16_t));
    return 0;
}

static int measure_sample(struct measuring *m, const struct sample *sample, struct worker *worker, struct sums *sums,
                          struct error *err)
{
    const struct shard_tensor *tensor = &m->plan->ranks[0].tensors[sample->tensor];
    uint64_t part_begin = 0, last = sample->first_row + sample->rows;
    int rc = stop_check(err);
    for (int part = 0; !rc && part < tensor->num_parts; part++) {
        uint64_t rows = tensor->parts[part].rows, part_end = part_begin + rows;
        uint64_t begin = sample->first_row > part_begin ? sample->first_row : part_begin;
        uint64_t end = smaller_of(last, part_end), offset = tensor->parts[part].row_begin;
        if (begin < end)
            rc = measure_part(m, sample, part, offset + begin - part_begin, offset + end - part_begin, worker, sums,
                              err);
        part_begin = part_end;
    }
    return rc;
}

static void run_sample(void *arg, int64_t task, int thread)
{
    struct measuring *m = arg;
    struct error err;
    if (pool_error_any(&m->failure))
        return;
    if (measure_sample(m, &m->samples[task], &m->workers[thread], &m->sums[task], &err))
        pool_error_note(&m->failure, &err);
    if (thread == 0)
        progress_show(m->progress);
}

// Sums over all samples of a unit, in their order; all [units] is zeroed. A matrix of zeros has no error in any kind.
static void take_errors(struct bits *bits, const struct measuring *m, uint64_t count, struct sums *all)
{
    for (uint64_t s = 0; s < count; s++) {
        struct sums *unit = &all[m->samples[s].unit - bits->units];
        unit->weights += m->sums[s].weights;
        for (int c = 0; c < BITS_CANDIDATES; c++)
            unit->errors[c] += m->sums[s].errors[c];
    }
    for (size_t u = 0; u < bits->num_units; u++)
        for (int c = 0; c < BITS_CANDIDATES; c++)
            if (!bits->left_out[c])
                bits->units[u].error[c] = all[u].weights > 0 ? all[u].errors[c] / all[u].weights : 0;
    bits->measured = true;
}

int bits_measure(struct bits *bits, const struct plan *plan, const struct row_source *source, enum weight_scales scales,
                 struct thread_pool *pool, struct progress *progress, struct error *err)
{
    uint64_t count = count_samples(plan);
    int threads = thread_pool_size(pool), rc = 0;
    struct sample *samples = calloc(count + 1, sizeof *samples);
    struct sums *of_units = calloc(bits->num_units + 1, sizeof *of_units);
    struct measuring m = {.plan = plan,
                          .source = source,
                          .scales = scales,
                          .left_out = bits->left_out,
                          .samples = samples,
                          .progress = progress};
    m.sums = calloc(count + 1, sizeof *m.sums);
    m.workers = calloc((size_t)threads, sizeof *m.workers);
    if (!samples || !of_units || !m.sums || !m.workers) {
        rc = error_set(err, ERR_MEMORY, "out of memory to measure %llu pieces of matrices", (unsigned long long)count);
    } else {
        list_samples(samples, plan, bits);
        thread_pool_run(pool, run_sample, &m, (int64_t)count);
        rc = pool_error_take(&m.failure, err);
    }
    if (!rc)
        take_errors(bits, &m, count, of_units);
    for (int t = 0; m.workers && t < threads; t++) {
        row_window_free(&m.workers[t].window);
        free(m.workers[t].memory);
    }
    free(m.workers);
    free(m.sums);
    free(of_units);
    free(samples);
    return rc;
}
