// Chooses the checksum implementation once; hexadecimal spelling. See checksum.h.
#include "formats/checksum.h"

#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

extern const struct checksum_target checksum_base, checksum_avx2, checksum_avx512;

const struct checksum_target *checksum_target_at(size_t index)
{
    const struct checksum_target *supported[4] = {&checksum_base};
    size_t count = 1;
#ifdef __x86_64__
    // The builtin asks the CPU and whether the operating system saves the wide registers. What is asked for is what
    // the build allows the compiler to use in these files, not only what xxHash needs.
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                  __builtin_cpu_supports("avx512vnni");
    if (avx2)
        supported[count++] = &checksum_avx2;
    if (avx512)
        supported[count++] = &checksum_avx512;
#endif
    return index < count ? supported[index] : NULL;
}

// Threads that race here store the same pointer.
static const struct checksum_target *fastest(void)
{
    static const struct checksum_target *_Atomic chosen;
    const struct checksum_target *target = atomic_load_explicit(&chosen, memory_order_relaxed);
    if (!target) {
        for (size_t i = 0; checksum_target_at(i); i++)
            target = checksum_target_at(i);
        atomic_store_explicit(&chosen, target, memory_order_relaxed);
    }
    return target;
}

uint64_t checksum_leaf(const void *bytes, size_t num_bytes) { return fastest()->leaf(bytes, num_bytes); }

struct checksum128 checksum_whole(const void *bytes, size_t num_bytes) { return fastest()->whole(bytes, num_bytes); }

bool checksum128_equal(struct checksum128 a, struct checksum128 b) { return a.low == b.low && a.high == b.high; }

void checksum128_to_hex(struct checksum128 sum, char hex[CHECKSUM128_HEX_DIGITS + 1])
{
    snprintf(hex, CHECKSUM128_HEX_DIGITS + 1, "%016llx%016llx", (unsigned long long)sum.high,
             (unsigned long long)sum.low);
}

bool checksum128_from_hex(struct checksum128 *out, const char *hex)
{
    static const char digits[] = "0123456789abcdef";
    if (strlen(hex) != CHECKSUM128_HEX_DIGITS || strspn(hex, digits) != CHECKSUM128_HEX_DIGITS)
        return false;
    uint64_t halves[2] = {0, 0};
    for (int i = 0; i < CHECKSUM128_HEX_DIGITS; i++)
        halves[i / 16] = halves[i / 16] << 4 | (uint64_t)(strchr(digits, hex[i]) - digits);
    *out = (struct checksum128){.low = halves[1], .high = halves[0]};
    return true;
}

void checksum128_to_bytes(struct checksum128 sum, uint8_t bytes[CHECKSUM128_BYTES])
{
    for (int i = 0; i < 8; i++) {
        bytes[i] = (uint8_t)(sum.high >> (56 - 8 * i));
        bytes[8 + i] = (uint8_t)(sum.low >> (56 - 8 * i));
    }
}

struct checksum128 checksum128_from_bytes(const uint8_t bytes[CHECKSUM128_BYTES])
{
    struct checksum128 sum = {0, 0};
    for (int i = 0; i < 8; i++) {
        sum.high = sum.high << 8 | bytes[i];
        sum.low = sum.low << 8 | bytes[8 + i];
    }
    return sum;
}

struct checksum_stream *checksum_stream_new(void) { return fastest()->stream_new(); }

void checksum_stream_update(struct checksum_stream *stream, const void *bytes, size_t num_bytes)
{
    fastest()->stream_update(stream, bytes, num_bytes);
}

struct checksum128 checksum_stream_final(const struct checksum_stream *stream)
{
    return fastest()->stream_final(stream);
}

void checksum_stream_free(struct checksum_stream *stream) { fastest()->stream_free(stream); }
