// config.json, and behind a zero byte generation_config.json: any bytes may be refused, and what is accepted must be a
// description that can be planned and written into a manifest.
#include "formats/manifest.h"
#include "formats/model_json.h"
#include "shard/hf_config.h"
#include "shard/plan.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/fuzz/fuzz.h"

static void check_rope(const struct hf_config *config)
{
    float table[ROPE_MAX_PAIRS];
    const struct rope *ropes[] = {&config->rope, &config->rope_local};
    CHECK(config->rope.dim == config->model.rotary_dim);
    for (int r = 0; r < 2; r++)
        for (int long_table = 0; long_table < 2; long_table++) {
            CHECK(ropes[r]->dim / 2 <= ROPE_MAX_PAIRS);
            rope_inv_freq(table, ropes[r], long_table);
            for (int64_t i = 0; i < ropes[r]->dim / 2; i++)
                CHECK(isfinite(table[i]) && table[i] >= 0);
        }
}

static void check_plan(const struct hf_config *config)
{
    struct plan_options options = {.tp_size = 3};
    struct plan *plan;
    struct error err;
    if (config->model.num_layers * (config->model.experts.num_experts + 1) > 64)
        return; // nothing but time
    CHECK(plan_quant(&options.quant, "int4", NULL, NULL, 64, config->model.tied_embeddings, &err) == 0);
    for (int experts = EXPERTS_TP; experts <= EXPERTS_EP; experts++) {
        options.experts = (enum experts_mode)experts;
        if (plan_make(&plan, &config->model, &options, &err))
            continue;
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
                             "generation_config.json", NULL, &err);
    CHECK(rc == 0 || rc == ERR_MODEL);
    if (rc)
        return 0;
    const struct model_desc *model = &config.model;
    CHECK(model->num_heads % model->num_kv_heads == 0 && model->head_dim % 2 == 0);
    CHECK(model->num_layers > 0 && model->hidden_size > 0 && model->vocab_size > 0);
    char problem[160];
    CHECK(model_json_check(model, problem, sizeof problem));
    CHECK(model->num_eos >= 0 && model->num_eos <= MODEL_MAX_EOS);
    CHECK(isfinite(model->norm_eps) && model->norm_eps > 0);
    check_rope(&config);
    check_plan(&config);
    return 0;
}
