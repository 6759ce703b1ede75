// See shard_fixture.h.
#include "tests/shard_fixture.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include "formats/file_io.h"
#include "formats/manifest.h"
#include "kernels/pack.h"

enum {
    HIDDEN = 128,
    HEADS = 4,
    KV_HEADS = 2,
    HEAD_DIM = 32,
    INTERMEDIATE = 192,
    EXPERT_SIZE = 64,
    VOCAB = 300,
    TP = 2
};
enum { Q_ROWS = HEADS * HEAD_DIM, KV_ROWS = KV_HEADS * HEAD_DIM };

// Element (row, col) of source `number`; exact in bf16. The same formula stands in test_shard_reader.py.
static float source_value(unsigned number, uint64_t row, uint64_t col)
{
    return (float)((int)((row * 131 + col * 71 + row * col % 97 + 17ull * number) % 251) - 125) / 1024;
}

static const char *const source_names[] = {
    "embed",     "input_norm", "q",  "k",    "v",    "q_bias",  "k_bias", "v_bias",     "o",
    "post_norm", "gate",       "up", "down", "norm", "lm_head", "router", "experts[0]", "experts[1]",
};

static unsigned source_number(const char *name)
{
    for (unsigned i = 0; i < sizeof source_names / sizeof *source_names; i++)
        if (strcmp(name, source_names[i]) == 0)
            return i;
    fail_msg("no source %s", name);
    return 0;
}

static struct rank_share share_of(uint32_t rank)
{
    int64_t mlp = partition_begin(3, rank, TP) * 64, vocab = partition_begin(VOCAB, rank, TP);
    return (struct rank_share){
        .head_begin = 2 * (int64_t)rank,
        .num_heads_local = 2,
        .kv_head_begin = rank,
        .num_kv_heads_local = 1,
        .mlp_begin = mlp,
        .intermediate_local = partition_begin(3, rank + 1, TP) * 64 - mlp,
        .vocab_begin = vocab,
        .vocab_local = partition_begin(VOCAB, rank + 1, TP) - vocab,
        .expert_begin = rank,
        .num_experts_local = 1,
        .expert_size_local = EXPERT_SIZE,
    };
}

void shard_fixture_set_tensor(struct shard_tensor *tensor, enum tensor_role role, int32_t layer, enum weight_kind kind,
                              uint32_t group_size, uint64_t rows, uint64_t cols)
{
    *tensor = (struct shard_tensor){.role = role, .layer = layer, .expert = -1};
    assert_true(weight_shape_make(&tensor->shape, kind, group_size, rows, cols));
}

static void add_part(struct shard_tensor *tensor, const char *source, uint64_t source_rows, uint64_t source_cols,
                     uint64_t row_begin, uint64_t rows, uint64_t col_begin, uint64_t cols)
{
    tensor->parts[tensor->num_parts++] =
        (struct shard_part){source, source_rows, source_cols, row_begin, rows, col_begin, cols};
}

