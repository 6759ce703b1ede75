// Columns of quantized checkpoints in an order of their own (act-order); unlike matrices that are stored as one.
#include "tests/import_help.h"

enum { WIDE = 64, HIGH = 16 };

// A GPTQ matrix of HIGH rows and WIDE columns in two groups of 32, column c in group index[c].
struct scattered {
    uint32_t words[WIDE / 8 * HIGH], zeros[2 * HIGH / 8];
    uint16_t scales[2 * HIGH];
    int32_t index[WIDE];
};

static void make_scattered(struct scattered *out, int seed, bool scatter)
{
    memset(out, 0, sizeof *out);
    for (int k = 0; k < WIDE; k++)
        for (int n = 0; n < HIGH; n++)
            out->words[k / 8 * HIGH + n] |= (uint32_t)((7 * k + 3 * n + seed) % 16) << 4 * (k % 8);
    for (int i = 0; i < 2 * HIGH; i++)
        out->scales[i] = (uint16_t)(0x2c00 + 100 * i + seed);
    for (int i = 0; i < 2 * HIGH / 8; i++)
        out->zeros[i] = 0x77777777;
    for (int k = 0; k < WIDE; k++)
        out->index[k] = scatter ? (k + seed) % 2 : k / 32;
}

static float scattered_value(const struct scattered *matrix, int n, int k, int seed)
{
    return (float)((7 * k + 3 * n + seed) % 16 - 8) * f16_to_f32(matrix->scales[matrix->index[k] * HIGH + n]);
}

#define GPTQ_TENSORS(m, d)                                                                                             \
    {m ".qweight", "I32", "[8,16]", (d)->words, sizeof(d)->words},                                                     \
        {m ".qzeros", "I32", "[2,2]", (d)->zeros, sizeof(d)->zeros},                                                   \
        {m ".scales", "F16", "[2,16]", (d)->scales, sizeof(d)->scales},                                                \
    {                                                                                                                  \
        m ".g_idx", "I32", "[64]", (d)->index, sizeof(d)->index                                                        \
    }

#define ACT_ORDER CONFIG("\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":32,\"sym\":true,\"desc_act\":true")

// qkv: one order for all, stored beside them.
static void test_input_order(void **state)
{
    (void)state;
    for (int same = 0; same < 2; same++) {
        struct scattered q, k;
        float values[HIGH * WIDE], order[WIDE];
        struct opened opened;
        struct error err;
        enum weight_kind kind;
        uint32_t group;
        make_scattered(&q, 0, true);
        make_scattered(&k, same ? 2 : 1, true);
        const struct tensor tensors[] = {GPTQ_TENSORS("q_proj", &q), GPTQ_TENSORS("k_proj", &k)};
        open_import(&opened, ACT_ORDER, tensors, 8);
        struct import_part parts[] = {{"q_proj.weight", HIGH, WIDE}, {"k_proj.weight", HIGH, WIDE}};
        if (import_choose(opened.import, ROLE_QKV, parts, 2, &kind, &group, &err))
            fail_msg("%s", err.msg);
        assert_int_equal(kind, WEIGHT_INT4);
        assert_int_equal(group, 32);
        assert_int_equal(import_has_order(opened.import, ROLE_QKV, "q_proj.weight"), same);
        import_order(opened.import, "q_proj.weight", order, WIDE);
        stored_values(&opened, "q_proj.weight", kind, group, HIGH, WIDE, values);
        for (int n = 0; n < HIGH; n++)
            for (int c = 0; c < WIDE; c++) {
                int source = same ? c < 32 ? 2 * c : 2 * (c - 32) + 1 : c;
                float wanted = scattered_value(&q, n, source, 0);
                assert_int_equal((int)order[c], source);
                assert_true(same ? values[n * WIDE + c] == wanted : fabsf(values[n * WIDE + c] - wanted) < 0.5f);
            }
        assert_int_equal(import_losses(opened.import, NULL, 0), !same);
        close_import(&opened);
    }
}

