// The records of a rank file as they lie on disk, and where everything lies: what the reader (shard_file.c) and the
// writer (shard_layout.c) share, and repair_head, which makes a head anew. All others ask shard_file.h. The specification is shard_file.md.
#ifndef TPSHARD_FORMATS_SHARD_LAYOUT_H
#define TPSHARD_FORMATS_SHARD_LAYOUT_H

#include "formats/checksum.h"
#include "formats/shard_file.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the records are copied from and to little-endian files");

#define SHARD_MAGIC "TPSHARD\n" // 8 bytes, without the NUL

enum {
    FEATURE_COMPRESSED = 1, // leaves lie in the file as a table of the head says
    FEATURE_STAGES = 2,     // the model is cut into several pipeline stages: the file holds one's layers
    REQUIRED_FEATURES_KNOWN = FEATURE_COMPRESSED | FEATURE_STAGES,
    HEADER_BYTES = 320,
    HEAD_MAX_BYTES = 64 << 20,
    LEAVES_ALIGN = 16,
    NAME_MAX_BYTES = 255,
    LAYER_MAX = 65535,
    EXPERT_MAX = 65535,
    SHARE_FIELDS = sizeof(struct rank_share) / sizeof(int64_t),
};

struct disk_header {
    uint8_t magic[8];           //   0  "TPSHARD\n"
    uint32_t version;           //   8  SHARD_VERSION; readers reject any other
    uint32_t header_bytes;      //  12  320
    uint32_t required_features; //  16  a reader rejects a bit that it does not know
    uint32_t optional_features; //  20  a reader ignores bits that it does not know
    uint32_t rank;              //  24  < tp_size
    uint32_t tp_size;           //  28  1 to SHARD_MAX_RANKS
    uint32_t pp_rank;           //  32  < pp_size
    uint32_t pp_size;           //  36  1 to SHARD_MAX_RANKS
    uint32_t tensor_count;      //  40  >= 1
    uint32_t part_count;        //  44  all tensors' parts
    uint64_t tensors_offset;    //  48  from the file's start, as all offsets here; 320
    uint64_t parts_offset;      //  56  directly behind the tensor records
    uint64_t strings_offset;    //  64  directly behind the part records
    uint64_t strings_bytes;     //  72
    uint64_t leaves_offset;     //  80  end of the strings, rounded up to 16
    uint64_t leaf_count;        //  88  payload_bytes / 1 MiB, rounded up
    uint64_t payload_offset;    //  96  end of the leaves, compressed: of the table behind them, rounded up to 2 MiB
    uint64_t payload_bytes;     // 104  multiple of 4096; not compressed: up to the end of the file
    uint64_t file_bytes;        // 112  payload_offset + what lies there
    uint32_t layer_begin;       // 120  first layer of the stage, and
    uint32_t num_layers;        // 124  how many; both 0 where there is one stage
    uint8_t contract[16];       // 128
    uint64_t share[14];         // 144  struct rank_share, in its order
    uint8_t head_hash[16];      // 256  XXH3-128, canonical, of [0, payload_offset) with this field zero
    uint8_t reserved_end[48];   // 272  0
};
_Static_assert(sizeof(struct disk_header) == HEADER_BYTES, "on-disk layout");
_Static_assert(offsetof(struct disk_header, tensors_offset) == 48, "on-disk layout");
_Static_assert(offsetof(struct disk_header, layer_begin) == 120, "on-disk layout");
_Static_assert(offsetof(struct disk_header, contract) == 128, "on-disk layout");
_Static_assert(offsetof(struct disk_header, head_hash) == 256, "on-disk layout");
_Static_assert(SHARE_FIELDS == 14, "on-disk layout");

struct disk_tensor {
    uint32_t role;         //  0  enum tensor_role
    int32_t layer;         //  4  -1 outside the layers
    uint32_t kind;         //  8  enum weight_kind
    uint32_t group_size;   // 12  of kinds that have groups; else 0
    uint64_t rows, cols;   // 16, 24  logical
    uint64_t data_offset;  // 32  from the payload's start, as scale_offset
    uint64_t data_bytes;   // 40
    uint64_t scale_offset; // 48  0 when scale_bytes is 0
    uint64_t scale_bytes;  // 56
    uint32_t first_part;   // 64  index of its first part record
    uint32_t num_parts;    // 68  0 to 4
    int32_t expert;        // 72  -1 for all but an expert's own tensors
    uint32_t reserved;     // 76  0
};
_Static_assert(sizeof(struct disk_tensor) == 80, "on-disk layout");
_Static_assert(offsetof(struct disk_tensor, data_offset) == 32, "on-disk layout");

struct disk_part {
    uint32_t name_offset;              //  0  from strings_offset
    uint32_t name_bytes;               //  4  without the NUL that follows; 1 to 255
    uint64_t source_rows, source_cols; //  8, 16
    uint64_t row_begin, rows;          // 24, 32
    uint64_t col_begin, cols;          // 40, 48
    uint64_t reserved;                 // 56  0
};
_Static_assert(sizeof(struct disk_part) == 64, "on-disk layout");

// In a compressed file: one for each leaf, directly behind the leaves.
_Static_assert(sizeof(struct shard_leaf) == 8, "on-disk layout");

// Where everything lies; see struct disk_header.
struct shard_disk_layout {
    uint64_t part_count, parts_offset, strings_offset, strings_bytes, leaves_offset, leaf_count;
    uint64_t table_offset, table_bytes; // of struct shard_leaf; 0 bytes: not compressed
    uint64_t payload_offset, payload_bytes;
    uint64_t file_bytes; // compressed: known when the table is, see shard_layout_stored
};

// Gives a tensor the places behind *end, which is moved to its end. False on overflow.
bool shard_layout_tensor(struct shard_tensor *tensor, uint64_t *end);
// Places all tensors, and everything else behind each other; of a compressed file all but its length.
int shard_layout_all(struct shard_disk_layout *out, struct shard_tensor *tensors, uint64_t count, bool compressed,
                     struct error *err);
// The rest of the layout, from the counts and the end of the last tensor. False when something overflows or the head
// would be larger than HEAD_MAX_BYTES.
bool shard_layout_file(struct shard_disk_layout *out, uint64_t tensor_count, uint64_t part_count,
                       uint64_t strings_bytes, uint64_t payload_end, bool compressed);
// Payload bytes of a leaf.
uint64_t shard_layout_leaf_bytes(const struct shard_disk_layout *layout, uint64_t index);
// The length of a compressed file, and where its leaves begin: offsets [leaf_count], from the payload's start. What is wrong with the table,
// in words; NULL: nothing.
const char *shard_layout_stored(struct shard_disk_layout *layout, const struct shard_leaf *table, uint64_t *offsets);
// "layers.3.down (model.layers.3.mlp.down_proj.weight)", "layers.3.expert_down 7 (...)", for messages.
const char *shard_layout_label(char *buffer, size_t bytes, const struct shard_tensor *tensor);

#endif
