// The parts of a step and their exchanges. See decoder_parts.h.
//
// The exchanges of all parts are posted in one order on every rank: in a block the first part's sum, then the second's. Where rows are dealt out, a
// part's normed rows follow its sum before the other part's next exchange, however early or late that one's coming is noticed; on devices they follow
// it at once.
#include "engine/decoder_parts.h"

#include "engine/comm_select.h"
#include "engine/device_exchange.h"
#include "engine/sum_check.h"
#include "kernels/clock.h"

struct block block_at(const struct model *model, int64_t number)
{
    int64_t i = number / 2;
    const struct layer *layer = &model->weights.layers[i];
    const struct latent_desc *latent = &model->desc.latent;
    if (number % 2 == 1)
        return (struct block){OP_MLP,
                              i,
                              number,
                              &layer->attention_join,
                              layer->mlp_norm,
                              layer->gate_up_order,
                              layer->flags & LAYER_EXPERTS ? &layer->router : &layer->mlp.gate_up};
    return (struct block){OP_ATTENTION,
                          i,
                          number,
                          i > 0 ? &layer[-1].mlp_join : NULL,
                          layer->attention_norm,
                          layer->qkv_order,
                          latent->kv_rank == 0 ? &layer->qkv
                          : latent->q_rank > 0 ? &layer->q_a
                                               : &layer->q_b};
}

// ---- exchanges -------------------------------------------------------------------------------------------------

// Done in turn, or begun on the exchanger: then part->ticket is set.
static int begin_exchange(struct decoder *d, struct decoder_part *part, const struct exchange *exchange,
                          struct error *err)
{
    d->exchanges++;
    if (d->threaded) {
        part->ticket = exchange_post(d->exchanger, exchange);
        return 0;
    }
    int64_t begin_ns = clock_now_ns();
    int rc = exchange_run(d->comm, exchange, d->pool, err);
    d->exchange_ns += clock_now_ns() - begin_ns;
    return rc;
}

static int end_exchange(struct decoder *d, struct decoder_part *part, struct error *err)
{
    if (!part->ticket)
        return 0;
    int64_t begin_ns = clock_now_ns();
    int rc = exchange_wait(d->exchanger, part->ticket, err);
    d->exchange_ns += clock_now_ns() - begin_ns;
    part->ticket = 0;
    return rc;
}

int part_exchange(struct decoder *d, const struct exchange *exchange, struct error *err)
{
    struct decoder_part alone = {0}; // what the part has under way stays so
    int rc = begin_exchange(d, &alone, exchange, err);
    return rc ? rc : end_exchange(d, &alone, err);
}

bool decoder_devices_exchange(const struct decoder *d)
{
    bool of_devices = d->transport == TRANSPORT_HOST || d->transport == TRANSPORT_P2P || d->transport == TRANSPORT_NCCL;
    return of_devices && comm_size(d->comm) > 1;
}

// Devices bear with each other for the time of a wait: a rank whose weights are still on their way is waited for here.
static int wait_for_loading(struct decoder *d, struct error *err)
{
    return d->model->loaded ? 0 : comm_barrier(d->comm, err);
}

static int sum_on_device(struct decoder *d, enum buffer buffer, int64_t rows, int64_t cols, enum wire wire,
                         enum comm_operation op, int layer, struct error *err)
{
    int ranks = comm_size(d->comm), rc;
    struct exchange_choice choice = comm_select(d->transport, ranks, 2 * (uint64_t)(rows * cols), d->phase, wire);
    bool feedback = d->feedback && buffer == BUFFER_PARTIAL && wire_is_compressed(choice.wire);
    if ((rc = wait_for_loading(d, err)))
        return rc;
    // The message of two numbers a row is one row.
    struct checked_sum sum = {.kind = EXCHANGE_SUM,
                              .buffer = buffer,
                              .rows = buffer == BUFFER_SQUARES ? 1 : rows,
                              .cols = buffer == BUFFER_SQUARES ? rows * cols : cols,
                              .wire = choice.wire,
                              .feedback = feedback,
                              .op = op,
                              .layer = layer};
    d->exchanges++;
    d->device_sent_bytes += (uint64_t)rows * wire_groups((uint64_t)cols) * wire_group_bytes(choice.wire) * 2 *
                            (uint64_t)(ranks - 1) / (uint64_t)ranks;
    if (d->checked && (rc = sum_check_take(d->check, d->backend, d->device, &sum, err)))
        return rc;
    rc = d->backend->all_reduce(d->device, buffer, &choice, feedback, (int)op, layer, err);
    return rc || !d->checked
               ? rc
               : sum_check_compare(d->check, d->backend, d->device, d->comm, d->pool, d->transport, &sum, err);
}

