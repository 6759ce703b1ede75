// How the rows of a step travel through the blocks, for decoder.c alone: in one part or two, and with the residual on every rank or dealt out.
//
// In two parts (decoder.in_parts): a prompt's rows are cut once; the parts take turns, block by block, and while one computes, the other's exchange
// goes on. Sums of parts in common memory (decoder.common) have no exchange that goes on; with them a rank may be later than the others by as much as a
// part takes, before they wait. The later rows' attention needs the earlier rows' keys of the same layer, which are there; never the other way round.
//
// Dealt out (decoder.deals): the row at position p of its sequence belongs to rank p % tp_size, which alone has its residual. A block's
// sum goes to the owners (half an all-reduce), who add it to the residual and norm their rows; the normed rows go to all ranks (the other half). So
// what the second half's coding loses never enters the residual. The owner is fixed by the position, so a row's bits depend on nothing beside it,
// and the owner's own part, and the sum itself, need no coding. Error feedback is of the sums alone: what a normed row loses is gone with its block.
// Devices that exchange among themselves do all that is between two blocks at once.
//
// Both are of prefill, and which exchanges there are follows from what all ranks know: the options and the number of rows.
#ifndef TPSHARD_ENGINE_DECODER_PARTS_H
#define TPSHARD_ENGINE_DECODER_PARTS_H

#include "engine/decoder.h"
#include "engine/exchange.h"

#include <stdint.h>

// A layer's attention or its mlp: where it is, how the residual takes what came before, and the norm that it begins with.
struct block {
    enum comm_operation op; // OP_ATTENTION, OP_MLP
    int64_t layer, number;  // number: 2 * layer, and 1 more for an mlp
    const struct join *join;
    const float *weight, *order;
    const struct matrix *first; // what multiplies the normed rows first
};
struct block block_at(const struct model *model, int64_t number);

// A buffer's rows become the sum over ranks, in order with the device's other operations. cols: of a row, for the message's size.
int part_sum_on_device(struct decoder *d, enum buffer buffer, int64_t cols, enum wire wire, enum comm_operation op,
                       int layer, struct error *err);

// Whether a step of so many rows goes in two parts; d->transport is settled.
bool parts_cut(const struct decoder *d, int64_t rows, enum phase phase);
// For a step of d->count rows in d->phase: cuts it.
void parts_begin(struct decoder *d, const struct token_row *rows);
// The sum over ranks of the embedding's rows.
int part_sum_embedding(struct decoder *d, struct error *err);

// d->part begins a block: its last sum is waited for, the input is made.
int part_enter(struct decoder *d, const struct block *block, struct error *err);
// Its partial sums are on their way.
int part_leave(struct decoder *d, const struct block *block, struct error *err);
// Between operations: if the other part's sums have come, what it can do without computing on is done.
int part_look(struct decoder *d, struct error *err);
// The same, waited for: before an exchange amid a block, so that both stand in one order on every rank.
int part_settle_other(struct decoder *d, struct error *err);
// An exchange of d->part amid a block, waited for.
int part_exchange(struct decoder *d, const struct exchange *exchange, struct error *err);
// Behind the last block, also after an error (rc): all exchanges have ended. Returns rc or their error.
int parts_settle(struct decoder *d, int rc, struct error *err);

// Where the residual is dealt out: every rank gets some rows of it and of the last sum, exactly. row_index [count] (NULL: 0 .. count - 1).
int parts_gather(struct decoder *d, const int64_t *row_index, int64_t count, struct error *err);

#endif
