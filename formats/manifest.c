// Reader and writer of the manifest. See manifest.h; the specification is shard_file.md.
//
// One emitter writes both texts, keys sorted: the manifest, and its core, which leaves out what is not in the contract.
#include "formats/manifest.h"

#include "formats/checked.h"
#include "formats/json_file.h"
#include "formats/memory_stream.h"
#include "formats/model_json.h"
#include "formats/shard_file.h"

#include <dirent.h>
#include <errno.h>
#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { FILES_MAX = 10000, NAME_MAX_BYTES = 255, TOOL_MAX_BYTES = 255 };

#define INT_MAX_DIM 0x7fffffff

static const char *const wire_codecs[] = {"bf16", "f32", "fp8", "s8x"};

static bool is_wire_codec(const char *name)
{
    for (size_t i = 0; i < sizeof wire_codecs / sizeof *wire_codecs; i++)
        if (strcmp(name, wire_codecs[i]) == 0)
            return true;
    return false;
}

static const char *const method_names[] = {"none", "scales", "gptq"};

const char *calibration_method_name(enum calibration_method method) { return method_names[method]; }

bool calibration_method_from_name(const char *name, enum calibration_method *method)
{
    for (int i = CALIBRATION_NONE; i <= CALIBRATION_GPTQ; i++)
        if (strcmp(name, method_names[i]) == 0) {
            *method = (enum calibration_method)i;
            return true;
        }
    return false;
}

const char *experts_mode_name(enum experts_mode mode) { return mode == EXPERTS_EP ? "ep" : "tp"; }

bool experts_mode_from_name(const char *name, enum experts_mode *mode)
{
    *mode = strcmp(name, "ep") == 0 ? EXPERTS_EP : EXPERTS_TP;
    return strcmp(name, experts_mode_name(*mode)) == 0;
}

// ---- emitting -------------------------------------------------------------------------------------------------------

static void emit_checksum(struct json_emit *to, const char *key, struct checksum128 sum)
{
    char hex[CHECKSUM128_HEX_DIGITS + 1];
    checksum128_to_hex(sum, hex);
    json_emit_string(to, key, hex);
}

static void emit_file(struct json_emit *to, const char *name, uint64_t bytes, struct checksum128 hash)
{
    json_emit_open(to, NULL, '{');
    json_emit_int(to, "bytes", (int64_t)bytes);
    json_emit_string(to, "name", name);
    emit_checksum(to, "xxh3_128", hash);
    json_emit_close(to, '}');
}

static void emit_files(struct json_emit *to, const char *key, const struct manifest_file *files, size_t count)
{
    json_emit_open(to, key, '[');
    for (size_t i = 0; i < count; i++)
        emit_file(to, files[i].name, files[i].bytes, files[i].hash);
    json_emit_close(to, ']');
}

static int emit_matrices(struct json_emit *to, const struct manifest *manifest)
{
    struct matrix_kind *by_name = malloc((manifest->num_matrices + 1) * sizeof *by_name);
    if (!by_name)
        return ERR_MEMORY;
    if (manifest->num_matrices > 0)
        memcpy(by_name, manifest->matrices, manifest->num_matrices * sizeof *by_name);
    qsort(by_name, manifest->num_matrices, sizeof *by_name, matrix_kinds_compare);
    json_emit_open(to, "matrices", '{');
    for (size_t i = 0; i < manifest->num_matrices; i++) {
        char name[MATRIX_WORD_BYTES], kind[MATRIX_WORD_BYTES];
        matrix_name_print(name, by_name[i].layer, by_name[i].role);
        matrix_kind_print(kind, by_name[i].kind, by_name[i].group_size);
        json_emit_string(to, name, kind);
    }
    json_emit_close(to, '}');
    free(by_name);
    return 0;
}

