// One rank's file: a header, the rank's share, a tensor index, checksum leaves, then one flat payload that is byte for
// byte what the kernels read. Little-endian. The specification is formats/shard_file.md; this file is its C reader and
// writer. It leaves to others: which rank owns what (shard/plan), quantizing and packing (kernels/pack), the manifest
// (formats/manifest).
#ifndef TPSHARD_FORMATS_SHARD_FILE_H
#define TPSHARD_FORMATS_SHARD_FILE_H

#include "formats/checksum.h"
#include "formats/error.h"
#include "formats/leaf_code.h"
#include "formats/model_desc.h"
#include "formats/weight.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    SHARD_VERSION = 2,
    SHARD_LEAF_BYTES = 1 << 20,    // a checksum leaf covers this many payload bytes (the last one may be shorter)
    SHARD_PAYLOAD_ALIGN = 2 << 20, // payload starts at a multiple of this
    SHARD_TENSOR_ALIGN = 256,      // every tensor's data and scales start at a multiple of this
    SHARD_FILE_ALIGN = 4096,       // the file's length is a multiple of this
    SHARD_STORED_MAX_BYTES =
        SHARD_LEAF_BYTES + SHARD_FILE_ALIGN - 1, // a leaf as it lies in the file; more than a leaf: the last one
    SHARD_MAX_PARTS = 4,                         // source tensors fused into one stored tensor
    SHARD_MAX_RANKS = 1024,                      // tp_size, and pp_size
    SHARD_LEAF_LABEL_BYTES = 320,                // for shard_file_leaf_label
};

// What a tensor is for. Numbers are on disk. layer is -1 for those outside the layers.
enum tensor_role {
    ROLE_EMBEDDING = 0,       // [vocab_local, hidden]           also the head when embeddings are tied
    ROLE_ROPE_INV_FREQ,       // f32 [1, rotary_dim / 2]         scaling already applied
    ROLE_ATTENTION_NORM,      // f32 [1, hidden]
    ROLE_QKV,                 // [(heads_local + 2 kv_heads_local) * head_dim, hidden]   rows: q, then k, then v
    ROLE_QKV_BIAS,            // f32 [1, rows of ROLE_QKV]
    ROLE_Q_NORM,              // f32 [1, head_dim], or this rank's [1, heads_local * head_dim]
    ROLE_K_NORM,              // f32 [1, head_dim], or this rank's [1, kv_heads_local * head_dim]
    ROLE_O,                   // [hidden, heads_local * head_dim]  (latent attention: * v_dim)
    ROLE_O_BIAS,              // f32 [1, hidden]                 the same on every rank, added once after the all-reduce
    ROLE_MLP_NORM,            // f32 [1, hidden]
    ROLE_GATE_UP,             // [2 * intermediate_local, hidden]  rows: gate, then up
    ROLE_GATE_UP_BIAS,        // f32 [1, 2 * intermediate_local]
    ROLE_DOWN,                // [hidden, intermediate_local]
    ROLE_DOWN_BIAS,           // f32 [1, hidden]
    ROLE_FINAL_NORM,          // f32 [1, hidden]
    ROLE_HEAD,                // [vocab_local, hidden]           absent when embeddings are tied
    ROLE_ROPE_LONG,           // f32 [1, rotary_dim / 2]         for contexts above rope_original_context
    ROLE_ROPE_LOCAL,          // f32 [1, rotary_dim / 2]         of LAYER_LOCAL_ROPE layers
    ROLE_SINKS,               // f32 [1, heads_local]
    ROLE_ATTENTION_POST_NORM, // f32 [1, hidden]
    ROLE_MLP_POST_NORM,       // f32 [1, hidden]
    // Latent attention. Those of the latent are the same on every rank.
    ROLE_Q_A,       // [q_rank, hidden]
    ROLE_Q_A_NORM,  // f32 [1, q_rank]
    ROLE_Q_B,       // [heads_local * head_dim, q_rank or hidden]
    ROLE_KV_A,      // [kv_rank + rope_dim, hidden]
    ROLE_KV_A_NORM, // f32 [1, kv_rank]
    ROLE_KV_B, // bf16 [heads_local * (nope_dim + v_dim), kv_rank]   each head: rows of its keys, then of its values
    // Experts. `expert` counts over the whole model; a rank that holds no part of one has a tensor without rows or columns.
    ROLE_ROUTER,              // bf16 [num_experts (+ 1: the shared gate), hidden]
    ROLE_ROUTER_BIAS,         // f32 [1, num_experts]
    ROLE_ROUTER_CHOICE_BIAS,  // f32 [1, num_experts]
    ROLE_EXPERT_GATE_UP,      // [2 * expert_size_local, hidden]   rows: gate, then up
    ROLE_EXPERT_GATE_UP_BIAS, // f32 [1, 2 * expert_size_local]
    ROLE_EXPERT_DOWN,         // [hidden, expert_size_local]
    ROLE_EXPERT_DOWN_BIAS,    // f32 [1, hidden]      added by the rank that holds the first column
    ROLE_SHARED_GATE_UP,      // [2 * shared_size_local, hidden]
    ROLE_SHARED_DOWN,         // [hidden, shared_size_local]
    // Columns of a quantized checkpoint that were reordered so that its groups are consecutive: stored column i is column order[i] of
    // the input. Absent: in order.
    ROLE_QKV_ORDER,     // f32 [1, hidden]: column numbers, exact
    ROLE_GATE_UP_ORDER, // likewise
    ROLE_COUNT,
};
const char *tensor_role_name(enum tensor_role role); // "embedding", "attention_norm", "qkv", ...

