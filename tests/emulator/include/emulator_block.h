// What primitives.cuh includes in place of the toolkit's <cuda_runtime.h>: a name on the include path, because kernels do not know tests.
#include "tests/emulator/block.h"