static void make_tensors(struct shard_tensor tensors[SHARD_FIXTURE_TENSORS], const struct rank_share *share)
{
    uint64_t q_begin = (uint64_t)share->head_begin * HEAD_DIM, q = (uint64_t)share->num_heads_local * HEAD_DIM;
    uint64_t kv_begin = (uint64_t)share->kv_head_begin * HEAD_DIM, kv = (uint64_t)share->num_kv_heads_local * HEAD_DIM;
    uint64_t mlp_begin = (uint64_t)share->mlp_begin, mlp = (uint64_t)share->intermediate_local;
    uint64_t vocab_begin = (uint64_t)share->vocab_begin, vocab = (uint64_t)share->vocab_local;
    struct shard_tensor *t = tensors;
    shard_fixture_set_tensor(t, ROLE_EMBEDDING, -1, WEIGHT_BF16, 0, vocab, HIDDEN);
    add_part(t++, "embed", VOCAB, HIDDEN, vocab_begin, vocab, 0, HIDDEN);
    shard_fixture_set_tensor(t++, ROLE_ROPE_INV_FREQ, -1, WEIGHT_F32, 0, 1, HEAD_DIM / 2);
    shard_fixture_set_tensor(t, ROLE_ATTENTION_NORM, 0, WEIGHT_F32, 0, 1, HIDDEN);
    add_part(t++, "input_norm", 1, HIDDEN, 0, 1, 0, HIDDEN);
    shard_fixture_set_tensor(t, ROLE_QKV, 0, WEIGHT_INT4, 32, q + 2 * kv, HIDDEN);
    add_part(t, "q", Q_ROWS, HIDDEN, q_begin, q, 0, HIDDEN);
    add_part(t, "k", KV_ROWS, HIDDEN, kv_begin, kv, 0, HIDDEN);
    add_part(t++, "v", KV_ROWS, HIDDEN, kv_begin, kv, 0, HIDDEN);
    shard_fixture_set_tensor(t, ROLE_QKV_BIAS, 0, WEIGHT_F32, 0, 1, q + 2 * kv);
    add_part(t, "q_bias", 1, Q_ROWS, 0, 1, q_begin, q);
    add_part(t, "k_bias", 1, KV_ROWS, 0, 1, kv_begin, kv);
    add_part(t++, "v_bias", 1, KV_ROWS, 0, 1, kv_begin, kv);
    shard_fixture_set_tensor(t, ROLE_O, 0, WEIGHT_FP8, 0, HIDDEN, q);
    add_part(t++, "o", HIDDEN, Q_ROWS, 0, HIDDEN, q_begin, q);
    shard_fixture_set_tensor(t, ROLE_MLP_NORM, 0, WEIGHT_F32, 0, 1, HIDDEN);
    add_part(t++, "post_norm", 1, HIDDEN, 0, 1, 0, HIDDEN);
    shard_fixture_set_tensor(t, ROLE_GATE_UP, 0, WEIGHT_INT4, 128, 2 * mlp, HIDDEN);
    add_part(t, "gate", INTERMEDIATE, HIDDEN, mlp_begin, mlp, 0, HIDDEN);
    add_part(t++, "up", INTERMEDIATE, HIDDEN, mlp_begin, mlp, 0, HIDDEN);
    shard_fixture_set_tensor(t, ROLE_DOWN, 0, WEIGHT_INT4, 64, HIDDEN, mlp);
    add_part(t++, "down", HIDDEN, INTERMEDIATE, 0, HIDDEN, mlp_begin, mlp);
    shard_fixture_set_tensor(t, ROLE_FINAL_NORM, -1, WEIGHT_F32, 0, 1, HIDDEN);
    add_part(t++, "norm", 1, HIDDEN, 0, 1, 0, HIDDEN);
    shard_fixture_set_tensor(t, ROLE_HEAD, -1, WEIGHT_INT8, 0, vocab, HIDDEN);
    add_part(t++, "lm_head", VOCAB, HIDDEN, vocab_begin, vocab, 0, HIDDEN);
    // Two of no size, and of two experts one: a rank may own nothing of a layer.
    shard_fixture_set_tensor(t, ROLE_QKV, 1, WEIGHT_INT8, 0, 0, HIDDEN);
    add_part(t++, "q", Q_ROWS, HIDDEN, 0, 0, 0, HIDDEN);
    shard_fixture_set_tensor(t, ROLE_O, 1, WEIGHT_INT4, 32, HIDDEN, 0);
    add_part(t++, "o", HIDDEN, Q_ROWS, 0, HIDDEN, 0, 0);
    shard_fixture_set_tensor(t, ROLE_ROUTER, 1, WEIGHT_BF16, 0, 2, HIDDEN);
    add_part(t++, "router", 2, HIDDEN, 0, 2, 0, HIDDEN);
    for (int expert = 0; expert < 2; expert++) {
        uint64_t cols = share->expert_begin == expert ? EXPERT_SIZE : 0;
        shard_fixture_set_tensor(t, ROLE_EXPERT_DOWN, 1, WEIGHT_INT4, 64, HIDDEN, cols);
        t->expert = expert;
        add_part(t++, expert ? "experts[1]" : "experts[0]", HIDDEN, EXPERT_SIZE, 0, HIDDEN, 0, cols);
    }
    assert_int_equal(t - tensors, SHARD_FIXTURE_TENSORS);
}

