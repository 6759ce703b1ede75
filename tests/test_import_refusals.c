// Tensors and rows of quantized checkpoints that are refused, each by a sentence that names what is wrong.
#include "tests/import_help.h"

static const struct import_part refused_part = {"m.weight", N, K};

static void refused_choice(const char *config, const struct tensor *tensors, size_t count, const char *name,
                           const char *words)
{
    enum weight_kind kind;
    uint32_t group;
    struct opened opened;
    struct error err = {0};
    open_import(&opened, config, tensors, count);
    int rc = import_choose(opened.import, ROLE_O, &refused_part, 1, &kind, &group, &err);
    if (rc != ERR_MODEL || !strstr(err.msg, words))
        fail_msg("%s: code %d, \"%s\" does not say \"%s\"", name, rc, err.msg, words);
    close_import(&opened);
}

static void test_refused_tensors(void **state)
{
    (void)state;
    static const uint32_t words[8];
    static const int32_t wild_index[8] = {0, 0, 0, 0, 0, 0, 0, 1};
    static const uint16_t huge[8] = {0x3c00, 0x5c00}; // 256: too large for f16 times 2^8
    static const uint8_t not_a_number[64] = {[5] = 0x7f};
    static const struct {
        const char *name;
        struct tensor tensors[4];
        const char *words;
    } cases[] = {
        {"missing", {{"other.qweight", "I32", "[1,8]", WORDS(words)}}, "m.weight"},
        {"no scales",
         {{"m.qweight", "I32", "[1,8]", WORDS(words)}, {"m.qzeros", "I32", "[1,1]", words, 4}},
         "tensor m.scales"},
        {"no zeros",
         {{"m.qweight", "I32", "[1,8]", WORDS(words)}, {"m.scales", "F16", "[1,8]", WORDS(f16_scales)}},
         "tensor m.qzeros"},
        {"shape",
         {{"m.qweight", "I32", "[2,4]", WORDS(words)},
          {"m.qzeros", "I32", "[1,1]", words, 4},
          {"m.scales", "F16", "[1,8]", WORDS(f16_scales)}},
         "m.qweight is 2 x 4"},
        {"dtype",
         {{"m.qweight", "F32", "[1,8]", WORDS(words)},
          {"m.qzeros", "I32", "[1,1]", words, 4},
          {"m.scales", "F16", "[1,8]", WORDS(f16_scales)}},
         "m.qweight is F32, and I32"},
        {"scales",
         {{"m.qweight", "I32", "[1,8]", WORDS(words)},
          {"m.qzeros", "I32", "[1,1]", words, 4},
          {"m.scales", "F16", "[3,2]", f16_scales, 12}},
         "group size"},
        {"scales as a vector",
         {{"m.qweight", "I32", "[1,8]", WORDS(words)},
          {"m.qzeros", "I32", "[1,1]", words, 4},
          {"m.scales", "F16", "[8]", WORDS(f16_scales)}},
         "m.scales"},
        {"group index",
         {{"m.qweight", "I32", "[1,8]", WORDS(words)},
          {"m.qzeros", "I32", "[1,1]", words, 4},
          {"m.scales", "F16", "[1,8]", WORDS(f16_scales)},
          {"m.g_idx", "I32", "[8]", WORDS(wild_index)}},
         "group 1, of 1"},
        {"blocks", {{"m.weight", "F8_E4M3", "[8,8]", not_a_number, 64}}, "m.weight_scale_inv"},
        {"floats of 64 bits", {{"m.weight", "F64", "[8,1]", not_a_number, 64}}, "m.weight is F64"},
    };
    enum weight_kind kind;
    uint32_t group;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        size_t count = 0;
        while (count < 4 && cases[i].tensors[count].name)
            count++;
        refused_choice(GPTQ_SYMMETRIC, cases[i].tensors, count, cases[i].name, cases[i].words);
    }
    const struct tensor zeros[] = {{"m.weight_packed", "I32", "[8,1]", WORDS(words)},
                                   {"m.weight_scale", "F16", "[8,1]", WORDS(f16_scales)},
                                   {"m.weight_zero_point", "I32", "[1,1]", words, 4}};
    refused_choice(CONFIG("\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\",\"config_groups\":{"
                          "\"group_0\":{\"targets\":[\"Linear\"],\"weights\":{\"num_bits\":4,\"type\":\"int\","
                          "\"symmetric\":true,\"strategy\":\"channel\"}}}"),
                   zeros, 3, "symmetric", "the config says symmetric, but there are zero points");
    const struct tensor turned[] = {{"m.W_q", "U8", "[4,8]", words, 32},
                                    {"m.scale", "F16", "[1,8]", WORDS(f16_scales)},
                                    {"m.zero", "F16", "[1,8]", WORDS(f16_scales)}};
    refused_choice(
        CONFIG("\"quant_method\":\"hqq\",\"quant_config\":{\"weight_quant_params\":{\"nbits\":4,\"group_size\":8}}"),
        turned, 3, "axis 0", "its groups run along a column (axis 0)");

    // What only rows show.
    const struct {
        const char *config;
        struct tensor tensors[3];
        const char *words;
    } rows[] = {
        {GPTQ_SYMMETRIC,
         {{"m.qweight", "I32", "[1,8]", WORDS(words)},
          {"m.qzeros", "I32", "[1,1]", &zeros_sevens, 4},
          {"m.scales", "F16", "[1,8]", WORDS(huge)}},
         "row 1: a scale or zero point is too large"},
        {GPTQ_SYMMETRIC,
         {{"m.qweight", "I32", "[1,8]", WORDS(words)},
          {"m.qzeros", "I32", "[1,1]", &zeros_eights, 4},
          {"m.scales", "F16", "[1,8]", WORDS(f16_scales)}},
         "checkpoint_format"},
        {CONFIG("\"quant_method\":\"fp8\""),
         {{"m.weight", "F8_E4M3", "[8,8]", not_a_number, 64}, {"m.weight_scale", "F32", "[1]", f32_scales, 4}},
         "row 0: a weight is not a number"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        struct opened opened;
        struct error err = {0};
        struct import_window window = {0};
        int rc = 0;
        open_import(&opened, rows[i].config, rows[i].tensors, rows[i].tensors[2].name ? 3 : 2);
        assert_int_equal(import_choose(opened.import, ROLE_O, &refused_part, 1, &kind, &group, &err), 0);
        struct packed_row row = new_row(kind, group, K);
        assert_int_equal(import_read(opened.import, &window, "m.weight", 0, N, &err), 0);
        for (uint64_t n = 0; n < N && !rc; n++)
            rc = import_row(opened.import, &window, n, kind, group, WEIGHT_SCALES_SEARCHED, &row, &err);
        if (rc != ERR_MODEL || !strstr(err.msg, rows[i].words))
            fail_msg("code %d, \"%s\" does not say \"%s\"", rc, err.msg, rows[i].words);
        free_row(&row);
        import_window_free(&window);
        close_import(&opened);
    }
}

