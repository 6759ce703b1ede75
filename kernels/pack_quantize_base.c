// Quantizers for what every CPU of the architecture has.
#define PACK_TARGET pack_base
#define PACK_TARGET_NAME "base"
#include "kernels/pack_quantize_impl.h"
