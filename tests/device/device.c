// The emulator's own functions on a real device: nothing is counted, and the order of threads is the device's.
#include "tests/emulator/emulator.h"

bool emulator_present(void) { return false; }
void emulator_seed(uint64_t seed) { (void)seed; }
void emulator_new_process(void) {}
void emulator_misread_scales(bool wrong) { (void)wrong; }
void emulator_stats_reset(void) {}
struct emulator_stats emulator_count(const char *kernel)
{
    (void)kernel;
    return (struct emulator_stats){0};
}
