// What `tpshard plan` counts for a GPU (shard/memory_plan.c) against what the CUDA backend plans to take there: no less, and hardly more.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

extern "C" {
#include <cmocka.h>

#include "formats/checked.h"
#include "kernels/buffers.h"
#include "kernels/cuda/device.h"
#include "shard/memory_plan.h"
#include "tests/emulator/emulator.h"
#include "tests/plan_help.h"

const struct backend *tpengine_cuda_backend(void);
}

static const uint64_t SLACK = 2 << 20; // what the plan may count too much

// The emulator's backend has small slabs.
static uint64_t slab_difference(const struct plan *plan, uint32_t rank)
{
    uint64_t real = 32ull << 20, emulated = SLAB_BYTES;
    uint64_t rows =
        WEIGHT_ROW_UNIT * round_up((uint64_t)widest_input(&plan->model, &plan->ranks[rank].share), ACT_GROUP) * 2;
    return (real > rows ? real : rows) - (emulated > rows ? emulated : rows) + (real - emulated) / 64 * sizeof(float);
}

static void compare(const char *name, uint32_t tp_size, enum experts_mode experts, int64_t context)
{
    const struct backend *b = tpengine_cuda_backend();
    struct plan *plan = plan_of_model(name, tp_size, experts);
    struct error err;
    for (uint32_t rank = 0; rank < tp_size; rank++) {
        struct device *device = NULL;
        struct memory_plan taken;
        struct rank_memory planned;
        struct device_options options = {};
        struct device_shape shape = {};
        shape.desc = &plan->model;
        shape.share = &plan->ranks[rank].share;
        shape.max_rows = b->prefill_rows;
        shape.max_sequences = 1;
        shape.decode_rows = 1;
        shape.context = context;
        shape.num_pages = (int64_t)div_up((uint64_t)context, KV_PAGE_TOKENS);
        shape.samples = tp_size == 1;
        shape.exchange = TRANSPORT_P2P;
        options.rank = (int)rank;
        options.tp_size = (int)tp_size;
        options.device = -1;
        if (b->open(&device, &options, &err) || b->plan(device, &shape, &taken, &err)) {
            b->close(device);
            plan_free(plan);
            if (err.code == ERR_MODEL) // no kernels for it: nothing to compare
                skip();
            fail_msg("%s: %s", name, err.msg);
        }
        struct memory_plan over_host;
        shape.exchange = TRANSPORT_HOST;
        if (b->plan(device, &shape, &over_host, &err))
            fail_msg("%s: %s", name, err.msg);
        if (tp_size > 1 && over_host.exchange_bytes > taken.exchange_bytes)
            fail_msg("tp %u: the plan counts p2p, and host takes more: %llu", tp_size,
                     (unsigned long long)over_host.exchange_bytes);
        memory_plan_rank(&planned, plan, rank, context, KV_BF16);
        uint64_t scratch = taken.scratch_bytes + taken.exchange_bytes + slab_difference(plan, rank);
        if (planned.scratch_bytes < scratch || planned.scratch_bytes > scratch + SLACK ||
            planned.kv_bytes != taken.kv_bytes)
            fail_msg("%s, rank %u of %u: planned %llu of buffers and %llu of KV cache, taken %llu and %llu", name, rank,
                     tp_size, (unsigned long long)planned.scratch_bytes, (unsigned long long)planned.kv_bytes,
                     (unsigned long long)scratch, (unsigned long long)taken.kv_bytes);
        b->close(device);
    }
    plan_free(plan);
}

static void test_plan(void **state)
{
    (void)state;
    emulator_set_sm(90); // has the largest workspace
    compare("Llama-3-70B", 2, EXPERTS_TP, 8192);
    compare("Llama-3.2-1B", 1, EXPERTS_TP, 131072);
    compare("gemma-2-27b", 3, EXPERTS_TP, 4096);
    compare("Mixtral-8x7B-v0.1", 2, EXPERTS_TP, 32768);
    compare("Qwen3-30B-A3B", 4, EXPERTS_EP, 4096);
    compare("Llama-3-70B", 8, EXPERTS_TP, 4096);
    compare("gpt-oss-20b", 3, EXPERTS_TP, 4096);
}

static void test_latent(void **state)
{
    (void)state;
    emulator_set_sm(90);
    compare("DeepSeek-V2-Lite", 2, EXPERTS_TP, 163840);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_plan), cmocka_unit_test(test_latent)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
