// An all_reduce in packed shares (kernels/cuda/shares.h) against the CPU's arithmetic (engine/comm_reduce.h): coded bytes, sums and what error
// feedback keeps, bit for bit, on every rank; and its halves where whole rows have owners.
#include "tests/device/cuda_test.h"

extern "C" {
#include "engine/comm_reduce.h"
}
#include "kernels/cuda/shares.h"

enum { MAX_RANKS = 8, MESSAGES = 2 }; // of two messages the second finds what the first has lost

static const struct share_case {
    const char *name;
    int tp_size;
    int64_t rows, cols, stride;
} cases[] = {
    {"two ranks", 2, 5, 512, 512},
    {"rows of another stride", 2, 3, 256, 268},
    {"four ranks", 4, 3, 1024, 1024},
    {"eight ranks", 8, 2, 1024, 1024},
    {"groups do not divide by the ranks", 4, 3, 128 * 7, 128 * 7},
    {"a short last group", 2, 3, 300, 300},
    {"not aligned", 3, 2, 263, 265},
    {"fewer groups than ranks", 8, 2, 130, 130},
    {"sums of squares", 4, 9, 2, 2},
};

// Ordinary values with outliers; and a row each of NaN, Inf, zeros, denormals, huge and equal values.
static void fill_row(float *x, int64_t cols, int64_t row, int rank)
{
    for (int64_t i = 0; i < cols; i++)
        x[i] = centred() * (i % 37 == 5 ? 40.0f : 1.0f);
    for (int64_t i = 0; i < cols; i++)
        switch (row % 8) {
        case 2:
            x[i] = i % 100 == 17 && rank == 1 ? f32_from_bits(0x7fa12345) : x[i];
            break;
        case 3:
            x[i] = i % 90 == 3 ? (rank ? -INFINITY : INFINITY) : x[i];
            break;
        case 4:
            x[i] = i % 2 ? -0.0f : 0.0f;
            break;
        case 5:
            x[i] *= 0x1p-127f;
            break;
        case 6:
            x[i] *= i / 128 % 2 ? 0x1p120f : 0x1.8p127f;
            break;
        case 7:
            x[i] = i % 3 ? 0.75f : -0.75f;
            break;
        }
}

struct group_of_ranks {
    const struct share_case *shape;
    enum wire wire;
    bool feeds;
    uint64_t groups, values, lost_values;
    float *cpu[MAX_RANKS], *gpu[MAX_RANKS];                    // [rows][stride]
    uint16_t *cpu_lost[MAX_RANKS], *gpu_lost[MAX_RANKS];       // [rows][cols]
    uint8_t *cpu_coded[MAX_RANKS], *cpu_sums[MAX_RANKS];       // [groups]
    uint8_t *to[MAX_RANKS], *from[MAX_RANKS], *sum[MAX_RANKS]; // shares: for each rank, from each rank, sums of all
};

static void open_ranks(struct group_of_ranks *g)
{
    const struct share_case *s = g->shape;
    int64_t share = share_bytes(s->rows, s->cols, s->tp_size, g->wire);
    g->groups = (uint64_t)s->rows * wire_groups((uint64_t)s->cols);
    g->values = (uint64_t)(s->rows * s->stride), g->lost_values = (uint64_t)(s->rows * s->cols);
    for (int r = 0; r < s->tp_size; r++) {
        g->cpu[r] = floats((int64_t)g->values);
        g->gpu[r] = device_array<float>((int64_t)g->values);
        g->cpu_lost[r] = (uint16_t *)zeroed((int64_t)g->lost_values * 2);
        g->gpu_lost[r] = (uint16_t *)device_zeros((int64_t)g->lost_values * 2);
        g->cpu_coded[r] = (uint8_t *)zeroed((int64_t)(g->groups * wire_group_bytes(g->wire)));
        g->cpu_sums[r] = (uint8_t *)zeroed((int64_t)(g->groups * wire_group_bytes(g->wire)));
        g->to[r] = (uint8_t *)device_new(share * s->tp_size);
        g->from[r] = (uint8_t *)device_new(share * s->tp_size);
        g->sum[r] = (uint8_t *)device_new(share * s->tp_size);
    }
}

static void close_ranks(struct group_of_ranks *g)
{
    for (int r = 0; r < g->shape->tp_size; r++) {
        free(g->cpu[r]), free(g->cpu_lost[r]), free(g->cpu_coded[r]), free(g->cpu_sums[r]);
        cudaFree(g->gpu[r]), cudaFree(g->gpu_lost[r]), cudaFree(g->to[r]), cudaFree(g->from[r]), cudaFree(g->sum[r]);
    }
}

