// The decoder's operations beside matrix products against an independent implementation (tests/golden/decoder, made by
// scripts/make_goldens_decoder.py in float64), through every kernel table; the choice of experts through the CPU backend.
#include "formats/number_formats.h"
#include "kernels/attention.h"
#include "kernels/backend.h"

#include <jansson.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static json_t *cases_of(const char *name)
{
    char path[64];
    json_error_t problem;
    snprintf(path, sizeof path, "tests/golden/decoder/%s.json", name);
    json_t *cases = json_load_file(path, 0, &problem);
    if (!cases)
        fail_msg("%s: line %d: %s", path, problem.line, problem.text);
    assert_true(json_is_array(cases) && json_array_size(cases) > 0);
    return cases;
}

static double number(const json_t *object, const char *key)
{
    const json_t *value = json_object_get(object, key);
    if (!json_is_number(value) && !json_is_boolean(value))
        fail_msg("%s is no number", key);
    return json_is_boolean(value) ? json_is_true(value) : json_number_value(value);
}

static void flatten(float *out, int64_t *count, const json_t *value)
{
    if (json_is_number(value)) {
        if (out)
            out[*count] = (float)json_number_value(value);
        ++*count;
    }
    for (size_t i = 0; i < json_array_size(value); i++)
        flatten(out, count, json_array_get(value, i));
}

// All numbers of an array of whatever depth, NULL where the member is null. The caller frees them.
static float *floats(const json_t *object, const char *key, int64_t *count)
{
    int64_t wanted = 0, filled = 0;
    const json_t *value = json_object_get(object, key);
    assert_non_null(value);
    if (json_is_null(value))
        return NULL;
    flatten(NULL, &wanted, value);
    float *out = calloc((size_t)wanted, sizeof *out);
    assert_non_null(out);
    flatten(out, &filled, value);
    if (count)
        *count = wanted;
    return out;
}

static void assert_near(const json_t *test, const struct kernels *k, const float *got, const float *want, int64_t count,
                        double relative, double absolute)
{
    for (int64_t i = 0; i < count; i++)
        if (!(fabs((double)got[i] - want[i]) <= absolute + relative * fabs(want[i])))
            fail_msg("%s, %s: element %lld is %.9g, not %.9g", json_string_value(json_object_get(test, "name")),
                     k->name, (long long)i, (double)got[i], (double)want[i]);
}

static void check_attention(const struct kernels *k, const json_t *test)
{
    int64_t q_count, kv_count, out_count;
    float *q = floats(test, "q", &q_count), *keys = floats(test, "keys", &kv_count),
          *values = floats(test, "values", NULL), *want = floats(test, "expected", &out_count),
          *sinks = floats(test, "sinks", NULL);
    int64_t heads = (int64_t)json_array_size(json_object_get(test, "q")), dim = q_count / heads;
    int64_t kv_heads = (int64_t)json_array_size(json_object_get(test, "keys")), positions = kv_count / kv_heads / dim;
    assert_true(positions <= KV_PAGE_TOKENS && out_count == q_count);
    static const int32_t page = 1; // not the first, so that a forgotten page table shows
    size_t bytes = (size_t)(2 * kv_heads * KV_PAGE_TOKENS * dim) * sizeof(uint16_t);
    struct kv_view kv = {.k = calloc(1, bytes),
                         .v = calloc(1, bytes),
                         .pages = &page,
                         .num_kv_heads = kv_heads,
                         .k_dim = dim,
                         .v_dim = dim,
                         .v_stride = dim};
    assert_true(kv.k && kv.v);
    for (int64_t head = 0; head < kv_heads; head++)
        for (int64_t i = 0; i < positions * dim; i++) {
            int64_t begin = (kv_heads + head) * KV_PAGE_TOKENS * dim, turned = i % dim * KV_PAGE_TOKENS + i / dim;
            ((uint16_t *)kv.k)[begin + turned] = f32_to_bf16(keys[head * positions * dim + i]);
            ((uint16_t *)kv.v)[begin + i] = f32_to_bf16(values[head * positions * dim + i]);
        }
    int64_t window = (int64_t)number(test, "sliding_window");
    int64_t first = window > 0 && positions > window ? positions - window : 0;
    float *room = calloc((size_t)attention_room_floats(dim, dim), sizeof *room), out[64];
    assert_non_null(room);
    for (int64_t head = 0; head < heads; head++) {
        struct attention_scores scores = {(float)number(test, "attention_scale"),
                                          (float)number(test, "attention_softcap")};
        struct attention_query query = {.q = q + head * dim, .first = first, .end = positions, .out = out};
        attention_begin(&query);
        k->attention(&query, 1, &kv, head * kv_heads / heads, 0, positions, &scores, room);
        attention_finish(&query, dim, sinks ? &sinks[head] : NULL);
        assert_near(test, k, out, want + head * dim, dim, 1e-5, 1e-5); // scores of magnitude 10 err by 1e-6
    }
    free(q);
    free(keys);
    free(values);
    free(want);
    free(sinks);
    free(room);
    free(kv.k);
    free(kv.v);
}