// A rectangle of a source tensor that stands in the stored tensor. A matrix holds its parts one below the other (each
// has the matrix's cols, their rows add up to its rows); a vector holds them side by side (1 x n each, their cols add
// up). A tensor without parts was computed (rope_inv_freq).
struct shard_part {
    const char *source;                // name in the checkpoint, e.g. "model.layers.0.self_attn.q_proj.weight";
                                       // 1 to 255 bytes of printable ASCII
    uint64_t source_rows, source_cols; // whole source tensor (a vector is 1 x n)
    uint64_t row_begin, rows;          // rows of the source
    uint64_t col_begin, cols;          // columns of the source
};

struct shard_tensor {
    enum tensor_role role;
    int32_t layer;  // -1 outside the layers
    int32_t expert; // -1 for all but an expert's own tensors
    struct weight_shape shape;
    uint64_t data_offset;  // from the payload's start
    uint64_t scale_offset; // from the payload's start; 0 when scale_bytes is 0
    int num_parts;
    struct shard_part parts[SHARD_MAX_PARTS];
};

// What a rank file says of itself, besides its tensors.
struct shard_identity {
    uint32_t rank, tp_size;           // of its stage
    uint32_t pp_rank, pp_size;        // stage
    uint32_t layer_begin, num_layers; // of the stage, where there are several; else 0
    uint8_t contract[16];             // XXH3-128 of the canonical manifest core (formats/manifest.h), big endian
    struct rank_share share;
};

// ---- reading ---------------------------------------------------------------------------------------------------
struct shard_file; // immutable after opening

// Parses header, index and leaf table from the first `available` bytes of a file that is file_bytes long. Any bytes may
// be rejected (ERR_CORRUPT), none may crash. The bytes are copied: they need not outlive the call.
int shard_file_parse(struct shard_file **out, const uint8_t *bytes, uint64_t available, uint64_t file_bytes,
                     const char *name, struct error *err);
// How long the head of a file is that begins so, as its header says; at most 64 MiB. 0: that is no head, which is for shard_file_parse to
// say, or these are too few bytes to tell. SHARD_PAYLOAD_ALIGN bytes are enough, and no head is shorter.
uint64_t shard_file_head_bytes(const uint8_t *first, uint64_t num_first);
// Reads and parses the head of a file, then maps the payload read-only (private, not populated).
int shard_file_open(struct shard_file **out, const char *path, struct error *err);
void shard_file_close(struct shard_file *file);

const struct shard_identity *shard_file_identity(const struct shard_file *file);
uint64_t shard_file_tensor_count(const struct shard_file *file);
const struct shard_tensor *shard_file_tensor(const struct shard_file *file, uint64_t index);
// NULL when there is none. expert -1 for all but an expert's own tensors. Takes logarithmic time.
const struct shard_tensor *shard_file_find(const struct shard_file *file, enum tensor_role role, int32_t layer,
                                           int32_t expert);
