// tpshard inspect: what is in a shard directory. Reads the manifest and the heads of the rank files, no weights.
#include "formats/json_file.h"
#include "shard/commands.h"
#include "shard/mix_text.h"
#include "shard/plan.h"
#include "shard/progress.h"
#include "shard/shard_dir.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct {
    int64_t rank;
} options = {.rank = 0};

const struct option_spec inspect_options[] = {
    {"rank", OPTION_INT, &options.rank, "N", 0, PLAN_MAX_TP - 1, "whose tensors to list"},
    {0},
};

// ---- JSON --------------------------------------------------------------------------------------------------------

static json_t *tensor_json(const struct shard_tensor *tensor)
{
    json_t *parts = json_array();
    for (int p = 0; p < tensor->num_parts; p++) {
        const struct shard_part *part = &tensor->parts[p];
        json_array_append_new(
            parts, json_pack("{s:s, s:[I,I], s:[I,I], s:[I,I]}", "source", part->source, "source_shape",
                             (json_int_t)part->source_rows, (json_int_t)part->source_cols, "rows",
                             (json_int_t)part->row_begin, (json_int_t)(part->row_begin + part->rows), "columns",
                             (json_int_t)part->col_begin, (json_int_t)(part->col_begin + part->cols)));
    }
    return json_pack("{s:s, s:i, s:i, s:s, s:i, s:[I,I], s:[I,I], s:I, s:I, s:I, s:I, s:o}", "role",
                     tensor_role_name(tensor->role), "layer", (int)tensor->layer, "expert", (int)tensor->expert, "kind",
                     weight_kind_name(tensor->shape.kind), "group_size", (int)tensor->shape.group_size, "shape",
                     (json_int_t)tensor->shape.rows, (json_int_t)tensor->shape.cols, "padded_shape",
                     (json_int_t)tensor->shape.rows_padded, (json_int_t)tensor->shape.cols_padded, "data_offset",
                     (json_int_t)tensor->data_offset, "data_bytes", (json_int_t)tensor->shape.data_bytes,
                     "scale_offset", (json_int_t)tensor->scale_offset, "scale_bytes",
                     (json_int_t)tensor->shape.scale_bytes, "parts", parts);
}

// Leaves of each code.
static void count_codes(uint64_t codes[LEAF_CODE_COUNT], const struct shard_file *file)
{
    memset(codes, 0, LEAF_CODE_COUNT * sizeof *codes);
    for (uint64_t leaf = 0; leaf < shard_file_leaf_count(file); leaf++)
        codes[shard_file_leaf_code(file, leaf)]++;
}

static json_t *stored_json(const struct shard_file *file)
{
    uint64_t codes[LEAF_CODE_COUNT], payload_bytes = shard_file_payload_bytes(file);
    json_t *leaves = json_object();
    count_codes(codes, file);
    for (int code = 0; code < LEAF_CODE_COUNT; code++)
        json_object_set_new(leaves, leaf_code_name((enum leaf_code)code), json_integer((json_int_t)codes[code]));
    return json_pack("{s:b, s:I, s:f, s:o}", "compressed", (int)shard_file_is_compressed(file), "bytes",
                     (json_int_t)shard_file_stored_bytes(file), "ratio",
                     payload_bytes ? (double)shard_file_stored_bytes(file) / (double)payload_bytes : 1.0, "leaves",
                     leaves);
}

// The layers that a rank's stage holds.
static void stage_of(const struct manifest *manifest, uint32_t rank, int64_t *layer_begin, int64_t *num_layers)
{
    *layer_begin = 0;
    *num_layers = manifest->model.num_layers;
    if (manifest->pp_size > 1)
        manifest_stage(manifest->stage_layers, rank / manifest->tp_size, layer_begin, num_layers);
}

