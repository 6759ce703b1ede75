// The inner loops of gptq.h. The including file is compiled for one instruction set, and defines GPTQ_TARGET, the table's name, and
// GPTQ_TARGET_NAME.
//
// Same bytes everywhere, but for moments_block: products are never fused into sums (-ffp-contract=off); a sum over columns runs in LANES partial
// sums that are combined in one fixed tree; all else is element by element in a fixed order.
#include "kernels/gptq.h"

#include "formats/number_formats.h"
#include "kernels/vectors.h"

#include <string.h>
#ifdef __SSE2__
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512DQ__)
enum { WIDTH = 16, TILE_ROWS = 8, DOT_ROWS = 4 };
#elif defined(__AVX2__)
enum { WIDTH = 8, TILE_ROWS = 4, DOT_ROWS = 2 };
#else
enum { WIDTH = 4, TILE_ROWS = 4, DOT_ROWS = 2 };
#endif
enum { BLOCK = 64, PARTS = LANES / WIDTH };

// As many floats as one register holds.
typedef float part __attribute__((vector_size(WIDTH * sizeof(float))));

static inline part part_load(const float *from)
{
    part value;
    memcpy(&value, from, sizeof value);
    return value;
}
static inline void part_store(float *to, part value) { memcpy(to, &value, sizeof value); }

static inline part multiply_add(part a, part b, part sum)
{
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    return (part)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__AVX2__)
    return (part)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
    return a * b + sum;
#endif
}

static void moments_block(float *out, const float *a, const float *b, uint64_t rows)
{
    for (int i = 0; i < BLOCK; i += TILE_ROWS)
        for (int j = 0; j < BLOCK; j += 2 * WIDTH) {
            part sum[TILE_ROWS][2];
            memset(sum, 0, sizeof sum);
            for (uint64_t row = 0; row < rows; row++) {
                const float *left = a + row * BLOCK + i, *right = b + row * BLOCK + j;
                part first = part_load(right), second = part_load(right + WIDTH);
                UNROLL for (int r = 0; r < TILE_ROWS; r++)
                {
                    part factor = (part){0} + left[r];
                    sum[r][0] = multiply_add(factor, first, sum[r][0]);
                    sum[r][1] = multiply_add(factor, second, sum[r][1]);
                }
            }
            for (int r = 0; r < TILE_ROWS; r++) {
                part_store(out + (i + r) * BLOCK + j, sum[r][0]);
                part_store(out + (i + r) * BLOCK + j + WIDTH, sum[r][1]);
            }
        }
}

// ---- the factor ----------------------------------------------------------------------------------------------------

static inline float lanes_sum(const part lanes[PARTS])
{
    f32x16 all;
    memcpy(&all, lanes, sizeof all);
    return sum_lanes(&all);
}

static void subtract_products(float *const *rows, uint64_t num_rows, const float *const *by, uint64_t num_by,
                              uint64_t count, bool triangle)
{
    for (uint64_t i = 0; i < num_rows; i += DOT_ROWS)
        for (uint64_t j = 0; j < num_by && !(triangle && j > i + DOT_ROWS - 1); j += DOT_ROWS) {
            part sum[DOT_ROWS][DOT_ROWS][PARTS];
            const float *a[DOT_ROWS],
                *b[DOT_ROWS]; // rows that are not there: the first one again, and its sums are dropped
            for (int r = 0; r < DOT_ROWS; r++) {
                a[r] = rows[i + r < num_rows ? i + r : i];
                b[r] = by[j + r < num_by ? j + r : j];
            }
            memset(sum, 0, sizeof sum);
            for (uint64_t k = 0; k < count; k += LANES)
                UNROLL for (int p = 0; p < PARTS; p++)
                {
                    part right[DOT_ROWS];
                    UNROLL for (int s = 0; s < DOT_ROWS; s++) right[s] = part_load(b[s] + k + p * WIDTH);
                    UNROLL for (int r = 0; r < DOT_ROWS; r++)
                    {
                        part left = part_load(a[r] + k + p * WIDTH);
                        UNROLL for (int s = 0; s < DOT_ROWS; s++) sum[r][s][p] += left * right[s];
                    }
                }
            for (int r = 0; r < DOT_ROWS && i + r < num_rows; r++)
                for (int s = 0; s < DOT_ROWS && j + s < num_by; s++)
                    if (!triangle || j + s <= i + r)
                        rows[i + r][count + j + s] -= lanes_sum(sum[r][s]);
        }
}

// ---- codes ---------------------------------------------------------------------------------------------------------

enum { STEP = 128, ROW_TILE = 4 }; // columns whose errors are passed on together

// What the codes of one row and group mean: (level - zero) * scale.
struct grid {
    float scale, inverse, zero;
};

