// Calibration files: what was written is read, the triangle of each input beside its diagonal; a run that was cut off anywhere goes on behind the last
// complete layer and ends in the same bytes; every changed byte and every shorter file is refused; and keys depend on the model and not on the cut.
#include "formats/calibration_file.h"

#include <fcntl.h>
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

enum { LAYERS = 3, COLS = 21, EXPERTS = 2, EXPERT_COLS = 7, MAX_BYTES = 1 << 16 };
enum { TRIANGLE_BYTES = (COLS * (COLS + 1) / 2 * 4 + 63) / 64 * 64 }; // with the zeros behind it

static char directory[] = "/tmp/test_calibration_file_XXXXXX", path[128];
static struct calibration_header header;
static uint8_t whole[MAX_BYTES];
static uint64_t whole_bytes;

static float number(int32_t layer, int32_t expert, uint64_t i)
{
    return (float)(layer + 2) + 10 * (float)(expert + 1) + (float)i / 64;
}

static struct calibration_moments moments(enum calibration_input input, int32_t layer, int32_t expert, float *room)
{
    struct calibration_moments m = {
        .input = input, .layer = layer, .expert = expert, .rows = 77, .cols = expert < 0 ? COLS : EXPERT_COLS};
    float *triangle = room + m.cols;
    for (uint64_t i = 0; i < m.cols; i++)
        room[i] = number(layer, expert, i);
    for (uint64_t i = 0; i < calibration_triangle_elems(m.cols); i++)
        triangle[i] = -number(layer, expert, 1000 + i);
    m.diagonal = room;
    m.triangle = expert < 0 ? triangle : NULL;
    return m;
}

static void check(int rc, const struct error *err)
{
    if (rc)
        fail_msg("%s", err->msg);
}

static void add(struct calibration_writer *writer, enum calibration_input input, int32_t layer, int32_t expert)
{
    float room[COLS + COLS * (COLS + 1) / 2];
    struct error err;
    struct calibration_moments m = moments(input, layer, expert, room);
    check(calibration_writer_add(writer, &m, &err), &err);
}

// Writes what is missing; returns how many layers were there.
static uint32_t write_rest(uint32_t stop_behind)
{
    struct calibration_writer *writer;
    struct error err;
    uint32_t done;
    bool finished;
    check(calibration_writer_open(&writer, path, &header, &done, &finished, &err), &err);
    for (uint32_t layer = done; layer < LAYERS && layer < stop_behind; layer++) {
        add(writer, CALIBRATION_ATTENTION, (int32_t)layer, -1);
        for (int32_t expert = EXPERTS - 1; expert >= 0; expert--)
            add(writer, CALIBRATION_EXPERT_DOWN, (int32_t)layer, expert);
        check(calibration_writer_end_layer(writer, &err), &err);
    }
    if (stop_behind > LAYERS && !finished) {
        add(writer, CALIBRATION_HEAD, -1, -1);
        check(calibration_writer_finish(writer, &err), &err);
    }
    calibration_writer_close(writer);
    return finished ? UINT32_MAX : done;
}

static uint64_t read_all(uint8_t *bytes)
{
    FILE *in = fopen(path, "r");
    assert_non_null(in);
    uint64_t count = fread(bytes, 1, MAX_BYTES, in);
    fclose(in);
    return count;
}

static void write_all(const uint8_t *bytes, uint64_t count)
{
    FILE *out = fopen(path, "w");
    assert_non_null(out);
    assert_int_equal(fwrite(bytes, 1, count, out), count);
    assert_int_equal(fclose(out), 0);
}

static int setup(void **state)
{
    (void)state;
    const struct checksum128 key = {1, 2};
    assert_non_null(mkdtemp(directory));
    snprintf(path, sizeof path, "%s/statistics", directory);
    calibration_header_make(&header, LAYERS, 512, 1234, key, key, key, "a name that is longer than the field");
    assert_int_equal(write_rest(LAYERS + 1), 0);
    whole_bytes = read_all(whole);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    unlink(path);
    return rmdir(directory);
}

