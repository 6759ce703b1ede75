// Which kernel tables exist, and which of them this machine can run. The tables themselves: kernels_<isa>.c.
#include "kernels/kernels.h"

#include "kernels/kernels_internal.h"

#include <stdio.h>
#include <string.h>

#ifdef __x86_64__

#include <cpuid.h>

const struct kernels *const kernels_all[] = {&kernels_avx512, &kernels_avx2, &kernels_scalar, NULL};

// Register sets that the operating system saves at a context switch (XCR0).
enum { XCR0_YMM = 0x06, XCR0_ZMM = 0xe6 };

static bool os_saves(uint32_t registers)
{
    uint32_t eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_OSXSAVE))
        return false;
    __asm__("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
    return (eax & registers) == registers;
}

static bool cpu_has_f16c(void) // not every compiler's __builtin_cpu_supports knows the name
{
    uint32_t eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
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

#else

const struct kernels *const kernels_all[] = {&kernels_scalar, NULL};

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
        if (named || strcmp(wanted, "auto") == 0) {
            *out = kernels_all[i];
            return 0;
        }
        size_t used = strlen(list);
        snprintf(list + used, sizeof list - used, ", %s", kernels_all[i]->name);
    }
    return error_set(err, ERR_USAGE, "kernels \"%s\" %s; this machine supports: %s", wanted,
                     known ? "need instructions that this CPU or operating system lacks" : "do not exist", list);
}