static struct grid grid_of(const struct packed_row *row, enum weight_kind kind, uint64_t group)
{
    struct grid grid = {0};
    switch (kind) {
    case WEIGHT_INT4Z:
        grid.zero = f16_to_f32(row->zero_f16[group]);
        grid.scale = weight_int4_scale(row->scale_f16[group]);
        break;
    case WEIGHT_NL4:
        grid.scale = weight_nl4_scale(row->scale_f16[group]);
        break;
    case WEIGHT_INT4:
        grid.scale = weight_int4_scale(row->scale_f16[group]);
        break;
    case WEIGHT_MXFP4:
        grid.scale = e8m0_to_f32(row->scale_u8[group]);
        break;
    case WEIGHT_NVFP4:
        grid.scale = e4m3_to_f32(row->scale_u8[group]) * row->scale;
        break;
    default:
        break;
    }
    // A scale whose reciprocal is none belongs to values of no account; their codes are zeros.
    float size = grid.scale < 0 ? -grid.scale : grid.scale;
    grid.inverse = size >= 0x1p-126f ? 1.0f / grid.scale : 0;
    return grid;
}

// The code next to a value, and the value that it stands for.
static inline float take_code(struct packed_row *row, enum weight_kind kind, uint64_t col, const struct grid *grid,
                              float target)
{
    float at = target * grid->inverse + grid->zero, level;
    if (weight_group_chosen(kind)) {
        row->q[col] = pack_nearest_code(kind, at);
        level = pack_code_value(kind, row->q[col]);
    } else {
        row->e2m1[col] = f32_to_e2m1(at);
        level = e2m1_to_f32(row->e2m1[col]);
    }
    return (level - grid->zero) * grid->scale;
}

// aims[row][0 .. end) += error[row][j] * L'_jk for places j of [begin, begin + count), last first.
static void pass_on(float *aims, uint64_t cols, const float *error, uint64_t rows, const struct gptq_factor *factor,
                    uint64_t begin, uint64_t count, uint64_t end)
{
    uint64_t k = 0;
    float panel[STEP * 2 * WIDTH]; // what all rows read, gathered from rows of the factor that lie far apart
    for (; k + 2 * WIDTH <= end; k += 2 * WIDTH) {
        for (uint64_t j = 0; j < count; j++)
            memcpy(panel + j * 2 * WIDTH, factor->lower + (begin + j) * (begin + j + 1) / 2 + k,
                   2 * WIDTH * sizeof *panel);
        for (uint64_t row = 0; row < rows; row += ROW_TILE) {
            part sum[ROW_TILE][2];
            const float *e[ROW_TILE];
            for (int r = 0; r < ROW_TILE; r++) {
                uint64_t there = row + (uint64_t)r < rows ? row + (uint64_t)r : row;
                e[r] = error + there * STEP;
                sum[r][0] = part_load(aims + there * cols + k);
                sum[r][1] = part_load(aims + there * cols + k + WIDTH);
            }
            for (uint64_t j = count; j-- > 0;) {
                part first = part_load(panel + j * 2 * WIDTH), second = part_load(panel + j * 2 * WIDTH + WIDTH);
                UNROLL for (int r = 0; r < ROW_TILE; r++)
                {
                    part by = (part){0} + e[r][j];
                    sum[r][0] += by * first;
                    sum[r][1] += by * second;
                }
            }
            for (int r = 0; r < ROW_TILE && row + (uint64_t)r < rows; r++) {
                part_store(aims + (row + (uint64_t)r) * cols + k, sum[r][0]);
                part_store(aims + (row + (uint64_t)r) * cols + k + WIDTH, sum[r][1]);
            }
        }
    }
    for (; k < end; k++)
        for (uint64_t row = 0; row < rows; row++)
            for (uint64_t j = count; j-- > 0;)
                aims[row * cols + k] += error[row * STEP + j] * factor->lower[(begin + j) * (begin + j + 1) / 2 + k];
}

// scratch: aims [rows][cols], by place; then error [rows][STEP].
static void quantize(struct packed_row *rows, uint64_t count, enum weight_kind kind, uint32_t group_size,
                     const float *values, const struct gptq_factor *factor, float *scratch)
{
    uint64_t cols = factor->cols;
    float *aims = scratch, *error = scratch + GPTQ_ROWS * cols;
    for (uint64_t row = 0; row < count; row++)
        for (uint64_t place = 0; place < cols; place++)
            aims[row * cols + place] = values[row * cols + factor->order[place]];
    for (uint64_t end = cols, begin; end > 0; end = begin) {
        begin = (end - 1) / STEP * STEP;
        for (uint64_t place = end; place-- > begin;) {
            uint64_t col = factor->order[place];
            const float *lower = factor->lower + place * (place + 1) / 2;
            for (uint64_t row = 0; row < count; row++) {
                struct grid grid = grid_of(&rows[row], kind, col / group_size);
                float *aim = aims + row * cols;
                float e = values[row * cols + col] - take_code(&rows[row], kind, col, &grid, aim[place]);
                error[row * STEP + place - begin] = e;
                for (uint64_t k = begin; k < place; k++)
                    aim[k] += e * lower[k];
            }
        }
        pass_on(aims, cols, error, count, factor, begin, end - begin, begin);
    }
}

extern const struct gptq_target GPTQ_TARGET;
const struct gptq_target GPTQ_TARGET = {GPTQ_TARGET_NAME, moments_block, subtract_products, quantize};