static void fill(struct group_of_ranks *g)
{
    for (int r = 0; r < g->shape->tp_size; r++) {
        for (int64_t row = 0; row < g->shape->rows; row++) {
            float *x = g->cpu[r] + row * g->shape->stride;
            fill_row(x, g->shape->cols, row, r);
            for (int64_t i = g->shape->cols; i < g->shape->stride; i++)
                x[i] = 1e30f; // must stay
        }
        memcpy(g->gpu[r], g->cpu[r], g->values * sizeof(float));
    }
}

static void reduce_on_cpu(struct group_of_ranks *g)
{
    struct reduce_piece piece[MAX_RANKS] = {};
    for (int r = 0; r < g->shape->tp_size; r++) {
        struct reduce_piece *p = &piece[r];
        p->data = g->cpu[r], p->lost = g->feeds ? g->cpu_lost[r] : NULL;
        p->cols = (uint64_t)g->shape->cols, p->stride = (uint64_t)g->shape->stride;
        p->groups_per_row = wire_groups(p->cols), p->count = g->groups;
        p->wire = g->wire, p->rank = r, p->tp_size = g->shape->tp_size;
        p->to = g->cpu_coded[r];
        reduce_encode(p, 0, p->count);
    }
    for (int step = 0; step < 2; step++)
        for (int r = 0; r < g->shape->tp_size; r++) {
            for (int from = 0; from < g->shape->tp_size; from++)
                piece[r].from[from] = step ? g->cpu_sums[from] : g->cpu_coded[from];
            piece[r].to = g->cpu_sums[r];
            if (step)
                reduce_decode(&piece[r], 0, g->groups);
            else
                reduce_add_up(&piece[r], 0, g->groups);
        }
}

static struct share_piece piece_of(const struct group_of_ranks *g, int rank)
{
    const struct share_case *s = g->shape;
    struct share_piece piece = {};
    piece.data = g->gpu[rank], piece.lost = g->feeds ? g->gpu_lost[rank] : NULL;
    piece.rows = s->rows, piece.cols = s->cols, piece.stride = s->stride;
    piece.wire = g->wire, piece.rank = rank, piece.tp_size = s->tp_size;
    return piece;
}

static void reduce_on_device(struct group_of_ranks *g)
{
    const struct share_case *s = g->shape;
    size_t share = (size_t)share_bytes(s->rows, s->cols, s->tp_size, g->wire);
    uint32_t *began = NULL;
    assert_int_equal(cudaMallocHost((void **)&began, sizeof *began), cudaSuccess);
    for (int r = 0; r < s->tp_size; r++) {
        struct share_piece piece = piece_of(g, r);
        finish(launch_share_encode(g->to[r], &piece, began, (uint32_t)r + 7, NULL));
        assert_int_equal(*began, r + 7);
        for (int o = 0; o < s->tp_size; o++)
            if (o != r)
                memcpy(g->from[o] + share * (size_t)r, g->to[r] + share * (size_t)o, share);
    }
    for (int r = 0; r < s->tp_size; r++) {
        struct share_piece piece = piece_of(g, r);
        finish(launch_share_add_up(g->sum[r] + share * (size_t)r, g->from[r], &piece, NULL));
        for (int o = 0; o < s->tp_size; o++)
            if (o != r)
                memcpy(g->sum[o] + share * (size_t)r, g->sum[r] + share * (size_t)r, share);
    }
    for (int r = 0; r < s->tp_size; r++) {
        struct share_piece piece = piece_of(g, r);
        finish(launch_share_decode(g->sum[r], &piece, NULL));
    }
    cudaFreeHost(began);
}

// The coded bytes of a rank's groups, on the device packed by owner, empty slots zero.
static void check_coded(const struct group_of_ranks *g, const uint8_t *packed, int owner, const uint8_t *plain,
                        const char *what)
{
    const struct share_case *s = g->shape;
    uint64_t bytes = wire_group_bytes(g->wire), per_row = wire_groups((uint64_t)s->cols);
    uint64_t slots = (uint64_t)share_slots_per_row(s->cols, s->tp_size);
    static const uint8_t zeros[WIRE_MAX_GROUP_BYTES] = {};
    for (uint64_t row = 0; row < (uint64_t)s->rows; row++)
        for (uint64_t slot = 0; slot < slots; slot++) {
            uint64_t group = slot * (uint64_t)s->tp_size + (uint64_t)owner;
            const uint8_t *want = group < per_row ? plain + (row * per_row + group) * bytes : zeros;
            if (memcmp(packed + (row * slots + slot) * bytes, want, bytes) != 0)
                fail_msg("%s, %s, %s, owner %d: row %llu, group %llu is coded differently", s->name, wire_name(g->wire),
                         what, owner, (unsigned long long)row, (unsigned long long)group);
        }
}

