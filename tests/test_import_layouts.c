// Layouts of quantized checkpoints: the golden words of each give the golden values, exactly or with the stated loss.
#include "tests/import_help.h"

// ---- codes of four bits in words: golden_code, zero points 1, 3, ..., 15 -------------------------------------------

static const uint32_t awq_words[K] = {0x4a06f5b1, 0x7d3928e4, 0xa06c5b17, 0xd39f8e4a,
                                      0x06c2b17d, 0x39f5e4a0, 0x6c2817d3, 0x9f5b4a06};
static const uint32_t zeros_v2 = 0xfdb97531, zeros_v1 = 0xeca86420, zeros_awq = 0xfb73d951;

struct golden {
    const char *name, *config;
    struct tensor tensors[4];
    enum weight_kind kind;
    bool zeros; // 1, 3, ..., 15; else 8
};

static const struct golden goldens[] = {
    {"gptq v1, symmetric",
     GPTQ_SYMMETRIC,
     {{"m.qweight", "I32", "[1,8]", WORDS(gptq_words)},
      {"m.qzeros", "I32", "[1,1]", &zeros_sevens, 4},
      {"m.scales", "F16", "[1,8]", WORDS(f16_scales)}},
     WEIGHT_INT4,
     false},
    {"gptq v2, symmetric",
     CONFIG("\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":-1,\"sym\":true,\"checkpoint_format\":\"gptq_v2\""),
     {{"m.qweight", "I32", "[1,8]", WORDS(gptq_words)},
      {"m.qzeros", "I32", "[1,1]", &zeros_eights, 4},
      {"m.scales", "F16", "[1,8]", WORDS(f16_scales)}},
     WEIGHT_INT4,
     false},
    {"gptq v1, zero points",
     CONFIG("\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":-1,\"sym\":false,\"checkpoint_format\":\"gptq\""),
     {{"m.qweight", "I32", "[1,8]", WORDS(gptq_words)},
      {"m.qzeros", "I32", "[1,1]", &zeros_v1, 4},
      {"m.scales", "F16", "[1,8]", WORDS(f16_scales)}},
     WEIGHT_INT4Z,
     true},
    {"gptq v2, zero points",
     CONFIG("\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":-1,\"sym\":false,\"checkpoint_format\":\"gptq_v2\""),
     {{"m.qweight", "I32", "[1,8]", WORDS(gptq_words)},
      {"m.qzeros", "I32", "[1,1]", &zeros_v2, 4},
      {"m.scales", "F16", "[1,8]", WORDS(f16_scales)}},
     WEIGHT_INT4Z,
     true},
    {"awq",
     CONFIG("\"quant_method\":\"awq\",\"bits\":4,\"group_size\":128,\"zero_point\":true,\"version\":\"gemm\""),
     {{"m.qweight", "I32", "[8,1]", WORDS(awq_words)},
      {"m.qzeros", "I32", "[1,1]", &zeros_awq, 4},
      {"m.scales", "F16", "[1,8]", WORDS(f16_scales)}},
     WEIGHT_INT4Z,
     true},
    {"compressed-tensors, symmetric",
     CONFIG("\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\",\"config_groups\":{\"group_0\":{"
            "\"targets\":[\"Linear\"],\"weights\":{\"num_bits\":4,\"type\":\"int\",\"symmetric\":true,"
            "\"strategy\":\"channel\"}}}"),
     {{"m.weight_packed", "I32", "[8,1]", WORDS(gptq_words)}, {"m.weight_scale", "F16", "[8,1]", WORDS(f16_scales)}},
     WEIGHT_INT4,
     false},
    {"compressed-tensors, zero points",
     CONFIG("\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\",\"config_groups\":{\"group_0\":{"
            "\"targets\":[\"Linear\"],\"weights\":{\"num_bits\":4,\"type\":\"int\",\"symmetric\":false,"
            "\"strategy\":\"group\",\"group_size\":32}}}"),
     {{"m.weight_packed", "I32", "[8,1]", WORDS(gptq_words)},
      {"m.weight_scale", "F16", "[8,1]", WORDS(f16_scales)},
      {"m.weight_zero_point", "I32", "[1,1]", &zeros_v2, 4}},
     WEIGHT_INT4Z,
     true},
};

