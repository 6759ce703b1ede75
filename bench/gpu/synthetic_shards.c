// Writes a shard directory with random codes, straight into the rank files: for whole-model benchmarks where making and
// quantizing a real checkpoint would take longer than the measurement. Weights have the spread of a trained model's, so that
// numbers stay in range; the text means nothing and there is no tokenizer.
//
//   synthetic_shards NAME QUANT out_dir [TP_SIZE]
//
// NAME is a shape below; it is cut for so many ranks (1). llama-3-70b/4 and /2 are what one card of four or two holds of Llama-3-70B, as a model of one rank: its decode
// and prefill time is a card's time without the exchange.
#include "formats/checked.h"
#include "formats/file_io.h"
#include "formats/number_formats.h"
#include "shard/plan.h"
#include "shard/progress.h"
#include "shard/rank_writer.h"

#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static const struct {
    const char *name;
    int64_t layers, hidden, heads, kv_heads, head_dim, mlp, vocab, context;
    double rope_base;
} shapes[] = {
    {"llama-3-8b", 32, 4096, 32, 8, 128, 14336, 128256, 8192, 500000},
    {"llama-3-70b/4", 80, 8192, 16, 2, 128, 7168, 32064, 8192, 500000},
    {"llama-3-70b/2", 80, 8192, 32, 4, 128, 14336, 64128, 8192, 500000},
    {"small", 2, 256, 4, 2, 64, 512, 1000, 1024, 10000}, // for a test of this program
};

enum { BLOCK_BYTES = 8 << 20, MOST_RANKS = 8 };

struct fill_job {
    uint8_t *payload;
    const uint8_t *block; // random bytes
    const struct plan *plan;
    uint32_t rank;
    double rope_base;
};

static void fill_floats(float *out, uint64_t count, float value)
{
    for (uint64_t i = 0; i < count; i++)
        out[i] = value;
}

// Codes of the kind from random bytes.
static void fill_codes(uint8_t *out, uint64_t bytes, enum weight_kind kind, const uint8_t *block, uint64_t seed)
{
    uint64_t at = seed * 4099 % (BLOCK_BYTES / 2) * 2;
    for (uint64_t done = 0; done < bytes;) {
        uint64_t part = bytes - done < BLOCK_BYTES - at ? bytes - done : BLOCK_BYTES - at;
        memcpy(out + done, block + at, part);
        done += part;
        at = 0;
    }
    if (kind == WEIGHT_FP8) // no NaN
        for (uint64_t i = 0; i < bytes; i++)
            out[i] &= 0xb7;
    if (kind == WEIGHT_BF16) // magnitudes from 2^-8 to 2^-5
        for (uint64_t i = 1; i < bytes; i += 2)
            out[i] = (uint8_t)((out[i] & 0x80) | 0x3c | (out[i] & 1));
}

static float inv_freq(uint64_t i, int64_t head_dim, double base)
{
    return (float)pow(base, -2.0 * (double)i / (double)head_dim);
}

static void fill_tensor(void *arg, int64_t index, int thread)
{
    (void)thread;
    const struct fill_job *job = arg;
    const struct shard_tensor *tensor = &job->plan->ranks[job->rank].tensors[index];
    uint8_t *data = job->payload + tensor->data_offset;
    void *scale = job->payload + tensor->scale_offset;
    const struct weight_shape *shape = &tensor->shape;
    switch (shape->kind) {
    case WEIGHT_F32:
        fill_floats((float *)(void *)data, shape->cols, 1.0f);
        if (tensor->role == ROLE_ROPE_INV_FREQ)
            for (uint64_t i = 0; i < shape->cols; i++)
                ((float *)(void *)data)[i] = inv_freq(i, job->plan->model.head_dim, job->rope_base);
        return;
    case WEIGHT_INT4: // codes spread by 4.6, so weights by 0.02
        for (uint64_t i = 0; i < shape->scale_bytes / 2; i++)
            ((uint16_t *)scale)[i] = f32_to_f16(1.1f);
        break;
    case WEIGHT_INT8:
        fill_floats(scale, shape->rows_padded, 0.02f / 74);
        break;
    case WEIGHT_FP8:
        fill_floats(scale, shape->rows_padded, 0.02f / 4);
        break;
    default:
        break;
    }
    fill_codes(data, shape->data_bytes, shape->kind, job->block, (uint64_t)index + 1000003 * job->rank);
}