static void check_activation(const struct kernels *k, const json_t *test)
{
    static const char *const names[] = {"silu", "gelu_tanh", "gpt_oss"};
    int64_t count;
    float *gate = floats(test, "gate", &count), *up = floats(test, "up", NULL), *want = floats(test, "expected", NULL);
    enum activation activation = ACTIVATION_SILU;
    while (strcmp(names[activation], json_string_value(json_object_get(test, "name"))) != 0)
        activation++;
    k->activate(gate, gate, up, count, activation);
    // gelu of -7.5 is 0 times a large number: what is left of 1 + tanh(-33) in float32.
    assert_near(test, k, gate, want, count, 2e-6, 2e-6);
    free(gate);
    free(up);
    free(want);
}

static void check_norm(const struct kernels *k, const json_t *test)
{
    int64_t count, cols;
    float *x = floats(test, "x", &count), *weight = floats(test, "weight", &cols),
          *want = floats(test, "expected", NULL);
    for (int64_t i = 0; i < count; i += cols)
        k->rms_norm(x + i, x + i, weight, cols, (float)number(test, "norm_eps"));
    assert_near(test, k, x, want, count, 1e-6, 0);
    free(x);
    free(weight);
    free(want);
}

static void check_rope(const struct kernels *k, const json_t *test)
{
    int64_t count, half;
    float *x = floats(test, "x", &count), *inv_freq = floats(test, "inv_freq", &half),
          *want = floats(test, "expected", NULL), cosines[64], sines[64];
    assert_int_equal(2 * half, (int64_t)number(test, "rotary_dim"));
    k->rope_table(cosines, sines, inv_freq, half, (int64_t)number(test, "position"),
                  (float)number(test, "rope_attention_factor"));
    k->rope(x, cosines, sines, 2 * half, number(test, "rotary_interleaved") != 0);
    assert_near(test, k, x, want, count, 1e-5, 1e-5); // angles up to 37 are rounded to float32
    free(x);
    free(inv_freq);
    free(want);
}

static void run_cases(const char *name, void (*check)(const struct kernels *k, const json_t *test))
{
    json_t *cases = cases_of(name);
    for (int table = 0; kernels_all[table]; table++)
        for (size_t i = 0; kernels_all[table]->supported() && i < json_array_size(cases); i++)
            check(kernels_all[table], json_array_get(cases, i));
    json_decref(cases);
}

static void test_attention(void **state)
{
    (void)state;
    run_cases("attention", check_attention);
}

static void test_activation(void **state)
{
    (void)state;
    run_cases("activation", check_activation);
}

static void test_norm(void **state)
{
    (void)state;
    run_cases("norm", check_norm);
}

static void test_rope(void **state)
{
    (void)state;
    run_cases("rope", check_rope);
}

// ---- the router, through the backend -------------------------------------------------------------------------------

enum { HIDDEN = 64, MAX_EXPERTS = 32 };

static struct experts_desc experts_desc_of(const json_t *test, int64_t num_experts)
{
    static const char *const routers[] = {"softmax", "chosen_softmax", "sigmoid"};
    struct experts_desc desc = {.num_experts = num_experts,
                                .experts_per_token = (int64_t)number(test, "experts_per_token"),
                                .expert_size = 2,
                                .normalise = number(test, "normalise") != 0,
                                .scale = number(test, "scale"),
                                .num_groups = (int64_t)number(test, "num_groups"),
                                .groups_per_token = (int64_t)number(test, "groups_per_token"),
                                .group_members = (int64_t)number(test, "group_members"),
                                .bias = true};
    while (strcmp(routers[desc.router], json_string_value(json_object_get(test, "router"))) != 0)
        desc.router++;
    return desc;
}