static void test_goldens(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof goldens / sizeof goldens[0]; i++) {
        const struct golden *golden = &goldens[i];
        struct opened opened;
        struct error err = {0};
        size_t count = golden->tensors[2].name ? 3 : 2;
        enum weight_kind kind;
        uint32_t group;
        float values[N * K];
        open_import(&opened, golden->config, golden->tensors, count);
        struct import_part part = {"m.weight", N, K};
        if (import_choose(opened.import, ROLE_O, &part, 1, &kind, &group, &err))
            fail_msg("%s: %s", golden->name, err.msg);
        assert_int_equal(kind, golden->kind);
        assert_true(import_serves(opened.import, "m.weight"));
        stored_values(&opened, "m.weight", kind, group, N, K, values);
        for (uint64_t n = 0; n < N; n++)
            for (uint64_t k = 0; k < K; k++) {
                int zero = golden->zeros ? 2 * (int)n + 1 : 8;
                float wanted = (float)(golden_code(k, n) - zero) * f16_to_f32(f16_scales[n]);
                if (!(values[n * K + k] == wanted))
                    fail_msg("%s: row %d, column %d: %g, wanted %g", golden->name, (int)n, (int)k, values[n * K + k],
                             wanted);
            }
        assert_int_equal(import_losses(opened.import, NULL, 0), 0);
        close_import(&opened);
    }
}

// ---- codes of four bits that are floats -------------------------------------------------------------------------

static const float e2m1[16] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};
static const uint8_t fp4_first_bytes[4] = {0x41, 0xa7, 0x0d, 0x63};

// Rows of 32 columns, low nibble first.
static void pack_fp4(uint8_t *out, uint64_t rows)
{
    for (uint64_t n = 0; n < rows; n++)
        for (uint64_t k = 0; k < 32; k += 2)
            out[n * 16 + k / 2] = (uint8_t)(golden_code(k, n) | golden_code(k + 1, n) << 4);
    assert_memory_equal(out, fp4_first_bytes, sizeof fp4_first_bytes);
}

