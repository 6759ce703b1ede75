// See host_identity.h.
#include "kernels/host_identity.h"

#include "formats/fnv.h"

#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

uint64_t host_identity(void)
{
    enum { BOOT_ID_BYTES = 64 };
    char text[BOOT_ID_BYTES + HOST_NAME_MAX + 1] = "";
    FILE *f = fopen("/proc/sys/kernel/random/boot_id", "re");
    if (f) {
        if (!fgets(text, BOOT_ID_BYTES, f))
            text[0] = 0;
        fclose(f);
    }
    size_t used = strlen(text);
    gethostname(text + used, sizeof text - used - 1);
    return fnv1a_64(text, strlen(text));
}
