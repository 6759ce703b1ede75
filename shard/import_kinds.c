// What a quantized matrix is stored as, and in which order of rows and columns. See import.h.
#include "shard/import_internal.h"

#include "formats/checked.h"

#include <stdio.h>
#include <string.h>

enum { NAME_BYTES = 512, NF4_STORED_GROUP = 64 };

// ---- one matrix --------------------------------------------------------------------------------------------------

// The largest stored group of which the source's groups are whole multiples; 0: there is none. A scale for the whole
// row is repeated.
static uint32_t stored_group(uint64_t group_size, uint64_t cols)
{
    static const uint32_t sizes[] = {128, 64, 32};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++)
        if (group_size == 0 || group_size >= cols || group_size % sizes[i] == 0)
            return sizes[i];
    return 0;
}

bool import_kind_of_form(const struct import_form *form, uint64_t cols, enum weight_kind *kind, uint32_t *group_size)
{
    bool whole_rows = form->group_size == 0 || form->group_size >= cols;
    *group_size = 0;
    switch (form->layout) {
    case LAYOUT_PLAIN:
        *kind = WEIGHT_BF16;
        return true;
    case LAYOUT_GPTQ:
    case LAYOUT_AWQ:
    case LAYOUT_PACKED:
    case LAYOUT_HQQ:
        if (form->bits == 8) {
            *kind = WEIGHT_INT8;
            return whole_rows && form->symmetric;
        }
        *kind = form->symmetric ? WEIGHT_INT4 : WEIGHT_INT4Z;
        *group_size = stored_group(form->group_size, cols);
        return *group_size != 0;
    case LAYOUT_INT8:
        *kind = WEIGHT_INT8;
        return true;
    case LAYOUT_FP8:
        *kind = whole_rows ? WEIGHT_FP8 : WEIGHT_FP8G;
        *group_size = whole_rows ? 0 : 128;
        return whole_rows || form->group_size % 128 == 0;
    case LAYOUT_NVFP4:
        *kind = WEIGHT_NVFP4;
        *group_size = 16;
        return true;
    case LAYOUT_MXFP4:
        *kind = WEIGHT_MXFP4;
        *group_size = 32;
        return true;
    case LAYOUT_NF4: // its values lie on no grid of ours
        *kind = WEIGHT_INT4;
        *group_size = NF4_STORED_GROUP;
        return true;
    }
    return false;
}

// What keeps codes as they are from being copied: columns whose groups are scattered.
static bool scattered(const struct import_matrix *matrix) { return matrix->column_group && !matrix->reordered; }

bool import_is_exact(const struct import_matrix *matrix, enum weight_kind kind, uint32_t group_size)
{
    const struct import_form *form = &matrix->form;
    bool one_group = matrix->groups == 1;
    if (scattered(matrix))
        return false;
    switch (form->layout) {
    case LAYOUT_GPTQ:
    case LAYOUT_AWQ:
    case LAYOUT_PACKED:
    case LAYOUT_HQQ:
        if (form->bits == 8)
            return kind == WEIGHT_INT8 && one_group && form->symmetric;
        return (kind == WEIGHT_INT4Z || (kind == WEIGHT_INT4 && form->symmetric)) &&
               (one_group || form->group_size % group_size == 0);
    case LAYOUT_INT8:
        return kind == WEIGHT_INT8;
    case LAYOUT_FP8:
        return (kind == WEIGHT_FP8 && one_group) ||
               (kind == WEIGHT_FP8G && (one_group || form->group_size % group_size == 0));
    case LAYOUT_NVFP4:
        return kind == WEIGHT_NVFP4;
    case LAYOUT_MXFP4:
        return kind == WEIGHT_MXFP4;
    case LAYOUT_PLAIN:
    case LAYOUT_NF4:
        break;
    }
    return false;
}