static void test_fp4(void **state)
{
    (void)state;
    enum { ROWS = 6, COLS = 32 };
    uint8_t codes[ROWS * COLS / 2], e4m3[ROWS * 2], e8m0[ROWS];
    float values[ROWS * COLS], global = 4096, factor = 1.0f / 4096, odd_global = 3000;
    pack_fp4(codes, ROWS);
    for (int i = 0; i < ROWS * 2; i++)
        e4m3[i] = (uint8_t)(0x30 + 5 * i);
    for (int i = 0; i < ROWS; i++)
        e8m0[i] = (uint8_t)(100 + 7 * i);
    const struct {
        const char *config, *scale_dtype;
        const struct tensor tensors[3];
        float global;
        enum weight_kind kind;
    } cases[] = {
        {CONFIG("\"quant_method\":\"compressed-tensors\",\"format\":\"nvfp4-pack-quantized\",\"config_groups\":{"
                "\"a\":{\"targets\":[\"Linear\"],\"weights\":{\"num_bits\":4,\"type\":\"float\"}}}"),
         "F8_E4M3",
         {{"m.weight_packed", "U8", "[6,16]", codes, sizeof codes},
          {"m.weight_scale", "F8_E4M3", "[6,2]", e4m3, sizeof e4m3},
          {"m.weight_global_scale", "F32", "[1]", &global, 4}},
         1.0f / 4096,
         WEIGHT_NVFP4},
        {CONFIG("\"quant_method\":\"compressed-tensors\",\"format\":\"nvfp4-pack-quantized\",\"config_groups\":{"
                "\"a\":{\"targets\":[\"Linear\"],\"weights\":{\"num_bits\":4,\"type\":\"float\"}}}"),
         "F8_E4M3",
         {{"m.weight_packed", "U8", "[6,16]", codes, sizeof codes},
          {"m.weight_scale", "F8_E4M3", "[6,2]", e4m3, sizeof e4m3},
          {"m.weight_global_scale", "F32", "[1]", &odd_global, 4}},
         1.0f / 3000,
         WEIGHT_NVFP4},
        {CONFIG("\"quant_method\":\"modelopt\",\"quant_algo\":\"NVFP4\",\"exclude_modules\":[\"lm_head\"]"),
         "F8_E4M3",
         {{"m.weight", "U8", "[6,16]", codes, sizeof codes},
          {"m.weight_scale", "F8_E4M3", "[6,2]", e4m3, sizeof e4m3},
          {"m.weight_scale_2", "F32", "[]", &factor, 4}},
         1.0f / 4096,
         WEIGHT_NVFP4},
        {CONFIG("\"quant_method\":\"compressed-tensors\",\"format\":\"mxfp4-pack-quantized\",\"config_groups\":{"
                "\"a\":{\"targets\":[\"Linear\"],\"weights\":{\"num_bits\":4,\"type\":\"float\"}}}"),
         "U8",
         {{"m.weight_packed", "U8", "[6,16]", codes, sizeof codes},
          {"m.weight_scale", "U8", "[6,1]", e8m0, sizeof e8m0},
          {"m.input_scale", "F32", "[1]", &global, 4}},
         0,
         WEIGHT_MXFP4},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct opened opened;
        struct error err;
        enum weight_kind kind;
        uint32_t group;
        open_import(&opened, cases[i].config, cases[i].tensors, 3);
        struct import_part part = {"m.weight", ROWS, COLS};
        if (import_choose(opened.import, ROLE_DOWN, &part, 1, &kind, &group, &err))
            fail_msg("case %zu: %s", i, err.msg);
        assert_int_equal(kind, cases[i].kind);
        stored_values(&opened, "m.weight", kind, group, ROWS, COLS, values);
        for (int n = 0; n < ROWS; n++)
            for (int k = 0; k < COLS; k++) {
                float scale = kind == WEIGHT_MXFP4 ? ldexpf(1, e8m0[n] - 127)
                                                   : e4m3_to_f32(e4m3[2 * n + k / 16]) * cases[i].global;
                float wanted = e2m1[golden_code((uint64_t)k, (uint64_t)n)] * scale;
                assert_true(fabsf(values[n * COLS + k] - wanted) <= 1.2e-7f * fabsf(wanted));
            }
        for (size_t t = 0; t < 3; t++) {
            bool known = false;
            assert_int_equal(import_tensor_known(opened.import, checkpoint_tensor(opened.checkpoint, t), &known, &err),
                             0);
            assert_true(known || strcmp(checkpoint_tensor(opened.checkpoint, t)->name, "m.weight") == 0);
        }
        close_import(&opened);
    }
}