static void test_read(void **state)
{
    (void)state;
    struct calibration_file *file;
    struct error err;
    bool has_triangle;
    write_all(whole, whole_bytes);
    check(calibration_file_open(&file, path, &err), &err);
    assert_int_equal(calibration_file_count(file), LAYERS * (1 + EXPERTS) + 1);
    assert_int_equal(calibration_file_header(file)->tokens, 1234);
    assert_null(calibration_file_find(file, CALIBRATION_O, 1, -1, NULL));
    assert_null(calibration_file_find(file, CALIBRATION_ATTENTION, LAYERS, -1, NULL));
    for (int32_t layer = -1; layer < LAYERS; layer++)
        for (int32_t expert = -1; expert < (layer < 0 ? 0 : EXPERTS); expert++) {
            enum calibration_input input = layer < 0    ? CALIBRATION_HEAD
                                           : expert < 0 ? CALIBRATION_ATTENTION
                                                        : CALIBRATION_EXPERT_DOWN;
            const struct calibration_moments *m = calibration_file_find(file, input, layer, expert, &has_triangle);
            assert_non_null(m);
            assert_int_equal(m->rows, 77);
            assert_int_equal(m->cols, expert < 0 ? COLS : EXPERT_COLS);
            assert_true(has_triangle == (expert < 0));
            for (uint64_t i = 0; i < m->cols; i++)
                assert_true(m->diagonal[i] == number(layer, expert, i));
            if (!has_triangle)
                continue;
            float triangle[COLS * (COLS + 1) / 2];
            check(calibration_file_triangle(file, m, triangle, &err), &err);
            for (uint64_t i = 0; i < calibration_triangle_elems(m->cols); i++)
                assert_true(triangle[i] == -number(layer, expert, 1000 + i));
        }
    calibration_file_close(file);
}

// A crash at any byte: what is there is unfinished to a reader, and the writer ends in the same bytes.
static void test_resume(void **state)
{
    (void)state;
    uint32_t seen = 0;
    static uint8_t again[MAX_BYTES];
    for (uint64_t bytes = 0; bytes < whole_bytes; bytes += bytes < 140 ? 23 : 211) {
        struct calibration_file *file;
        struct error err;
        write_all(whole, bytes);
        assert_int_equal(calibration_file_open(&file, path, &err), ERR_CORRUPT);
        uint32_t done = write_rest(LAYERS + 1);
        assert_true(done >= seen && done <= LAYERS);
        seen = done;
        assert_int_equal(read_all(again), whole_bytes);
        assert_memory_equal(again, whole, whole_bytes);
    }
    assert_int_equal(seen, LAYERS);
    assert_int_equal(write_rest(LAYERS + 1), UINT32_MAX); // nothing left to do
    unlink(path);
    assert_int_equal(write_rest(2), 0); // stopped by intent
    assert_int_equal(write_rest(LAYERS + 1), 2);
    assert_int_equal(read_all(again), whole_bytes);
    assert_memory_equal(again, whole, whole_bytes);
}

static void test_damage(void **state)
{
    (void)state;
    static uint8_t bytes[MAX_BYTES];
    static float triangle[COLS * (COLS + 1) / 2];
    int refused_late = 0;
    for (uint64_t at = 0; at < whole_bytes; at++) {
        struct calibration_file *file;
        struct error err;
        memcpy(bytes, whole, whole_bytes);
        bytes[at] ^= 0x10;
        write_all(bytes, whole_bytes);
        int rc = calibration_file_open(&file, path, &err);
        if (rc) {
            assert_int_equal(rc, ERR_CORRUPT);
            continue;
        }
        bool refused = false; // in a triangle or the zeros behind it
        for (uint64_t i = 0; i < calibration_file_count(file); i++) {
            bool has_triangle;
            const struct calibration_moments *m = calibration_file_at(file, i, &has_triangle);
            if (has_triangle && calibration_file_triangle(file, m, triangle, &err) == ERR_CORRUPT) {
                refused_late++;
                refused = true;
            }
        }
        if (!refused)
            fail_msg("byte %llu may change", (unsigned long long)at);
        calibration_file_close(file);
    }
    assert_int_equal(refused_late, (LAYERS + 1) * TRIANGLE_BYTES);
    memcpy(bytes, whole, whole_bytes);
    write_all(bytes, whole_bytes + 1);
    struct calibration_file *file;
    struct error err;
    assert_int_equal(calibration_file_open(&file, path, &err), ERR_CORRUPT);
}