static int refuse_form(const struct import *import, const struct import_matrix *matrix, struct error *err)
{
    const struct import_form *form = &matrix->form;
    return error_set(err, ERR_MODEL,
                     "tensor %s (%s) has weights of %d bits in groups of %llu columns%s, which no stored kind holds as "
                     "they are; --quant int8, int4, fp8 or none stores them anew, with rounding",
                     matrix->source, import->config->name, form->bits,
                     (unsigned long long)(form->group_size ? form->group_size : matrix->cols),
                     form->symmetric ? "" : " with zero points");
}

// ---- parts of one stored tensor ----------------------------------------------------------------------------------

// The finest kind that holds both; false: there is none.
static bool combine(enum weight_kind *kind, uint32_t *group_size, enum weight_kind other, uint32_t other_group)
{
    bool int4 = weight_group_chosen(*kind);
    bool other_int4 = weight_group_chosen(other);
    bool fp8 = *kind == WEIGHT_FP8 || *kind == WEIGHT_FP8G;
    bool other_fp8 = other == WEIGHT_FP8 || other == WEIGHT_FP8G;
    if (*kind == other && *group_size == other_group)
        return true;
    if (int4 && other_int4) {
        *kind = *kind == WEIGHT_INT4 && other == WEIGHT_INT4 ? WEIGHT_INT4 : WEIGHT_INT4Z;
        *group_size = *group_size < other_group ? *group_size : other_group; // each divides the larger ones
        return true;
    }
    if (fp8 && other_fp8) {
        *kind = WEIGHT_FP8G;
        *group_size = 128;
        return true;
    }
    return false;
}

static bool is_down(enum tensor_role role)
{
    return role == ROLE_DOWN || role == ROLE_EXPERT_DOWN || role == ROLE_SHARED_DOWN;
}

static bool is_gate_up(enum tensor_role role)
{
    return role == ROLE_GATE_UP || role == ROLE_EXPERT_GATE_UP || role == ROLE_SHARED_GATE_UP;
}

// "...mlp.gate_proj.weight" -> "...mlp.down_proj.weight"; false: no such name.
static bool down_of(char *out, size_t bytes, const char *source)
{
    static const char *const names[][2] = {
        {".gate_proj.", ".down_proj."},
        {".up_proj.", ".down_proj."},
        {".gate_up_proj.", ".down_proj."},
        {".w1.", ".w2."},
        {".w3.", ".w2."},
    };
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        const char *at = strstr(source, names[i][0]);
        if (at)
            return snprintf(out, bytes, "%.*s%s%s", (int)(at - source), source, names[i][1], at + strlen(names[i][0])) <
                   (int)bytes;
    }
    return false;
}

// Rows of gate and up stand in the order that the columns of the matrix behind them are stored in.
static int follow_down(struct import *import, const struct import_part *part, bool fused, struct error *err)
{
    char name[NAME_BYTES];
    struct import_matrix *matrix = import_find(import, part->source);
    if (!import->checkpoint || !down_of(name, sizeof name, part->source) ||
        (!import_companion(import, name, ".g_idx") && !import_companion(import, name, ".weight_g_idx")))
        return 0;
    uint64_t size = fused ? part->rows / 2 : part->rows;
    struct import_part down = {.source = name, .rows = part->cols, .cols = size};
    int rc = import_bind(import, &down, err);
    if (rc)
        return rc;
    struct import_matrix *leader = import_find(import, name);
    if (leader->sorted) {
        leader->rows_follow = true;
        matrix->row_leader = leader;
        matrix->row_period = size;
    }
    return 0;
}

// True when all parts' columns are scattered in one and the same way.
static bool share_order(struct import_matrix *const *parts, int num_parts)
{
    for (int p = 0; p < num_parts; p++)
        if (!parts[p]->sorted || parts[p]->cols != parts[0]->cols ||
            memcmp(parts[p]->sorted, parts[0]->sorted, parts[0]->cols * sizeof *parts[0]->sorted) != 0)
            return false;
    return num_parts > 0;
}

