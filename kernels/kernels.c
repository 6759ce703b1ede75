// Which kernel tables exist, and which of them this machine can run. The tables themselves: kernels_<isa>.c.
#include "kernels/kernels.h"

#include "kernels/kernels_internal.h"

#include <stdio.h>
#include <string.h>

#ifdef __x86_64__

#include <cpuid.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

const struct kernels *const kernels_all[] = {
    &kernels_amx, &kernels_avx512bf16, &kernels_avx512vbmi, &kernels_avx512, &kernels_avx2, &kernels_scalar, NULL};

// Register sets that the operating system saves at a context switch (XCR0).
enum { XCR0_YMM = 0x06, XCR0_ZMM = 0xe6, XCR0_TILES = 0x60000 };

// Features of leaf 1. Asked once: a virtual machine traps the question, which then takes longer than a row takes to be quantized.
static uint32_t cpu_features(void)
{
    static _Atomic uint32_t known; // 0: not asked yet
    uint32_t eax, ebx, ecx = atomic_load_explicit(&known, memory_order_relaxed), edx;
    if (ecx == 0 && __get_cpuid(1, &eax, &ebx, &ecx, &edx))
        atomic_store_explicit(&known, ecx, memory_order_relaxed);
    return ecx;
}

static bool os_saves(uint32_t registers)
{
    uint32_t eax, edx;
    if (!(cpu_features() & bit_OSXSAVE))
        return false;
    __asm__("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
    return (eax & registers) == registers;
}

static bool cpu_has_f16c(void) // not every compiler's __builtin_cpu_supports knows the name
{
    return cpu_features() & bit_F16C;
}

bool kernels_supported_avx2(void)
{
    return os_saves(XCR0_YMM) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cpu_has_f16c();
}

bool kernels_supported_avx512(void)
{
    return os_saves(XCR0_ZMM) && kernels_supported_avx2() && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

bool kernels_supported_avx512bf16(void)
{
    enum { AVX512_VBMI = 1 << 1, AVX512_BF16 = 1 << 5 };
    uint32_t eax, ebx, ecx, edx;
    return kernels_supported_avx512() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (ecx & AVX512_VBMI) &&
           __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & AVX512_BF16);
}

bool kernels_supported_avx512vbmi(void) { return kernels_supported_avx512() && __builtin_cpu_supports("avx512vbmi"); }

// Eight tiles of 16 rows of 64 bytes: the first palette, as long as there is no other hardware.
static bool cpu_has_amx(void)
{
    enum { AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24, AMX_INT8 = 1 << 25, PALETTE_LEAF = 0x1d };
    uint32_t eax, ebx, ecx, edx, all = AMX_TILE | AMX_INT8 | AMX_BF16;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & all) != all)
        return false;
    return __get_cpuid_count(PALETTE_LEAF, 1, &eax, &ebx, &ecx, &edx) && (ebx & 0xffff) == 64 && ebx >> 16 >= 8 &&
           (ecx & 0xffff) == 16;
}

// Tiles are 8 KiB for each thread that uses them, so Linux wants to be asked. It refuses when a signal stack of the process is too small for
// them; systems that do not know the question refuse too. The answer holds for all threads and is handed on by fork.
static bool amx_allowed;
static void ask_for_amx(void)
{
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_TILE_DATA = 18 };
    amx_allowed = cpu_has_amx() && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_TILE_DATA) == 0;
}

bool kernels_supported_amx(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    if (!os_saves(XCR0_TILES) || !kernels_supported_avx512())
        return false;
    pthread_once(&once, ask_for_amx);
    return amx_allowed;
}

// Sapphire Rapids, whose tiles take over where they are allowed, was seen to do half as many products of bf16 in vectors as of f32.
bool kernels_auto_passes_by(const struct kernels *kernels)
{
    uint32_t eax, ebx, ecx, edx;
    return kernels == &kernels_avx512bf16 && __get_cpuid(0, &eax, &ebx, &ecx, &edx) && ebx == signature_INTEL_ebx;
}

#else

const struct kernels *const kernels_all[] = {&kernels_scalar, NULL};

bool kernels_auto_passes_by(const struct kernels *kernels)
{
    (void)kernels;
    return false;
}

#endif

int kernels_select(const struct kernels **out, const char *wanted, struct error *err)
{
    bool known = false;
    char list[128] = "auto";
    for (int i = 0; kernels_all[i]; i++) {
        bool named = strcmp(wanted, kernels_all[i]->name) == 0;
        known |= named;
        if (!kernels_all[i]->supported())
            continue;
        if (named || (strcmp(wanted, "auto") == 0 && !kernels_auto_passes_by(kernels_all[i]))) {
            *out = kernels_all[i];
            return 0;
        }
        size_t used = strlen(list);
        snprintf(list + used, sizeof list - used, ", %s", kernels_all[i]->name);
    }
    return error_set(err, ERR_USAGE, "kernels \"%s\" %s; this machine supports: %s", wanted,
                     known ? "need instructions that this CPU or operating system lacks" : "do not exist", list);
}

const struct kernels *kernels_of_sums(const char *sums)
{
    for (int i = 0; kernels_all[i]; i++)
        if (strcmp(kernels_all[i]->sums, sums) == 0 && kernels_all[i]->supported())
            return kernels_all[i];
    return NULL;
}

enum { TABLES = sizeof kernels_all / sizeof *kernels_all - 1 };

uint32_t kernels_auto_set(void)
{
    uint32_t set = 0;
    for (int i = 0; i < TABLES; i++)
        if (kernels_all[i]->supported() && !kernels_auto_passes_by(kernels_all[i]))
            set |= 1u << (TABLES - 1 - i);
    return set;
}

const struct kernels *kernels_fastest(uint32_t set)
{
    int i = 0;
    while (i < TABLES - 1 && !(set >> (TABLES - 1 - i) & 1))
        i++;
    return kernels_all[i];
}