// gpt-oss: a stack of experts, rows of gate and up alternating.
static void test_stacked_blocks(void **state)
{
    (void)state;
    enum { EXPERTS = 2, ROWS = 4, COLS = 32 };
    uint8_t codes[EXPERTS * ROWS * COLS / 2], scales[EXPERTS * ROWS];
    float values[ROWS * COLS];
    struct opened opened;
    struct error err;
    enum weight_kind kind;
    uint32_t group;
    pack_fp4(codes, EXPERTS * ROWS);
    for (int i = 0; i < EXPERTS * ROWS; i++)
        scales[i] = (uint8_t)(120 + i);
    const struct tensor tensors[] = {
        {"l.mlp.experts.gate_up_proj_blocks", "U8", "[2,4,1,16]", codes, sizeof codes},
        {"l.mlp.experts.gate_up_proj_scales", "U8", "[2,4,1]", scales, sizeof scales},
    };
    open_import(&opened, CONFIG("\"quant_method\":\"mxfp4\""), tensors, 2);
    struct import_part parts[2] = {{"l.mlp.experts.gate_up_proj[1]", ROWS, COLS},
                                   {"l.mlp.experts.gate_up_proj[1]", ROWS, COLS}};
    if (import_choose(opened.import, ROLE_EXPERT_GATE_UP, parts, 2, &kind, &group, &err))
        fail_msg("%s", err.msg);
    assert_int_equal(kind, WEIGHT_MXFP4);
    stored_values(&opened, parts[0].source, kind, group, ROWS, COLS, values);
    static const int order[ROWS] = {4, 6, 5, 7}; // gate rows, then up rows, of the second expert
    for (int n = 0; n < ROWS; n++)
        for (int k = 0; k < COLS; k++)
            assert_true(values[n * COLS + k] ==
                        e2m1[golden_code((uint64_t)k, (uint64_t)order[n])] * ldexpf(1, 120 + order[n] - 127));
    struct import_part third = {"l.mlp.experts.gate_up_proj[2]", ROWS, COLS};
    assert_int_equal(import_bind(opened.import, &third, &err), ERR_MODEL);
    close_import(&opened);
}

// ---- codes of a byte --------------------------------------------------------------------------------------------

static void test_bytes(void **state)
{
    (void)state;
    enum { ROWS = 6, COLS = 160 };
    static uint8_t codes[ROWS * COLS];
    static float values[ROWS * COLS], block_scales[2 * 2] = {0.5f, 0.25f, 3, 7e-3f};
    uint16_t bf16_scale = 0x3d12;
    for (int i = 0; i < ROWS * COLS; i++)
        codes[i] = (uint8_t)(i * 37 % 256);
    for (int i = 0; i < ROWS * COLS; i++) // e4m3 has two codes that are no numbers
        codes[i] = (codes[i] & 0x7f) == 0x7f ? 0x80 : codes[i];
    const char *fp8 =
        CONFIG("\"quant_method\":\"fp8\",\"weight_block_size\":[4,128],\"activation_scheme\":\"dynamic\"");
    const char *row = CONFIG("\"quant_method\":\"fbgemm_fp8\",\"activation_scale_ub\":1200.0");
    const char *integer =
        CONFIG("\"quant_method\":\"compressed-tensors\",\"format\":\"int-quantized\",\"config_groups\":{\"a\":{"
               "\"targets\":[\"Linear\"],\"weights\":{\"num_bits\":8,\"type\":\"int\",\"strategy\":\"channel\"}}}");
    const struct {
        const char *config;
        struct tensor tensors[2];
        enum weight_kind kind;
        int scales; // 1, rows, or 4: blocks
    } cases[] = {
        {fp8,
         {{"m.weight", "F8_E4M3", "[6,160]", codes, sizeof codes},
          {"m.weight_scale_inv", "F32", "[2,2]", block_scales, sizeof block_scales}},
         WEIGHT_FP8G,
         4},
        {row,
         {{"m.weight", "F8_E4M3", "[6,160]", codes, sizeof codes},
          {"m.weight_scale", "F32", "[6,1]", f32_scales, ROWS * 4}},
         WEIGHT_FP8,
         ROWS},
        {row,
         {{"m.weight", "F8_E4M3", "[6,160]", codes, sizeof codes}, {"m.weight_scale", "BF16", "[1]", &bf16_scale, 2}},
         WEIGHT_FP8,
         1},
        {integer,
         {{"m.weight", "I8", "[6,160]", codes, sizeof codes}, {"m.weight_scale", "F32", "[6,1]", f32_scales, ROWS * 4}},
         WEIGHT_INT8,
         ROWS},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct opened opened;
        struct error err;
        enum weight_kind kind;
        uint32_t group;
        open_import(&opened, cases[i].config, cases[i].tensors, 2);
        struct import_part part = {"m.weight", ROWS, COLS};
        if (import_choose(opened.import, ROLE_O, &part, 1, &kind, &group, &err))
            fail_msg("case %zu: %s", i, err.msg);
        assert_int_equal(kind, cases[i].kind);
        stored_values(&opened, "m.weight", kind, group, ROWS, COLS, values);
        for (int n = 0; n < ROWS; n++)
            for (int k = 0; k < COLS; k++) {
                float scale = cases[i].scales == 4   ? block_scales[n / 4 * 2 + k / 128]
                              : cases[i].scales == 1 ? bf16_to_f32(bf16_scale)
                                                     : f32_scales[n];
                uint8_t code = codes[n * COLS + k];
                float wanted = (kind == WEIGHT_INT8 ? (float)(int8_t)code : e4m3_to_f32(code)) * scale;
                if (!(values[n * COLS + k] == wanted))
                    fail_msg("case %zu: row %d, column %d: %g, wanted %g", i, n, k, values[n * COLS + k], wanted);
            }
        close_import(&opened);
    }
}

