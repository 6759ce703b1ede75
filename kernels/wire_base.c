// Wire codecs for what every CPU of the architecture has.
#define WIRE_TARGET wire_base
#define WIRE_TARGET_NAME "base"
#include "kernels/wire_impl.h"
