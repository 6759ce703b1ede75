// What a rotation (tpshard --rot) does to the residual stream: each channel takes a sign, then blocks of channels are multiplied by a Hadamard
// matrix over the root of its size, which is its own inverse. The signs are part of what shards hold: whoever compares a rotated model with one that
// is not undoes both.
#ifndef TPSHARD_FORMATS_ROTATION_H
#define TPSHARD_FORMATS_ROTATION_H

#include <stdint.h>

// A bit of a hash of the channel's number, so that no pattern of a model's meets one of ours.
static inline float rotation_sign(uint64_t channel)
{
    uint32_t x = (uint32_t)channel + 0x9e3779b9u;
    x = (x ^ x >> 16) * 0x85ebca6bu;
    x = (x ^ x >> 13) * 0xc2b2ae35u;
    return (x ^ x >> 16) & 1 ? -1.0f : 1.0f;
}

#endif
