// The header of one safetensors file: 8 bytes little-endian header length, that many bytes of JSON, then the tensors.
// Owns parsing and judging the header; opening and reading files belongs to checkpoint.h.
//
// Stricter than the reference reader. Accepted: white space before and after the JSON (writers pad with it), tensors
// of zero elements, '/' in names. Refused with ERR_MODEL: a header above the cap, invalid JSON or UTF-8, duplicate
// names or keys, unknown keys in a tensor's description, a "__metadata__" that does not map strings to strings, names
// that are empty, longer than SAFETENSORS_NAME_BYTES or hold control characters, unknown dtypes, more than 8
// dimensions, overflow, an F4 tensor whose last dimension is odd (a row would begin within a byte), and any byte
// behind the header that does not belong to exactly one tensor (overlaps, holes, trailing bytes).
#ifndef TPSHARD_FORMATS_SAFETENSORS_H
#define TPSHARD_FORMATS_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

#include "formats/dtype.h"
#include "formats/error.h"

enum {
    SAFETENSORS_PREFIX_BYTES = 8,
    SAFETENSORS_HEADER_CAP_BYTES = 32 << 20,
    SAFETENSORS_NAME_BYTES = 4096,
    SAFETENSORS_MAX_DIMS = 8,
};

struct safetensors_tensor {
    const char *name;
    enum dtype dtype;
    int num_dims;                        // 0: one element
    uint64_t dims[SAFETENSORS_MAX_DIMS]; // outermost first
    uint64_t bytes;                      // dims and dtype agree with it
    int file;                            // index of the file in its checkpoint; 0 from safetensors_parse
    uint64_t offset;                     // from the file's start
};

struct safetensors_header {
    struct safetensors_tensor *tensors; // sorted by name
    size_t tensor_count;
    char *names; // what the names point into
};

// Reads the header's length from the first 8 bytes of a file of file_bytes, so that a caller knows how much to read.
// ERR_MODEL when it is above the cap or does not fit into the file. name is the file's, for messages.
int safetensors_header_bytes(const uint8_t prefix[SAFETENSORS_PREFIX_BYTES], uint64_t file_bytes, const char *name,
                             uint64_t *header_bytes, struct error *err);

// Parses the first `available` bytes of a file of file_bytes; prefix and header must be among them (else ERR_MODEL).
// Memory is at most some four times the header. Success: the caller owns *out (safetensors_free), which does not
// refer to the input.
int safetensors_parse(const uint8_t *header_and_prefix, size_t available, uint64_t file_bytes, const char *name,
                      struct safetensors_header **out, struct error *err);
void safetensors_free(struct safetensors_header *header); // accepts null

// True for a name without control characters of ASCII or Latin-1 (which terminals obey), not empty, not too long.
bool safetensors_name_ok(const char *name, size_t bytes);

#endif