// down's columns are sorted, and gate's rows (and its bias) stand in the same order.
static void test_down_order(void **state)
{
    (void)state;
    static struct scattered down;
    static uint16_t gate[WIDE * HIGH];
    float values[HIGH * WIDE], rows[WIDE * HIGH];
    struct opened opened;
    struct error err;
    enum weight_kind kind;
    uint32_t group;
    make_scattered(&down, 0, true);
    for (int i = 0; i < WIDE * HIGH; i++)
        gate[i] = f32_to_bf16((float)i);
    const struct tensor tensors[] = {GPTQ_TENSORS("mlp.down_proj", &down),
                                     {"mlp.gate_proj.weight", "BF16", "[64,16]", gate, sizeof gate}};
    open_import(&opened, ACT_ORDER, tensors, 5);
    struct import_part gate_part = {"mlp.gate_proj.weight", WIDE, HIGH};
    struct import_part down_part = {"mlp.down_proj.weight", HIGH, WIDE};
    struct import_part pair[] = {gate_part, {"mlp.up_proj.weight", WIDE, HIGH}};
    assert_int_equal(import_choose(opened.import, ROLE_GATE_UP, pair, 2, &kind, &group, &err), ERR_MODEL); // no up_proj
    close_import(&opened);

    // A gate that lies the other way round has the right size, and is refused all the same.
    const struct tensor turned[] = {GPTQ_TENSORS("mlp.down_proj", &down),
                                    {"mlp.gate_proj.weight", "BF16", "[16,64]", gate, sizeof gate},
                                    {"mlp.up_proj.weight", "BF16", "[64,16]", gate, sizeof gate}};
    open_import(&opened, ACT_ORDER, turned, 6);
    assert_int_equal(import_choose(opened.import, ROLE_GATE_UP, pair, 2, &kind, &group, &err), ERR_MODEL);
    assert_non_null(strstr(err.msg, "mlp.gate_proj.weight is 16 x 64, the configuration calls for 64 x 16"));
    close_import(&opened);

    const struct tensor whole[] = {GPTQ_TENSORS("mlp.down_proj", &down),
                                   {"mlp.gate_proj.weight", "BF16", "[64,16]", gate, sizeof gate},
                                   {"mlp.up_proj.weight", "BF16", "[64,16]", gate, sizeof gate}};
    open_import(&opened, ACT_ORDER, whole, 6);
    if (import_choose(opened.import, ROLE_GATE_UP, pair, 2, &kind, &group, &err))
        fail_msg("%s", err.msg);
    assert_int_equal(kind, WEIGHT_BF16);
    assert_true(import_serves(opened.import, "mlp.gate_proj.weight"));
    assert_false(import_has_order(opened.import, ROLE_GATE_UP, "mlp.gate_proj.weight"));
    stored_values(&opened, "mlp.gate_proj.weight", kind, group, WIDE, HIGH, rows);
    if (import_choose(opened.import, ROLE_DOWN, &down_part, 1, &kind, &group, &err))
        fail_msg("%s", err.msg);
    assert_int_equal(kind, WEIGHT_INT4);
    stored_values(&opened, "mlp.down_proj.weight", kind, group, HIGH, WIDE, values);
    uint64_t period = 0;
    const uint32_t *order = import_row_order(opened.import, "mlp.gate_proj.bias", &period);
    assert_non_null(order);
    assert_int_equal(period, WIDE);
    for (int c = 0; c < WIDE; c++) {
        int source = c < 32 ? 2 * c : 2 * (c - 32) + 1;
        assert_int_equal(order[c], source);
        for (int n = 0; n < HIGH; n++) {
            assert_true(values[n * WIDE + c] == scattered_value(&down, n, source, 0));
            assert_true(rows[c * HIGH + n] == bf16_to_f32(gate[source * HIGH + n]));
        }
    }
    assert_int_equal(import_losses(opened.import, NULL, 0), 0);
    close_import(&opened);
}

// o crosses heads: stored anew, and said so. A g_idx in order changes nothing.
static void test_other_order(void **state)
{
    (void)state;
    for (int scatter = 0; scatter < 2; scatter++) {
        static struct scattered o;
        float values[HIGH * WIDE];
        struct opened opened;
        struct error err;
        enum weight_kind kind;
        uint32_t group;
        make_scattered(&o, 0, scatter);
        const struct tensor tensors[] = {GPTQ_TENSORS("o_proj", &o)};
        open_import(&opened, ACT_ORDER, tensors, 4);
        struct import_part part = {"o_proj.weight", HIGH, WIDE};
        assert_int_equal(import_choose(opened.import, ROLE_O, &part, 1, &kind, &group, &err), 0);
        assert_int_equal(kind, WEIGHT_INT4);
        stored_values(&opened, "o_proj.weight", kind, group, HIGH, WIDE, values);
        for (int n = 0; n < HIGH; n++)
            for (int c = 0; c < WIDE; c++) {
                float wanted = scattered_value(&o, n, c, 0);
                assert_true(fabsf(values[n * WIDE + c] - wanted) <= (scatter ? 0.5f : 0));
            }
        assert_int_equal(import_losses(opened.import, NULL, 0), scatter);
        close_import(&opened);
    }
}

// q, k and v are one matrix: unlike groups meet in the smaller one, an unquantized part makes all of it bf16.
static void test_mixed_parts(void **state)
{
    (void)state;
    static struct scattered q;
    static uint16_t plain[HIGH * WIDE];
    uint32_t words[WIDE / 8 * HIGH], zeros[HIGH / 8];
    uint16_t scales[HIGH];
    struct opened opened;
    struct error err;
    enum weight_kind kind;
    uint32_t group;
    const char *first;
    make_scattered(&q, 0, false);
    memcpy(words, q.words, sizeof words);
    memset(zeros, 0x77, sizeof zeros);
    memcpy(scales, q.scales, sizeof scales);
    const struct tensor tensors[] = {GPTQ_TENSORS("q_proj", &q),
                                     {"k_proj.qweight", "I32", "[8,16]", words, sizeof words},
                                     {"k_proj.qzeros", "I32", "[1,2]", zeros, sizeof zeros},
                                     {"k_proj.scales", "F16", "[1,16]", scales, sizeof scales},
                                     {"v_proj.weight", "BF16", "[16,64]", plain, sizeof plain}};
    open_import(&opened, ACT_ORDER, tensors, 8);
    struct import_part parts[] = {
        {"q_proj.weight", HIGH, WIDE}, {"k_proj.weight", HIGH, WIDE}, {"v_proj.weight", HIGH, WIDE}};
    assert_int_equal(import_choose(opened.import, ROLE_QKV, parts, 2, &kind, &group, &err), 0);
    assert_int_equal(kind, WEIGHT_INT4); // groups of 32 and of the whole row: 32 holds both
    assert_int_equal(group, 32);
    assert_int_equal(import_mixed(opened.import, &first), 0);
    assert_int_equal(import_choose(opened.import, ROLE_QKV, parts, 3, &kind, &group, &err), 0);
    assert_int_equal(kind, WEIGHT_BF16);
    assert_int_equal(import_mixed(opened.import, &first), 1);
    assert_string_equal(first, "q_proj.weight");
    close_import(&opened);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_input_order),
        cmocka_unit_test(test_down_order),
        cmocka_unit_test(test_other_order),
        cmocka_unit_test(test_mixed_parts),
    };
    return cmocka_run_group_tests(tests, enter_directory, leave_directory);
}