static json_t *rank_json(const struct shard_dir *dir, uint32_t rank)
{
    const struct shard_file *file = dir->files[rank];
    const struct rank_share *share = &shard_file_identity(file)->share;
    const struct manifest *manifest = dir->manifest;
    int64_t layer_begin, num_layers;
    stage_of(manifest, rank, &layer_begin, &num_layers);
    json_t *tensors = json_array(), *object;
    for (uint64_t i = 0; rank == (uint32_t)options.rank && i < shard_file_tensor_count(file); i++)
        json_array_append_new(tensors, tensor_json(shard_file_tensor(file, i)));
    object = json_pack(
        "{s:i, s:s, s:I, s:I, s:I, s:[I,I], s:[I,I], s:[I,I], s:[I,I], s:[I,I], s:[I,I], s:[I,I], s:I, s:o, s:o}",
        "rank", (int)rank, "file", dir->manifest->ranks[rank].name, "bytes",
        (json_int_t)dir->manifest->ranks[rank].bytes, "payload_offset", (json_int_t)shard_file_payload_offset(file),
        "payload_bytes", (json_int_t)shard_file_payload_bytes(file), "heads", (json_int_t)share->head_begin,
        (json_int_t)(share->head_begin + share->num_heads_local), "kv_heads", (json_int_t)share->kv_head_begin,
        (json_int_t)(share->kv_head_begin + share->num_kv_heads_local), "intermediate", (json_int_t)share->mlp_begin,
        (json_int_t)(share->mlp_begin + share->intermediate_local), "vocab", (json_int_t)share->vocab_begin,
        (json_int_t)(share->vocab_begin + share->vocab_local), "experts", (json_int_t)share->expert_begin,
        (json_int_t)(share->expert_begin + share->num_experts_local), "expert_intermediate",
        (json_int_t)share->expert_mlp_begin, (json_int_t)(share->expert_mlp_begin + share->expert_size_local),
        "shared_intermediate", (json_int_t)share->shared_begin,
        (json_int_t)(share->shared_begin + share->shared_size_local), "tensor_count",
        (json_int_t)shard_file_tensor_count(file), "stored", stored_json(file), "tensors", tensors);
    json_object_set_new(object, "stage", json_integer(rank / manifest->tp_size));
    json_object_set_new(object, "layers",
                        json_pack("[I,I]", (json_int_t)layer_begin, (json_int_t)(layer_begin + num_layers)));
    return object;
}

static int print_json(const struct shard_dir *dir, struct error *err)
{
    char *text;
    int rc = manifest_to_json(dir->manifest, &text, err);
    if (rc)
        return rc;
    json_error_t ignored;
    bool no_memory; // asked again of the whole
    json_t *manifest = json_file_load(text, strlen(text), 0, &ignored, &no_memory), *ranks = json_array();
    free(text);
    for (uint32_t rank = 0; rank < dir->manifest->num_ranks; rank++)
        json_array_append_new(ranks, rank_json(dir, rank));
    return commands_print_json(json_pack("{s:i, s:o, s:o}", "schema_version", 1, "manifest", manifest, "ranks", ranks),
                               err);
}

// ---- for people --------------------------------------------------------------------------------------------------

// What the ranks hold of each kind: a checkpoint that came quantized may hold matrices of kinds that the manifest does not name.
static void print_kinds(const struct shard_dir *dir)
{
    uint64_t bytes[WEIGHT_KIND_COUNT] = {0};
    const char *between = "";
    for (uint32_t rank = 0; rank < dir->manifest->num_ranks; rank++)
        for (uint64_t i = 0; i < shard_file_tensor_count(dir->files[rank]); i++) {
            const struct weight_shape *shape = &shard_file_tensor(dir->files[rank], i)->shape;
            bytes[shape->kind] += shape->data_bytes + shape->scale_bytes;
        }
    printf("  stored in all ranks:");
    for (int kind = 0; kind < WEIGHT_KIND_COUNT; kind++) {
        char text[32];
        if (!bytes[kind])
            continue;
        printf("%s %s %s", between, weight_kind_name((enum weight_kind)kind), progress_bytes_text(text, bytes[kind]));
        between = ",";
    }
    printf("\n");
}

static void print_stages(const struct manifest *manifest)
{
    if (manifest->pp_size == 1)
        return;
    printf("  pp %u, layers of the stages:", manifest->pp_size);
    for (uint32_t stage = 0; stage < manifest->pp_size; stage++) {
        int64_t begin, count;
        manifest_stage(manifest->stage_layers, stage, &begin, &count);
        printf("%s %lld-%lld", stage ? "," : "", (long long)begin, (long long)(begin + count - 1));
    }
    printf("\n");
}

// Behind the length of a rank file.
static void print_stored(const struct shard_file *file)
{
    uint64_t codes[LEAF_CODE_COUNT], payload_bytes = shard_file_payload_bytes(file);
    char bytes[32];
    if (!shard_file_is_compressed(file)) {
        printf("\n");
        return;
    }
    count_codes(codes, file);
    printf(", compressed: %s of weights to %.3f of that (leaves:", progress_bytes_text(bytes, payload_bytes),
           (double)shard_file_stored_bytes(file) / (double)payload_bytes);
    for (int code = 0; code < LEAF_CODE_COUNT; code++)
        printf(" %llu %s%s", (unsigned long long)codes[code], leaf_code_name((enum leaf_code)code),
               code + 1 < LEAF_CODE_COUNT ? "," : ")\n");
}

