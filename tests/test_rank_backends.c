// Ranks of hosts with unlike processors: tables with the same sums go together, others are refused with what all hosts can start with; on a device the
// processor's table counts for nothing.
#include "engine/rank_backends.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

static const struct backend device = {.name = "cuda"};

struct host {
    const struct backend *backend;
    const struct kernels *kernels;
};

static const struct kernels *named(const char *name)
{
    for (int i = 0; kernels_all[i]; i++)
        if (strcmp(kernels_all[i]->name, name) == 0)
            return kernels_all[i];
    return NULL;
}

static int compare(const struct host *hosts, int count, struct error *err)
{
    struct rank_sums all[3];
    for (int i = 0; i < count; i++)
        rank_sums_of(&all[i], hosts[i].backend, hosts[i].kernels);
    return rank_sums_compare(all, count, err);
}

static void refused(const struct host *hosts, int count, const char *const parts[])
{
    struct error err = {0};
    assert_int_equal(compare(hosts, count, &err), ERR_USAGE);
    for (int i = 0; parts[i]; i++)
        if (!strstr(err.msg, parts[i]))
            fail_msg("\"%s\", wanted \"%s\"", err.msg, parts[i]);
}

// Tables are only compared, so that it does not matter which of them this machine can run.
static void test_same_sums(void **state)
{
    (void)state;
    const struct kernels *avx2 = named("avx2"), *avx512 = named("avx512"), *vbmi = named("avx512vbmi"),
                         *amx = named("amx");
    if (!avx2)
        skip(); // another kind of processor: scalar is its only table
    struct host processors[3] = {{&backend_cpu, avx512}, {&backend_cpu, avx2}, {&backend_cpu, vbmi}};
    struct host devices[3] = {{&device, amx}, {&device, named("scalar")}, {&device, avx2}};
    assert_int_equal(compare(processors, 3, NULL), 0);
    assert_int_equal(compare(devices, 3, NULL), 0);
}

static void test_other_sums(void **state)
{
    (void)state;
    const struct kernels *other = named("amx") ? named("amx") : &(struct kernels){.name = "other", .sums = "other"};
    char advice[64];
    snprintf(advice, sizeof advice, "--backend %s, which every host", kernels_fastest(kernels_auto_set())->name);
    for (int i = 0; kernels_all[i]; i++) {
        if (kernels_all[i] == other)
            continue;
        char first[64], second[64];
        snprintf(first, sizeof first, "rank 0 computes with %s, ", kernels_all[i]->name);
        snprintf(second, sizeof second, "rank 2 with %s, ", other->name);
        struct host hosts[3] = {{&backend_cpu, kernels_all[i]}, {&backend_cpu, kernels_all[i]}, {&backend_cpu, other}};
        refused(hosts, 3, (const char *[]){first, second, advice, NULL});
    }
    struct host mixed[2] = {{&backend_cpu, other}, {&device, other}}, turned[2] = {mixed[1], mixed[0]};
    refused(mixed, 2, (const char *[]){"rank 1 with cuda", "--backend cuda, or", advice, NULL});
    refused(turned, 2, (const char *[]){"rank 0 computes with cuda", "--backend cuda, or", advice, NULL});
}

// The advice is what all of the hosts have, not what one of them has.
static void test_advice(void **state)
{
    (void)state;
    int tables = 0;
    while (kernels_all[tables])
        tables++;
    struct rank_sums all[3] = {{.name = "one", .sums = "one", .tables = UINT32_MAX >> (32 - tables)},
                               {.name = "one", .sums = "one", .tables = 3},
                               {.name = "two", .sums = "two", .tables = UINT32_MAX >> (32 - tables)}};
    struct error err;
    for (int common = 0; common < 2 && common < tables; common++) {
        char advice[64];
        all[1].tables = 1u << common | 1;
        snprintf(advice, sizeof advice, "with --backend %s, which", kernels_all[tables - 1 - common]->name);
        assert_int_equal(rank_sums_compare(all, 3, &err), ERR_USAGE);
        assert_non_null(strstr(err.msg, "rank 2 with two"));
        assert_non_null(strstr(err.msg, advice));
    }
    assert_int_equal(rank_sums_compare(all, 2, &err), 0);
    assert_int_equal(rank_sums_compare(all, 1, &err), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_same_sums),
        cmocka_unit_test(test_other_sums),
        cmocka_unit_test(test_advice),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