static int emit_quant(struct json_emit *to, const struct manifest *manifest)
{
    const struct manifest_quant *quant = &manifest->quant;
    int rc = 0;
    json_emit_open(to, "quant", '{');
    if (quant->calibration != CALIBRATION_NONE) {
        json_emit_open(to, "calibration", '{');
        json_emit_string(to, "method", calibration_method_name(quant->calibration));
        emit_checksum(to, "statistics", quant->statistics);
        json_emit_close(to, '}');
    }
    json_emit_string(to, "embedding", weight_kind_name(quant->embedding));
    json_emit_int(to, "group_size", quant->group_size);
    json_emit_string(to, "head", weight_kind_name(quant->head));
    json_emit_string(to, "linear", weight_kind_name(quant->linear));
    if (quant->millibits) {
        rc = emit_matrices(to, manifest);
        json_emit_int(to, "millibits", quant->millibits);
    }
    if (quant->rotation)
        json_emit_int(to, "rotation", quant->rotation);
    if (quant->scales != WEIGHT_SCALES_SEARCHED)
        json_emit_string(to, "scales", weight_scales_name(quant->scales));
    json_emit_close(to, '}');
    return rc;
}

static void emit_wires(struct json_emit *to, const struct manifest_wires *measured)
{
    if (measured->count == 0)
        return;
    json_emit_open(to, "wires_measured", '{');
    json_emit_int(to, "context", measured->context);
    json_emit_bool(to, "feedback", measured->feedback);
    json_emit_real(to, "limit", measured->limit);
    emit_checksum(to, "text_xxh3_128", measured->text);
    json_emit_int(to, "tokens", measured->tokens);
    json_emit_open(to, "wires", '[');
    for (size_t i = 0; i < measured->count; i++) {
        const struct manifest_wire *wire = &measured->wires[i];
        json_emit_open(to, NULL, '{');
        if (wire->finite) {
            json_emit_real(to, "kl_divergence", wire->kl_divergence);
            json_emit_real(to, "kl_high", wire->kl_high);
            json_emit_real(to, "same_top", wire->same_top);
        }
        json_emit_string(to, "wire", wire->name);
        json_emit_close(to, '}');
    }
    json_emit_close(to, ']');
    json_emit_close(to, '}');
}

// The whole manifest (contract given), or its core (contract NULL).
static int emit(char **out, const struct manifest *manifest, const struct checksum128 *contract, struct error *err)
{
    struct memory_stream memory;
    if (!memory_stream_open(&memory))
        return error_set(err, ERR_MEMORY, MANIFEST_FILE_NAME ": out of memory");
    struct json_emit emitter = {.out = memory.out, .pretty = contract != NULL, .first = true};
    struct json_emit *to = &emitter;
    json_emit_open(to, NULL, '{');
    if (contract)
        emit_checksum(to, "contract", *contract);
    json_emit_string(to, "experts", experts_mode_name(manifest->experts));
    if (contract)
        emit_files(to, "extras", manifest->extras, manifest->num_extras);
    model_json_emit(to, &manifest->model);
    json_emit_int(to, "pp_size", manifest->pp_size);
    int rc = emit_quant(to, manifest);
    if (contract)
        emit_files(to, "ranks", manifest->ranks, manifest->num_ranks);
    json_emit_open(to, "sources", '[');
    for (size_t i = 0; i < manifest->num_sources; i++)
        emit_file(to, manifest->sources[i].name, manifest->sources[i].bytes, manifest->sources[i].hash);
    json_emit_close(to, ']');
    if (manifest->pp_size > 1) {
        json_emit_open(to, "stage_layers", '[');
        for (uint32_t stage = 0; stage < manifest->pp_size && stage < MODEL_MAX_LAYERS; stage++)
            json_emit_int(to, NULL, manifest->stage_layers[stage]);
        json_emit_close(to, ']');
    }
    if (contract)
        json_emit_string(to, "tool", manifest->tool);
    json_emit_int(to, "tp_size", manifest->tp_size);
    json_emit_int(to, "version", manifest->version);
    if (contract) {
        json_emit_string(to, "wire_advice", manifest->wire_advice);
        emit_wires(to, &manifest->wires_measured);
    }
    json_emit_close(to, '}');
    if (to->pretty)
        fputc('\n', to->out);
    *out = memory_stream_close(&memory, NULL);
    if (rc) {
        free(*out);
        *out = NULL;
    }
    return *out ? 0 : error_set(err, ERR_MEMORY, MANIFEST_FILE_NAME ": out of memory");
}

int manifest_core(const struct manifest *manifest, char **out, struct error *err)
{
    return emit(out, manifest, NULL, err);
}