static void print_wires(const struct manifest *manifest)
{
    const struct manifest_wires *measured = &manifest->wires_measured;
    printf("  sums over ranks: %s is advised", manifest->wire_advice);
    if (measured->count)
        printf("; KL divergence over %lld tokens, error feedback %s:", (long long)measured->tokens,
               measured->feedback ? "on" : "off");
    for (size_t i = 0; i < measured->count; i++)
        if (measured->wires[i].finite)
            printf("%s %s %.7f", i ? "," : "", measured->wires[i].name, measured->wires[i].kl_divergence);
        else
            printf("%s %s NaN", i ? "," : "", measured->wires[i].name);
    printf("\n");
}

static void print_manifest(const char *path, const struct shard_dir *dir)
{
    const struct manifest *manifest = dir->manifest;
    const struct model_desc *model = &manifest->model;
    char contract[CHECKSUM128_HEX_DIGITS + 1], statistics[CHECKSUM128_HEX_DIGITS + 1], bytes[32];
    checksum128_to_hex(manifest->quant.statistics, statistics);
    checksum128_to_hex(manifest->contract, contract);
    printf("%s: %s, written by %s\n", path, model->architecture, manifest->tool);
    printf("  %lld layers, hidden %lld, intermediate %lld, heads %lld (kv %lld) of %lld, vocabulary %lld%s, context "
           "%lld\n",
           (long long)model->num_layers, (long long)model->hidden_size, (long long)model->intermediate_size,
           (long long)model->num_heads, (long long)model->num_kv_heads, (long long)model->head_dim,
           (long long)model->vocab_size, model->tied_embeddings ? " (tied)" : "", (long long)model->context);
    if (model->experts.num_experts > 0)
        printf("  %lld experts of %lld, %lld for each token, %s\n", (long long)model->experts.num_experts,
               (long long)model->experts.expert_size, (long long)model->experts.experts_per_token,
               manifest->experts == EXPERTS_EP ? "dealt out whole (ep)" : "each cut over all ranks (tp)");
    printf("  weights: layers %s",
           manifest->quant.millibits ? "mixed, see below" : weight_kind_name(manifest->quant.linear));
    if (manifest->quant.group_size && !manifest->quant.millibits)
        printf(" (groups of %u)", manifest->quant.group_size);
    if (manifest->quant.scales == WEIGHT_SCALES_LARGEST)
        printf(" (plain rounding)");
    printf(", embedding %s, head %s\n", weight_kind_name(manifest->quant.embedding),
           weight_kind_name(manifest->quant.head));
    if (manifest->quant.rotation)
        printf("  rotated: residual stream in blocks of %u, mlp of %lld (0: not)\n", manifest->quant.rotation,
               (long long)model->mlp_rotation);
    if (manifest->quant.calibration != CALIBRATION_NONE)
        printf("  calibrated: %s, by statistics %s\n", calibration_method_name(manifest->quant.calibration),
               statistics);
    print_kinds(dir);
    printf("  tp %u, contract %s\n", manifest->tp_size, contract);
    print_stages(manifest);
    print_wires(manifest);
    for (size_t i = 0; i < manifest->num_ranks; i++) {
        printf("  %-28s %s", manifest->ranks[i].name, progress_bytes_text(bytes, manifest->ranks[i].bytes));
        print_stored(dir->files[i]);
    }
    for (size_t i = 0; i < manifest->num_extras; i++)
        printf("  %-28s %s\n", manifest->extras[i].name, progress_bytes_text(bytes, manifest->extras[i].bytes));
    for (size_t i = 0; i < manifest->num_sources; i++)
        printf("  made from %-40s %s\n", manifest->sources[i].name,
               progress_bytes_text(bytes, manifest->sources[i].bytes));
}

