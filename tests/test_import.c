// Quantized checkpoints: every layout's golden words, exact rows, act-order, and what is refused.
#include "shard/hf_config.h"
#include "shard/import.h"
#include "shard/import_plan.h"

#include "formats/number_formats.h"
#include "kernels/pack.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

// ---- checkpoints -------------------------------------------------------------------------------------------------

static char directory[64];

static int enter_directory(void **state)
{
    (void)state;
    strcpy(directory, "/tmp/test_import.XXXXXX");
    return !mkdtemp(directory);
}

static int leave_directory(void **state)
{
    (void)state;
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", directory);
    return system(command);
}

struct tensor {
    const char *name, *dtype, *shape;
    const void *data;
    size_t bytes;
};

static void write_file(const char *name, const void *bytes, size_t num_bytes)
{
    char path[128];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    assert_int_equal(fwrite(bytes, 1, num_bytes, file), num_bytes);
    assert_int_equal(fclose(file), 0);
}

static void write_checkpoint(const struct tensor *tensors, size_t count)
{
    char json[8192] = "{";
    static uint8_t file[1 << 20];
    size_t used = 1, at = 0;
    for (size_t i = 0; i < count; i++) {
        used += (size_t)snprintf(json + used, sizeof json - used,
                                 "%s\"%s\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%zu,%zu]}", i ? "," : "",
                                 tensors[i].name, tensors[i].dtype, tensors[i].shape, at, at + tensors[i].bytes);
        at += tensors[i].bytes;
    }
    json[used++] = '}';
    assert_true(8 + used + at <= sizeof file);
    for (int i = 0; i < 8; i++)
        file[i] = (uint8_t)((uint64_t)used >> 8 * i);
    memcpy(file + 8, json, used);
    at = 8 + used;
    for (size_t i = 0; i < count; i++) {
        memcpy(file + at, tensors[i].data, tensors[i].bytes);
        at += tensors[i].bytes;
    }
    write_file("model.safetensors", file, at);
}

struct opened {
    struct import_config config;
    struct checkpoint *checkpoint;
    struct import *import;
};

static int open_import(struct opened *out, const char *config, const struct tensor *tensors, size_t count,
                       struct error *err)
{
    struct json_object root = {0};
    *out = (struct opened){0};
    write_checkpoint(tensors, count);
    assert_int_equal(json_file_parse(&root, config, strlen(config), "config.json", ERR_MODEL, err), 0);
    int rc = import_config_parse(&out->config, &root, NULL, err);
    json_file_close(&root);
    if (rc)
        return rc;
    assert_int_equal(checkpoint_open(&out->checkpoint, directory, err), 0);
    assert_int_equal(import_open(&out->import, &out->config, out->checkpoint, err), 0);
    return 0;
}

static void close_import(struct opened *opened)
{
    import_close(opened->import);
    checkpoint_close(opened->checkpoint);
    import_config_clear(&opened->config);
}

// ---- golden vectors: q[k][n] = (3k + 5n + 1) & 15, zero points 1, 3, ..., 15 ----------------------------------------

enum { N = 8, K = 8 };

static int golden_code(uint64_t k, uint64_t n) { return (int)((3 * k + 5 * n + 1) & 15); }

static const uint32_t gptq_words[N] = {0x630da741, 0xb852fc96, 0x0da741eb, 0x52fc9630,
                                       0xa741eb85, 0xfc9630da, 0x41eb852f, 0x9630da74};
static const uint32_t awq_words[K] = {0x4a06f5b1, 0x7d3928e4, 0xa06c5b17, 0xd39f8e4a,
                                      0x06c2b17d, 0x39f5e4a0, 0x6c2817d3, 0x9f5b4a06};
static const uint32_t zeros_v2 = 0xfdb97531, zeros_v1 = 0xeca86420, zeros_awq = 0xfb73d951, zeros_eights = 0x88888888,
                      zeros_sevens = 0x77777777;
static const uint16_t f16_scales[N] = {0x3c00, 0x3800, 0x2e66, 0x2001, 0x0400, 0x0001, 0xb800, 0x5bff};
static const float f32_scales[N] = {1, 0.5f, 0.1f, 3e-5f, 1e-20f, 7, 123456, 1e10f};

static const uint8_t bnb_bytes[N * K / 2] = {0x14, 0x7a, 0xd0, 0x36}; // the rest is filled in
static const uint8_t fp4_first_bytes[4] = {0x41, 0xa7, 0x0d, 0x63};