// Experts whose matrices are zero and whose bias is one in the column of their own number: what they put out are the weights.
static void check_router(const struct kernels *k, const json_t *test)
{
    static uint16_t zeros[HIDDEN * 64];
    struct error err = {0};
    int64_t num_experts;
    float *logits = floats(test, "logits", &num_experts), *bias = floats(test, "router_bias", NULL),
          *choice_bias = floats(test, "choice_bias", NULL), *chosen = floats(test, "experts", NULL),
          *weights_wanted = floats(test, "weights", NULL), unit[MAX_EXPERTS][HIDDEN] = {0}, want[HIDDEN] = {0};
    assert_true(num_experts <= MAX_EXPERTS);

    struct model_desc desc = {.num_layers = 1,
                              .layer_flags = {LAYER_EXPERTS},
                              .hidden_size = HIDDEN,
                              .num_heads = 1,
                              .num_kv_heads = 1,
                              .head_dim = 2,
                              .rotary_dim = 2,
                              .vocab_size = 1,
                              .norm_eps = 1e-5,
                              .residual_scale = 1,
                              .experts = experts_desc_of(test, num_experts)};
    struct rank_share share = {.num_heads_local = 1,
                               .num_kv_heads_local = 1,
                               .vocab_local = 1,
                               .num_experts_local = num_experts,
                               .expert_size_local = 2};
    struct mlp experts[MAX_EXPERTS] = {0};
    for (int64_t i = 0; i < num_experts; i++) {
        assert_true(weight_shape_make(&experts[i].gate_up.shape, WEIGHT_BF16, 0, 4, HIDDEN) &&
                    weight_shape_make(&experts[i].down.shape, WEIGHT_BF16, 0, HIDDEN, 2));
        experts[i].gate_up.data = experts[i].down.data = zeros;
        unit[i][i] = 1;
        experts[i].down_bias = unit[i];
    }
    for (int64_t i = 0; i < desc.experts.experts_per_token; i++)
        want[(int64_t)chosen[i]] = weights_wanted[i];
    float inv_freq = 1;
    struct layer layer = {.flags = LAYER_EXPERTS, .router_bias = bias, .choice_bias = choice_bias, .experts = experts};
    struct weights weights = {.rope = &inv_freq, .layers = &layer};
    struct device_shape shape = {
        .desc = &desc, .share = &share, .max_rows = 3, .max_sequences = 3, .context = 64, .num_pages = 3};
    struct thread_pool *pool = NULL;
    struct device *device = NULL;
    const struct device_options options = {.kernels = k, .tp_size = 1, .device = -1};
    struct device_options with_pool = options;
    assert_int_equal(thread_pool_create(&pool, 2, &err), 0);
    with_pool.pool = pool;
    assert_int_equal(backend_cpu.open(&device, &with_pool, &err), 0);
    assert_int_equal(backend_cpu.prepare(device, &shape, &weights, &err), 0);

    // Three rows, the one in question in the middle: its neighbours choose others.
    struct token_row rows[3] = {{.sequence = 0}, {.sequence = 1}, {.sequence = 2}};
    static const int32_t pages[3] = {0, 1, 2};
    struct kv_pages kv_pages = {.pages = pages, .pages_per_sequence = 1};
    float *host;
    assert_int_equal(backend_cpu.begin(device, rows, 3, PHASE_DECODE, &kv_pages, &err), 0);
    assert_int_equal(backend_cpu.lend(device, BUFFER_ROUTER, false, &host, &err), 0);
    for (int64_t i = 0; i < num_experts; i++) {
        host[i] = (float)i;
        host[num_experts + i] = logits[i];
        host[2 * num_experts + i] = (float)-i;
    }
    assert_int_equal(backend_cpu.returned(device, BUFFER_ROUTER, &err), 0);
    assert_int_equal(backend_cpu.route(device, 0, &err), 0);
    assert_int_equal(backend_cpu.experts(device, 0, &err), 0);
    assert_int_equal(backend_cpu.lend(device, BUFFER_PARTIAL, false, &host, &err), 0);
    assert_near(test, k, host + HIDDEN, want, HIDDEN, 2e-6, 0);
    backend_cpu.close(device);
    thread_pool_free(pool);
    free(logits);
    free(bias);
    free(choice_bias);
    free(chosen);
    free(weights_wanted);
}

static void test_router(void **state)
{
    (void)state;
    run_cases("router", check_router);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_attention), cmocka_unit_test(test_activation), cmocka_unit_test(test_norm),
        cmocka_unit_test(test_rope),      cmocka_unit_test(test_router),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
