// The AMX table on emulated registers: kernels_amx_emulated. It goes by this name to the compiler's flags.
#include "tests/amx_emulator.h"

#define kernels_amx kernels_amx_emulated
#include "kernels/cpu/kernels_amx.c" // NOLINT(bugprone-suspicious-include)
