// See bits.h.
#include "shard/bits.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// From few bits to many. The four-bit kinds of other bases (mxfp4, nvfp4) err more at the same size.
const struct plan_kind bits_candidates[BITS_CANDIDATES] = {
    {WEIGHT_INT4, 128, false},  {WEIGHT_NL4, 128, false}, {WEIGHT_INT4, 64, false}, {WEIGHT_NL4, 64, false},
    {WEIGHT_INT4Z, 128, false}, {WEIGHT_INT4, 32, false}, {WEIGHT_NL4, 32, false},  {WEIGHT_INT4Z, 64, false},
    {WEIGHT_INT4Z, 32, false},  {WEIGHT_FP8, 0, false},   {WEIGHT_INT8, 0, false},  {WEIGHT_BF16, 0, false},
};

// Relative errors of normally distributed weights (tests/test_bits.c compares them with measured ones).
static const double normal_errors[BITS_CANDIDATES] = {0.0966, 0.0866, 0.0898, 0.0810, 0.0910, 0.0809,
                                                      0.0737, 0.0815, 0.0701, 0.0265, 0.0087, 0.0};

// ---- units -------------------------------------------------------------------------------------------------------

static int compare_units(const void *a, const void *b)
{
    const struct bits_unit *x = a, *y = b;
    if (x->layer != y->layer)
        return x->layer < y->layer ? -1 : 1;
    return (x->role > y->role) - (x->role < y->role);
}

struct bits_unit *bits_find(const struct bits *bits, int32_t layer, enum tensor_role role)
{
    const struct bits_unit wanted = {.layer = layer, .role = role};
    return bits->num_units ? bsearch(&wanted, bits->units, bits->num_units, sizeof wanted, compare_units) : NULL;
}

// What a relative error of the matrix does to the model's output, relative to that of gate_up: as scripts/measure_sensitivity.py found it on the
// bundled model, rounded. An error of the first layer passes through all others.
static double default_sensitivity(const struct bits_unit *unit)
{
    double first = unit->layer == 0 ? 4 : 1;
    switch (unit->role) {
    case ROLE_QKV:
    case ROLE_KV_A:
        return 1.7 * first;
    case ROLE_O:
    case ROLE_DOWN:
    case ROLE_EXPERT_DOWN:
    case ROLE_SHARED_DOWN:
        return 0.6 * first;
    default:
        return first;
    }
}

static uint64_t whole_rows(const struct shard_tensor *tensor)
{
    uint64_t rows = 0;
    for (int p = 0; p < tensor->num_parts; p++)
        rows += tensor->parts[p].source_rows;
    return rows;
}

uint64_t bits_unit_bytes(const struct bits_unit *unit, enum weight_kind kind, uint32_t group_size)
{
    struct weight_shape shape;
    if (!weight_shape_make(&shape, kind, group_size, unit->rows, unit->cols))
        return 0;
    return unit->matrices * (shape.data_bytes + shape.scale_bytes);
}

// Experts of a layer are all alike.
static void add_matrix(struct bits_unit *unit, const struct shard_tensor *tensor)
{
    unit->rows = whole_rows(tensor);
    unit->cols = tensor->parts[0].source_cols;
    unit->matrices++;
}

int bits_init(struct bits *out, const struct plan *plan, struct error *err)
{
    struct bits bits = {.units = calloc(plan->tensor_count + 1, sizeof *bits.units)};
    const struct shard_tensor *tensors = plan->ranks[0].tensors;
    if (!bits.units)
        return error_set(err, ERR_MEMORY, "out of memory for a list of matrices");
    for (uint64_t i = 0; i < plan->tensor_count; i++)
        if (tensor_role_is_linear(tensors[i].role) && tensors[i].expert <= 0) {
            struct bits_unit *unit = &bits.units[bits.num_units++];
            *unit = (struct bits_unit){.layer = tensors[i].layer, .role = tensors[i].role};
            unit->sensitivity = default_sensitivity(unit);
            for (int c = 0; c < BITS_CANDIDATES; c++)
                unit->error[c] = normal_errors[c] * normal_errors[c];
        }
    qsort(bits.units, bits.num_units, sizeof *bits.units, compare_units);
    for (uint64_t i = 0; i < plan->tensor_count; i++)
        if (tensor_role_is_linear(tensors[i].role))
            add_matrix(bits_find(&bits, tensors[i].layer, tensors[i].role), &tensors[i]);
    for (size_t u = 0; u < bits.num_units; u++) {
        struct bits_unit *unit = &bits.units[u];
        bits.weights += unit->matrices * unit->rows * unit->cols;
        for (int c = 0; c < BITS_CANDIDATES; c++)
            unit->bytes[c] = bits_unit_bytes(unit, bits_candidates[c].kind, bits_candidates[c].group_size);
    }
    *out = bits;
    return 0;
}