static void test_writer_refuses(void **state)
{
    (void)state;
    struct calibration_writer *writer;
    struct calibration_header other = header;
    struct error err;
    uint32_t done;
    bool finished;
    static uint8_t again[MAX_BYTES];
    const struct checksum128 key = {1, 2}, text = {3, 4};
    write_all(whole, whole_bytes);
    calibration_header_make(&other, LAYERS, 512, 1234, key, key, text, "avx2");
    assert_int_equal(calibration_writer_open(&writer, path, &other, &done, &finished, &err), ERR_USAGE);
    assert_non_null(strstr(err.msg, "another one"));
    calibration_header_make(&other, LAYERS, 512, 1234, key, key, key, "avx2");
    assert_int_equal(calibration_writer_open(&writer, path, &other, &done, &finished, &err), ERR_USAGE);
    assert_non_null(strstr(err.msg, "--backend a name that is longer"));
    assert_int_equal(read_all(again), whole_bytes);
    write_all((const uint8_t *)"a file of the user's own", 24);
    assert_int_equal(calibration_writer_open(&writer, path, &header, &done, &finished, &err), ERR_USAGE);
    assert_int_equal(read_all(again), 24);
    assert_int_equal(calibration_writer_open(&writer, directory, &header, &done, &finished, &err), ERR_IO);
    unlink(path);
    check(calibration_writer_open(&writer, path, &header, &done, &finished, &err), &err);
    float room[COLS + COLS * (COLS + 1) / 2];
    struct calibration_moments m = moments(CALIBRATION_ATTENTION, 1, -1, room);
    assert_int_equal(calibration_writer_add(writer, &m, &err), ERR_OTHER); // layer 0 comes first
    m = moments(CALIBRATION_ATTENTION, 0, -1, room);
    room[3] = NAN;
    assert_int_equal(calibration_writer_add(writer, &m, &err), ERR_MODEL);
    assert_non_null(strstr(err.msg, "column 3"));
    assert_int_equal(calibration_writer_finish(writer, &err), ERR_OTHER); // layers are missing
    calibration_writer_close(writer);
}

static void test_keys(void **state)
{
    (void)state;
    struct manifest_file sources[] = {{(char *)"a.safetensors", 5, {7, 8}}, {(char *)"config.json", 6, {9, 10}}};
    struct manifest a = {.version = MANIFEST_VERSION, .tp_size = 4, .pp_size = 1, .sources = sources, .num_sources = 2};
    struct checksum128 model, weights, again;
    struct error err;
    a.model.num_layers = 1;
    a.quant =
        (struct manifest_quant){.linear = WEIGHT_INT4, .group_size = 64, .embedding = WEIGHT_BF16, .head = WEIGHT_INT8};
    check(calibration_model_key(&a, &model, &err), &err);
    check(calibration_weights_key(&a, &weights, &err), &err);
    assert_false(checksum128_equal(model, weights));
    a.tp_size = 2;
    a.experts = EXPERTS_EP;
    a.quant.linear = WEIGHT_FP8;
    check(calibration_weights_key(&a, &again, &err), &err);
    assert_true(checksum128_equal(weights, again));
    sources[0].hash.low++;
    check(calibration_weights_key(&a, &again, &err), &err);
    assert_false(checksum128_equal(weights, again));
    check(calibration_model_key(&a, &again, &err), &err);
    assert_true(checksum128_equal(model, again));
    a.model.hidden_size++;
    check(calibration_model_key(&a, &again, &err), &err);
    assert_false(checksum128_equal(model, again));
}

static void test_inputs(void **state)
{
    (void)state;
    static const struct {
        enum tensor_role role;
        int64_t q_rank;
        bool tied;
        int input; // -1: none
    } cases[] = {
        {ROLE_QKV, 0, false, CALIBRATION_ATTENTION},
        {ROLE_Q_B, 0, false, CALIBRATION_ATTENTION},
        {ROLE_Q_B, 8, false, CALIBRATION_Q_LATENT},
        {ROLE_KV_B, 8, false, -1},
        {ROLE_ROUTER, 0, false, -1},
        {ROLE_FINAL_NORM, 0, false, -1},
        {ROLE_EXPERT_GATE_UP, 0, false, CALIBRATION_MLP},
        {ROLE_EXPERT_DOWN, 0, false, CALIBRATION_EXPERT_DOWN},
        {ROLE_SHARED_DOWN, 0, false, CALIBRATION_DOWN},
        {ROLE_EMBEDDING, 0, false, -1},
        {ROLE_EMBEDDING, 0, true, CALIBRATION_HEAD},
        {ROLE_HEAD, 0, false, CALIBRATION_HEAD},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct model_desc model = {.latent.q_rank = cases[i].q_rank, .tied_embeddings = cases[i].tied};
        enum calibration_input input;
        bool any = calibration_input_of(&input, cases[i].role, &model);
        if (any != (cases[i].input >= 0) || (any && (int)input != cases[i].input))
            fail_msg("role %s: %d", tensor_role_name(cases[i].role), any ? (int)input : -1);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_read),           cmocka_unit_test(test_resume), cmocka_unit_test(test_damage),
        cmocka_unit_test(test_writer_refuses), cmocka_unit_test(test_keys),   cmocka_unit_test(test_inputs),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
