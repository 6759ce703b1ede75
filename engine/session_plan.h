// What rank 0's command line decides for the ranks of all processes, as it goes to them when they meet. Programs of one version read it, on machines
// of one kind; what is out of its range is refused all the same.
#ifndef TPSHARD_ENGINE_SESSION_PLAN_H
#define TPSHARD_ENGINE_SESSION_PLAN_H

#include "engine/rendezvous_wire.h"
#include "engine/step.h"
#include "engine/worker.h"
#include "formats/manifest.h"

#include <stdint.h>

struct session_plan {
    int64_t context, max_sequences, logits_rows, residual_rows, num_pages, least_pages, usual_choices, check_sums;
    struct step_limits limits;
    int32_t kv_format, wire, transport, transport_is_auto, feedback, deals, overlap, verify, load_first, timeout_ms;
};
_Static_assert(sizeof(struct session_plan) <= MEET_BLOB_MAX_BYTES, "within what the ranks are told when they meet");

// num_pages: of the KV cache, as they are wanted. The rest is of the worker.
void session_plan_make(struct session_plan *out, const struct worker_options *worker, int64_t num_pages,
                       int timeout_ms);
// ERR_RANK for a plan that a rank of this model and backend cannot follow: a number is out of its range, or the backend lacks what is asked for.
int session_plan_check(const struct session_plan *plan, const struct manifest *manifest, const struct backend *backend,
                       struct error *err);
// The other way, of a plan that was checked; not num_pages and timeout_ms.
void session_plan_take(const struct session_plan *plan, struct worker_options *worker);

#endif