// ---- formats that are stored anew, or nearly --------------------------------------------------------------------

static const uint8_t bnb_first_bytes[4] = {0x14, 0x7a, 0xd0, 0x36};

static void test_bitsandbytes(void **state)
{
    (void)state;
    enum { ROWS = 8, COLS = 64 }; // eight blocks of 64
    uint8_t codes[ROWS * COLS / 2], absmax[ROWS];
    float table[16], nested_table[256], nested_absmax[2] = {0.5f, 0.75f}, values[COLS];
    static const char description[] =
        "{\"quant_type\":\"nf4\",\"blocksize\":64,\"dtype\":\"bfloat16\",\"shape\":[8,64],\"nested_blocksize\":4,"
        "\"nested_dtype\":\"float32\",\"nested_offset\":0.125}";
    for (int i = 0; i < 16; i++)
        table[i] = (float)((i - 7) * abs(i - 7)) / 64; // on no grid
    for (int i = 0; i < 256; i++)
        nested_table[i] = (float)(i - 100) / 256;
    for (int i = 0; i < ROWS; i++)
        absmax[i] = (uint8_t)(150 + 11 * i);
    for (int n = 0; n < ROWS; n++)
        for (int k = 0; k < COLS; k += 2) // the upper nibble comes first
            codes[(n * COLS + k) / 2] =
                (uint8_t)(golden_code((uint64_t)k, (uint64_t)n) << 4 | golden_code((uint64_t)k + 1, (uint64_t)n));
    assert_memory_equal(codes, bnb_first_bytes, sizeof bnb_first_bytes);
    char length[16];
    snprintf(length, sizeof length, "[%zu]", sizeof description - 1);
    const struct tensor tensors[] = {
        {"m.weight", "U8", "[256,1]", codes, sizeof codes},
        {"m.weight.absmax", "U8", "[8]", absmax, sizeof absmax},
        {"m.weight.quant_map", "F32", "[16]", table, sizeof table},
        {"m.weight.nested_absmax", "F32", "[2]", nested_absmax, sizeof nested_absmax},
        {"m.weight.nested_quant_map", "F32", "[256]", nested_table, sizeof nested_table},
        {"m.weight.quant_state.bitsandbytes__nf4", "U8", length, description, sizeof description - 1},
    };
    struct opened opened;
    struct error err;
    enum weight_kind kind;
    uint32_t group;
    struct import_window window = {0};
    open_import(&opened, CONFIG("\"quant_method\":\"bitsandbytes\",\"load_in_4bit\":true"), tensors, 6);
    struct import_part part = {"m.weight", ROWS, COLS};
    if (import_choose(opened.import, ROLE_O, &part, 1, &kind, &group, &err))
        fail_msg("%s", err.msg);
    assert_int_equal(kind, WEIGHT_INT4);
    assert_int_equal(group, 64);
    assert_int_equal(import_read(opened.import, &window, "m.weight", 0, ROWS, &err), 0);
    for (int n = 0; n < ROWS; n++) {
        float scale = nested_table[absmax[n]] * nested_absmax[n / 4] + 0.125f;
        assert_int_equal(import_values(opened.import, &window, (uint64_t)n, values, &err), 0);
        for (int k = 0; k < COLS; k++)
            assert_true(values[k] == table[golden_code((uint64_t)k, (uint64_t)n)] * scale);
    }
    import_window_free(&window);
    float stored[ROWS * COLS];
    stored_values(&opened, "m.weight", kind, group, ROWS, COLS, stored);
    struct import_loss loss;
    assert_int_equal(import_losses(opened.import, &loss, 1), 1);
    assert_true(loss.relative_rmse > 0.01 && loss.relative_rmse < 0.2);
    assert_string_equal(loss.source, "m.weight");
    close_import(&opened);
}