static int fill_payload(const char *dir, const struct plan *plan, uint32_t rank, double rope_base,
                        struct thread_pool *pool, struct error *err)
{
    char name[64], path[4096];
    uint64_t state = 1;
    manifest_rank_file_name(name, sizeof name, rank, plan->tp_size, 1);
    snprintf(path, sizeof path, "%s/%s", dir, name);
    uint8_t *block = malloc(BLOCK_BYTES);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    size_t bytes = plan->ranks[rank].file_bytes;
    uint8_t *map = fd < 0 ? MAP_FAILED : mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    int rc = 0;
    if (!block || map == MAP_FAILED) {
        rc = error_set_errno(err, "%s", path);
    } else {
        for (int i = 0; i < BLOCK_BYTES; i++)
            block[i] = (uint8_t)((state = state * 6364136223846793005u + 1442695040888963407u) >> 56);
        struct fill_job job = {map + plan->ranks[rank].payload_offset, block, plan, rank, rope_base};
        thread_pool_run(pool, fill_tensor, &job, (int64_t)plan->tensor_count);
        munmap(map, bytes);
    }
    if (fd >= 0)
        close(fd);
    free(block);
    return rc;
}

static int write_model(const char *dir, const struct plan *plan, double rope_base, struct thread_pool *pool,
                       struct error *err)
{
    struct rank_writer *writer = NULL;
    struct manifest_file files[MOST_RANKS] = {{0}};
    struct progress progress;
    char wire[] = "bf16", tool[] = "synthetic_shards", *text = NULL;
    struct manifest manifest = {.version = MANIFEST_VERSION,
                                .tool = tool,
                                .model = plan->model,
                                .tp_size = plan->tp_size,
                                .pp_size = 1,
                                .quant = plan->quant,
                                .wire_advice = wire,
                                .ranks = files,
                                .num_ranks = plan->tp_size};
    int rc;
    progress_start(&progress, "", 0, true);
    if ((rc = rank_writer_open(&writer, dir, plan, false, false, err)))
        goto done;
    for (uint32_t rank = 0; rank < plan->tp_size; rank++)
        if ((rc = fill_payload(dir, plan, rank, rope_base, pool, err)))
            goto done;
    if ((rc = manifest_contract(&manifest, &manifest.contract, err)) ||
        (rc = rank_writer_finish(writer, manifest.contract, pool, &progress, files, err)) ||
        (rc = manifest_to_json(&manifest, &text, err)))
        goto done;
    rc = file_write_atomic(dir, MANIFEST_FILE_NAME, text, strlen(text), err);
done:
    rank_writer_free(writer);
    for (int rank = 0; rank < MOST_RANKS; rank++)
        free(files[rank].name);
    free(text);
    return rc;
}

int main(int argc, char **argv)
{
    struct error err = {0};
    int tp_size = argc == 5 ? atoi(argv[4]) : 1;
    struct plan_options options = {.tp_size = (uint32_t)tp_size};
    struct plan *plan = NULL;
    struct thread_pool *pool = NULL;
    size_t s = 0;
    bool right = argc == 4 || (argc == 5 && tp_size >= 1 && tp_size <= MOST_RANKS);
    while (right && s < sizeof shapes / sizeof *shapes && strcmp(shapes[s].name, argv[1]) != 0)
        s++;
    if (!right || s == sizeof shapes / sizeof *shapes) {
        fprintf(stderr,
                "usage: synthetic_shards llama-3-8b|llama-3-70b/4|llama-3-70b/2|small none|int8|int4|fp8 out_dir "
                "[1 to %d ranks]\n",
                MOST_RANKS);
        return 2;
    }
    struct model_desc model = {.architecture = "LlamaForCausalLM",
                               .num_layers = shapes[s].layers,
                               .hidden_size = shapes[s].hidden,
                               .intermediate_size = shapes[s].mlp,
                               .num_heads = shapes[s].heads,
                               .num_kv_heads = shapes[s].kv_heads,
                               .head_dim = shapes[s].head_dim,
                               .vocab_size = shapes[s].vocab,
                               .context = shapes[s].context,
                               .norm_eps = 1e-5,
                               .pre_norms = true,
                               .embedding_scale = 1,
                               .residual_scale = 1,
                               .logit_scale = 1,
                               .attention_scale = 1 / sqrt((double)shapes[s].head_dim),
                               .rotary_dim = shapes[s].head_dim,
                               .rope_attention_factor = 1,
                               .bos_token_id = -1,
                               .default_temperature = NAN,
                               .default_top_p = NAN,
                               .default_repetition_penalty = NAN,
                               .default_top_k = -1};
    int rc;
    if (mkdir(argv[3], 0777) != 0) {
        rc = error_set_errno(&err, "%s", argv[3]);
    } else if ((rc = plan_quant(&options.quant, argv[2], NULL, NULL, 128, false, &err)) == 0 &&
               (rc = plan_make(&plan, &model, &options, &err)) == 0 &&
               (rc = thread_pool_create(&pool, thread_pool_default_threads(), &err)) == 0) {
        rc = write_model(argv[3], plan, shapes[s].rope_base, pool, &err);
    }
    if (rc)
        fprintf(stderr, "synthetic_shards: %s\n", err.msg);
    thread_pool_free(pool);
    plan_free(plan);
    return -rc;
}