int manifest_contract(const struct manifest *manifest, struct checksum128 *out, struct error *err)
{
    char *core;
    int rc = manifest_core(manifest, &core, err);
    if (rc)
        return rc;
    *out = checksum_whole(core, strlen(core));
    free(core);
    return 0;
}

int manifest_to_json(const struct manifest *manifest, char **out, struct error *err)
{
    char *text;
    struct checksum128 contract;
    struct manifest *check;
    int rc;
    if ((rc = manifest_contract(manifest, &contract, err)) || (rc = emit(&text, manifest, &contract, err)))
        return rc;
    // What is written can be read: the reader's checks are the writer's too.
    if ((rc = manifest_parse(&check, text, strlen(text), "new " MANIFEST_FILE_NAME, err))) {
        free(text);
        return rc;
    }
    manifest_free(check);
    *out = text;
    return 0;
}

// ---- parsing --------------------------------------------------------------------------------------------------------

static const char *const root_keys[] = {"contract", "experts", "extras",      "model",          "pp_size",
                                        "quant",    "ranks",   "sources",     "stage_layers",   "tool",
                                        "tp_size",  "version", "wire_advice", "wires_measured", NULL};
static const char *const measured_keys[] = {"context", "feedback", "limit", "text_xxh3_128", "tokens", "wires", NULL};
static const char *const wire_keys[] = {"kl_divergence", "kl_high", "same_top", "wire", NULL};
static const char *const calibration_keys[] = {"method", "statistics", NULL};
static const char *const quant_keys[] = {"calibration", "embedding", "group_size", "head",   "linear",
                                         "matrices",    "millibits", "rotation",   "scales", NULL};
static const char *const file_keys[] = {"bytes", "name", "xxh3_128", NULL};

static bool is_clean_text(const char *text, size_t max_bytes)
{
    size_t bytes = strlen(text);
    for (size_t i = 0; i < bytes; i++)
        if ((unsigned char)text[i] < 0x20 || text[i] == 0x7f)
            return false;
    return bytes <= max_bytes;
}

static bool is_plain_name(const char *name)
{
    return name && *name && is_clean_text(name, NAME_MAX_BYTES) && !strchr(name, '/') && strcmp(name, ".") != 0 &&
           strcmp(name, "..") != 0;
}

static int get_checksum(struct checksum128 *out, const struct json_object *object, const char *key, struct error *err)
{
    const char *hex = NULL;
    int rc = json_file_get_string(&hex, object, key, JSON_REQUIRED, err);
    if (rc)
        return rc;
    if (!checksum128_from_hex(out, hex))
        return error_set(err, ERR_CORRUPT, "%s: %s%s must be 32 hexadecimal digits in lower case", object->file_name,
                         object->path, key);
    return 0;
}

static int get_text(char **out, const struct json_object *object, const char *key, size_t max_bytes, struct error *err)
{
    const char *text = NULL;
    int rc = json_file_get_string(&text, object, key, JSON_REQUIRED, err);
    if (rc)
        return rc;
    if (!is_clean_text(text, max_bytes))
        return error_set(err, ERR_CORRUPT, "%s: %s%s must be at most %zu bytes without control characters",
                         object->file_name, object->path, key, max_bytes);
    *out = strdup(text);
    if (*out)
        return 0;
    error_set(err, ERR_MEMORY, "%s: out of memory", object->file_name);
    return ERR_MEMORY;
}

static int get_kind(enum weight_kind *out, const struct json_object *object, const char *key, struct error *err)
{
    const char *name = NULL;
    int rc = json_file_get_string(&name, object, key, JSON_REQUIRED, err);
    if (rc)
        return rc;
    if (!weight_kind_from_name(name, out))
        return error_set(err, ERR_CORRUPT, "%s: %s%s must be a kind of weight, such as bf16 or int4, found %.40s",
                         object->file_name, object->path, key, name);
    return 0;
}

static int parse_model(struct model_desc *model, const struct json_object *root, struct error *err)
{
    struct json_object object;
    int rc = json_file_get_object(&object, root, "model", JSON_REQUIRED, err);
    return rc ? rc : model_json_parse(model, &object, err);
}