// Of `rows`, which belong to the ranks in turn, this one's.
static int64_t count_own(const struct decoder *d, const struct dealt_rows *rows)
{
    int64_t ranks = comm_size(d->comm), first = (comm_rank(d->comm) - rows->first_owner + ranks) % ranks;
    return first < rows->count ? (rows->count - first + ranks - 1) / ranks : 0;
}

// A half of a sum, as the kind of exchange says: EXCHANGE_SUM_TO_OWN or EXCHANGE_OWN_TO_ALL.
struct half {
    struct exchange_choice choice;
    bool feedback;
    int operation; // as devices are told of it
    uint64_t sent_bytes;
};

static struct half half_of(const struct decoder *d, enum exchange_kind kind, enum buffer buffer,
                           const struct dealt_rows *rows, enum wire wire, enum comm_operation op)
{
    uint64_t cols = (uint64_t)d->model->desc.hidden_size, row_bytes = wire_groups(cols) * wire_group_bytes(wire);
    uint64_t own = (uint64_t)count_own(d, rows), others = (uint64_t)comm_size(d->comm) - 1;
    bool to_own = kind == EXCHANGE_SUM_TO_OWN;
    return (struct half){
        .choice = comm_select(d->transport, comm_size(d->comm), 2 * (uint64_t)rows->count * cols, d->phase, wire),
        .feedback = to_own && d->feedback && buffer == BUFFER_PARTIAL && wire_is_compressed(wire),
        .operation = device_operation(to_own ? DEVICE_REDUCE_SCATTER : DEVICE_ALL_GATHER, op),
        .sent_bytes = (to_own ? (uint64_t)rows->count - own : own * others) * row_bytes};
}

static void count_half(struct decoder *d, const struct half *half)
{
    d->exchanges++;
    d->device_sent_bytes += half->sent_bytes;
}

static int half_on_device(struct decoder *d, enum exchange_kind kind, enum buffer buffer, const struct dealt_rows *rows,
                          enum wire wire, enum comm_operation op, int layer, struct error *err)
{
    const struct backend *b = d->backend;
    struct half half = half_of(d, kind, buffer, rows, wire, op);
    struct checked_sum sum = {.kind = kind,
                              .buffer = buffer,
                              .first = rows->first,
                              .rows = rows->count,
                              .cols = d->model->desc.hidden_size,
                              .first_owner = rows->first_owner,
                              .wire = half.choice.wire,
                              .feedback = half.feedback,
                              .op = op,
                              .layer = layer};
    int rc = wait_for_loading(d, err);
    if (rc)
        return rc;
    count_half(d, &half);
    if (d->checked && (rc = sum_check_take(d->check, b, d->device, &sum, err)))
        return rc;
    if (kind == EXCHANGE_OWN_TO_ALL)
        rc = b->all_gather_rows(d->device, buffer, rows, &half.choice, half.operation, layer, err);
    else
        rc = b->reduce_scatter_rows(d->device, buffer, rows, &half.choice, half.feedback, half.operation, layer, err);
    return rc || !d->checked ? rc
                             : sum_check_compare(d->check, b, d->device, d->comm, d->pool, d->transport, &sum, err);
}

static struct dealt_rows rows_of(const struct decoder_part *part)
{
    return (struct dealt_rows){.count = part->count, .first_owner = (int)part->first_owner};
}

// Where the rows are cut, what the devices exchange goes on sides of theirs: behind what the parts before it have sent, beside what they compute.
static int begin_side(struct decoder *d, struct decoder_part *part, struct error *err)
{
    part->beside = d->num_parts > 1;
    return part->beside ? d->backend->side_begin(d->device, part->side, err) : 0;
}

// Also after an error (rc).
static int end_side(struct decoder *d, const struct decoder_part *part, int rc, struct error *err)
{
    struct error other;
    int ended = part->beside ? d->backend->side_end(d->device, rc ? &other : err) : 0;
    return rc ? rc : ended;
}

static int wait_side(struct decoder *d, struct decoder_part *part, struct error *err)
{
    bool beside = part->beside;
    part->beside = false;
    return beside ? d->backend->side_wait(d->device, part->side, err) : 0;
}

