// Plans of public models in INT4, from their configuration alone; for C and C++.
#ifndef TPSHARD_TESTS_PLAN_HELP_H
#define TPSHARD_TESTS_PLAN_HELP_H

#include "formats/file_io.h"
#include "formats/json_file.h"
#include "shard/hf_config.h"
#include "shard/plan.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// name: of bench/models. To be freed with plan_free.
static inline struct plan *plan_of_model(const char *name, uint32_t tp_size, enum experts_mode experts)
{
    struct error err;
    struct hf_config *config = (struct hf_config *)calloc(1, sizeof *config);
    struct plan_options options;
    struct plan *plan = NULL;
    char path[128];
    uint8_t *text;
    uint64_t bytes;
    memset(&options, 0, sizeof options);
    options.tp_size = tp_size;
    options.experts = experts;
    snprintf(path, sizeof path, "bench/models/%s.json", name);
    if (file_read_all(&text, &bytes, path, JSON_FILE_CAP_BYTES, ERR_MODEL, &err) ||
        hf_config_parse(config, (const char *)text, bytes, path, NULL, 0, NULL, NULL, &err) ||
        plan_quant(&options.quant, "int4", NULL, NULL, 128, config->model.tied_embeddings, &err) ||
        plan_make(&plan, &config->model, &options, &err))
        fail_msg("%s", err.msg);
    free(text);
    free(config);
    return plan;
}

#endif
