// See fit.h.
#include "shard/fit.h"

#include "formats/checked.h"
#include "shard/memory_plan.h"

#include <stddef.h>

const char *fit_quant_at(const struct fit_question *question, int index)
{
    static const char *const stronger[] = {"int8", "fp8", "int4"};
    if (question->quant)
        return index == 0 ? question->quant : NULL;
    return index == 0 ? question->unchanged : index <= 3 ? stronger[index - 1] : NULL;
}

// How the plan does with one format of the KV cache.
static struct fit judge(const struct fit_question *question, const struct plan *plan, const char *quant,
                        enum kv_format format)
{
    struct fit fit = {.way = {quant, format, plan->tp_size}};
    uint64_t stored = 0;
    for (uint32_t rank = 0; rank < plan->num_ranks; rank++)
        stored += plan->ranks[rank].payload_bytes;
    uint64_t min_ranks = div_up(stored, question->available_bytes ? question->available_bytes : 1);
    fit.min_ranks = min_ranks > UINT32_MAX ? UINT32_MAX : (uint32_t)min_ranks;
    fit.max_context = memory_plan_max_context(plan, format, question->available_bytes);
    fit.fits = fit.max_context >= question->context_tokens;
    return fit;
}

static bool in_question(const struct fit_question *question, enum kv_format format)
{
    return !question->format || *question->format == format;
}

// The best way with these weights: the fewest ranks on which the cache fits in bf16, or else in fp8.
static int try_quant(struct fit *out, const struct fit_question *question, const char *quant, struct error *err)
{
    uint32_t first = question->tp_size ? question->tp_size : 1, pp_size = question->pp_size ? question->pp_size : 1,
             last = question->tp_size ? first : FIT_MAX_TP / pp_size;
    struct fit with_fp8 = {0};
    for (uint32_t tp_size = first; tp_size <= last; tp_size++) {
        struct plan *plan;
        int rc = question->plan(question->arg, &plan, quant, tp_size, err);
        if (rc)
            return rc;
        enum kv_format least_changed = question->format ? *question->format : KV_BF16;
        *out = judge(question, plan, quant, least_changed);
        if (!out->fits && !with_fp8.fits && in_question(question, KV_E4M3))
            with_fp8 = judge(question, plan, quant, KV_E4M3);
        plan_free(plan);
        if (out->fits)
            return 0;
        // More ranks never store less in all, so that counts too small for these weights need not be tried.
        uint32_t least = (uint32_t)div_up(out->min_ranks, pp_size);
        if (least > tp_size + 1)
            tp_size = least - 1;
    }
    if (in_question(question, KV_E4M3))
        *out = with_fp8;
    return 0;
}

int fit_find(struct fit *out, const struct fit_question *question, struct error *err)
{
    const char *quant;
    *out = (struct fit){0};
    for (int i = 0; (quant = fit_quant_at(question, i)) && !out->fits; i++) {
        int rc = try_quant(out, question, quant, err);
        if (rc)
            return rc;
    }
    return 0;
}