int part_sum_on_device(struct decoder *d, enum buffer buffer, int64_t cols, enum wire wire, enum comm_operation op,
                       int layer, struct error *err)
{
    int rc = begin_side(d, d->part, err);
    rc = rc ? rc : sum_on_device(d, buffer, d->part->count, cols, wire, op, layer, err);
    rc = end_side(d, d->part, rc, err);
    return rc ? rc : wait_side(d, d->part, err);
}

static int window(struct decoder *d, const struct decoder_part *part, struct error *err)
{
    return d->num_parts > 1 ? d->backend->window(d->device, part->first, part->count, err) : 0;
}

static bool deals_out(const struct decoder *d, enum phase phase)
{
    return phase == PHASE_PREFILL && d->deals && comm_size(d->comm) > 1;
}

// ---- sums of parts in common memory ----------------------------------------------------------------------------
//
// A block's partial sums are computed in the set of its number's parity, and what they add up to, in the other one, which the next block overwrites.
// That one's parts are of the block before: who has posted a part of this block has read them.

static bool sums_in_common(const struct decoder *d, int64_t rows, enum phase phase)
{
    int ranks = comm_size(d->comm);
    enum wire wire = decoder_wire(d, phase);
    uint64_t bytes = 2 * (uint64_t)(rows * d->model->desc.hidden_size);
    return d->common.memory && !deals_out(d, phase) && !wire_is_compressed(wire) &&
           comm_select(d->transport, ranks, bytes, phase, wire).algorithm == ALGORITHM_ONE_SHOT;
}

static float *common_set(const struct decoder *d, int rank, int64_t number)
{
    int first = comm_rank(d->world) - comm_rank(d->comm);
    return part_set(&d->common, first + rank, (int)(number % 2));
}

// The parts of block number - 1 have come, if there are any; block `number` finds their sums where it puts its own.
static int take_common(struct decoder *d, struct decoder_part *part, int64_t number, struct error *err)
{
    struct rank_parts parts = {.ranks = comm_size(d->comm), .wire = decoder_wire(d, d->phase)};
    float *rows = common_set(d, comm_rank(d->comm), number);
    bool posted = part->posted;
    int rc;
    if (posted) {
        int64_t begin_ns = clock_now_ns();
        part->posted = false;
        rc = comm_wait_parts(d->comm, part->number, err);
        d->exchange_ns += clock_now_ns() - begin_ns;
        if (rc)
            return rc;
    }
    for (int rank = 0; rank < parts.ranks; rank++)
        parts.part[rank] = common_set(d, rank, number + 1);
    if ((rc = window(d, part, err)))
        return rc;
    return d->backend->place_partial(d->device, rows, posted ? &parts : NULL, err);
}

static int post_common(struct decoder *d, struct decoder_part *part, int64_t number, struct error *err)
{
    int rc =
        comm_post_part(d->comm, part->count, d->model->desc.hidden_size, decoder_wire(d, d->phase), &part->number, err);
    d->exchanges++;
    part->posted = !rc;
    part->next_block = number + 1;
    return rc;
}

// What a block's end has sent out: the part's sums have come, and its window is set.
static int take_back(struct decoder *d, struct decoder_part *part, struct error *err)
{
    bool lent = part->lent;
    int rc;
    if ((rc = end_exchange(d, part, err)) || (rc = wait_side(d, part, err)) || (rc = window(d, part, err)))
        return rc;
    part->lent = false;
    return lent ? d->backend->returned(d->device, BUFFER_PARTIAL, err) : 0;
}

static struct exchange exchange_of(const struct decoder *d, const struct decoder_part *part, const struct block *block,
                                   enum exchange_kind kind, float *data)
{
    return (struct exchange){.kind = kind,
                             .op = block->op,
                             .layer = (int)block->layer,
                             .data = data,
                             .rows = part->count,
                             .cols = d->model->desc.hidden_size,
                             .first_owner = part->first_owner,
                             .wire = decoder_wire(d, d->phase)};
}

// ---- a residual that is dealt out ------------------------------------------------------------------------------

// Of the part's rows, the first that this rank owns.
static int64_t first_own(const struct decoder *d, const struct decoder_part *part)
{
    int64_t ranks = comm_size(d->comm);
    return (comm_rank(d->comm) - part->first_owner + ranks) % ranks;
}

