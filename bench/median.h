// The middle of some values, which it sorts.
#ifndef TPSHARD_BENCH_MEDIAN_H
#define TPSHARD_BENCH_MEDIAN_H

#include <stdlib.h>

static int bench_compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double bench_median(double *values, size_t count)
{
    qsort(values, count, sizeof *values, bench_compare);
    return values[count / 2];
}

#endif
