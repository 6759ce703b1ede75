// What a sum over ranks takes between devices, by really running it: each rank is a process that opens a device as ranks of a model do, without weights, and
// exchanges by the backend's table. In children, since a driver can hang. See doctor.h.
#include "engine/doctor.h"

#include "engine/comm_select.h"
#include "engine/device_exchange.h"
#include "kernels/kv.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_ROWS = 512, TIMEOUT_MS = 60000 };

struct run {
    struct doctor_times *out;
    const struct backend *backend;
    const struct kernels *kernels;
    struct comm_region *region;
};

struct rank {
    const struct run *run;
    int rank;
    struct comm *comm;
    struct device *device;
    struct device_exchange *exchange;
    struct model_desc desc;
    struct rank_share share;
    struct weights weights;
    int64_t rows; // of the step that was begun
};

// A model without layers, whose rows are those of the sums; what no sum touches is small.
static void describe_model(struct rank *r)
{
    r->desc = (struct model_desc){.hidden_size = DOCTOR_COLS,
                                  .intermediate_size = 1,
                                  .num_heads = 1,
                                  .num_kv_heads = 1,
                                  .head_dim = 64,
                                  .rotary_dim = 64,
                                  .vocab_size = 1,
                                  .context = KV_PAGE_TOKENS,
                                  .norm_eps = 1e-5,
                                  .embedding_scale = 1,
                                  .residual_scale = 1,
                                  .logit_scale = 1,
                                  .qk_norm = QK_NORM_FULL}; // for BUFFER_SQUARES
    r->share =
        (struct rank_share){.num_heads_local = 1, .num_kv_heads_local = 1, .intermediate_local = 1, .vocab_local = 1};
    r->weights.embedding.shape.kind = r->weights.head.shape.kind = WEIGHT_BF16;
}

static int open_rank(struct rank *r, struct error *err)
{
    const struct run *run = r->run;
    const struct backend *b = run->backend;
    const struct doctor_times *out = run->out;
    struct device_options options = {
        .kernels = run->kernels, .rank = r->rank, .tp_size = out->ranks, .device = r->rank % out->devices};
    struct device_shape shape = {.desc = &r->desc,
                                 .share = &r->share,
                                 .max_rows = MOST_ROWS,
                                 .max_sequences = 1,
                                 .decode_rows = 1,
                                 .context = KV_PAGE_TOKENS,
                                 .num_pages = 1,
                                 .exchange = out->transport};
    struct exchange_wish wish = {.transport = out->transport};
    char note[DEVICE_EXCHANGE_NOTE_BYTES];
    enum transport taken;
    int rc;
    describe_model(r);
    if ((rc = comm_open(&r->comm, run->region, r->rank, TIMEOUT_MS, err)) || (rc = b->open(&r->device, &options, err)))
        return rc;
    if ((rc = b->prepare(r->device, &shape, &r->weights, err)))
        return rc;
    return device_exchange_open(&r->exchange, &taken, b, r->device, r->comm, wish, note, err);
}

static void close_rank(struct rank *r)
{
    r->run->backend->close(r->device);
    device_exchange_close(r->exchange);
    comm_close(r->comm);
}

static int prepare_values(void *arg, const struct doctor_size *size, struct error *err)
{
    static const struct token_row rows[MOST_ROWS];
    static const int32_t page;
    const struct kv_pages pages = {.pages = &page, .pages_per_sequence = 1, .version = 1};
    struct rank *r = arg;
    const struct backend *b = r->run->backend;
    enum phase phase = size->rows == 1 ? PHASE_DECODE : PHASE_PREFILL;
    float *data;
    int rc;
    if ((rc = b->begin(r->device, rows, size->rows, phase, &pages, err)) ||
        (rc = b->lend(r->device, BUFFER_PARTIAL, true, &data, err)))
        return rc;
    for (int64_t i = 0; i < size->rows * DOCTOR_COLS; i++)
        data[i] = doctor_value(r->rank, i % DOCTOR_COLS);
    if ((rc = b->returned(r->device, BUFFER_PARTIAL, err)))
        return rc;
    return b->lend(r->device, BUFFER_SQUARES, false, &data, err); // waits for it
}