// Two groups of 4 columns, and nothing that says which columns they are.
static void test_refused_order(void **state)
{
    (void)state;
    static const uint32_t words[8] = {zeros_eights, zeros_eights};
    static const uint16_t scales[16];
    const struct tensor tensors[] = {{"m.qweight", "I32", "[1,8]", WORDS(words)},
                                     {"m.qzeros", "I32", "[2,1]", words, 8},
                                     {"m.scales", "F16", "[2,8]", WORDS(scales)}};
    refused_choice(CONFIG("\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":4,\"desc_act\":true"), tensors, 3,
                   "act-order without g_idx", "m.qweight has no g_idx beside it, though desc_act says");
}

static void test_refused_second_weight(void **state)
{
    (void)state;
    static const uint32_t words[64];
    static const char *const seconds[] = {"m.qweight", "m.weight_packed", "m.W_q", "m_blocks"};
    for (size_t i = 0; i < sizeof seconds / sizeof *seconds; i++) {
        char sentence[128];
        const struct tensor tensors[] = {{"m.weight", "F32", "[8,8]", WORDS(words)},
                                         {seconds[i], "I32", "[1,8]", words, 32}};
        snprintf(sentence, sizeof sentence, "tensors m.weight and %s are one weight twice", seconds[i]);
        refused_choice(GPTQ_SYMMETRIC, tensors, 2, seconds[i], sentence);
    }
}

static void test_refused_globals(void **state)
{
    (void)state;
    static const uint8_t codes[64], scales[8];
    static const float values[] = {INFINITY, -INFINITY, NAN, 0, 1e-42f};
    struct import_part part = {"m.weight", 8, 16};
    for (int divides = 0; divides < 2; divides++) // compressed-tensors divides by it, ModelOpt multiplies
        for (size_t i = 0; i < (divides ? 5 : 3); i++) {
            struct opened opened;
            struct error err = {0};
            enum weight_kind kind;
            uint32_t group;
            const struct tensor tensors[] = {
                {divides ? "m.weight_packed" : "m.weight", "U8", "[8,8]", WORDS(codes)},
                {"m.weight_scale", "F8_E4M3", "[8,1]", WORDS(scales)},
                {divides ? "m.weight_global_scale" : "m.weight_scale_2", "F32", "[1]", &values[i], 4}};
            open_import(&opened,
                        divides ? CONFIG("\"quant_method\":\"compressed-tensors\",\"format\":\"nvfp4-pack-quantized\","
                                         "\"config_groups\":{\"group_0\":{\"targets\":[\"Linear\"],\"weights\":{"
                                         "\"num_bits\":4,\"type\":\"float\",\"group_size\":16}}}")
                                : CONFIG("\"quant_method\":\"modelopt\",\"quant_algo\":\"NVFP4\""),
                        tensors, 3);
            int rc = import_choose(opened.import, ROLE_O, &part, 1, &kind, &group, &err);
            if (rc != ERR_MODEL || !strstr(err.msg, "it is not a finite number other than zero"))
                fail_msg("%s of %g: code %d, \"%s\"", tensors[2].name, (double)values[i], rc, err.msg);
            close_import(&opened);
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_refused_tensors),
        cmocka_unit_test(test_refused_order),
        cmocka_unit_test(test_refused_second_weight),
        cmocka_unit_test(test_refused_globals),
    };
    return cmocka_run_group_tests(tests, enter_directory, leave_directory);
}