static int parse_experts(enum experts_mode *out, const struct json_object *root, struct error *err)
{
    const char *name = NULL;
    int rc = json_file_get_string(&name, root, "experts", JSON_REQUIRED, err);
    if (rc)
        return rc;
    if (!experts_mode_from_name(name, out))
        return error_set(err, ERR_CORRUPT, "%s: experts must be ep or tp, found '%.40s'", root->file_name, name);
    return 0;
}

// Not said: searched.
static int parse_scales(struct manifest_quant *quant, const struct json_object *object, struct error *err)
{
    const char *name = NULL;
    int rc = json_file_get_string(&name, object, "scales", JSON_OPTIONAL, err);
    quant->scales = WEIGHT_SCALES_SEARCHED;
    if (rc || !name)
        return rc;
    if (weight_scales_from_name(name, &quant->scales) && quant->scales == WEIGHT_SCALES_LARGEST &&
        (quant->millibits || weight_is_tiled(quant->linear) || weight_is_tiled(quant->embedding) ||
         weight_is_tiled(quant->head)))
        return 0;
    return error_set(err, ERR_CORRUPT,
                     "%s: quant.scales must be absent, or max beside a kind of four bits; found '%.40s'",
                     object->file_name, name);
}

// Not said: none.
static int parse_calibration(struct manifest_quant *quant, const struct json_object *quant_object, struct error *err)
{
    struct json_object object = {0};
    const char *name = NULL;
    int rc;
    quant->calibration = CALIBRATION_NONE;
    if ((rc = json_file_get_object(&object, quant_object, "calibration", JSON_OPTIONAL, err)) || !object.json)
        return rc;
    if ((rc = json_file_check_keys(&object, calibration_keys, err)) ||
        (rc = json_file_get_string(&name, &object, "method", JSON_REQUIRED, err)) ||
        (rc = get_checksum(&quant->statistics, &object, "statistics", err)))
        return rc;
    if (calibration_method_from_name(name, &quant->calibration) && quant->calibration != CALIBRATION_NONE &&
        quant->scales == WEIGHT_SCALES_SEARCHED)
        return 0;
    return error_set(err, ERR_CORRUPT,
                     "%s: quant.calibration.method must be scales or gptq, without plain rounding; found '%.40s'",
                     object.file_name, name);
}

// A rotated model has a head of its own, and norms in front of attention and mlp alone.
static int parse_rotation(struct manifest_quant *quant, const struct model_desc *model,
                          const struct json_object *object, struct error *err)
{
    int64_t block = 0;
    int rc =
        json_file_get_int(&block, object, "rotation", MANIFEST_MIN_ROTATION, MODEL_MAX_ROTATION, JSON_OPTIONAL, err);
    if (rc)
        return rc;
    quant->rotation = (uint32_t)block;
    if (block == 0 ? model->mlp_rotation == 0
                   : (block & (block - 1)) == 0 && model->hidden_size % block == 0 && !model->tied_embeddings &&
                         model->pre_norms && !model->post_norms)
        return 0;
    return error_set(
        err, ERR_CORRUPT,
        "%s: quant.rotation must be a power of two that divides hidden_size, of a model with a head of its own "
        "and no post_norms, or absent where nothing is rotated; found %" PRId64,
        object->file_name, block);
}

// After the model. Both keys or none.
static int parse_matrices(struct manifest *manifest, const struct json_object *object, struct error *err)
{
    int64_t millibits = 0;
    int rc;
    if ((rc = json_file_get_int(&millibits, object, "millibits", 1, MANIFEST_MAX_MILLIBITS, JSON_OPTIONAL, err)) ||
        (rc = matrix_kinds_parse(&manifest->matrices, &manifest->num_matrices, object, "matrices",
                                 manifest->model.num_layers, err)))
        return rc;
    manifest->quant.millibits = (uint32_t)millibits;
    if ((millibits > 0) == (manifest->num_matrices > 0))
        return 0;
    return error_set(err, ERR_CORRUPT, "%s: quant.%s must stand beside quant.%s", object->file_name,
                     millibits > 0 ? "matrices" : "millibits", millibits > 0 ? "millibits" : "matrices");
}

