// config.json, and behind a zero byte model.safetensors: any quantization config and any tensors may be refused, with a
// sentence; what is accepted must give rows.
#include "shard/import.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tests/fuzz/fuzz.h"

enum { MOST_ELEMS = 1 << 16, MOST_TENSORS = 64, WINDOW_ROWS = 5 };

static char scratch[] = "/tmp/fuzz_import.XXXXXX";

static void remove_scratch(void)
{
    char path[64];
    snprintf(path, sizeof path, "%s/model.safetensors", scratch);
    remove(path);
    remove(scratch);
}

static const char *directory(void)
{
    static bool made;
    if (!made)
        CHECK(mkdtemp(scratch) && atexit(remove_scratch) == 0);
    made = true;
    return scratch;
}

static void write_checkpoint(const uint8_t *data, size_t size)
{
    char path[64];
    snprintf(path, sizeof path, "%s/model.safetensors", directory());
    FILE *file = fopen(path, "w");
    CHECK(file && fwrite(data, 1, size, file) == size && fclose(file) == 0);
}

static void check_refused(int rc, const struct error *err) { CHECK(rc == ERR_MODEL && err->msg[0]); }

// Every row as the kind that was chosen, and as another.
static void read_rows(struct import *import, const struct import_part *part, enum weight_kind kind, uint32_t group)
{
    struct import_window window = {0};
    struct packed_row row;
    struct error err;
    float *values = malloc(part->cols * sizeof *values);
    void *memory = malloc(packed_row_bytes(kind, group, part->cols) + packed_row_bytes(WEIGHT_BF16, 0, part->cols));
    CHECK(values && memory);
    for (uint64_t begin = 0; begin < part->rows; begin += WINDOW_ROWS) {
        uint64_t rows = part->rows - begin < WINDOW_ROWS ? part->rows - begin : WINDOW_ROWS;
        int rc = import_read(import, &window, part->source, begin, rows, &err);
        if (rc) {
            check_refused(rc, &err);
            break;
        }
        for (uint64_t i = begin; i < begin + rows; i++) {
            packed_row_place(&row, memory, kind, group, part->cols);
            if ((rc = import_row(import, &window, i, kind, group, WEIGHT_SCALES_SEARCHED, &row, &err)))
                check_refused(rc, &err);
            if ((rc = import_values(import, &window, i, values, &err)))
                check_refused(rc, &err);
            packed_row_place(&row, memory, WEIGHT_BF16, 0, part->cols);
            if ((rc = import_row(import, &window, i, WEIGHT_BF16, 0, WEIGHT_SCALES_SEARCHED, &row, &err)))
                check_refused(rc, &err);
        }
    }
    free(values);
    free(memory);
    import_window_free(&window);
}

static void try_matrix(const struct import_config *config, const struct checkpoint *checkpoint, const char *source,
                       uint64_t rows, uint64_t cols)
{
    static const enum tensor_role roles[] = {ROLE_QKV, ROLE_GATE_UP, ROLE_DOWN, ROLE_O};
    struct import *import;
    struct error err;
    if (rows < 1 || cols < 1 || rows > MOST_ELEMS || cols > MOST_ELEMS || rows * cols > MOST_ELEMS)
        return;
    CHECK(import_open(&import, config, checkpoint, &err) == 0);
    for (size_t i = 0; i < sizeof roles / sizeof roles[0]; i++) {
        struct import_part part = {source, rows, cols};
        enum weight_kind kind;
        uint32_t group;
        struct weight_shape shape;
        int rc = import_choose(import, roles[i], &part, 1, &kind, &group, &err);
        if (rc) {
            check_refused(rc, &err);
            break;
        }
        CHECK(weight_shape_make(&shape, kind, group, rows, cols));
        if (import_serves(import, source))
            read_rows(import, &part, kind, group);
        for (size_t t = 0; t < checkpoint_tensor_count(checkpoint) && t < MOST_TENSORS; t++) {
            bool known;
            CHECK(import_tensor_known(import, checkpoint_tensor(checkpoint, t), &known, &err) == 0);
        }
    }
    import_close(import);
}

// The matrix that a tensor may belong to, by the shapes that each layout gives it.
static void try_tensor(const struct import_config *config, const struct checkpoint *checkpoint,
                       const struct safetensors_tensor *tensor)
{
    static const char *const endings[] = {".qweight", ".weight_packed", ".W_q", "_blocks", ".weight"};
    char source[256];
    const uint64_t *d = tensor->dims;
    for (size_t i = 0; i < sizeof endings / sizeof endings[0]; i++) {
        size_t length = strlen(tensor->name), tail = strlen(endings[i]);
        if (length <= tail || length > 200 || strcmp(tensor->name + length - tail, endings[i]) != 0)
            continue;
        bool stack = strcmp(endings[i], "_blocks") == 0;
        snprintf(source, sizeof source, "%.*s%s", (int)(length - tail), tensor->name, stack ? "[0]" : ".weight");
        if (tensor->num_dims == 4)
            try_matrix(config, checkpoint, source, d[1], d[2] * 32);
        if (tensor->num_dims != 2 || d[0] > MOST_ELEMS || d[1] > MOST_ELEMS)
            continue;
        try_matrix(config, checkpoint, source, d[0], d[1]);     // bytes
        try_matrix(config, checkpoint, source, d[0], d[1] * 2); // nibbles
        try_matrix(config, checkpoint, source, d[0], d[1] * 8); // words along the row
        try_matrix(config, checkpoint, source, d[1], d[0] * 8); // gptq
        try_matrix(config, checkpoint, source, d[1], d[0] * 4);
        try_matrix(config, checkpoint, source, d[1] * 8, d[0]); // awq
        try_matrix(config, checkpoint, source, 8, d[0] / 4);    // flat
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const uint8_t *zero = size ? memchr(data, 0, size) : NULL;
    size_t config_bytes = zero ? (size_t)(zero - data) : size;
    struct json_object root = {0};
    struct import_config config = {0};
    struct checkpoint *checkpoint = NULL;
    struct error err;
    int rc;
    if (json_file_parse(&root, (const char *)data, config_bytes, "config.json", ERR_MODEL, &err))
        return 0;
    if ((rc = import_config_parse(&config, &root, &root, &err)))
        check_refused(rc, &err);
    json_file_close(&root);
    const struct import_form *form;
    if (!rc)
        rc = import_config_form(&form, &config, "model.layers.0.mlp.down_proj", &err);
    if (rc || !zero)
        goto done;
    struct safetensors_header *header;
    uint64_t file_bytes = size - config_bytes - 1;
    if (safetensors_parse(zero + 1, file_bytes, file_bytes, "model.safetensors", &header, &err))
        goto done;
    safetensors_free(header);
    write_checkpoint(zero + 1, file_bytes);
    if (checkpoint_open(&checkpoint, directory(), &err))
        goto done;
    for (size_t t = 0; t < checkpoint_tensor_count(checkpoint) && t < MOST_TENSORS; t++)
        try_tensor(&config, checkpoint, checkpoint_tensor(checkpoint, t));
done:
    checkpoint_close(checkpoint);
    import_config_clear(&config);
    return 0;
}