static void check(const struct group_of_ranks *g)
{
    const struct share_case *s = g->shape;
    size_t share = (size_t)share_bytes(s->rows, s->cols, s->tp_size, g->wire);
    for (int r = 0; r < s->tp_size; r++) {
        for (int o = 0; o < s->tp_size; o++) {
            if (o != r)
                check_coded(g, g->to[r] + share * (size_t)o, o, g->cpu_coded[r], "parts");
            check_coded(g, g->sum[r] + share * (size_t)o, o, g->cpu_sums[o], "sums");
        }
        for (uint64_t i = 0; i < g->values; i++)
            if (f32_bits(g->gpu[r][i]) != f32_bits(g->cpu[r][i]))
                fail_msg("%s, %s, rank %d: value %llu is %.9g (%08x), not %.9g (%08x)", s->name, wire_name(g->wire), r,
                         (unsigned long long)i, (double)g->gpu[r][i], f32_bits(g->gpu[r][i]), (double)g->cpu[r][i],
                         f32_bits(g->cpu[r][i]));
        assert_memory_equal(g->gpu_lost[r], g->cpu_lost[r], g->lost_values * 2);
        for (int64_t row = 0; r > 0 && row < s->rows; row++)
            assert_memory_equal(g->gpu[r] + row * s->stride, g->gpu[0] + row * s->stride, (size_t)s->cols * 4);
    }
}

static void run(const struct share_case *shape, enum wire wire, bool feeds)
{
    struct group_of_ranks g = {};
    g.shape = shape, g.wire = wire, g.feeds = feeds;
    open_ranks(&g);
    for (int message = 0; message < (feeds ? MESSAGES : 1); message++) {
        fill(&g);
        reduce_on_cpu(&g);
        reduce_on_device(&g);
        check(&g);
    }
    close_ranks(&g);
}

static void test_same_bits(void **state)
{
    (void)state;
    for (const struct share_case &shape : cases)
        for (int wire = 0; wire < WIRE_COUNT; wire++)
            run(&shape, (enum wire)wire, false);
}

static void test_same_bits_with_error_feedback(void **state)
{
    (void)state;
    for (const struct share_case &shape : cases)
        for (int wire = 0; wire < WIRE_COUNT; wire++)
            run(&shape, (enum wire)wire, true);
}

// Rows of all kinds, and groups that decide between codes of a scale.
static void test_many_rows(void **state)
{
    (void)state;
    static const struct share_case many = {"many rows", 2, 64, 256, 256};
    for (int wire = 0; wire < WIRE_COUNT; wire++)
        run(&many, (enum wire)wire, true);
}

// ---- rows that have owners -------------------------------------------------------------------------------------------

// From the definition: the own part as it is, the others' coded, in rank order; then the sum coded for all.
static void reference_group(const struct group_of_ranks *g, int owner, int64_t row, int64_t col, float *sum, float *all)
{
    const struct share_case *s = g->shape;
    uint8_t bytes[WIRE_MAX_GROUP_BYTES];
    int count = s->cols - col < WIRE_GROUP ? (int)(s->cols - col) : WIRE_GROUP;
    for (int i = 0; i < WIRE_GROUP; i++)
        sum[i] = 0;
    for (int r = 0; r < s->tp_size; r++) {
        enum wire wire = r == owner ? WIRE_F32 : g->wire;
        wire_encode_group(bytes, g->cpu[r] + row * s->stride + col, count, wire);
        wire_add_group(sum, bytes, count, wire);
    }
    wire_encode_group(bytes, sum, count, g->wire);
    wire_decode_group(all, bytes, count, g->wire);
}

static struct share_piece rows_of(const struct group_of_ranks *g, int rank, int first_owner)
{
    struct share_piece piece = piece_of(g, rank);
    piece.by_rows = true;
    piece.first_owner = first_owner;
    return piece;
}