void bits_clear(struct bits *bits)
{
    free(bits->units);
    *bits = (struct bits){0};
}

int bits_among(struct bits *bits, const char *list, struct error *err)
{
    for (int c = 0; c < BITS_CANDIDATES; c++)
        bits->left_out[c] = true;
    for (const char *word = list ? list : "int4,int4z,fp8,int8,bf16";;) {
        size_t length = strcspn(word, ",");
        bool known = false;
        for (int c = 0; c < BITS_CANDIDATES; c++) {
            const char *name = weight_kind_name(bits_candidates[c].kind);
            if (strlen(name) != length || strncmp(name, word, length) != 0)
                continue;
            bits->left_out[c] = false;
            known = true;
        }
        if (!known)
            return error_set(
                err, ERR_USAGE,
                "--among %.64s: \"%.*s\" is none of int4, nl4, int4z, fp8, int8 and bf16, separated by commas", list,
                (int)(length < 32 ? length : 32), word);
        if (word[length] == 0)
            return 0;
        word += length + 1;
    }
}

// ---- the choice --------------------------------------------------------------------------------------------------

enum { TABLE_CELLS = 1 << 25, MAX_STEPS = 1 << 17 };

// The bytes of the smallest candidate.
static uint64_t smallest(const struct bits *bits, const struct bits_unit *unit)
{
    uint64_t least = UINT64_MAX;
    for (int c = 0; c < BITS_CANDIDATES; c++)
        if (!bits->left_out[c] && unit->bytes[c] < least)
            least = unit->bytes[c];
    return least;
}

