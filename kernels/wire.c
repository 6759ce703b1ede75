// Names of the wire codecs and the choice of their implementation. See wire.h; the codecs themselves stand in
// wire_impl.h.
#include "kernels/wire.h"

#include <stddef.h>
#include <string.h>

extern const struct wire_target wire_base, wire_avx2;

static const struct {
    const char *name;
    uint64_t group_bytes;
} wires[WIRE_COUNT] = {{"bf16", 256}, {"fp8", 132}, {"s8x", 132}, {"f32", 512}};

const char *wire_name(enum wire wire) { return wires[wire].name; }

bool wire_from_name(const char *name, enum wire *wire)
{
    for (int i = 0; i < WIRE_COUNT; i++)
        if (!strcmp(name, wires[i].name)) {
            *wire = (enum wire)i;
            return true;
        }
    return false;
}

uint64_t wire_group_bytes(enum wire wire) { return wires[wire].group_bytes; }

#ifdef __x86_64__
// The builtin asks the CPU and the operating system, and costs one load.
static bool have_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

const struct wire_target *wire_target_at(int index)
{
#ifdef __x86_64__
    if (index == 1 && have_avx2())
        return &wire_avx2;
#endif
    return index == 0 ? &wire_base : NULL;
}

static const struct wire_target *fastest(void)
{
#ifdef __x86_64__
    if (have_avx2())
        return &wire_avx2;
#endif
    return &wire_base;
}

void wire_encode_group(uint8_t *out, const float *x, int count, enum wire wire)
{
    fastest()->encode[wire](out, x, count);
}

void wire_add_group(float *sum, const uint8_t *in, int count, enum wire wire) { fastest()->add[wire](sum, in, count); }

void wire_decode_group(float *out, const uint8_t *in, int count, enum wire wire)
{
    fastest()->decode[wire](out, in, count);
}

void wire_feed_group(uint8_t *out, float *decoded, const float *x, uint16_t *lost, int count, enum wire wire)
{
    fastest()->feed[wire](out, decoded, x, lost, count);
}

void wire_add_up_group(uint8_t *out, float *x, const uint8_t *const *parts, int own, int ranks, int count,
                       enum wire wire)
{
    fastest()->add_up[wire](out, x, parts, own, ranks, count);
}

void wire_sum_group(float *out, const float *const *parts, int own, int ranks, int count, enum wire wire)
{
    fastest()->sum[wire](out, parts, own, ranks, count);
}