// Rows [first, first + count) of the step, which the window is, from their owners, as they are.
static int gather_exactly(struct decoder *d, enum buffer buffer, int64_t first, int64_t count, enum comm_operation op,
                          int layer, struct error *err)
{
    float *rows;
    int64_t hidden = d->model->desc.hidden_size;
    int owner = (int)((d->parts[0].first_owner + first) % comm_size(d->comm));
    if (decoder_devices_exchange(d))
        return half_on_device(d, EXCHANGE_OWN_TO_ALL, buffer, &(struct dealt_rows){first, count, owner}, WIRE_F32, op,
                              layer, err);
    int rc = d->backend->lend(d->device, buffer, false, &rows, err);
    if (rc)
        return rc;
    struct exchange exchange = {.kind = EXCHANGE_OWN_TO_ALL,
                                .op = op,
                                .layer = layer,
                                .data = rows + first * hidden,
                                .rows = count,
                                .cols = hidden,
                                .first_owner = owner,
                                .wire = WIRE_F32};
    if ((rc = part_exchange(d, &exchange, err)))
        return rc;
    return d->backend->returned(d->device, buffer, err);
}

// The layer of a block may still be on its way.
static int need_block(struct decoder *d, const struct block *block, struct error *err)
{
    if (d->model->loaded)
        return 0;
    comm_at(d->comm, OP_LOAD, -1);
    int rc = model_need_layer(d->model, block->layer, err);
    comm_at(d->comm, block->op, (int)block->layer);
    return rc;
}

// The part's sum, which is there, enters the residual of its own rows, and their normed rows set out. With the part's window.
static int norm_and_send(struct decoder *d, struct decoder_part *part, const struct block *block, struct error *err)
{
    const struct backend *b = d->backend;
    struct dealt_rows rows = rows_of(part);
    float *normed;
    int rc = b->norm_own(d->device, block->join, block->weight, first_own(d, part), comm_size(d->comm), err);
    if (rc)
        return rc;
    part->joined = true;
    if (decoder_devices_exchange(d))
        return half_on_device(d, EXCHANGE_OWN_TO_ALL, BUFFER_NORMED, &rows, decoder_wire(d, d->phase), block->op,
                              (int)block->layer, err);
    if ((rc = b->lend(d->device, BUFFER_NORMED, false, &normed, err)))
        return rc;
    struct exchange exchange = exchange_of(d, part, block, EXCHANGE_OWN_TO_ALL, normed);
    return begin_exchange(d, part, &exchange, err);
}

// The same once the sum has come; the window is the caller's to set again.
static int join_own(struct decoder *d, struct decoder_part *part, const struct block *block, struct error *err)
{
    bool on_device = decoder_devices_exchange(d);
    int rc;
    if ((rc = need_block(d, block, err)) || (rc = take_back(d, part, err)) ||
        (rc = on_device ? begin_side(d, part, err) : 0))
        return rc;
    rc = norm_and_send(d, part, block, err);
    return on_device ? end_side(d, part, rc, err) : rc;
}

// Before the first block of devices: that of all parts, so that no part's stands behind another one's sum.
static int join_all(struct decoder *d, const struct block *block, struct error *err)
{
    int rc = 0;
    for (int i = 0; i < d->num_parts && !rc; i++)
        rc = d->parts[i].joined ? 0 : join_own(d, &d->parts[i], block, err);
    return rc;
}

// The part's last sum to its owners.
static int sum_to_own(struct decoder *d, const struct block *block, struct error *err)
{
    struct dealt_rows rows = rows_of(d->part);
    return half_on_device(d, EXCHANGE_SUM_TO_OWN, BUFFER_PARTIAL, &rows, decoder_wire(d, d->phase), block->op,
                          (int)block->layer, err);
}

// On devices all that is between two blocks is one: the sum to its owners, their norm for the next block, the normed rows to all. Of a step that is
// checked each is looked at, so each is for itself.
static int norm_for_next(struct decoder *d, const struct block *block, const struct block *next, struct error *err)
{
    struct decoder_part *part = d->part;
    struct dealt_rows rows = rows_of(part);
    struct half sum = half_of(d, EXCHANGE_SUM_TO_OWN, BUFFER_PARTIAL, &rows, decoder_wire(d, d->phase), block->op);
    struct half normed = half_of(d, EXCHANGE_OWN_TO_ALL, BUFFER_NORMED, &rows, decoder_wire(d, d->phase), next->op);
    struct dealt_norm what = {.first_owner = rows.first_owner,
                              .join = next->join,
                              .weight = next->weight,
                              .choice = sum.choice,
                              .feedback = sum.feedback,
                              .operation = {sum.operation, normed.operation},
                              .layer = {(int)block->layer, (int)next->layer}};
    int rc;
    if ((rc = need_block(d, next, err)) || (rc = wait_for_loading(d, err)))
        return rc;
    count_half(d, &sum);
    count_half(d, &normed);
    part->joined = true;
    return d->backend->norm_dealt(d->device, &what, err);
}

