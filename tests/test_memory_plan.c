// What `tpshard plan` counts for a rank on a CPU (shard/memory_plan.c) against what the engine takes there: buffers of steps as short as the engine
// makes them, and the memory in which the ranks of a host make their sums.
#include "engine/worker.h"
#include "formats/checked.h"
#include "shard/memory_plan.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

#include "tests/plan_help.h"

enum { CONTEXT = 8192 };

// Two sets of a rank's, as the engine lays them out for steps of so many rows.
static uint64_t parts_bytes(const struct plan *plan, int64_t rows)
{
    struct manifest *manifest = calloc(1, sizeof *manifest);
    assert_non_null(manifest);
    manifest->model = plan->model;
    manifest->tp_size = plan->tp_size;
    manifest->pp_size = 1;
    manifest->num_ranks = plan->num_ranks;
    struct worker_options options = {.manifest = manifest,
                                     .backend = &backend_cpu,
                                     .transport = TRANSPORT_SHM,
                                     .limits = {.max_rows = rows, .decode_rows = rows, .prefill_rows = rows}};
    struct part_area area = worker_part_area(&options);
    free(manifest);
    return 2 * (uint64_t)area.elems * sizeof(float);
}

static void test_cpu(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        uint32_t tp_size;
        int64_t rows; // of a step; 0: any
    } cases[] = {
        {"Llama-3.2-1B", 1, 256}, {"Llama-3.2-1B", 2, 256}, {"Llama-3-70B", 2, 128},
        {"Llama-3-70B", 8, 64},   {"Llama-3-70B", 16, 0},   {"Qwen3-30B-A3B", 4, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct plan *plan = plan_of_model(cases[i].name, cases[i].tp_size, EXPERTS_TP);
        struct rank_memory planned;
        memory_plan_rank(&planned, plan, 0, CONTEXT, KV_BF16);
        struct device_shape shape = {.desc = &plan->model,
                                     .share = &plan->ranks[0].share,
                                     .max_rows = backend_cpu.prefill_rows,
                                     .max_sequences = 1,
                                     .context = CONTEXT};
        uint64_t extra = cpu_parts_row_bytes((int)plan->tp_size, plan->model.hidden_size);
        shape.max_rows = cpu_step_rows(&shape, 1, extra, 1);
        uint64_t parts = parts_bytes(plan, shape.max_rows), wanted = backend_cpu.host_bytes(&shape, 1) + parts;
        print_message("%s, tp %u: steps of %lld rows, %.1f MiB, of it parts %.1f\n", cases[i].name, cases[i].tp_size,
                      (long long)shape.max_rows, (double)wanted / 0x1p20, (double)parts / 0x1p20);
        assert_true((parts > 0) == (plan->tp_size > 1 && plan->tp_size <= RANK_PARTS_MOST));
        assert_true((extra > 0) == (parts > 0));
        if (cases[i].rows > 0)
            assert_int_equal(shape.max_rows, cases[i].rows);
        assert_int_equal(planned.cpu_scratch_bytes, wanted);
        plan_free(plan);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_cpu)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