static uint64_t gcd(uint64_t a, uint64_t b)
{
    while (b) {
        uint64_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

// A budget above the smallest sizes, in steps of so many bytes that a table over all of it is small.
struct room {
    uint64_t step_bytes;
    uint32_t steps;
};

static struct room room_of(const struct bits *bits, uint64_t spare_bytes)
{
    uint64_t step = 0, limit = TABLE_CELLS / (bits->num_units + 1);
    for (size_t u = 0; u < bits->num_units; u++) {
        const struct bits_unit *unit = &bits->units[u];
        for (int c = 0; c < BITS_CANDIDATES; c++)
            if (!bits->left_out[c])
                step = gcd(step, unit->bytes[c] - smallest(bits, unit));
    }
    if (limit > MAX_STEPS)
        limit = MAX_STEPS;
    if (step == 0 || spare_bytes / step > limit)
        step = spare_bytes / limit + 1; // sizes are rounded up to it
    return (struct room){step, (uint32_t)(spare_bytes / step)};
}

// The multiple-choice knapsack, unit by unit: least[s] is the least that can be lost with the units so far in s steps. Of what is equal the
// smaller kind wins, so that the result does not depend on how a compiler orders anything.
static void choose_in(struct bits *bits, struct room room, double *least, double *next, uint8_t *chosen)
{
    uint64_t width = (uint64_t)room.steps + 1;
    for (uint64_t s = 0; s < width; s++)
        least[s] = 0;
    for (size_t u = 0; u < bits->num_units; u++) {
        const struct bits_unit *unit = &bits->units[u];
        uint64_t least_bytes = smallest(bits, unit);
        for (uint64_t s = 0; s < width; s++)
            next[s] = INFINITY;
        for (int c = 0; c < BITS_CANDIDATES; c++) {
            if (bits->left_out[c])
                continue;
            uint64_t more = unit->bytes[c] - least_bytes;
            uint64_t cost = (more + room.step_bytes - 1) / room.step_bytes;
            double lost = unit->sensitivity * unit->error[c];
            for (uint64_t s = cost; s < width; s++)
                if (least[s - cost] + lost < next[s]) {
                    next[s] = least[s - cost] + lost;
                    chosen[u * width + s] = (uint8_t)c;
                }
        }
        double *swap = least;
        least = next;
        next = swap;
    }
    uint64_t left = room.steps;
    for (size_t u = bits->num_units; u-- > 0;) {
        struct bits_unit *unit = &bits->units[u];
        unit->chosen = chosen[u * width + left];
        uint64_t more = unit->bytes[unit->chosen] - smallest(bits, unit);
        left -= (more + room.step_bytes - 1) / room.step_bytes;
    }
}

// Spends what the rounding of sizes has left: the change that gains most for its bytes, again and again.
static void spend_rest(struct bits *bits, uint64_t budget_bytes)
{
    for (size_t u = 0; u < bits->num_units; u++)
        budget_bytes -= bits->units[u].bytes[bits->units[u].chosen];
    for (;;) {
        struct bits_unit *best = NULL;
        int best_kind = 0;
        double best_gain = 0;
        for (size_t u = 0; u < bits->num_units; u++) {
            struct bits_unit *unit = &bits->units[u];
            for (int c = 0; c < BITS_CANDIDATES; c++) {
                uint64_t now = unit->bytes[unit->chosen];
                double less = unit->sensitivity * (unit->error[unit->chosen] - unit->error[c]);
                if (bits->left_out[c] || (unit->bytes[c] > now && unit->bytes[c] - now > budget_bytes))
                    continue;
                double gain = unit->bytes[c] > now ? less / (double)(unit->bytes[c] - now) : less > 0 ? INFINITY : 0;
                if (gain > best_gain) {
                    best = unit;
                    best_kind = c;
                    best_gain = gain;
                }
            }
        }
        if (!best)
            return;
        budget_bytes += best->bytes[best->chosen];
        budget_bytes -= best->bytes[best_kind];
        best->chosen = best_kind;
    }
}

int bits_choose(struct bits *bits, uint32_t millibits, struct error *err)
{
    uint64_t least_bytes = 0;
    for (size_t u = 0; u < bits->num_units; u++)
        least_bytes += smallest(bits, &bits->units[u]);
    uint64_t budget_bytes = bits->weights * millibits / 8000; // far from 2^64 for 10^12 weights
    if (budget_bytes < least_bytes)
        return error_set(err, ERR_USAGE,
                         "--bits %.3f: this model's matrices take at least %.3f bits per weight, scales and padding "
                         "included",
                         millibits / 1000.0, ceil(8000.0 * (double)least_bytes / (double)bits->weights) / 1000);
    struct room room = room_of(bits, budget_bytes - least_bytes);
    uint64_t width = (uint64_t)room.steps + 1;
    double *rows = malloc(2 * width * sizeof *rows);
    uint8_t *chosen = malloc(width * (bits->num_units + 1));
    int rc = rows && chosen ? 0 : error_set(err, ERR_MEMORY, "out of memory to choose kinds of matrices");
    if (!rc) {
        choose_in(bits, room, rows, rows + width, chosen);
        spend_rest(bits, budget_bytes);
    }
    free(rows);
    free(chosen);
    return rc;
}

// ---- results -----------------------------------------------------------------------------------------------------

double bits_lost(const struct bits *bits)
{
    double lost = 0;
    for (size_t u = 0; u < bits->num_units; u++)
        lost += bits->units[u].sensitivity * bits->units[u].error[bits->units[u].chosen];
    return lost;
}

int bits_matrices(struct matrix_kind **out, const struct bits *bits, struct error *err)
{
    struct matrix_kind *list = calloc(bits->num_units + 1, sizeof *list);
    if (!list)
        return error_set(err, ERR_MEMORY, "out of memory for a list of matrices");
    for (size_t u = 0; u < bits->num_units; u++) {
        const struct bits_unit *unit = &bits->units[u];
        const struct plan_kind *kind = &bits_candidates[unit->chosen];
        list[u] = (struct matrix_kind){unit->layer, unit->role, kind->kind, kind->group_size};
    }
    *out = list;
    return 0;
}