static int leave_dealt_on_device(struct decoder *d, const struct block *block, struct error *err)
{
    struct decoder_part *part = d->part;
    int64_t number = block->number + 1;
    bool last = number == 2 * d->model->desc.num_layers;
    struct block next = block_at(d->model, last ? 0 : number);
    int rc = begin_side(d, part, err);
    rc = rc ? rc : last || d->checked ? sum_to_own(d, block, err) : norm_for_next(d, block, &next, err);
    return end_side(d, part, rc, err);
}

// The other part's next block; false where there is none to be joined.
static bool next_of_other(struct decoder *d, struct decoder_part **other, struct block *next)
{
    *other = d->part == &d->parts[0] ? &d->parts[1] : &d->parts[0];
    if (!d->dealt || d->num_parts < 2 || (*other)->joined || (*other)->next_block == 0 ||
        (*other)->next_block >= 2 * d->model->desc.num_layers)
        return false;
    *next = block_at(d->model, (*other)->next_block);
    return true;
}

static int join_other(struct decoder *d, bool wait, struct error *err)
{
    struct decoder_part *other;
    struct block next;
    int rc;
    if (!next_of_other(d, &other, &next) || (!wait && other->ticket && !exchange_done(d->exchanger, other->ticket)))
        return 0;
    return (rc = join_own(d, other, &next, err)) ? rc : window(d, d->part, err);
}

int part_look(struct decoder *d, struct error *err) { return join_other(d, false, err); }

int part_settle_other(struct decoder *d, struct error *err) { return join_other(d, true, err); }

// ---- a part's way through a block ------------------------------------------------------------------------------

static int enter_dealt(struct decoder *d, const struct block *block, struct error *err)
{
    const struct backend *b = d->backend;
    struct decoder_part *part = d->part;
    bool first = block->number == 0 && decoder_devices_exchange(d);
    int rc = part->joined ? 0 : first ? join_all(d, block, err) : join_own(d, part, block, err);
    if (rc || (rc = end_exchange(d, part, err)) || (rc = wait_side(d, part, err)) || (rc = window(d, part, err)) ||
        (rc = decoder_devices_exchange(d) ? 0 : b->returned(d->device, BUFFER_NORMED, err)))
        return rc;
    part->joined = false;
    rc = b->take_normed(d->device, block->order, block->first, err);
    return rc || !d->shows_residual
               ? rc
               : gather_exactly(d, BUFFER_RESIDUAL, 0, d->count, block->op, (int)block->layer, err);
}

int part_enter(struct decoder *d, const struct block *block, struct error *err)
{
    struct decoder_part *part = d->part;
    int rc;
    if (!d->threaded)
        comm_at(d->comm, block->op, (int)block->layer);
    if (d->dealt)
        return enter_dealt(d, block, err);
    if ((rc = d->in_common ? take_common(d, part, block->number, err) : take_back(d, part, err)))
        return rc;
    return d->backend->norm(d->device, block->join, block->weight, block->order, block->first, err);
}

int part_leave(struct decoder *d, const struct block *block, struct error *err)
{
    float *partial;
    struct decoder_part *part = d->part;
    int rc;
    if (comm_size(d->comm) == 1)
        return 0;
    if (d->in_common)
        return post_common(d, part, block->number, err);
    if (decoder_devices_exchange(d) && d->dealt)
        return leave_dealt_on_device(d, block, err);
    if (decoder_devices_exchange(d)) {
        rc = begin_side(d, part, err);
        rc = rc ? rc
                : sum_on_device(d, BUFFER_PARTIAL, part->count, d->model->desc.hidden_size, decoder_wire(d, d->phase),
                                block->op, (int)block->layer, err);
        return end_side(d, part, rc, err);
    }
    if ((rc = join_other(d, true, err)) || (rc = d->backend->lend(d->device, BUFFER_PARTIAL, false, &partial, err)))
        return rc;
    struct exchange exchange = exchange_of(d, part, block, d->dealt ? EXCHANGE_SUM_TO_OWN : EXCHANGE_SUM, partial);
    if (d->lost && wire_is_compressed(exchange.wire))
        exchange.lost = d->lost + part->first * exchange.cols;
    part->lent = true;
    part->next_block = block->number + 1;
    return begin_exchange(d, part, &exchange, err);
}