static int parse_quant(struct manifest *manifest, const struct json_object *root, struct error *err)
{
    struct manifest_quant *quant = &manifest->quant;
    struct json_object object;
    int64_t group_size = 0;
    int rc;
    if ((rc = json_file_get_object(&object, root, "quant", JSON_REQUIRED, err)) ||
        (rc = json_file_check_keys(&object, quant_keys, err)) || (rc = parse_matrices(manifest, &object, err)) ||
        (rc = get_kind(&quant->linear, &object, "linear", err)) ||
        (rc = get_kind(&quant->embedding, &object, "embedding", err)) ||
        (rc = get_kind(&quant->head, &object, "head", err)) || (rc = parse_scales(quant, &object, err)) ||
        (rc = parse_rotation(quant, &manifest->model, &object, err)) || (rc = parse_calibration(quant, &object, err)) ||
        (rc = json_file_get_int(&group_size, &object, "group_size", 0, 128, JSON_REQUIRED, err)))
        return rc;
    bool int4 =
        weight_group_chosen(quant->linear) || weight_group_chosen(quant->embedding) || weight_group_chosen(quant->head);
    if (int4 ? group_size != 32 && group_size != 64 && group_size != 128 : group_size != 0)
        return error_set(err, ERR_CORRUPT, "%s: quant.group_size must be %s, found %" PRId64, root->file_name,
                         int4 ? "32, 64 or 128" : "0, since none of the kinds has groups of a chosen size", group_size);
    quant->group_size = (uint32_t)group_size;
    return 0;
}

// One codec's figures: all or none.
static int parse_wire(struct manifest_wire *out, const struct json_object *object, struct error *err)
{
    const char *name = NULL;
    const double unknown = -2; // no divergence, no share
    int rc;
    out->kl_divergence = out->kl_high = out->same_top = unknown;
    if ((rc = json_file_check_keys(object, wire_keys, err)) ||
        (rc = json_file_get_string(&name, object, "wire", JSON_REQUIRED, err)) ||
        (rc = json_file_get_number(&out->kl_divergence, object, "kl_divergence", -1, MANIFEST_MAX_KL, JSON_OPTIONAL,
                                   err)) ||
        (rc = json_file_get_number(&out->kl_high, object, "kl_high", -1, MANIFEST_MAX_KL, JSON_OPTIONAL, err)) ||
        (rc = json_file_get_number(&out->same_top, object, "same_top", 0, 1, JSON_OPTIONAL, err)))
        return rc;
    if (!is_wire_codec(name))
        return error_set(err, ERR_CORRUPT, "%s: %swire must be bf16, f32, fp8 or s8x, found '%.40s'", object->file_name,
                         object->path, name);
    snprintf(out->name, sizeof out->name, "%s", name);
    out->finite = out->kl_divergence > unknown;
    if ((out->kl_high > unknown) != out->finite || (out->same_top > unknown) != out->finite)
        return error_set(err, ERR_CORRUPT, "%s: %skl_divergence, kl_high and same_top must stand together",
                         object->file_name, object->path);
    return 0;
}

static int parse_wires(struct manifest_wires *out, const struct json_object *root, struct error *err)
{
    struct json_object object;
    const json_t *wires = NULL;
    int rc;
    if (!json_object_get(root->json, "wires_measured"))
        return 0;
    if ((rc = json_file_get_object(&object, root, "wires_measured", JSON_REQUIRED, err)) ||
        (rc = json_file_check_keys(&object, measured_keys, err)) ||
        (rc = json_file_get_int(&out->context, &object, "context", 1, INT_MAX_DIM, JSON_REQUIRED, err)) ||
        (rc = json_file_get_int(&out->tokens, &object, "tokens", 1, INT64_MAX, JSON_REQUIRED, err)) ||
        (rc = json_file_get_bool(&out->feedback, &object, "feedback", JSON_REQUIRED, err)) ||
        (rc = json_file_get_number(&out->limit, &object, "limit", 0, MANIFEST_MAX_KL, JSON_REQUIRED, err)) ||
        (rc = get_checksum(&out->text, &object, "text_xxh3_128", err)) ||
        (rc = json_file_get_array(&wires, &object, "wires", JSON_REQUIRED, err)))
        return rc;
    size_t count = json_array_size(wires);
    if (count < 1 || count > MANIFEST_MAX_WIRES)
        return error_set(err, ERR_CORRUPT, "%s: wires_measured.wires must hold 1 to %d codecs, found %zu",
                         root->file_name, MANIFEST_MAX_WIRES, count);
    for (; out->count < count; out->count++) {
        struct json_object wire;
        if ((rc = json_file_get_object_at(&wire, &object, "wires", out->count, err)) ||
            (rc = parse_wire(&out->wires[out->count], &wire, err)))
            return rc;
    }
    return 0;
}