#define WORDS(array) array, sizeof array
#define CONFIG(text) "{\"quantization_config\":{" text "}}"

struct golden {
    const char *name, *config;
    struct tensor tensors[4];
    enum weight_kind kind;
    bool zeros; // 1, 3, ..., 15; else 8
};

static const struct golden goldens[] = {
    {"gptq v1, symmetric",
     CONFIG("\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":-1,\"sym\":true"),
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

static struct packed_row new_row(enum weight_kind kind, uint32_t group_size, uint64_t cols)
{
    struct packed_row row;
    void *memory = calloc(1, packed_row_bytes(kind, group_size, cols));
    assert_non_null(memory);
    packed_row_place(&row, memory, kind, group_size, cols);
    return row;
}

static void free_row(struct packed_row *row) { free(row->group_scales ? row->group_scales : row->q); }

// Rows [begin, begin + rows) as stored, dequantized, in out [rows][cols].
static void stored_values(struct opened *opened, const char *source, enum weight_kind kind, uint32_t group,
                          uint64_t rows, uint64_t cols, float *out)
{
    struct import_window window = {0};
    struct packed_row row = new_row(kind, group, cols);
    struct error err;
    for (uint64_t begin = 0; begin < rows; begin += 3) { // windows that do not end with words
        uint64_t count = rows - begin < 3 ? rows - begin : 3;
        assert_int_equal(import_read(opened->import, &window, source, begin, count, &err), 0);
        for (uint64_t r = begin; r < begin + count; r++) {
            if (import_row(opened->import, &window, r, kind, group, &row, &err))
                fail_msg("%s", err.msg);
            pack_dequantize_row(out + r * cols, &row, kind, group, cols);
        }
    }
    free_row(&row);
    import_window_free(&window);
}

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
        if (open_import(&opened, golden->config, golden->tensors, count, &err))
            fail_msg("%s: %s", golden->name, err.msg);
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

// ---- codes of four bits that are floats ---------------------------------------------------------------------------

static const float e2m1[16] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};

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
        assert_int_equal(open_import(&opened, cases[i].config, cases[i].tensors, 3, &err), 0);
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
    assert_int_equal(open_import(&opened, CONFIG("\"quant_method\":\"mxfp4\""), tensors, 2, &err), 0);
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

// ---- codes of a byte ---------------------------------------------------------------------------------------------

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
        assert_int_equal(open_import(&opened, cases[i].config, cases[i].tensors, 2, &err), 0);
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

// ---- formats that are stored anew, or nearly ------------------------------------------------------------------------

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
    assert_memory_equal(codes, bnb_bytes, 4);
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
    assert_int_equal(
        open_import(&opened, CONFIG("\"quant_method\":\"bitsandbytes\",\"load_in_4bit\":true"), tensors, 6, &err), 0);
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
        assert_int_equal(open_import(&opened,
                                     CONFIG("\"quant_method\":\"hqq\",\"quant_config\":{\"weight_quant_params\":{"
                                            "\"nbits\":4,\"group_size\":32,\"axis\":1}}"),
                                     tensors, 3, &err),
                         0);
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

// ---- act-order ---------------------------------------------------------------------------------------------------

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
        assert_int_equal(open_import(&opened, ACT_ORDER, tensors, 8, &err), 0);
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
    assert_int_equal(open_import(&opened, ACT_ORDER, tensors, 5, &err), 0);
    struct import_part gate_part = {"mlp.gate_proj.weight", WIDE, HIGH};
    struct import_part down_part = {"mlp.down_proj.weight", HIGH, WIDE};
    struct import_part pair[] = {gate_part, {"mlp.up_proj.weight", WIDE, HIGH}};
    assert_int_equal(import_choose(opened.import, ROLE_GATE_UP, pair, 2, &kind, &group, &err), ERR_MODEL); // no up_proj
    close_import(&opened);

    // A gate that lies the other way round has the right size, and is refused all the same.
    const struct tensor turned[] = {GPTQ_TENSORS("mlp.down_proj", &down),
                                    {"mlp.gate_proj.weight", "BF16", "[16,64]", gate, sizeof gate},
                                    {"mlp.up_proj.weight", "BF16", "[64,16]", gate, sizeof gate}};
    assert_int_equal(open_import(&opened, ACT_ORDER, turned, 6, &err), 0);
    assert_int_equal(import_choose(opened.import, ROLE_GATE_UP, pair, 2, &kind, &group, &err), ERR_MODEL);
    assert_non_null(strstr(err.msg, "mlp.gate_proj.weight is 16 x 64, the configuration calls for 64 x 16"));
    close_import(&opened);

    const struct tensor whole[] = {GPTQ_TENSORS("mlp.down_proj", &down),
                                   {"mlp.gate_proj.weight", "BF16", "[64,16]", gate, sizeof gate},
                                   {"mlp.up_proj.weight", "BF16", "[64,16]", gate, sizeof gate}};
    assert_int_equal(open_import(&opened, ACT_ORDER, whole, 6, &err), 0);
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
        assert_int_equal(open_import(&opened, ACT_ORDER, tensors, 4, &err), 0);
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

// ---- large tensors -----------------------------------------------------------------------------------------------

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
    struct opened opened = {0};
    struct error err;
    struct json_object root = {0};
    const char *config = CONFIG("\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":-1,\"sym\":true");
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

    assert_int_equal(json_file_parse(&root, config, strlen(config), "config.json", ERR_MODEL, &err), 0);
    assert_int_equal(import_config_parse(&opened.config, &root, NULL, &err), 0);
    json_file_close(&root);
    assert_int_equal(checkpoint_open(&opened.checkpoint, directory, &err), 0);
    assert_int_equal(import_open(&opened.import, &opened.config, opened.checkpoint, &err), 0);
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

// ---- sizes whose groups do not divide ------------------------------------------------------------------------------

// Real configs: what each rank holds begins and ends with whole groups, all of it is dealt out, and nobody is left out.
static void test_uneven_groups(void **state)
{
    (void)state;
#define LLAMA(hidden, heads, kv, head, mlp)                                                                            \
    "{\"architectures\":[\"LlamaForCausalLM\"],\"hidden_act\":\"silu\",\"hidden_size\":" #hidden                       \
    ",\"intermediate_size\":" #mlp ",\"num_attention_heads\":" #heads ",\"num_key_value_heads\":" #kv                  \
    ",\"head_dim\":" #head                                                                                             \
    ",\"num_hidden_layers\":2,\"rms_norm_eps\":1e-5,\"vocab_size\":32000,\"max_position_embeddings\":4096,"            \
    "\"quantization_config\":{"
#define AWQ_128 "\"quant_method\":\"awq\",\"bits\":4,\"group_size\":128,\"zero_point\":true,\"version\":\"gemm\"}}"
#define FP8_128 "\"quant_method\":\"fp8\",\"weight_block_size\":[128,128]}}"
    static const struct {
        const char *config;
        int64_t mlp, group;
        enum weight_kind kind;
    } cases[] = {
        {LLAMA(8192, 64, 8, 128, 29568) AWQ_128, 29568, 128, WEIGHT_INT4Z},  // Qwen2.5-72B
        {LLAMA(4096, 32, 32, 128, 11008) AWQ_128, 11008, 128, WEIGHT_INT4Z}, // Llama-2-7B
        {LLAMA(2880, 64, 8, 64, 2880) AWQ_128, 2880, 128, WEIGHT_INT4Z},     // 22.5 groups
        {LLAMA(4096, 32, 8, 128, 11008) FP8_128, 11008, 128, WEIGHT_FP8G},
        {LLAMA(2880, 64, 8, 64, 2880) "\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":32}}", 2880, 32,
         WEIGHT_INT4},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        for (uint32_t tp = 1; tp <= 8; tp++) {
            struct hf_config model;
            struct import_config config = {0};
            struct json_object root = {0};
            struct import *import;
            struct error err;
            struct plan *plan = NULL;
            const char *text = cases[i].config;
            if (hf_config_parse(&model, text, strlen(text), "config.json", NULL, 0, NULL, NULL, &err))
                fail_msg("%s", err.msg);
            assert_int_equal(json_file_parse(&root, text, strlen(text), "config.json", ERR_MODEL, &err), 0);
            assert_int_equal(import_config_parse(&config, &root, NULL, &err), 0);
            json_file_close(&root);
            assert_int_equal(import_open(&import, &config, NULL, &err), 0);
            struct import_kinds kinds = import_kinds_keep(import, NULL, NULL);
            struct plan_options options = {.tp_size = tp, .kinds = &kinds.kinds};
            assert_int_equal(import_quant(&options.quant, &config, NULL, NULL, 128, false, &err), 0);
            assert_int_equal(options.quant.linear, cases[i].kind);
            if (plan_make(&plan, &model.model, &options, &err))
                fail_msg("%s", err.msg);
            int64_t next_mlp = 0, next_head = 0, head_group = cases[i].group / model.model.head_dim;
            for (uint32_t rank = 0; rank < tp; rank++) {
                const struct rank_share *share = &plan->ranks[rank].share;
                assert_int_equal(share->mlp_begin, next_mlp);
                assert_int_equal(share->mlp_begin % cases[i].group, 0);
                assert_true(share->intermediate_local > 0);
                assert_int_equal(share->head_begin, next_head);
                assert_true(head_group < 2 || share->head_begin % head_group == 0);
                next_mlp += share->intermediate_local;
                next_head += share->num_heads_local;
            }
            assert_int_equal(next_mlp, cases[i].mlp);
            assert_int_equal(next_head, model.model.num_heads);
            for (uint64_t t = 0; t < plan->tensor_count; t++)
                if (plan->ranks[0].tensors[t].role == ROLE_DOWN) {
                    assert_int_equal(plan->ranks[0].tensors[t].shape.kind, cases[i].kind);
                    assert_int_equal(plan->ranks[0].tensors[t].shape.group_size, cases[i].group);
                }
            plan_free(plan);
            import_close(import);
            import_config_clear(&config);
        }
}

