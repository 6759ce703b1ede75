// What `tpshard plan` finds out, before it is printed: commands_plan.c asks and prints JSON, plan_screen.c prints for people.
#ifndef TPSHARD_SHARD_PLAN_ANSWER_H
#define TPSHARD_SHARD_PLAN_ANSWER_H

#include "shard/compress_plan.h"
#include "shard/fit.h"
#include "shard/memory_plan.h"

struct plan_answer {
    struct plan *plan;
    struct fit_way way;        // how the plan stores and cuts
    const char *mix_words;     // "--bits 4.5"; NULL: every matrix as the way says
    double mix_average;        // stored bits per weight of a plan with kinds matrix by matrix
    bool mix_measured;         // chosen by errors of the checkpoint's weights
    bool proposed;             // something of the way was not asked for, and chosen so that it fits
    const char *source_format; // of a checkpoint that is quantized; NULL: it is not
    int64_t context_tokens;
    const char *context_is; // "asked for"
    struct rank_memory *ranks;
    uint64_t largest_bytes; // of the fullest rank, on a GPU

    // With experts: the other way to deal them out.
    enum experts_mode other_experts;
    uint64_t other_largest_bytes, other_read_bytes;

    // With --zstd.
    bool compress;
    struct compress_plan compressed;
    double link_gb_s; // 0: not said
    int64_t cores;

    // With --gpu-memory.
    uint64_t card_bytes, available_bytes; // card_bytes 0: not asked
    bool fits;
    int64_t max_context; // that fits on these ranks; 0: none
    int num_advice;
    struct fit advice[5]; // ways that fit: instead, or as well
    uint32_t min_ranks;   // where no way fits: the least that int4 needs
};

int plan_screen_print(const struct plan_answer *answer, struct error *err);

#endif