// Codes and scales of all ranks, without the padding of their cuts: rows x columns of each rank's share are the weights.
static double bits_of_layers(const struct shard_dir *dir, int32_t layer)
{
    uint64_t weights = 0, bytes = 0;
    for (uint32_t rank = 0; rank < dir->manifest->num_ranks; rank++)
        for (uint64_t i = 0; i < shard_file_tensor_count(dir->files[rank]); i++) {
            const struct shard_tensor *tensor = shard_file_tensor(dir->files[rank], i);
            if (!tensor_role_is_linear(tensor->role) || (layer >= 0 && tensor->layer != layer))
                continue;
            weights += tensor->shape.rows * tensor->shape.cols;
            bytes += tensor->shape.data_bytes + tensor->shape.scale_bytes;
        }
    return weights ? 8 * (double)bytes / (double)weights : 0;
}

// A line for each layer, with the kind of each of its matrices. Copies of key and value heads count on every rank that holds one.
static void print_mix(const struct shard_dir *dir)
{
    enum { WIDTH = 15 };
    const struct manifest *manifest = dir->manifest;
    bool present[ROLE_COUNT] = {0};
    char line[1024], word[MATRIX_WORD_BYTES];
    if (!manifest->quant.millibits)
        return;
    mix_text_line(line, sizeof line, manifest->matrices, manifest->num_matrices);
    printf("\nkinds of the layers' matrices (asked: at most %.3f bits per weight; stored %.3f):\n  %s\n  layer",
           manifest->quant.millibits / 1000.0, bits_of_layers(dir, -1), line);
    for (size_t i = 0; i < manifest->num_matrices; i++)
        present[manifest->matrices[i].role] = true;
    for (int role = 0; role < ROLE_COUNT; role++)
        if (present[role])
            printf("  %-*s", WIDTH, tensor_role_name((enum tensor_role)role));
    printf("    bits\n");
    for (int32_t layer = 0; layer < manifest->model.num_layers; layer++) {
        printf("  %5d", layer);
        for (int role = 0; role < ROLE_COUNT; role++) {
            const struct matrix_kind *entry =
                matrix_kinds_find(manifest->matrices, manifest->num_matrices, layer, (enum tensor_role)role);
            if (entry)
                matrix_kind_print(word, entry->kind, entry->group_size);
            if (present[role])
                printf("  %-*s", WIDTH, entry ? word : "-");
        }
        printf("  %6.3f\n", bits_of_layers(dir, layer));
    }
}

static void print_tensors(const struct shard_dir *dir, uint32_t rank)
{
    const struct shard_file *file = dir->files[rank];
    int64_t layer_begin, num_layers;
    stage_of(dir->manifest, rank, &layer_begin, &num_layers);
    printf("\ntensors of rank %u:\n  %-24s %-5s %17s %12s %14s  %s\n", rank, "tensor", "kind", "rows x cols", "bytes",
           "offset", "from");
    for (uint64_t i = 0; i < shard_file_tensor_count(file); i++) {
        const struct shard_tensor *tensor = shard_file_tensor(file, i);
        char label[96], shape[48];
        if (tensor->layer >= 0 && (tensor->layer < layer_begin || tensor->layer >= layer_begin + num_layers))
            continue; // another stage's
        plan_tensor_label(label, sizeof label, tensor);
        snprintf(shape, sizeof shape, "%llu x %llu", (unsigned long long)tensor->shape.rows,
                 (unsigned long long)tensor->shape.cols);
        printf("  %-24s %-5s %17s %12llu %14llu  %s%s\n", label, weight_kind_name(tensor->shape.kind), shape,
               (unsigned long long)(tensor->shape.data_bytes + tensor->shape.scale_bytes),
               (unsigned long long)tensor->data_offset, tensor->num_parts ? tensor->parts[0].source : "computed",
               tensor->num_parts > 1 ? ", ..." : "");
    }
}

int inspect_run(int argc, char **argv, struct error *err)
{
    struct shard_dir dir = {0};
    int rc;
    (void)argc;
    if ((rc = shard_dir_open(&dir, argv[0], err)))
        return rc;
    for (uint32_t rank = 0; !rc && rank < dir.manifest->num_ranks; rank++)
        rc = shard_dir_open_rank(&dir, rank, err);
    if (!rc && (uint64_t)options.rank >= dir.manifest->num_ranks)
        rc = error_set(err, ERR_USAGE, "--rank %lld: %s has ranks 0 to %zu", (long long)options.rank, argv[0],
                       dir.manifest->num_ranks - 1);
    if (!rc && common.json) {
        rc = print_json(&dir, err);
    } else if (!rc) {
        print_manifest(argv[0], &dir);
        print_mix(&dir);
        print_tensors(&dir, (uint32_t)options.rank);
    }
    shard_dir_close(&dir);
    return rc;
}