static void fill_tensor(uint8_t *payload, const struct shard_tensor *tensor)
{
    if (tensor->role == ROLE_ROPE_INV_FREQ) {
        for (int i = 0; i < HEAD_DIM / 2; i++) {
            float value = 1.0f / (float)(i + 1);
            memcpy(payload + tensor->data_offset + 4 * (uint64_t)i, &value, 4);
        }
        return;
    }
    uint64_t stored_row = 0, stored_col = 0;
    for (int p = 0; p < tensor->num_parts; p++) {
        const struct shard_part *part = &tensor->parts[p];
        unsigned number = source_number(part->source);
        if (tensor->shape.kind == WEIGHT_F32) {
            for (uint64_t i = 0; i < part->cols; i++, stored_col++) {
                float value = source_value(number, 0, part->col_begin + i);
                memcpy(payload + tensor->data_offset + 4 * stored_col, &value, 4);
            }
            continue;
        }
        for (uint64_t r = 0; r < part->rows; r++, stored_row++) {
            enum weight_kind kind = tensor->shape.kind;
            uint32_t group_size = tensor->shape.group_size;
            float x[256];
            assert_true(part->source_cols <= 256);
            for (uint64_t c = 0; c < part->source_cols; c++)
                x[c] = source_value(number, part->row_begin + r, c);
            uint64_t memory[256];
            assert_true(packed_row_bytes(kind, group_size, part->source_cols) <= sizeof memory);
            struct packed_row row;
            packed_row_place(&row, memory, kind, group_size, part->source_cols);
            assert_int_equal(pack_quantize_row(&row, kind, group_size, x, part->source_cols, NULL, NULL), 0);
            pack_store_row(payload + tensor->data_offset, payload + tensor->scale_offset, &tensor->shape, 0, stored_row,
                           &row, part->col_begin);
        }
    }
}

void shard_fixture_make(struct shard_fixture *file, uint32_t rank, const uint8_t contract[16], uint64_t extra_vocab)
{
    struct error err = {0};
    *file = (struct shard_fixture){
        .identity = {.rank = rank, .tp_size = TP, .pp_rank = 0, .pp_size = 1, .share = share_of(rank)}};
    memcpy(file->identity.contract, contract, 16);
    make_tensors(file->tensors, &file->identity.share);
    if (extra_vocab) {
        struct shard_tensor *embedding = &file->tensors[0];
        embedding->shape.rows += extra_vocab;
        assert_true(weight_shape_make(&embedding->shape, WEIGHT_BF16, 0, embedding->shape.rows, HIDDEN));
        embedding->parts[0].rows += extra_vocab;
        embedding->parts[0].source_rows += extra_vocab;
    }
    if (shard_layout(file->tensors, SHARD_FIXTURE_TENSORS, &file->payload_offset, &file->payload_bytes,
                     &file->file_bytes, &err))
        fail_msg("%s", err.msg);
    file->bytes = calloc(1, file->file_bytes);
    assert_non_null(file->bytes);
    uint8_t *payload = file->bytes + file->payload_offset;
    for (int i = 0; i < SHARD_FIXTURE_TENSORS; i++)
        fill_tensor(payload, &file->tensors[i]);
    uint64_t leaves[64], leaf_count = (file->payload_bytes + SHARD_LEAF_BYTES - 1) / SHARD_LEAF_BYTES;
    assert_true(leaf_count <= 64);
    for (uint64_t i = 0; i < leaf_count; i++) {
        uint64_t begin = i * SHARD_LEAF_BYTES, left = file->payload_bytes - begin;
        leaves[i] = checksum_leaf(payload + begin, left < SHARD_LEAF_BYTES ? left : SHARD_LEAF_BYTES);
    }
    uint8_t *head;
    if (shard_head_serialise(&head, &file->identity, file->tensors, SHARD_FIXTURE_TENSORS, leaves, &file->root, &err))
        fail_msg("%s", err.msg);
    memcpy(file->bytes, head, file->payload_offset);
    free(head);
}

void shard_fixture_compress(struct shard_fixture *file)
{
    struct error err = {0};
    struct shard_compressed_layout layout;
    struct shard_leaf leaves[64];
    uint64_t checksums[64], leaf_count = (file->payload_bytes + SHARD_LEAF_BYTES - 1) / SHARD_LEAF_BYTES, end = 0;
    struct leaf_encoder *encoder = leaf_encoder_new();
    assert_true(encoder && leaf_count <= 64);
    assert_int_equal(shard_compressed_layout(&layout, file->tensors, SHARD_FIXTURE_TENSORS, &err), 0);
    uint8_t *bytes = calloc(1, layout.payload_offset + file->payload_bytes + SHARD_FILE_ALIGN), *head;
    assert_non_null(bytes);
    for (uint64_t i = 0; i < leaf_count; i++) {
        uint64_t begin = i * SHARD_LEAF_BYTES, left = file->payload_bytes - begin, stored_bytes;
        const uint8_t *stored;
        enum leaf_code code;
        if (leaf_encode(&code, &stored, &stored_bytes, encoder, file->bytes + file->payload_offset + begin,
                        left < SHARD_LEAF_BYTES ? left : SHARD_LEAF_BYTES, &err))
            fail_msg("%s", err.msg);
        leaves[i] = (struct shard_leaf){(uint32_t)stored_bytes, code};
        memcpy(bytes + layout.payload_offset + end, stored, stored_bytes);
        if (i + 1 == leaf_count)
            stored_bytes = (end + stored_bytes + SHARD_FILE_ALIGN - 1) / SHARD_FILE_ALIGN * SHARD_FILE_ALIGN - end;
        checksums[i] = checksum_leaf(bytes + layout.payload_offset + end, stored_bytes);
        end += stored_bytes;
    }
    if (shard_compressed_head_serialise(&head, &file->identity, file->tensors, SHARD_FIXTURE_TENSORS, checksums, leaves,
                                        &file->root, &err))
        fail_msg("%s", err.msg);
    memcpy(bytes, head, layout.payload_offset);
    free(head);
    free(file->bytes);
    leaf_encoder_free(encoder);
    file->bytes = bytes;
    file->payload_offset = layout.payload_offset;
    file->file_bytes = layout.payload_offset + end;
}

