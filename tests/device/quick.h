// TEST_QUICK=1: a kernels' test takes a small part of its tables, for compute-sanitizer, under which everything takes a hundred times as long.
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
