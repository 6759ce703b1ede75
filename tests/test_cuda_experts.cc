// The device's operations of a mixture of experts: the router's choice against plain code in double, the list of slots, and the products
// of listed slots for every kind of weight against sums in f64; a slot gives the same bits in tiles of any size (law 9).
#include "tests/device/cuda_test.h"

// ---- the router --------------------------------------------------------------------------------------------------------

struct router_case {
    struct device_router router;
    bool biases;
};
// kind, experts, per token, groups, per token, members, shared gate, normalise, scale; then expert_begin and local experts
static const struct router_case router_cases[] = {
    {{ROUTER_SOFTMAX, 8, 2, 1, 1, 1, false, true, 1, NULL, NULL, 0, 8}, false},
    {{ROUTER_SOFTMAX, 60, 4, 1, 1, 1, true, false, 1, NULL, NULL, 20, 15}, false},
    {{ROUTER_SOFTMAX, 160, 6, 8, 3, 1, false, false, 16, NULL, NULL, 0, 160}, false},
    {{ROUTER_CHOSEN_SOFTMAX, 128, 4, 1, 1, 1, false, false, 1, NULL, NULL, 64, 64}, true},
    {{ROUTER_SIGMOID, 256, 8, 8, 4, 2, false, true, 2.5f, NULL, NULL, 32, 32}, true},
    {{ROUTER_SIGMOID, 3, 3, 1, 1, 1, true, true, 1, NULL, NULL, 0, 3}, false},
};
enum { MOST_EXPERTS = 256 };

static int best_of(const double *x, const bool *taken, int64_t count)
{
    int best = -1;
    for (int64_t i = 0; i < count; i++)
        if (!taken[i] && (best < 0 || x[i] > x[best]))
            best = (int)i;
    return best;
}

static void reference_route(const struct device_router *r, const float *logits, const float *bias,
                            const float *choice_bias, int *chosen, double *weight)
{
    double score[MOST_EXPERTS], choice[MOST_EXPERTS], sum = 0, largest = -INFINITY, rating[MOST_EXPERTS];
    bool taken[MOST_EXPERTS] = {}, kept[MOST_EXPERTS] = {};
    int64_t size = r->num_experts / r->num_groups;
    for (int64_t i = 0; i < r->num_experts; i++) {
        score[i] = (double)logits[i] + (bias ? (double)bias[i] : 0);
        largest = fmax(largest, score[i]);
    }
    for (int64_t i = 0; i < r->num_experts; i++)
        sum += exp(score[i] - largest);
    for (int64_t i = 0; i < r->num_experts; i++) {
        score[i] = r->kind == ROUTER_SOFTMAX   ? exp(score[i] - largest) / sum
                   : r->kind == ROUTER_SIGMOID ? 1 / (1 + exp(-score[i]))
                                               : score[i];
        choice[i] = score[i] + (choice_bias ? (double)choice_bias[i] : 0);
    }
    for (int64_t g = 0; g < r->num_groups; g++) {
        bool seen[MOST_EXPERTS] = {};
        rating[g] = 0;
        for (int64_t i = 0; i < r->group_members; i++) {
            int best = best_of(choice + g * size, seen, size);
            seen[best] = true;
            rating[g] += choice[g * size + best];
        }
    }
    for (int64_t i = 0; i < r->groups_per_token; i++)
        kept[best_of(rating, kept, r->num_groups)] = true;
    for (int64_t i = 0; i < r->num_experts; i++)
        taken[i] = !kept[i / size];
    sum = 0;
    for (int64_t i = 0; i < r->experts_per_token; i++) {
        chosen[i] = best_of(choice, taken, r->num_experts);
        taken[chosen[i]] = true;
        weight[i] = r->kind == ROUTER_CHOSEN_SOFTMAX ? exp(score[chosen[i]] - largest) : score[chosen[i]];
        sum += weight[i];
    }
    for (int64_t i = 0; i < r->experts_per_token; i++)
        weight[i] *= (r->normalise || r->kind == ROUTER_CHOSEN_SOFTMAX ? 1 / sum : 1) * (double)r->scale;
}

