// See model_rows.h.
#include "shard/model_rows.h"

int model_rows_open(struct model_rows *out, const char *model_dir, struct error *err)
{
    int rc;
    *out = (struct model_rows){0};
    if ((rc = import_config_read(&out->config, model_dir, err)) ||
        (rc = checkpoint_open(&out->checkpoint, model_dir, err)) || out->config.method == IMPORT_PLAIN)
        return rc;
    return import_open(&out->import, &out->config, out->checkpoint, err);
}

int model_rows_init(struct model_rows *rows, const struct plan *plan, const struct hf_config *config, struct error *err)
{
    int rc;
    if (rows->import) {
        rc = import_source_init(&rows->quantized, rows->import, rows->checkpoint, plan, config, err);
        rows->source = &rows->quantized.source;
        rows->rounds_to_bf16 = rows->quantized.plain.rounds_to_bf16;
    } else {
        rc = checkpoint_source_init(&rows->plain, rows->checkpoint, plan, config, NULL, err);
        rows->source = &rows->plain.source;
        rows->rounds_to_bf16 = rows->plain.rounds_to_bf16;
    }
    if (rc || plan->quant.rotation == 0)
        return rc;
    rc = rotate_source_init(&rows->rotated, rows->source, plan, err);
    rows->source = &rows->rotated.source;
    rows->rounds_to_bf16 = false; // which is no loss beside what the rotation rounds
    return rc;
}

void model_rows_close(struct model_rows *rows)
{
    rotate_source_clear(&rows->rotated);
    import_close(rows->import);
    checkpoint_close(rows->checkpoint);
    import_config_clear(&rows->config);
    *rows = (struct model_rows){0};
}
