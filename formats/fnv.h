// FNV-1a: a quick hash of few bytes, for tables and to tell things apart. Nothing against who looks for two of one hash; checksums are checksum.h's.
#ifndef TPSHARD_FORMATS_FNV_H
#define TPSHARD_FORMATS_FNV_H

#include <stddef.h>
#include <stdint.h>

static inline uint64_t fnv1a_64(const void *data, size_t bytes)
{
    uint64_t hash = 0xcbf29ce484222325u;
    for (size_t i = 0; i < bytes; i++)
        hash = (hash ^ ((const uint8_t *)data)[i]) * 0x100000001b3u;
    return hash;
}

// Of what has this hash and what stands behind it.
static inline uint32_t fnv1a_32_behind(uint32_t hash, const void *data, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++)
        hash = (hash ^ ((const uint8_t *)data)[i]) * 16777619u;
    return hash;
}

static inline uint32_t fnv1a_32(const void *data, size_t bytes) { return fnv1a_32_behind(2166136261u, data, bytes); }

#endif