static void routers_choose(void **state)
{
    (void)state;
    enum { ROWS = 20 };
    for (const struct router_case &c : router_cases) {
        struct device_router r = c.router;
        int64_t experts = r.num_experts, width = experts + r.shared_gate, k = r.experts_per_token;
        float *logits = floats(ROWS * width), *bias = floats(experts), *choice_bias = floats(experts);
        // Logits far enough apart that rounding does not decide.
        for (int64_t row = 0; row < ROWS; row++)
            for (int64_t i = 0; i < width; i++)
                logits[row * width + i] =
                    (float)((i * 37 + row * 11) % width) * 4 / (float)width - 2 + 1e-4f * centred();
        if (experts == 8) // equal ones: the first wins
            logits[1] = logits[3] = logits[6] = 5;
        for (int64_t i = 0; i < experts; i++) {
            bias[i] = c.biases ? (float)(i % 5) * 0.013f : 0;
            choice_bias[i] = c.biases && r.kind == ROUTER_SIGMOID ? (float)(i % 7) * 0.03f : 0;
        }
        float *device_logits = device_copy(logits, ROWS * width), *factor = device_array<float>(ROWS);
        float *device_bias = device_copy(bias, experts), *device_choice = device_copy(choice_bias, experts);
        r.bias = c.biases ? device_bias : NULL;
        r.choice_bias = c.biases ? device_choice : NULL;
        int32_t *chosen = device_array<int32_t>(ROWS * k);
        float *weight = device_array<float>(ROWS * k);
        finish(launch_route(chosen, weight, factor, device_logits, r, ROWS, 0));
        for (int64_t row = 0; row < ROWS; row++) {
            int want[32];
            double want_weight[32];
            reference_route(&r, logits + row * width, c.biases ? bias : NULL, c.biases ? choice_bias : NULL, want,
                            want_weight);
            for (int64_t i = 0; i < k; i++) {
                int64_t local = want[i] - r.expert_begin;
                int32_t due = local >= 0 && local < r.num_experts_local ? (int32_t)local : -1;
                if (chosen[row * k + i] != due ||
                    !(fabs((double)weight[row * k + i] - want_weight[i]) <= 1e-5 * r.scale))
                    fail_msg("%lld experts, row %lld, choice %lld: %d of weight %.9g, not %d of %.9g",
                             (long long)experts, (long long)row, (long long)i, chosen[row * k + i],
                             (double)weight[row * k + i], due, want_weight[i]);
            }
            double gate = r.shared_gate ? 1 / (1 + exp(-(double)logits[row * width + experts])) : 0;
            assert_true(!r.shared_gate || fabs((double)factor[row] - gate) <= 1e-6);
        }
        void *const devices[] = {device_logits, factor, device_bias, device_choice, chosen, weight};
        for (void *memory : devices)
            cudaFree(memory);
        free(logits);
        free(bias);
        free(choice_bias);
    }
}

// NaN somewhere still gives experts that exist, each once.
static void broken_logits(void **state)
{
    (void)state;
    struct device_router r = router_cases[4].router;
    float *logits = device_array<float>(r.num_experts), *weight = device_array<float>(r.experts_per_token);
    int32_t *chosen = device_array<int32_t>(r.experts_per_token);
    r.expert_begin = 0;
    r.num_experts_local = r.num_experts;
    for (int64_t i = 0; i < r.num_experts; i++)
        logits[i] = i % 3 ? NAN : centred();
    finish(launch_route(chosen, weight, NULL, logits, r, 1, 0));
    for (int64_t i = 0; i < r.experts_per_token; i++)
        for (int64_t j = 0; j <= i; j++)
            assert_true(chosen[i] >= 0 && chosen[i] < r.num_experts && (i == j || chosen[i] != chosen[j]));
    cudaFree(logits);
    cudaFree(weight);
    cudaFree(chosen);
}

// ---- the list ----------------------------------------------------------------------------------------------------------

static struct device_slots new_slots(int64_t count, int64_t experts, int64_t tile_tokens)
{
    struct device_slots slots = {};
    slots.tile_tokens = tile_tokens;
    slots.num_tiles = expert_tiles(count, experts, tile_tokens);
    slots.slot = device_array<int32_t>(count);
    slots.tiles = device_array<struct expert_tile>(slots.num_tiles);
    return slots;
}

static void free_slots(struct device_slots slots)
{
    cudaFree(slots.slot);
    cudaFree(slots.tiles);
}

static void slots_are_listed(void **state)
{
    (void)state;
    static const struct {
        int64_t count, experts, tile_tokens;
    } cases[] = {{1, 1, 8}, {8, 5, 8}, {700, 7, 32}, {1000, 300, 8}, {600, 2, 8}, {3, 1000, 32}};
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        int64_t count = cases[c].count, experts = cases[c].experts;
        int32_t *chosen = device_array<int32_t>(count);
        for (int64_t i = 0; i < count; i++)
            chosen[i] = (int32_t)(random_bits() % (uint64_t)(experts + 1)) - 1;
        struct device_slots slots = new_slots(count, experts, cases[c].tile_tokens);
        emulator_seed(c);
        finish(launch_list_slots(slots, chosen, count, experts, 0));
        int64_t tile = 0, at = 0;
        for (int32_t e = 0; e < experts; e++) {
            int64_t first = at;
            for (int64_t i = 0; i < count; i++)
                if (chosen[i] == e)
                    assert_int_equal(slots.slot[at++], i);
            for (; first < at; first += slots.tile_tokens, tile++) {
                int64_t left = at - first;
                assert_int_equal(slots.tiles[tile].expert, e);
                assert_int_equal(slots.tiles[tile].first, first);
                assert_int_equal(slots.tiles[tile].count, left < slots.tile_tokens ? left : slots.tile_tokens);
            }
        }
        for (; tile < slots.num_tiles; tile++)
            assert_int_equal(slots.tiles[tile].count, 0);
        free_slots(slots);
        cudaFree(chosen);
    }
}

