// Attention for what every CPU of the architecture has.
#define ATTENTION_FN attention_base
#define ATTENTION_VECTORS 1
#define ATTENTION_ROWS 6
#include "kernels/attention_impl.h"
