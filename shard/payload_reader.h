// Ranges of a rank file's payload, whether its leaves are compressed or not. For tools that read weights back; the engine has a loader.
#ifndef TPSHARD_SHARD_PAYLOAD_READER_H
#define TPSHARD_SHARD_PAYLOAD_READER_H

#include "formats/error.h"
#include "formats/shard_file.h"

#include <stdint.h>

struct payload_reader;

// file: of this path; it must outlive the reader.
int payload_reader_open(struct payload_reader **out, const struct shard_file *file, const char *path,
                        struct error *err);
void payload_reader_close(struct payload_reader *reader); // accepts NULL

// Bytes [offset, offset + bytes) of the payload. Any thread. Compressed leaves are verified, for the decoder is given nothing else; others are
// read as they are.
int payload_reader_read(struct payload_reader *reader, void *buffer, uint64_t bytes, uint64_t offset,
                        struct error *err);

#endif