// ---- fused matrices ----------------------------------------------------------------------------------------------

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
    assert_int_equal(open_import(&opened, ACT_ORDER, tensors, 8, &err), 0);
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

// ---- refusals ----------------------------------------------------------------------------------------------------

static void test_refused_configs(void **state)
{
    (void)state;
    static const struct {
        const char *config, *words;
    } cases[] = {
        {CONFIG("\"quant_method\":\"aqlm\""), "quant_method \"aqlm\""},
        {CONFIG("\"quant_method\":\"quip\""), "bf16, f16 or f32 checkpoint"},
        {CONFIG("\"bits\":4"), "quant_method is not there"},
        {CONFIG("\"quant_method\":7"), "must be a string"},
        {CONFIG("\"quant_method\":\"gptq\",\"bits\":3"), "3 bits"},
        {CONFIG("\"quant_method\":\"gptq\""), "bits"},
        {CONFIG("\"quant_method\":\"gptq\",\"bits\":4,\"checkpoint_format\":\"marlin\""), "\"marlin\""},
        {CONFIG("\"quant_method\":\"gptq\",\"bits\":4,\"is_marlin_format\":true"), "\"marlin\""},
        {CONFIG("\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":0.5"), "group_size must be an integer"},
        {CONFIG("\"quant_method\":\"awq\",\"bits\":4,\"version\":\"gemv\""), "version \"gemv\""},
        {CONFIG("\"quant_method\":\"awq\",\"bits\":4,\"version\":\"marlin\""), "version \"marlin\""},
        {CONFIG("\"quant_method\":\"awq\",\"bits\":8"), "8 bits"},
        {CONFIG("\"quant_method\":\"awq\",\"bits\":4,\"zero_point\":false"), "zero_point is false, and"},
        {CONFIG("\"quant_method\":\"fp8\",\"ignored_layers\":[\"re:(\"]"),
         "ignored_layers: \"re:(\" is no regular expression: missing closing parenthesis"},
        {CONFIG("\"quant_method\":\"fp8\",\"fmt\":\"e5m2\""), "\"e5m2\""},
        {CONFIG("\"quant_method\":\"fp8\",\"weight_block_size\":[128]"), "two integers"},
        {CONFIG("\"quant_method\":\"fp8\",\"weight_block_size\":[0,128]"), "two integers"},
        {CONFIG("\"quant_method\":\"bitsandbytes\",\"load_in_8bit\":true"), "llm_int8"},
        {CONFIG("\"quant_method\":\"hqq\",\"quant_config\":{\"weight_quant_params\":{\"nbits\":2}}"), "2 bits"},
        {CONFIG("\"quant_method\":\"hqq\",\"quant_config\":{\"weight_quant_params\":{\"nbits\":4,\"axis\":0}}"),
         "axis is 0, and"},
        {CONFIG("\"quant_method\":\"modelopt\",\"quant_algo\":\"W4A8_AWQ\""), "\"W4A8_AWQ\""},
        {CONFIG("\"quant_method\":\"compressed-tensors\",\"format\":\"marlin-24\",\"config_groups\":{\"a\":{"
                "\"weights\":{\"num_bits\":4}}}"),
         "\"marlin-24\""},
        {CONFIG("\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\",\"config_groups\":{\"a\":{"
                "\"weights\":{\"num_bits\":3}}}"),
         "3 bits"},
        {CONFIG("\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\",\"config_groups\":{}"),
         "quantizes no weights"},
        {CONFIG("\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\",\"config_groups\":{\"a\":{"
                "\"weights\":{\"num_bits\":4}}},\"transform_config\":{\"config_groups\":{\"u\":{}}}"),
         "transform_config"},
        {CONFIG("\"quant_method\":\"compressed-tensors\",\"sparsity_config\":{\"format\":\"sparse-24-bitmask\"}"),
         "sparse-24-bitmask"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct opened opened;
        struct error err = {0};
        int rc = open_import(&opened, cases[i].config, goldens[0].tensors, 3, &err);
        if (rc != ERR_MODEL || !strstr(err.msg, cases[i].words) || !strstr(err.msg, "config.json"))
            fail_msg("%s: code %d, \"%s\" does not say \"%s\"", cases[i].config, rc, err.msg, cases[i].words);
    }
}

static const struct import_part refused_part = {"m.weight", N, K};

static void refused_choice(const char *config, const struct tensor *tensors, size_t count, const char *name,
                           const char *words)
{
    enum weight_kind kind;
    uint32_t group;
    struct opened opened;
    struct error err = {0};
    assert_int_equal(open_import(&opened, config, tensors, count, &err), 0);
    int rc = import_choose(opened.import, ROLE_O, &refused_part, 1, &kind, &group, &err);
    if (rc != ERR_MODEL || !strstr(err.msg, words))
        fail_msg("%s: code %d, \"%s\" does not say \"%s\"", name, rc, err.msg, words);
    close_import(&opened);
}

static void test_refused_tensors(void **state)
{
    (void)state;
    const char *gptq = goldens[0].config;
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
        refused_choice(gptq, cases[i].tensors, count, cases[i].name, cases[i].words);
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
        {gptq,
         {{"m.qweight", "I32", "[1,8]", WORDS(words)},
          {"m.qzeros", "I32", "[1,1]", &zeros_sevens, 4},
          {"m.scales", "F16", "[1,8]", WORDS(huge)}},
         "row 1: a scale or zero point is too large"},
        {gptq,
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
        assert_int_equal(open_import(&opened, rows[i].config, rows[i].tensors, rows[i].tensors[2].name ? 3 : 2, &err),
                         0);
        assert_int_equal(import_choose(opened.import, ROLE_O, &refused_part, 1, &kind, &group, &err), 0);
        struct packed_row row = new_row(kind, group, K);
        assert_int_equal(import_read(opened.import, &window, "m.weight", 0, N, &err), 0);
        for (uint64_t n = 0; n < N && !rc; n++)
            rc = import_row(opened.import, &window, n, kind, group, &row, &err);
        if (rc != ERR_MODEL || !strstr(err.msg, rows[i].words))
            fail_msg("code %d, \"%s\" does not say \"%s\"", rc, err.msg, rows[i].words);
        free_row(&row);
        import_window_free(&window);
        close_import(&opened);
    }
}

// Lists of modules that nobody writes but to keep others waiting.
static void test_costly_patterns(void **state)
{
    (void)state;
    static char text[1 << 18];
    static const struct {
        const char *pattern;
        int count;
        const char *words;
    } cases[] = {
        {"\"m\"", 10001, "lists 10001 modules, more than the 10000"},
        {"\"re:m\"", 257, "more than 256 regular expressions"},
        {"\"re:(.+)+[!?]\"", 1, "\"re:(.+)+[!?]\" takes more than 10000 steps on \"model.layers.0.mlp.down_proj\""},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct import_config config = {0};
        const struct import_form *form;
        struct json_object root = {0};
        struct error err = {0};
        int at = snprintf(text, sizeof text, "{\"quantization_config\":{\"quant_method\":\"fp8\",\"ignored_layers\":[");
        for (int n = 0; n < cases[i].count; n++)
            at += snprintf(text + at, sizeof text - (size_t)at, "%s%s", n ? "," : "", cases[i].pattern);
        at += snprintf(text + at, sizeof text - (size_t)at, "]}}");
        assert_int_equal(json_file_parse(&root, text, (size_t)at, "config.json", ERR_MODEL, &err), 0);
        int rc = import_config_parse(&config, &root, NULL, &err);
        if (!rc)
            rc = import_config_form(&form, &config, "model.layers.0.mlp.down_proj", &err);
        if (rc != ERR_MODEL || !strstr(err.msg, cases[i].words))
            fail_msg("code %d, \"%s\" does not say \"%s\"", rc, err.msg, cases[i].words);
        import_config_clear(&config);
        json_file_close(&root);
    }
}

// Which modules a config quantizes, without a checkpoint.
static void test_config_forms(void **state)
{
    (void)state;
    static const struct {
        const char *config, *module;
        bool quantized;
    } cases[] = {
        {CONFIG("\"quant_method\":\"gptq\",\"bits\":4"), "model.layers.0.mlp.down_proj", true},
        {CONFIG("\"quant_method\":\"gptq\",\"bits\":4"), "lm_head", false},
        {CONFIG("\"quant_method\":\"gptq\",\"bits\":4,\"lm_head\":true"), "lm_head", true},
        {CONFIG("\"quant_method\":\"gptq\",\"bits\":4,\"lm_head\":true"), "model.embed_tokens", false},
        {CONFIG("\"quant_method\":\"fp8\",\"modules_to_not_convert\":[\"mlp\"]"), "model.layers.0.mlp.down_proj",
         false},
        {CONFIG("\"quant_method\":\"fp8\",\"modules_to_not_convert\":[\"ml\"]"), "model.layers.0.mlp.down_proj", true},
        {CONFIG("\"quant_method\":\"modelopt\",\"quant_algo\":\"NVFP4\",\"exclude_modules\":[\"model.layers.0*\"]"),
         "model.layers.0.mlp.down_proj", false},
        {CONFIG("\"quant_method\":\"mxfp4\""), "model.layers.0.self_attn.q_proj", false},
        {CONFIG("\"quant_method\":\"mxfp4\""), "model.layers.0.mlp.experts.down_proj", true},
        {CONFIG("\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\",\"ignore\":[\"re:.*down.*\"],"
                "\"config_groups\":{\"a\":{\"targets\":[\"Linear\"],\"weights\":{\"num_bits\":4}}}"),
         "model.layers.0.mlp.down_proj", false},
        {CONFIG("\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\",\"ignore\":[\"re:(a+)+$\"],"
                "\"config_groups\":{\"a\":{\"targets\":[\"re:.*up_proj$\"],\"weights\":{\"num_bits\":4}}}"),
         "model.layers.0.mlp.up_proj", true},
        {CONFIG("\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\","
                "\"config_groups\":{\"a\":{\"targets\":[\"re:.*up_proj$\"],\"weights\":{\"num_bits\":4}}}"),
         "model.layers.0.mlp.down_proj", false},
        {"{}", "model.layers.0.mlp.down_proj", false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct json_object root = {0};
        struct import_config config = {0};
        struct error err;
        const char *text = cases[i].config;
        assert_int_equal(json_file_parse(&root, text, strlen(text), "config.json", ERR_MODEL, &err), 0);
        assert_int_equal(import_config_parse(&config, &root, NULL, &err), 0);
        const struct import_form *form = NULL;
        assert_int_equal(import_config_form(&form, &config, cases[i].module, &err), 0);
        if ((form != NULL) != cases[i].quantized)
            fail_msg("%s: %s", text, cases[i].module);
        import_config_clear(&config);
        json_file_close(&root);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_goldens),         cmocka_unit_test(test_fp4),
        cmocka_unit_test(test_stacked_blocks),  cmocka_unit_test(test_bytes),
        cmocka_unit_test(test_bitsandbytes),    cmocka_unit_test(test_hqq),
        cmocka_unit_test(test_input_order),     cmocka_unit_test(test_down_order),
        cmocka_unit_test(test_other_order),     cmocka_unit_test(test_mixed_parts),
        cmocka_unit_test(test_refused_configs), cmocka_unit_test(test_refused_tensors),
        cmocka_unit_test(test_config_forms),    cmocka_unit_test(test_costly_patterns),
        cmocka_unit_test(test_column_blocks),   cmocka_unit_test(test_uneven_groups),
    };
    return cmocka_run_group_tests(tests, enter_directory, leave_directory);
}