static int parse_files(struct manifest_file **out, size_t *out_count, const struct json_object *root, const char *key,
                       struct error *err)
{
    const json_t *array = NULL;
    int rc = json_file_get_array(&array, root, key, JSON_REQUIRED, err);
    if (rc)
        return rc;
    size_t count = json_array_size(array);
    if (count > FILES_MAX)
        return error_set(err, ERR_CORRUPT, "%s: %s must hold at most %d files, found %zu", root->file_name, key,
                         FILES_MAX, count);
    *out = calloc(count + 1, sizeof **out);
    if (!*out)
        return error_set(err, ERR_MEMORY, "%s: out of memory", root->file_name);
    for (size_t i = 0; i < count; i++) {
        struct json_object object;
        struct manifest_file *file = &(*out)[i];
        int64_t bytes = 0;
        if ((rc = json_file_get_object_at(&object, root, key, i, err)) ||
            (rc = json_file_check_keys(&object, file_keys, err)) ||
            (rc = get_text(&file->name, &object, "name", NAME_MAX_BYTES, err)))
            return rc;
        *out_count = i + 1;
        if (!is_plain_name(file->name))
            return error_set(err, ERR_CORRUPT, "%s: %s[%zu].name must be a plain file name, found '%.80s'",
                             root->file_name, key, i, file->name);
        if ((rc = json_file_get_int(&bytes, &object, "bytes", 0, INT64_MAX, JSON_REQUIRED, err)) ||
            (rc = get_checksum(&file->hash, &object, "xxh3_128", err)))
            return rc;
        file->bytes = (uint64_t)bytes;
    }
    return 0;
}

