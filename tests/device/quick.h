// TEST_QUICK=1: a test takes a part of its tables, for sanitizers, under which everything takes ten times as long (on a device a hundred times).
#ifndef TPSHARD_TESTS_DEVICE_QUICK_H
#define TPSHARD_TESTS_DEVICE_QUICK_H

#include <stdbool.h>
#include <stdlib.h>

static inline bool quick(void)
{
    const char *value = getenv("TEST_QUICK");
    return value && value[0] == '1';
}

#endif