int import_settle(struct import *import, enum tensor_role role, const struct import_part *parts, int num_parts,
                  struct error *err)
{
    struct import_matrix *matrices[SHARD_MAX_PARTS];
    int rc = 0;
    bool fused = num_parts == 1 || strcmp(parts[0].source, parts[num_parts - 1].source) == 0;
    for (int p = 0; p < num_parts; p++) {
        if ((rc = import_bind(import, &parts[p], err)))
            return rc;
        matrices[p] = import_find(import, parts[p].source);
    }
    if (is_down(role))
        for (int p = 0; p < num_parts; p++)
            matrices[p]->reordered = matrices[p]->sorted && matrices[p]->rows_follow;
    if ((role == ROLE_QKV || role == ROLE_GATE_UP) && share_order(matrices, num_parts))
        for (int p = 0; p < num_parts; p++)
            matrices[p]->reordered = matrices[p]->order_stored = true;
    for (int p = 0; !rc && is_gate_up(role) && p < num_parts; p++)
        rc = follow_down(import, &parts[p], fused, err);
    return rc;
}

// Roles that the engine reads in bf16 alone.
static bool always_bf16(enum tensor_role role)
{
    return role == ROLE_EMBEDDING || role == ROLE_ROUTER || role == ROLE_KV_B;
}

int import_choose(struct import *import, enum tensor_role role, const struct import_part *parts, int num_parts,
                  enum weight_kind *kind, uint32_t *group_size, struct error *err)
{
    int rc = import_settle(import, role, parts, num_parts, err);
    *kind = WEIGHT_BF16;
    *group_size = 0;
    if (rc || always_bf16(role))
        return rc;
    for (int p = 0; p < num_parts; p++) {
        enum weight_kind own;
        uint32_t own_group;
        const struct import_matrix *matrix = import_find(import, parts[p].source);
        if (!import_kind_of_form(&matrix->form, matrix->cols, &own, &own_group))
            return refuse_form(import, matrix, err);
        if (scattered(matrix) && own == WEIGHT_INT4Z) // quantized anew, and then the zero is not needed
            own = WEIGHT_INT4;
        if (p == 0) {
            *kind = own;
            *group_size = own_group;
        } else if (!combine(kind, group_size, own, own_group)) {
            *kind = WEIGHT_BF16;
            *group_size = 0;
            if (import->mixed++ == 0)
                import->first_mixed = import_find(import, parts[0].source)->source;
            return 0;
        }
    }
    return 0;
}

// ---- orders ------------------------------------------------------------------------------------------------------

bool import_has_order(const struct import *import, enum tensor_role role, const char *source)
{
    const struct import_matrix *matrix = import_find(import, source);
    return (role == ROLE_QKV || role == ROLE_GATE_UP) && matrix && matrix->order_stored;
}

void import_order(const struct import *import, const char *source, float *out, uint64_t cols)
{
    const struct import_matrix *matrix = import_find(import, source);
    for (uint64_t c = 0; c < cols; c++)
        out[c] = matrix && matrix->order_stored && c < matrix->cols ? (float)matrix->sorted[c] : (float)c;
}

const uint32_t *import_row_order(const struct import *import, const char *source, uint64_t *period)
{
    char name[NAME_BYTES];
    size_t length = strlen(source);
    if (length > 5 && strcmp(source + length - 5, ".bias") == 0)
        snprintf(name, sizeof name, "%.*s.weight", (int)length - 5, source);
    else
        snprintf(name, sizeof name, "%s", source);
    const struct import_matrix *matrix = import_find(import, name);
    if (!matrix || !matrix->row_leader)
        return NULL;
    *period = matrix->row_period;
    return matrix->row_leader->sorted;
}

uint64_t import_mixed(const struct import *import, const char **first)
{
    *first = import->first_mixed;
    return import->mixed;
}
