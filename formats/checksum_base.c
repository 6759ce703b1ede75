// Checksums for what every CPU of the architecture has: SSE2 on x86-64, NEON on arm64, plain C elsewhere.
#define CHECKSUM_TARGET checksum_base
#define CHECKSUM_NAME "base"
#include "formats/checksum_impl.h"