static int check_sums(void *arg, const struct doctor_size *size, struct error *err)
{
    const struct rank *r = arg;
    const struct doctor_times *out = r->run->out;
    float *data, tolerance = wire_is_compressed(size->wire) ? 0.08f : 0; // of the largest in a group; fp8 keeps 3 bits
    int rc = r->run->backend->lend(r->device, BUFFER_PARTIAL, false, &data, err);
    for (int64_t i = 0; i < size->rows * DOCTOR_COLS && !rc; i++) {
        float want = 0, most = 0;
        for (int rank = 0; rank < out->ranks; rank++) {
            want += doctor_value(rank, i % DOCTOR_COLS);
            most += doctor_value(rank, 15);
        }
        if (!(fabsf(data[i] - want) <= tolerance * most))
            rc = error_set(err, ERR_GPU,
                           "a sum of %d ranks over %s is wrong on device %d: value %lld of row %lld is %g instead of "
                           "%g; --transport shm does without",
                           out->ranks, transport_name(out->transport), r->rank % out->devices,
                           (long long)(i % DOCTOR_COLS), (long long)(i / DOCTOR_COLS), (double)data[i], (double)want);
    }
    return rc;
}

static int add_up(void *arg, const struct doctor_size *size, int count, struct error *err)
{
    struct rank *r = arg;
    const struct backend *b = r->run->backend;
    struct exchange_choice choice = doctor_choice(r->run->out, size);
    float *none;
    int rc = 0;
    for (int i = 0; i < count && !rc; i++)
        rc = b->all_reduce(r->device, BUFFER_PARTIAL, &choice, false, OP_MLP, i, err);
    return rc ? rc
              : b->lend(r->device, BUFFER_SQUARES, false, &none, err); // a few bytes, behind all that was asked for
}

static int run_rank(void *arg, int rank, struct error *err)
{
    struct rank *r = calloc(1, sizeof *r);
    const struct run *run = arg;
    if (!r)
        return error_set(err, ERR_MEMORY, "no memory for rank %d", rank);
    const struct doctor_sums sums = {prepare_values, add_up, check_sums, r};
    r->run = run;
    r->rank = rank;
    int rc = open_rank(r, err);
    rc = rc ? rc : doctor_time_sums(run->out, r->comm, &sums, err);
    if (rc) {
        comm_region_abort(run->region, rank, err); // the first one's counts, and the others wait no longer
        comm_region_error(run->region, &rank, err);
    }
    close_rank(r);
    free(r);
    return rc;
}

static void run_ranks(struct probe *probe, void *arg)
{
    struct run run = *(const struct run *)arg;
    run.out = (struct doctor_times *)(void *)probe;
    setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID", 1); // as the bus counts cards
    void *memory = doctor_probe_new(comm_region_bytes(run.out->ranks, 1, 1, 0));
    if (!memory) {
        error_set(&probe->err, ERR_MEMORY, "no memory for %d ranks", run.out->ranks);
        return;
    }
    run.region = comm_region_init(memory, run.out->ranks, 1, 1, 0);
    doctor_run_ranks(run.out, run_rank, &run);
}

void doctor_devices_measure(struct doctor_times *out, const struct backend *backend, const struct kernels *kernels,
                            enum transport transport, int ranks, int devices, double seconds)
{
    struct run run = {.backend = backend, .kernels = kernels};
    out->transport = transport;
    out->ranks = ranks;
    out->devices = devices;
    if (ranks < 2 || ranks > DOCTOR_RANKS || devices < 1 || !backend->exchange_open ||
        backend->exchange_bytes(ranks) == 0)
        error_set(&out->probe.err, ERR_USAGE, "%s between %d ranks is not measured here", transport_name(transport),
                  ranks);
    else
        doctor_probe_run(&out->probe, run_ranks, &run, seconds);
}