// ---- the step --------------------------------------------------------------------------------------------------

bool parts_cut(const struct decoder *d, int64_t rows, enum phase phase)
{
    enum { LARGE_PART = 128 }; // rows: reading the weights once more costs little beside them
    uint64_t bytes = 2 * (uint64_t)(rows * d->model->desc.hidden_size);
    if (comm_size(d->comm) == 1 || (phase != PHASE_PREFILL && !d->backend->mixes_phases))
        return false;
    return d->in_parts ? rows >= 2 * d->backend->window_rows && bytes >= d->part_bytes
                       : d->in_large_parts && rows >= 2 * LARGE_PART && sums_in_common(d, rows, phase);
}

void parts_begin(struct decoder *d, const struct token_row *rows)
{
    int ranks = comm_size(d->comm);
    int64_t unit = d->backend->window_rows;
    d->dealt = deals_out(d, d->phase);
    d->checked = sum_check_begin(d->check) && decoder_devices_exchange(d);
    bool cut = !d->checked && parts_cut(d, d->count, d->phase);
    d->in_common = sums_in_common(d, d->count, d->phase);
    int64_t first = cut ? (d->count / 2 + unit - 1) / unit * unit : d->count;
    int64_t position = d->count > 0 ? rows[0].position : 0;
    d->num_parts = cut ? 2 : 1;
    d->parts[0] = (struct decoder_part){.count = first, .first_owner = position % ranks};
    d->parts[1] = (struct decoder_part){
        .first = first, .count = d->count - first, .first_owner = (position + first) % ranks, .side = 1};
    d->part = &d->parts[0];
    d->threaded = cut && d->exchanger && d->model->loaded && !d->in_common && !decoder_devices_exchange(d);
}

int part_sum_embedding(struct decoder *d, struct error *err)
{
    float *rows;
    int rc;
    if (comm_size(d->comm) == 1)
        return 0;
    struct dealt_rows all = {.count = d->count, .first_owner = (int)d->parts[0].first_owner};
    if (decoder_devices_exchange(d) && d->dealt) // all rows, before any side
        return half_on_device(d, EXCHANGE_SUM_TO_OWN, BUFFER_RESIDUAL, &all, WIRE_BF16, OP_EMBED, -1, err);
    if (decoder_devices_exchange(d))
        return sum_on_device(d, BUFFER_RESIDUAL, d->count, d->model->desc.hidden_size, WIRE_BF16, OP_EMBED, -1, err);
    if ((rc = d->backend->lend(d->device, BUFFER_RESIDUAL, false, &rows, err)))
        return rc;
    struct exchange exchange = {.kind = d->dealt ? EXCHANGE_SUM_TO_OWN : EXCHANGE_SUM,
                                .op = OP_EMBED,
                                .layer = -1,
                                .data = rows,
                                .rows = d->count,
                                .cols = d->model->desc.hidden_size,
                                .first_owner = d->parts[0].first_owner,
                                .wire = WIRE_BF16};
    if ((rc = part_exchange(d, &exchange, err)))
        return rc;
    return d->backend->returned(d->device, BUFFER_RESIDUAL, err);
}

int parts_settle(struct decoder *d, int rc, struct error *err)
{
    struct error other;
    for (int i = 0; i < d->num_parts; i++) {
        struct decoder_part *part = &d->parts[i];
        int ended = 0;
        if (rc) {
            ended = end_exchange(d, part, &other);
            wait_side(d, part, &other);
        } else if (!d->in_common) {
            ended = take_back(d, part, err);
        } else if (part->posted) {
            ended = take_common(d, part, part->next_block, err);
        }
        rc = rc ? rc : ended;
    }
    if (!rc && d->num_parts > 1)
        rc = d->backend->window(d->device, 0, d->count, err);
    return rc;
}

int parts_gather(struct decoder *d, const int64_t *row_index, int64_t count, struct error *err)
{
    int rc = 0;
    for (int64_t i = 0, run; d->dealt && i < count && !rc; i += run) { // rows one after the other go together
        int64_t first = row_index ? row_index[i] : i;
        run = row_index ? 1 : count;
        while (i + run < count && row_index[i + run] == first + run)
            run++;
        if ((rc = gather_exactly(d, BUFFER_RESIDUAL, first, run, OP_HEAD, -1, err)) == 0)
            rc = gather_exactly(d, BUFFER_PARTIAL, first, run, OP_HEAD, -1, err);
    }
    return rc;
}
