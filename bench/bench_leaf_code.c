// What compressed leaves save and what decoding them costs. One line for each kind of weight, of a synthetic matrix stored as a rank file holds it
// (Gaussian weights, whose deviation varies from row to row); with arguments, one for each rank file, of its first 64 MiB.
//
// Times are of one thread's processor, so that other programs do not count; of several runs the quickest.
//
// int4-g128-max: plain rounding (convert --scales max). The scales that tpshard searches leave less error and codes that are more equally
// frequent, so that there is less to gain.
//
//   ratio            size after / size before
//   bound            what an ideal code of single bytes, or of the planes' single bytes, would reach
//   codes            leaves raw/zstd/planes
//   encode, decode   GB/s of payload
#include "bench/bandwidth.h"
#include "formats/leaf_code.h"
#include "formats/number_formats.h"
#include "formats/shard_file.h"
#include "kernels/pack.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS = 1024, COLS = 4096, RUNS = 7, FILE_BYTES = 64 << 20 };

static uint64_t random_state = 0x9e3779b97f4a7c15u;

static double uniform(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return ((double)(random_state * 0x2545f4914f6cdd1du >> 11) + 0.5) / 9007199254740992.0;
}

static double gaussian(void) { return sqrt(-2 * log(uniform())) * cos(6.283185307179586 * uniform()); }

static void must(bool holds, const char *what)
{
    if (holds)
        return;
    fprintf(stderr, "bench_leaf_code: %s\n", what);
    exit(1);
}

// ---- one measurement ------------------------------------------------------------------------------------------------

struct stored {
    enum leaf_code code;
    uint8_t *bytes;
    uint64_t num_bytes;
};

static uint64_t leaf_bytes(uint64_t payload_bytes, uint64_t leaf)
{
    uint64_t left = payload_bytes - leaf * LEAF_MAX_BYTES;
    return left < LEAF_MAX_BYTES ? left : LEAF_MAX_BYTES;
}

// Bits that a byte of a sequence carries, each on its own.
static double entropy(const uint64_t counts[256], uint64_t total)
{
    double bits = 0;
    for (int i = 0; i < 256; i++)
        if (counts[i])
            bits -= (double)counts[i] / (double)total * log2((double)counts[i] / (double)total);
    return bits;
}

static double bound_of(const uint8_t *payload, uint64_t payload_bytes)
{
    uint64_t single[256] = {0}, high[256] = {0};
    for (uint64_t i = 0; i < payload_bytes; i++)
        single[payload[i]]++;
    for (uint64_t i = 0; i + 1 < payload_bytes; i += 2)
        high[(payload[i + 1] << 1 | payload[i] >> 7) & 255]++;
    double bytes = entropy(single, payload_bytes) / 8, planes = 0.5 + entropy(high, payload_bytes / 2) / 16;
    return bytes < planes ? bytes : planes;
}

static void measure(const char *data, const uint8_t *payload, uint64_t payload_bytes)
{
    uint64_t leaves = (payload_bytes + LEAF_MAX_BYTES - 1) / LEAF_MAX_BYTES, total = 0, codes[LEAF_CODE_COUNT] = {0};
    struct stored *stored = calloc(leaves, sizeof *stored);
    struct leaf_encoder *encoder = leaf_encoder_new();
    struct leaf_scratch *scratch = leaf_scratch_new();
    uint8_t *again = malloc(LEAF_MAX_BYTES);
    double encode_s = 0, decode_s = 1e9;
    struct error err;
    must(stored && encoder && scratch && again, "out of memory");
    for (uint64_t i = 0; i < leaves; i++) {
        const uint8_t *bytes;
        double begin = bench_thread_seconds();
        must(leaf_encode(&stored[i].code, &bytes, &stored[i].num_bytes, encoder, payload + i * LEAF_MAX_BYTES,
                         leaf_bytes(payload_bytes, i), &err) == 0,
             "cannot encode");
        encode_s += bench_thread_seconds() - begin;
        must((stored[i].bytes = malloc(stored[i].num_bytes)) != NULL, "out of memory");
        memcpy(stored[i].bytes, bytes, stored[i].num_bytes);
        total += stored[i].num_bytes;
        codes[stored[i].code]++;
    }
    for (int run = 0; run < RUNS; run++) {
        double seconds = 0;
        for (uint64_t i = 0; i < leaves; i++) {
            uint64_t bytes = leaf_bytes(payload_bytes, i);
            double begin = bench_thread_seconds();
            const char *wrong =
                leaf_decode(again, bytes, stored[i].code, stored[i].bytes, stored[i].num_bytes, scratch);
            seconds += bench_thread_seconds() - begin;
            must(!wrong && memcmp(again, payload + i * LEAF_MAX_BYTES, bytes) == 0, "what was decoded differs");
        }
        decode_s = seconds < decode_s ? seconds : decode_s;
    }
    printf("leaf_code data=%s mib=%.1f ratio=%.4f bound=%.4f codes=%llu/%llu/%llu encode_gb_s=%.3f decode_gb_s=%.2f\n",
           data, (double)payload_bytes / (1 << 20), (double)total / (double)payload_bytes,
           bound_of(payload, payload_bytes), (unsigned long long)codes[LEAF_RAW], (unsigned long long)codes[LEAF_ZSTD],
           (unsigned long long)codes[LEAF_PLANES], (double)payload_bytes / encode_s * 1e-9,
           (double)payload_bytes / decode_s * 1e-9);
    fflush(stdout);
    for (uint64_t i = 0; i < leaves; i++)
        free(stored[i].bytes);
    free(stored);
    free(again);
    leaf_encoder_free(encoder);
    leaf_scratch_free(scratch);
}

