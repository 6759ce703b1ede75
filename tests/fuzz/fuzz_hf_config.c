// config.json, and behind a zero byte generation_config.json: any bytes may be refused, and what is accepted must be a
// description that can be planned and written into a manifest.
#include "formats/manifest.h"
#include "shard/hf_config.h"
#include "shard/plan.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                                            \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check_rope(const struct hf_config *config)
{
    float *table = malloc((size_t)config->model.head_dim / 2 * sizeof *table);
    CHECK(table);
    rope_inv_freq(table, &config->rope, config->model.head_dim);
    for (int64_t i = 0; i < config->model.head_dim / 2; i++)
        CHECK(isfinite(table[i]) && table[i] >= 0);
    free(table);
}

static void check_plan(const struct hf_config *config)
{
    struct manifest_quant quant;
    struct plan *plan;
    struct error err;
    if (config->model.num_layers > 16)
        return; // nothing but time
    CHECK(plan_quant(&quant, "int4", NULL, NULL, 64, config->model.tied_embeddings, &err) == 0);
    if (plan_make(&plan, &config->model, &quant, 3, &err) == 0) {
        CHECK(plan->ranks[2].file_bytes > 0);
        plan_free(plan);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct hf_config config;
    struct error err;
    const char *text = (const char *)data;
    const char *zero = size ? memchr(data, 0, size) : NULL;
    size_t config_bytes = zero ? (size_t)(zero - text) : size;
    size_t generation_bytes = zero ? size - config_bytes - 1 : 0;
    int rc = hf_config_parse(&config, text, config_bytes, "config.json", zero ? zero + 1 : NULL, generation_bytes,
                             "generation_config.json", &err);
    CHECK(rc == 0 || rc == ERR_MODEL);
    if (rc)
        return 0;
    const struct model_desc *model = &config.model;
    CHECK(model->num_heads % model->num_kv_heads == 0 && model->head_dim % 2 == 0);
    CHECK(model->num_layers > 0 && model->hidden_size > 0 && model->intermediate_size > 0 && model->vocab_size > 0);
    CHECK(model->num_eos >= 0 && model->num_eos <= MODEL_MAX_EOS);
    CHECK(isfinite(model->norm_eps) && model->norm_eps > 0);
    check_rope(&config);
    check_plan(&config);
    return 0;
}
