// Moments, factors and codes for any machine.
#define GPTQ_TARGET gptq_base
#define GPTQ_TARGET_NAME "base"
#include "kernels/gptq_impl.h"