static int compare_names(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

// No file stands twice in the directory, none is the manifest itself.
static int check_names(const struct manifest_file *a, size_t num_a, const struct manifest_file *b, size_t num_b,
                       const char *file_name, struct error *err)
{
    int rc = 0;
    size_t count = 0;
    const char **names = malloc((num_a + num_b + 1) * sizeof *names);
    if (!names)
        return error_set(err, ERR_MEMORY, "%s: out of memory", file_name);
    for (size_t i = 0; i < num_a; i++)
        names[count++] = a[i].name;
    for (size_t i = 0; i < num_b; i++)
        names[count++] = b[i].name;
    names[count++] = MANIFEST_FILE_NAME;
    qsort(names, count, sizeof *names, compare_names);
    for (size_t i = 1; i < count && !rc; i++)
        if (strcmp(names[i], names[i - 1]) == 0)
            rc = error_set(err, ERR_CORRUPT, "%s: the file '%.80s' stands in it twice", file_name, names[i]);
    free(names);
    return rc;
}

// Every stage has layers, and together they have all of them. One stage needs no list.
static int parse_stages(struct manifest *manifest, const struct json_object *root, struct error *err)
{
    const json_t *list = NULL;
    size_t stages = manifest->pp_size;
    int64_t sum = 0, layers = manifest->model.num_layers;
    int rc = json_file_get_array(&list, root, "stage_layers", stages > 1 ? JSON_REQUIRED : JSON_OPTIONAL, err);
    if (rc || (stages == 1 && !list))
        return rc;
    if (stages == 1)
        return error_set(err, ERR_CORRUPT, "%s: stage_layers is of models of several stages, and pp_size is 1",
                         root->file_name);
    if (json_array_size(list) != stages || (int64_t)stages > layers)
        return error_set(err, ERR_CORRUPT,
                         "%s: stage_layers must hold pp_size = %zu numbers of the model's %" PRId64
                         " layers, at least one each; found %zu",
                         root->file_name, stages, layers, json_array_size(list));
    for (size_t stage = 0; stage < stages; stage++) {
        const json_t *count = json_array_get(list, stage);
        int64_t value = json_is_integer(count) ? json_integer_value(count) : 0;
        if (value < 1 || value > layers - sum)
            return error_set(err, ERR_CORRUPT,
                             "%s: stage_layers[%zu] must be a number of layers, at least 1, and all together %" PRId64,
                             root->file_name, stage, layers);
        manifest->stage_layers[stage] = (uint16_t)value;
        sum += value;
    }
    return sum == layers ? 0
                         : error_set(err, ERR_CORRUPT, "%s: stage_layers add up to %" PRId64 ", the model has %" PRId64,
                                     root->file_name, sum, layers);
}

static int parse_root(struct manifest *manifest, const struct json_object *root, struct error *err)
{
    int rc;
    int64_t version = 0, tp_size = 0, pp_size = 0;
    if (root->ints_are_reals)
        return error_set(err, ERR_CORRUPT, "%s: it holds an integer beyond 64 bits", root->file_name);
    if ((rc = json_file_get_int(&version, root, "version", 0, INT_MAX_DIM, JSON_REQUIRED, err)))
        return rc;
    if (version != MANIFEST_VERSION)
        return error_set(err, ERR_CORRUPT, "%s: shard directory version %" PRId64 ", this program reads version %d",
                         root->file_name, version, MANIFEST_VERSION);
    manifest->version = MANIFEST_VERSION;
    if ((rc = json_file_check_keys(root, root_keys, err)) || (rc = parse_model(&manifest->model, root, err)) ||
        (rc = parse_quant(manifest, root, err)) || (rc = parse_experts(&manifest->experts, root, err)) ||
        (rc = json_file_get_int(&tp_size, root, "tp_size", 1, SHARD_MAX_RANKS, JSON_REQUIRED, err)) ||
        (rc = json_file_get_int(&pp_size, root, "pp_size", 1, SHARD_MAX_RANKS, JSON_REQUIRED, err)) ||
        (rc = get_text(&manifest->tool, root, "tool", TOOL_MAX_BYTES, err)) ||
        (rc = get_text(&manifest->wire_advice, root, "wire_advice", NAME_MAX_BYTES, err)) ||
        (rc = parse_wires(&manifest->wires_measured, root, err)) ||
        (rc = get_checksum(&manifest->contract, root, "contract", err)) ||
        (rc = parse_files(&manifest->ranks, &manifest->num_ranks, root, "ranks", err)) ||
        (rc = parse_files(&manifest->extras, &manifest->num_extras, root, "extras", err)) ||
        (rc = parse_files(&manifest->sources, &manifest->num_sources, root, "sources", err)))
        return rc;
    manifest->tp_size = (uint32_t)tp_size;
    manifest->pp_size = (uint32_t)pp_size;
    if (!is_wire_codec(manifest->wire_advice))
        return error_set(err, ERR_CORRUPT, "%s: wire_advice must be bf16, f32, fp8 or s8x, found '%.40s'",
                         root->file_name, manifest->wire_advice);
    if (manifest->num_ranks != (size_t)(tp_size * pp_size))
        return error_set(err, ERR_CORRUPT, "%s: ranks must hold tp_size x pp_size = %" PRId64 " files, found %zu",
                         root->file_name, tp_size * pp_size, manifest->num_ranks);
    if ((rc = parse_stages(manifest, root, err)) ||
        (rc = check_names(manifest->ranks, manifest->num_ranks, manifest->extras, manifest->num_extras, root->file_name,
                          err)))
        return rc;

    struct checksum128 contract;
    if ((rc = manifest_contract(manifest, &contract, err)))
        return rc;
    if (!checksum128_equal(contract, manifest->contract))
        return error_set(err, ERR_CORRUPT,
                         "%s: its contract does not match its contents: the file was damaged or edited; run tpshard "
                         "convert --force again or restore it from its source",
                         root->file_name);
    return 0;
}

// Takes over root.
static int parse_and_close(struct manifest **out, struct json_object *root, struct error *err)
{
    int rc;
    struct manifest *manifest = calloc(1, sizeof *manifest);
    if (manifest)
        rc = parse_root(manifest, root, err);
    else
        rc = error_set(err, ERR_MEMORY, "%s: out of memory", root->file_name);
    json_file_close(root);
    if (rc) {
        manifest_free(manifest);
        return rc;
    }
    *out = manifest;
    return 0;
}

int manifest_parse(struct manifest **out, const char *text, size_t bytes, const char *name, struct error *err)
{
    struct json_object root;
    int rc = json_file_parse(&root, text, bytes, name, ERR_CORRUPT, err);
    return rc ? rc : parse_and_close(out, &root, err);
}

static bool exists(const char *dir, const char *name)
{
    char path[4096];
    return snprintf(path, sizeof path, "%s/%s", dir, name) < (int)sizeof path && access(path, F_OK) == 0;
}

static bool has_rank_files(const char *dir)
{
    DIR *entries = opendir(dir);
    const struct dirent *entry;
    bool found = false;
    while (entries && !found && (entry = readdir(entries))) {
        const char *dot = strrchr(entry->d_name, '.');
        found = dot && strcmp(dot, ".tpshard") == 0;
    }
    if (entries)
        closedir(entries);
    return found;
}

int manifest_read(struct manifest **out, const char *dir, struct error *err)
{
    char path[4096];
    if (snprintf(path, sizeof path, "%s/" MANIFEST_FILE_NAME, dir) >= (int)sizeof path)
        return error_set(err, ERR_IO, "%.80s...: the path is too long", dir);
    struct stat status;
    if (lstat(path, &status) != 0 && errno == ENOENT && exists(dir, ".")) {
        if (has_rank_files(dir))
            return error_set(err, ERR_CORRUPT,
                             "%s: no " MANIFEST_FILE_NAME " here beside the rank files: copy it from where they come "
                             "from, or shard the model again",
                             dir);
        if (exists(dir, "config.json"))
            return error_set(err, ERR_CORRUPT,
                             "%s: no " MANIFEST_FILE_NAME " here, but a config.json: this looks like a checkpoint; "
                             "run tpshard on it first",
                             dir);
        return error_set(err, ERR_CORRUPT,
                         "%s: no " MANIFEST_FILE_NAME " here: not a shard directory, or tpshard did not finish it",
                         dir);
    }
    struct json_object root;
    int rc = json_file_open(&root, path, JSON_FILE_CAP_BYTES, ERR_CORRUPT, err);
    if (rc == ERR_IO && stat(path, &status) == 0 && !S_ISREG(status.st_mode))
        rc = err->code = ERR_CORRUPT; // the directory is damaged, whatever the system makes of it
    return rc ? rc : parse_and_close(out, &root, err);
}

static void free_files(struct manifest_file *files, size_t count)
{
    for (size_t i = 0; files && i < count; i++)
        free(files[i].name);
    free(files);
}

void manifest_free(struct manifest *manifest)
{
    if (!manifest)
        return;
    free_files(manifest->ranks, manifest->num_ranks);
    free_files(manifest->extras, manifest->num_extras);
    free_files(manifest->sources, manifest->num_sources);
    free(manifest->matrices);
    free(manifest->tool);
    free(manifest->wire_advice);
    free(manifest);
}

void manifest_rank_file_name(char *buffer, size_t bytes, uint32_t rank, uint32_t tp_size, uint32_t pp_size)
{
    int used = pp_size > 1 ? snprintf(buffer, bytes, "stage-%02" PRIu32 "-", rank / tp_size) : 0;
    snprintf(buffer + used, bytes - (size_t)used, "rank-%02" PRIu32 "-of-%02" PRIu32 ".tpshard", rank % tp_size,
             tp_size);
}

void manifest_stage(const uint16_t *stage_layers, uint32_t stage, int64_t *begin, int64_t *count)
{
    *begin = 0;
    for (uint32_t i = 0; i < stage; i++)
        *begin += stage_layers[i];
    *count = stage_layers[stage];
}

void manifest_stage_model(struct model_desc *out, const struct model_desc *model, int64_t layer_begin,
                          int64_t num_layers)
{
    *out = *model;
    out->num_layers = num_layers;
    memset(out->layer_flags, 0, sizeof out->layer_flags);
    memcpy(out->layer_flags, model->layer_flags + layer_begin, (size_t)num_layers * sizeof *out->layer_flags);
}