// The manifest but for its lists of files.
static struct manifest fixture_manifest(void)
{
    return (struct manifest){
        .version = MANIFEST_VERSION,
        .tool = "test",
        .model = {.architecture = "Formula",
                  .num_layers = 2,
                  .hidden_size = HIDDEN,
                  .layer_flags = {0, LAYER_EXPERTS},
                  .intermediate_size = INTERMEDIATE,
                  .num_heads = HEADS,
                  .num_kv_heads = KV_HEADS,
                  .head_dim = HEAD_DIM,
                  .vocab_size = VOCAB,
                  .context = 64,
                  .norm_eps = 1e-5,
                  .pre_norms = true,
                  .embedding_scale = 1,
                  .residual_scale = 1,
                  .logit_scale = 1,
                  .attention_scale = 0.125,
                  .rotary_dim = HEAD_DIM,
                  .rope_attention_factor = 1.1,
                  .experts = {.num_experts = 2,
                              .experts_per_token = 1,
                              .expert_size = EXPERT_SIZE,
                              .scale = 1,
                              .num_groups = 1,
                              .groups_per_token = 1,
                              .group_members = 1},
                  .qkv_bias = true,
                  .bos_token_id = -1,
                  .eos_token_ids = {7, 8},
                  .num_eos = 2,
                  .default_temperature = 0.7,
                  .default_top_p = 0.9,
                  .default_repetition_penalty = 1.05,
                  .default_top_k = -1},
        .tp_size = TP,
        .pp_size = 1,
        .quant = {.linear = WEIGHT_INT4, .embedding = WEIGHT_BF16, .head = WEIGHT_INT8, .group_size = 64},
        .experts = EXPERTS_EP,
        .wire_advice = "bf16",
    };
}

void shard_fixture_write(const char *out_dir, bool compressed)
{
    struct error err = {0};
    struct manifest_file ranks[TP] = {0}, extra = {.name = "note.txt", .bytes = 6};
    extra.hash = checksum_whole("hello\n", 6);
    struct manifest_file source = {.name = "model.safetensors", .bytes = 1000, .hash = {1, 2}};
    struct manifest manifest = fixture_manifest();
    manifest.ranks = ranks;
    manifest.num_ranks = TP;
    manifest.extras = &extra;
    manifest.sources = &source;
    manifest.num_extras = manifest.num_sources = 1;
    struct checksum128 sum;
    if (manifest_contract(&manifest, &sum, &err))
        fail_msg("%s", err.msg);
    uint8_t contract[16];
    for (int i = 0; i < 16; i++)
        contract[i] = (uint8_t)((i < 8 ? sum.high : sum.low) >> (56 - 8 * (i % 8)));
    char names[TP][64];
    for (uint32_t rank = 0; rank < TP; rank++) {
        struct shard_fixture file;
        shard_fixture_make(&file, rank, contract, 0);
        if (compressed)
            shard_fixture_compress(&file);
        manifest_rank_file_name(names[rank], sizeof names[rank], rank, TP, 1);
        ranks[rank] = (struct manifest_file){names[rank], file.file_bytes, file.root};
        if (file_write_atomic(out_dir, names[rank], file.bytes, file.file_bytes, &err))
            fail_msg("%s", err.msg);
        free(file.bytes);
    }
    char *text = NULL;
    if (file_write_atomic(out_dir, extra.name, "hello\n", 6, &err) || manifest_to_json(&manifest, &text, &err) ||
        file_write_atomic(out_dir, MANIFEST_FILE_NAME, text, strlen(text), &err))
        fail_msg("%s", err.msg);
    free(text);
}
