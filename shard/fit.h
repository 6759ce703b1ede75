// Which ways of storing and cutting a model fit cards of a given size, best first. Owns the order of preference: weights as little
// changed as possible (as they are, int8, fp8, int4), then KV cache in bf16 before fp8, then the fewest ranks.
#ifndef TPSHARD_SHARD_FIT_H
#define TPSHARD_SHARD_FIT_H

#include "formats/error.h"
#include "kernels/kernels.h"
#include "shard/plan.h"

#include <stdbool.h>
#include <stdint.h>

#define FIT_MIXED "mixed" // in place of a word of --quant: kinds matrix by matrix
struct fit_way {
    const char *quant; // a word of --quant, or FIT_MIXED
    enum kv_format kv_format;
    uint32_t tp_size;
};

enum { FIT_MAX_TP = 16 }; // as many ranks are tried where none are asked for

struct fit_question {
    const char *quant;            // NULL: any
    const enum kv_format *format; // NULL: any
    uint32_t tp_size;             // 0: 1 to FIT_MAX_TP / pp_size
    uint32_t pp_size;             // 0: 1
    uint64_t available_bytes;     // on each card, for its rank
    int64_t context_tokens;       // at least so many must fit
    const char *unchanged;        // the first word to try: "none", or "keep" for a checkpoint that is quantized
    // Makes the plan of a way.
    int (*plan)(void *arg, struct plan **out, const char *quant, uint32_t tp_size, struct error *err);
    void *arg;
};

struct fit {
    bool fits;
    struct fit_way way;
    int64_t max_context; // that fits then
    // Where nothing fits: the way that came last and the fewest ranks that its weights alone could fit on.
    uint32_t min_ranks;
};

// The first way that fits. An error only when a plan cannot be made.
int fit_find(struct fit *out, const struct fit_question *question, struct error *err);

// The words that are tried, in order; NULL past the end.
const char *fit_quant_at(const struct fit_question *question, int index);

#endif