// ---- products ----------------------------------------------------------------------------------------------------------

static const struct kind_case kinds[] = {
    {WEIGHT_BF16, 0},   {WEIGHT_INT8, 0},   {WEIGHT_FP8, 0},    {WEIGHT_INT4, 32},  {WEIGHT_INT4, 128},
    {WEIGHT_INT4Z, 64}, {WEIGHT_FP8G, 128}, {WEIGHT_MXFP4, 32}, {WEIGHT_NVFP4, 16}, {WEIGHT_NL4, 64},
};

static void fill(float *x, uint64_t row, uint64_t cols)
{
    (void)row;
    for (uint64_t c = 0; c < cols; c++)
        x[c] = centred() * (c / 32 % 3 + 1);
}

static void check_products(struct kind_case kind, int64_t rows, int64_t cols, int64_t slots_per_row)
{
    enum { EXPERTS = 3, SLOTS = 60 };
    struct matrix w[EXPERTS];
    struct device_expert table[EXPERTS] = {};
    for (int e = 0; e < EXPERTS; e++) {
        w[e] = make_matrix(kind, (uint64_t)rows, (uint64_t)cols, fill);
        table[e].down = {w[e].data, w[e].scale, NULL};
    }
    struct device_expert *device_table = device_copy(table, EXPERTS);
    int32_t chosen[SLOTS];
    for (int i = 0; i < SLOTS; i++)
        chosen[i] = i % 7 == 3 ? -1 : i % 5 == 0 ? 2 : 0; // none for expert 1
    int32_t *device_chosen = device_copy(chosen, SLOTS);
    int64_t tokens = SLOTS / slots_per_row;
    float *x = floats(tokens * cols);
    for (int64_t i = 0; i < tokens * cols; i++)
        x[i] = centred();
    float *device_x = device_copy(x, tokens * cols), *y[2];
    enum input_format format = weight_is_tiled(kind.kind) ? INPUT_F16_TILE
                               : kind.kind == WEIGHT_BF16 ? INPUT_BF16
                                                          : INPUT_F16;
    struct device_input in;
    in.stride = round_up_to(cols, 128);
    in.values = device_new(tokens * in.stride * 2);
    in.scale = device_array<float>(tokens);
    finish(launch_prepare(in, format, device_x, cols, NULL, tokens, cols, 0));
    for (int many = 0; many < 2; many++) {
        struct device_slots slots = new_slots(SLOTS, EXPERTS, many ? EXPERT_TILE_MANY : EXPERT_TILE_FEW);
        y[many] = device_array<float>(SLOTS * rows);
        for (int64_t i = 0; i < SLOTS * rows; i++)
            y[many][i] = 12345;
        emulator_seed((uint64_t)many + 3);
        finish(launch_list_slots(slots, device_chosen, SLOTS, EXPERTS, 0));
        finish(launch_linear_experts(y[many], &w[0].shape, in, (int)slots_per_row, &device_table->down, 2, slots, 0));
        free_slots(slots);
    }
    float *weights = floats(cols);
    for (int i = 0; i < SLOTS; i++)
        for (int64_t r = 0; r < rows; r++) {
            float got = y[0][i * rows + r];
            assert_true(same(got, y[1][i * rows + r]));
            if (chosen[i] < 0) {
                assert_true(got == 12345);
                continue;
            }
            double want = 0, magnitude = 0;
            scalar()->dequantize_row(weights, &w[chosen[i]], r);
            for (int64_t c = 0; c < cols; c++) {
                float value = x[i / slots_per_row * cols + c];
                value = kind.kind == WEIGHT_BF16 ? bf16_to_f32(f32_to_bf16(value)) : f16_to_f32(f32_to_f16(value));
                want += (double)weights[c] * (double)value;
                magnitude += fabs((double)weights[c] * (double)value);
            }
            // Sums of products, see test_cuda_linear.cc; q - zero is rounded to f16.
            double tolerance = (double)(40 + cols / 128) * 0x1p-23 + (kind.kind == WEIGHT_INT4Z ? 0x1p-11 : 0);
            if (!(fabs((double)got - want) <= tolerance * magnitude))
                fail_msg("%s, %lld columns, slot %d, row %lld: %.9g, not %.9g", weight_kind_name(kind.kind),
                         (long long)cols, i, (long long)r, (double)got, want);
        }
    for (int e = 0; e < EXPERTS; e++)
        free_matrix(&w[e]);
    free_input(in);
    void *const devices[] = {device_table, device_chosen, device_x, y[0], y[1]};
    for (void *memory : devices)
        cudaFree(memory);
    free(x);
    free(weights);
}

static void listed_products(void **state)
{
    (void)state;
    for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k += quick() ? 4 : 1) {
        check_products(kinds[k], 40, 300, k % 2 ? 4 : 1);
        if (!quick())
            check_products(kinds[k], 70, 1100, 3);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(routers_choose),
        cmocka_unit_test(broken_logits),
        cmocka_unit_test(slots_are_listed),
        cmocka_unit_test(listed_products),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