static void test_hqq(void **state)
{
    (void)state;
    enum { ROWS = 6, COLS = 64, GROUP = 32, GROUPS = ROWS * COLS / GROUP };
    uint8_t codes[GROUPS / 2 * GROUP];
    uint16_t scales[GROUPS];
    float values[ROWS * COLS], zeros[GROUPS];
    for (int pass = 0; pass < 2; pass++) { // zero points that f16 holds, then some that it does not
        for (int i = 0; i < GROUPS; i++) {
            scales[i] = (uint16_t)(0x2c00 + 77 * i);
            zeros[i] = pass ? 7.3f + 0.0123f * (float)i : 5.25f + 0.25f * (float)i;
        }
        for (int i = 0; i < GROUPS / 2; i++)
            for (int c = 0; c < GROUP; c++) {
                int upper = i * GROUP + c, lower = (i + GROUPS / 2) * GROUP + c;
                codes[i * GROUP + c] = (uint8_t)(golden_code((uint64_t)upper % COLS, (uint64_t)upper / COLS) << 4 |
                                                 golden_code((uint64_t)lower % COLS, (uint64_t)lower / COLS));
            }
        const struct tensor tensors[] = {
            {"m.W_q", "U8", "[6,32]", codes, sizeof codes},
            {"m.scale", "F16", "[12,1]", scales, sizeof scales},
            {"m.zero", "F32", "[12,1]", zeros, sizeof zeros},
        };
        struct opened opened;
        struct error err;
        enum weight_kind kind;
        uint32_t group;
        open_import(&opened,
                    CONFIG("\"quant_method\":\"hqq\",\"quant_config\":{\"weight_quant_params\":{"
                           "\"nbits\":4,\"group_size\":32,\"axis\":1}}"),
                    tensors, 3);
        struct import_part part = {"m.weight", ROWS, COLS};
        if (import_choose(opened.import, ROLE_O, &part, 1, &kind, &group, &err))
            fail_msg("%s", err.msg);
        assert_int_equal(kind, WEIGHT_INT4Z);
        assert_int_equal(group, 32);
        stored_values(&opened, "m.weight", kind, group, ROWS, COLS, values);
        for (int n = 0; n < ROWS; n++)
            for (int k = 0; k < COLS; k++) {
                int g = (n * COLS + k) / GROUP;
                float scale = f16_to_f32(scales[g]);
                float wanted = ((float)golden_code((uint64_t)k, (uint64_t)n) - zeros[g]) * scale;
                assert_true(fabsf(values[n * COLS + k] - wanted) <= (pass ? scale / 256 : 0));
            }
        struct import_loss loss;
        assert_int_equal(import_losses(opened.import, &loss, 1), pass);
        assert_true(!pass || loss.relative_rmse < 1e-3);
        close_import(&opened);
    }
}

// ---- large tensors ----------------------------------------------------------------------------------------------