struct checksum128
shard_file_root(const struct shard_file *file); // XXH3-128 of everything before the payload; stands in the manifest
uint64_t shard_file_payload_bytes(const struct shard_file *file);
uint64_t shard_file_payload_offset(const struct shard_file *file); // from the file's start
const uint8_t *
shard_file_payload(const struct shard_file *file); // mapped; NULL after shard_file_parse, and in compressed files
uint64_t shard_file_leaf_count(const struct shard_file *file);
uint64_t shard_file_leaf_bytes(const struct shard_file *file, uint64_t index); // payload bytes of that leaf
// What stands in a leaf: "tensor layers.3.down (...)", "tensor ... or one of the 2 behind it", "padding". Returns buffer.
const char *shard_file_leaf_label(const struct shard_file *file, uint64_t index, char *buffer, size_t bytes);

// A compressed file holds leaves in fewer bytes, one behind the other, at any offset; each still has one checksum, of the bytes as they lie in
// the file. In other files a leaf lies there as it is. The last leaf's bytes go on to the end of the file, with zeros.
struct shard_stored {
    uint64_t offset, bytes; // offset from the payload's start; bytes <= SHARD_STORED_MAX_BYTES
};
bool shard_file_is_compressed(const struct shard_file *file);
struct shard_stored shard_file_stored_leaf(const struct shard_file *file, uint64_t index);
uint64_t shard_file_stored_bytes(const struct shard_file *file); // from the payload's start to the end of the file
enum leaf_code shard_file_leaf_code(const struct shard_file *file, uint64_t index);
// Checks leaf `index` against its bytes as they are stored. ERR_CORRUPT names rank, tensor and byte range of the file, and the command that
// repairs it.
int shard_file_verify_leaf(const struct shard_file *file, uint64_t index, const uint8_t *stored, struct error *err);
// Makes shard_file_leaf_bytes() bytes of payload from stored bytes that were verified. scratch (leaf_scratch_new): one for each thread.
int shard_file_decode_leaf(const struct shard_file *file, uint64_t index, const uint8_t *stored, uint8_t *out,
                           struct leaf_scratch *scratch, struct error *err);

// ---- writing ---------------------------------------------------------------------------------------------------
// The writer lays out tensors in the order given, so the layout is known before any weight is read.
// Tensors' offsets are filled in by shard_layout(). *payload_offset and *file_bytes are from the file's start.
int shard_layout(struct shard_tensor *tensors, uint64_t count, uint64_t *payload_offset, uint64_t *payload_bytes,
                 uint64_t *file_bytes, struct error *err);
// Serialises header + index + leaf table (leaves[leaf_count] of XXH3-64, one per SHARD_LEAF_BYTES of payload_bytes)
// into a malloc'ed block of exactly *payload_offset bytes, zero padded. root (may be NULL) receives its XXH3-128.
// Refuses whatever shard_file_parse would refuse.
int shard_head_serialise(uint8_t **out, const struct shard_identity *identity, const struct shard_tensor *tensors,
                         uint64_t count, const uint64_t *leaves, struct checksum128 *root, struct error *err);

// The same for a compressed file. How each leaf lies in it, [leaf_count]; not all of them raw. The last leaf's checksum is that of its bytes and
// of the zeros behind it up to the next multiple of SHARD_FILE_ALIGN. The head's length is known before anything is compressed.
struct shard_leaf {
    uint32_t bytes; // without those zeros
    uint32_t code;  // enum leaf_code
};
struct shard_compressed_layout {
    uint64_t leaves_offset, table_offset; // where the head holds checksums, and how leaves lie
    uint64_t payload_offset;
};
int shard_compressed_layout(struct shard_compressed_layout *out, const struct shard_tensor *tensors, uint64_t count,
                            struct error *err);
int shard_compressed_head_serialise(uint8_t **out, const struct shard_identity *identity,
                                    const struct shard_tensor *tensors, uint64_t count, const uint64_t *leaves,
                                    const struct shard_leaf *stored, struct checksum128 *root, struct error *err);

#endif