static void check_rows(const struct group_of_ranks *g, int first_owner, bool gathered)
{
    const struct share_case *s = g->shape;
    for (int r = 0; r < s->tp_size; r++)
        for (int64_t row = 0; row < s->rows; row++)
            for (int64_t col = 0; col < s->stride; col += WIRE_GROUP) {
                int owner = (int)((first_owner + row) % s->tp_size);
                float sum[WIRE_GROUP], all[WIRE_GROUP], *want = gathered ? all : owner == r ? sum : NULL;
                int64_t at = row * s->stride + col, left = s->stride - col;
                int64_t count = left < WIRE_GROUP ? left : (int64_t)WIRE_GROUP;
                if (col < s->cols)
                    reference_group(g, owner, row, col, sum, all);
                for (int64_t i = 0; i < count; i++) {
                    float x = want && col + i < s->cols ? want[i] : g->cpu[r][at + i]; // what is nobody's stays
                    if (f32_bits(g->gpu[r][at + i]) != f32_bits(x))
                        fail_msg("%s, %s, rank %d, %s: row %lld differs from column %lld on", s->name,
                                 wire_name(g->wire), r, gathered ? "gathered" : "sums", (long long)row,
                                 (long long)(col + i));
                }
            }
}

static void run_rows(const struct share_case *shape, enum wire wire, int first_owner)
{
    struct group_of_ranks g = {};
    g.shape = shape, g.wire = wire;
    open_ranks(&g);
    fill(&g);
    int64_t lines = (shape->rows + shape->tp_size - 1) / shape->tp_size;
    size_t share = (size_t)share_rows_bytes(shape->rows, shape->cols, shape->tp_size, wire);
    assert_int_equal(share, (uint64_t)lines * wire_groups((uint64_t)shape->cols) * wire_group_bytes(wire));
    for (int r = 0; r < shape->tp_size; r++) { // shares of rows are larger where there are few
        cudaFree(g.to[r]), cudaFree(g.from[r]), cudaFree(g.sum[r]);
        g.to[r] = (uint8_t *)device_new((int64_t)share * shape->tp_size);
        g.from[r] = (uint8_t *)device_new((int64_t)share * shape->tp_size);
        g.sum[r] = (uint8_t *)device_new((int64_t)share * shape->tp_size);
    }
    for (int r = 0; r < shape->tp_size; r++) {
        struct share_piece piece = rows_of(&g, r, first_owner);
        finish(launch_share_encode(g.to[r], &piece, NULL, 0, NULL));
        for (int o = 0; o < shape->tp_size; o++)
            if (o != r)
                memcpy(g.from[o] + share * (size_t)r, g.to[r] + share * (size_t)o, share);
    }
    for (int r = 0; r < shape->tp_size; r++) {
        struct share_piece piece = rows_of(&g, r, first_owner);
        finish(launch_share_add_up(NULL, g.from[r], &piece, NULL));
    }
    check_rows(&g, first_owner, false);
    for (int r = 0; r < shape->tp_size; r++) {
        struct share_piece piece = rows_of(&g, r, first_owner);
        finish(launch_share_encode_own(g.sum[r] + share * (size_t)r, &piece, NULL, 0, NULL));
        for (int o = 0; o < shape->tp_size; o++)
            if (o != r)
                memcpy(g.sum[o] + share * (size_t)r, g.sum[r] + share * (size_t)r, share);
    }
    for (int r = 0; r < shape->tp_size; r++) {
        struct share_piece piece = rows_of(&g, r, first_owner);
        finish(launch_share_decode(g.sum[r], &piece, NULL));
    }
    check_rows(&g, first_owner, true);
    close_ranks(&g);
}

static void test_owned_rows(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int wire = 0; wire < WIRE_COUNT; wire++)
            run_rows(&cases[i], (enum wire)wire, (int)(i % (size_t)cases[i].tp_size));
}

static void test_unknown_codec(void **state)
{
    (void)state;
    struct share_piece piece = {};
    piece.rows = 1, piece.cols = piece.stride = 128, piece.tp_size = 2, piece.wire = WIRE_COUNT;
    assert_int_equal(launch_share_decode(NULL, &piece, NULL), cudaErrorInvalidValue);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_same_bits),     cmocka_unit_test(test_same_bits_with_error_feedback),
        cmocka_unit_test(test_many_rows),     cmocka_unit_test(test_owned_rows),
        cmocka_unit_test(test_unknown_codec),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