// ---- what is measured -----------------------------------------------------------------------------------------------

static void measure_kind(const float *weights, enum weight_kind kind, uint32_t group_size, enum weight_scales scales)
{
    struct weight_shape shape;
    struct packed_row row;
    struct error err;
    char name[32];
    must(weight_shape_make(&shape, kind, group_size, ROWS, COLS), "no such kind");
    uint64_t bytes = shape.data_bytes + shape.scale_bytes;
    uint8_t *payload = calloc(1, bytes), *memory = malloc(packed_row_bytes(kind, group_size, COLS));
    must(payload && memory, "out of memory");
    packed_row_place(&row, memory, kind, group_size, COLS);
    for (uint64_t r = 0; r < ROWS; r++) {
        const float *from = weights + r * COLS;
        int rc = scales == WEIGHT_SCALES_LARGEST ? pack_round_row(&row, kind, group_size, from, COLS, &err)
                                                 : pack_quantize_row(&row, kind, group_size, from, COLS, NULL, &err);
        must(rc == 0, "cannot quantize");
        pack_store_row(payload, payload + shape.data_bytes, &shape, 0, r, &row, 0);
    }
    snprintf(name, sizeof name, group_size ? "%s-g%u%s" : "%s", weight_kind_name(kind), group_size,
             scales == WEIGHT_SCALES_LARGEST ? "-max" : "");
    measure(name, payload, bytes);
    free(memory);
    free(payload);
}

static void measure_file(const char *path)
{
    struct shard_file *file;
    struct error err;
    must(shard_file_open(&file, path, &err) == 0, "cannot open the rank file");
    uint64_t bytes = shard_file_payload_bytes(file);
    must(!shard_file_is_compressed(file), "the rank file is compressed already");
    measure(path, shard_file_payload(file), bytes < FILE_BYTES ? bytes : FILE_BYTES);
    shard_file_close(file);
}

int main(int argc, char **argv)
{
    static const struct {
        enum weight_kind kind;
        uint32_t group_size;
    } kinds[] = {{WEIGHT_F32, 0},    {WEIGHT_BF16, 0},   {WEIGHT_INT8, 0},  {WEIGHT_FP8, 0},
                 {WEIGHT_FP8G, 128}, {WEIGHT_INT4, 128}, {WEIGHT_INT4, 32}, {WEIGHT_INT4Z, 128},
                 {WEIGHT_NL4, 128},  {WEIGHT_MXFP4, 32}, {WEIGHT_NVFP4, 16}};
    for (int i = 1; i < argc; i++)
        measure_file(argv[i]);
    if (argc > 1)
        return 0;
    float *weights = malloc(sizeof *weights * ROWS * COLS);
    must(weights != NULL, "out of memory");
    for (int r = 0; r < ROWS; r++) {
        double deviation = 0.02 * exp(0.3 * gaussian());
        for (int c = 0; c < COLS; c++)
            weights[(size_t)r * COLS + (size_t)c] = (float)(deviation * gaussian());
    }
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        measure_kind(weights, kinds[i].kind, kinds[i].group_size, WEIGHT_SCALES_SEARCHED);
    measure_kind(weights, WEIGHT_INT4, 128, WEIGHT_SCALES_LARGEST);
    measure_kind(weights, WEIGHT_INT4Z, 128, WEIGHT_SCALES_LARGEST);
    measure_kind(weights, WEIGHT_NL4, 128, WEIGHT_SCALES_LARGEST);
    free(weights);
    return 0;
}
