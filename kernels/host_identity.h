// Which host this is, for processes that may be on several.
#ifndef TPSHARD_KERNELS_HOST_IDENTITY_H
#define TPSHARD_KERNELS_HOST_IDENTITY_H

#include <stdint.h>

// The same for all processes that see the same devices, other ones elsewhere: of the boot and the host's name, which containers of one machine
// have each their own of.
uint64_t host_identity(void);

#endif