// A packed tensor above 64 MiB is read in blocks of columns: rows on both sides of a block's end, and across words.
static void test_column_blocks(void **state)
{
    (void)state;
    enum { COLS = 8192, ROWS = 20480, WORD_ROWS = COLS / 8, SCALE_BYTES = ROWS * 2, ZERO_BYTES = ROWS / 8 * 4 };
    static uint16_t scales[ROWS];
    static uint32_t zeros[ROWS / 8];
    static float values[COLS];
    char header[512], path[128];
    uint64_t code_bytes = (uint64_t)WORD_ROWS * ROWS * 4;
    struct opened opened;
    struct error err;
    for (int n = 0; n < ROWS; n++)
        scales[n] = (uint16_t)(0x2c00 + n % 512);
    memset(zeros, 0x77, sizeof zeros);
    int length =
        snprintf(header + 8, sizeof header - 8,
                 "{\"m.qweight\":{\"dtype\":\"I32\",\"shape\":[%d,%d],\"data_offsets\":[0,%llu]},"
                 "\"m.qzeros\":{\"dtype\":\"I32\",\"shape\":[1,%d],\"data_offsets\":[%llu,%llu]},"
                 "\"m.scales\":{\"dtype\":\"F16\",\"shape\":[1,%d],\"data_offsets\":[%llu,%llu]}}",
                 WORD_ROWS, ROWS, (unsigned long long)code_bytes, ROWS / 8, (unsigned long long)code_bytes,
                 (unsigned long long)code_bytes + ZERO_BYTES, ROWS, (unsigned long long)code_bytes + ZERO_BYTES,
                 (unsigned long long)code_bytes + ZERO_BYTES + SCALE_BYTES);
    memset(header, 0, 8);
    header[0] = (char)length;
    header[1] = (char)(length >> 8);
    snprintf(path, sizeof path, "%s/model.safetensors", directory);
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    uint64_t data = 8 + (uint64_t)length;
    assert_int_equal(fwrite(header, 1, data, file), data);
    assert_int_equal(ftruncate(fileno(file), (off_t)(data + code_bytes + ZERO_BYTES + SCALE_BYTES)), 0); // holes
    static const int rows[] = {0, 16381, 16382, 16383, 16384, 16385, ROWS - 1};
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) { // one code each, in the last word: the row's number
        uint32_t word = (uint32_t)(rows[i] % 16) << 28;
        fseek(file, (long)(data + ((uint64_t)(WORD_ROWS - 1) * ROWS + (uint64_t)rows[i]) * 4), SEEK_SET);
        assert_int_equal(fwrite(&word, sizeof word, 1, file), 1);
    }
    fseek(file, (long)(data + code_bytes), SEEK_SET);
    assert_int_equal(fwrite(zeros, 1, sizeof zeros, file), sizeof zeros);
    assert_int_equal(fwrite(scales, 1, sizeof scales, file), sizeof scales);
    assert_int_equal(fclose(file), 0);

    open_directory(&opened, GPTQ_SYMMETRIC);
    struct import_part part = {"m.weight", ROWS, COLS};
    struct import_window window = {0};
    assert_int_equal(import_bind(opened.import, &part, &err), 0);
    for (int begin = 16381; begin <= 16384; begin++) {
        if (import_read(opened.import, &window, part.source, (uint64_t)begin, 2, &err))
            fail_msg("%s", err.msg);
        for (int n = begin; n < begin + 2; n++) {
            float scale = f16_to_f32(scales[n]);
            assert_int_equal(import_values(opened.import, &window, (uint64_t)n, values, &err), 0);
            assert_true(values[COLS - 1] == (float)(n % 16 - 8) * scale);
            assert_true(values[0] == -8 * scale && values[COLS - 2] == -8 * scale);
        }
    }
    assert_int_equal(import_read(opened.import, &window, part.source, ROWS - 1, 2, &err), ERR_OTHER); // beyond the end
    import_window_free(&window);
    close_import(&opened);
    assert_int_equal(remove(path), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_goldens),        cmocka_unit_test(test_fp4),
        cmocka_unit_test(test_stacked_blocks), cmocka_unit_test(test_bytes),
        cmocka_unit_test(test_bitsandbytes),   cmocka_unit_test(test_hqq),
        cmocka_unit_test(test_column_blocks),
    };
    return cmocka_run_group_tests(tests, enter_directory, leave_directory);
}
