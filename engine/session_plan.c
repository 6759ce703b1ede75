// See session_plan.h.
#include "engine/session_plan.h"

#include "kernels/kv.h"

#include <limits.h>
#include <string.h>

void session_plan_make(struct session_plan *plan, const struct worker_options *w, int64_t num_pages, int timeout_ms)
{
    memset(plan, 0, sizeof *plan);
    plan->context = w->context;
    plan->max_sequences = w->max_sequences;
    plan->logits_rows = w->logits_rows;
    plan->residual_rows = w->residual_rows;
    plan->num_pages = num_pages;
    plan->least_pages = w->least_pages;
    plan->usual_choices = w->usual_choices;
    plan->check_sums = w->check_sums;
    plan->limits = w->limits;
    plan->kv_format = (int32_t)w->kv_format;
    plan->wire = (int32_t)w->wire;
    plan->transport = (int32_t)w->transport;
    plan->transport_is_auto = w->transport_is_auto;
    plan->feedback = w->feedback;
    plan->deals = w->deals;
    plan->overlap = (int32_t)w->overlap;
    plan->verify = (int32_t)w->verify;
    plan->load_first = w->load_first;
    plan->timeout_ms = timeout_ms;
}

void session_plan_take(const struct session_plan *plan, struct worker_options *w)
{
    w->context = plan->context;
    w->max_sequences = plan->max_sequences;
    w->logits_rows = plan->logits_rows;
    w->residual_rows = plan->residual_rows;
    w->least_pages = plan->least_pages;
    w->usual_choices = plan->usual_choices;
    w->check_sums = plan->check_sums;
    w->limits = plan->limits;
    w->kv_format = (enum kv_format)plan->kv_format;
    w->wire = (enum wire)plan->wire;
    w->transport = (enum transport)plan->transport;
    w->transport_is_auto = plan->transport_is_auto;
    w->feedback = plan->feedback;
    w->deals = plan->deals;
    w->overlap = (enum overlap)plan->overlap;
    w->verify = (enum verify_mode)plan->verify;
    w->load_first = plan->load_first;
}

int session_plan_check(const struct session_plan *p, const struct manifest *manifest, const struct backend *backend,
                       struct error *err)
{
    // Most rows and tokens that any options ask for; with these no size of memory overflows.
    enum { MOST_ROWS = 1 << 24 };
    const struct step_limits *l = &p->limits;
    const struct {
        const char *name;
        int64_t value, least, most;
    } numbers[] = {
        {"context", p->context, 1, manifest->model.context},
        {"sequences", p->max_sequences, 1, MAX_SEQUENCES},
        {"rows of logits", p->logits_rows, 0, MOST_ROWS},
        {"rows of the residual stream", p->residual_rows, 0, MOST_ROWS},
        {"pages", p->num_pages, 1, INT32_MAX},
        {"least pages", p->least_pages, 1, p->num_pages},
        {"usual choices", p->usual_choices, 1, MOST_ROWS},
        {"steps to a check of sums", p->check_sums, 0, INT32_MAX},
        {"rows of a step", l->max_rows, 1, MOST_ROWS},
        {"rows of decode", l->decode_rows, 1, l->max_rows},
        {"rows of a prompt", l->prefill_rows, 1, l->max_rows},
        {"rows of a chunk", l->chunk, 1, l->prefill_rows},
        {"format of the KV cache", p->kv_format, 0, KV_FORMAT_COUNT - 1},
        {"wire", p->wire, 0, WIRE_COUNT - 1},
        {"choice of the transport", p->transport_is_auto, 0, 1},
        {"feedback", p->feedback, 0, 1},
        {"sequence parallelism", p->deals, 0, 1},
        {"overlap", p->overlap, 0, OVERLAP_ON},
        {"verification", p->verify, 0, VERIFY_OFF},
        {"order of loading", p->load_first, 0, 1},
        {"timeout", p->timeout_ms, 1, INT_MAX},
    };
    struct error why;
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (numbers[i].value < numbers[i].least || numbers[i].value > numbers[i].most)
            return error_set(err, ERR_RANK, "rank 0's plan: %s %lld; wanted %lld to %lld", numbers[i].name,
                             (long long)numbers[i].value, (long long)numbers[i].least, (long long)numbers[i].most);
    if (kv_format_check(&manifest->model, (enum kv_format)p->kv_format, &why))
        return error_set(err, ERR_RANK, "rank 0's plan: %s", why.msg);
    bool of_devices = p->transport == TRANSPORT_HOST || p->transport == TRANSPORT_P2P || p->transport == TRANSPORT_NCCL;
    if (p->transport != TRANSPORT_TCP && p->transport != TRANSPORT_MPI && (!of_devices || !backend->exchange_open))
        return error_set(err, ERR_RANK,
                         "rank 0's plan: transport %s (%d), which is none between processes of the %s "
                         "backend",
                         transport_name((enum transport)p->transport), (int)p->transport, backend->name);
    if (manifest->tp_size > 1 && ((p->deals && !backend->norm_own) || (p->overlap == OVERLAP_ON && !backend->window)))
        return error_set(err, ERR_RANK, "rank 0's plan: %s, which the %s backend of this rank does not do",
                         p->deals && !backend->norm_own ? "--sequence-parallel on" : "--overlap on", backend->name);
    return 0;
}
