// What the tests of quantized checkpoints share: a scratch directory, small checkpoints, golden codes, stored rows.
#ifndef TPSHARD_TESTS_IMPORT_HELP_H
#define TPSHARD_TESTS_IMPORT_HELP_H

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

#include "formats/number_formats.h"
#include "kernels/pack.h"
#include "shard/import.h"

// ---- checkpoints -------------------------------------------------------------------------------------------------

static char directory[64];

static inline int enter_directory(void **state)
{
    (void)state;
    strcpy(directory, "/tmp/test_import.XXXXXX");
    return !mkdtemp(directory);
}

static inline int leave_directory(void **state)
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

static inline void write_file(const char *name, const void *bytes, size_t num_bytes)
{
    char path[128];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    assert_int_equal(fwrite(bytes, 1, num_bytes, file), num_bytes);
    assert_int_equal(fclose(file), 0);
}

static inline void write_checkpoint(const struct tensor *tensors, size_t count)
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

#define WORDS(array) array, sizeof array
#define CONFIG(text) "{\"quantization_config\":{" text "}}"
#define GPTQ_SYMMETRIC CONFIG("\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":-1,\"sym\":true")

static inline int parse_config(struct import_config *out, const char *text, struct error *err)
{
    struct json_object root = {0};
    assert_int_equal(json_file_parse(&root, text, strlen(text), "config.json", ERR_MODEL, err), 0);
    int rc = import_config_parse(out, &root, NULL, err);
    json_file_close(&root);
    return rc;
}

struct opened {
    struct import_config config;
    struct checkpoint *checkpoint;
    struct import *import;
};

// What lies in the directory.
static inline void open_directory(struct opened *out, const char *config)
{
    struct error err = {0};
    *out = (struct opened){0};
    if (parse_config(&out->config, config, &err) || checkpoint_open(&out->checkpoint, directory, &err) ||
        import_open(&out->import, &out->config, out->checkpoint, &err))
        fail_msg("%s: %s", config, err.msg);
}

static inline void open_import(struct opened *out, const char *config, const struct tensor *tensors, size_t count)
{
    write_checkpoint(tensors, count);
    open_directory(out, config);
}

static inline void close_import(struct opened *opened)
{
    import_close(opened->import);
    checkpoint_close(opened->checkpoint);
    import_config_clear(&opened->config);
}

// ---- golden codes: q[k][n] = (3k + 5n + 1) & 15 --------------------------------------------------------------------

enum { N = 8, K = 8 };

static inline int golden_code(uint64_t k, uint64_t n) { return (int)((3 * k + 5 * n + 1) & 15); }

static const uint32_t gptq_words[N] = {0x630da741, 0xb852fc96, 0x0da741eb, 0x52fc9630,
                                       0xa741eb85, 0xfc9630da, 0x41eb852f, 0x9630da74};
static const uint32_t zeros_eights = 0x88888888, zeros_sevens = 0x77777777;
static const uint16_t f16_scales[N] = {0x3c00, 0x3800, 0x2e66, 0x2001, 0x0400, 0x0001, 0xb800, 0x5bff};
static const float f32_scales[N] = {1, 0.5f, 0.1f, 3e-5f, 1e-20f, 7, 123456, 1e10f};

// ---- rows ----------------------------------------------------------------------------------------------------------

static inline struct packed_row new_row(enum weight_kind kind, uint32_t group_size, uint64_t cols)
{
    struct packed_row row;
    void *memory = calloc(1, packed_row_bytes(kind, group_size, cols));
    assert_non_null(memory);
    packed_row_place(&row, memory, kind, group_size, cols);
    return row;
}

static inline void free_row(struct packed_row *row) { free(row->group_scales ? row->group_scales : row->q); }

// Rows [begin, begin + rows) as stored, dequantized, in out [rows][cols].
static inline void stored_values(struct opened *opened, const char *source, enum weight_kind kind, uint32_t group,
                                 uint64_t rows, uint64_t cols, float *out)
{
    struct import_window window = {0};
    struct packed_row row = new_row(kind, group, cols);
    struct error err;
    for (uint64_t begin = 0; begin < rows; begin += 3) { // windows that do not end with words
        uint64_t count = rows - begin < 3 ? rows - begin : 3;
        assert_int_equal(import_read(opened->import, &window, source, begin, count, &err), 0);
        for (uint64_t r = begin; r < begin + count; r++) {
            if (import_row(opened->import, &window, r, kind, group, WEIGHT_SCALES_SEARCHED, &row, &err))
                fail_msg("%s", err.msg);
            pack_dequantize_row(out + r * cols, &row, kind, group, cols);
        }
    }
    free_row(&row);
    import_window_free(&window);
}

#endif
