// tpengine capture: statistics of a model's inputs over a text, for tpshard convert --calib-stats. See capture.h.
#include "engine/commands.h"

#include "engine/capture.h"
#include "engine/text_windows.h"
#include "formats/checked.h"
#include "kernels/clock.h"
#include "kernels/host_memory.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct {
    const char *text, *output, *backend;
    int64_t tokens, window, threads;
} options = {.backend = "cpu", .tokens = 65536, .window = 512};

const struct option_spec capture_options[] = {
    {"text", OPTION_TEXT, &options.text, "FILE|-", 0, 0,
     "the text, UTF-8: like what the model will read, and none that it will be judged by"},
    {"output", OPTION_TEXT, &options.output, "FILE", 0, 0,
     "where the statistics go; with an unfinished file of the same run, it goes on"},
    {"tokens", OPTION_INT, &options.tokens, "N", 1, 1e9, "read the first N tokens of the text"},
    {"window", OPTION_INT, &options.window, "N", 2, 1 << 20,
     "tokens that are read at once, as a text of their own, or the longest that the model reads if that is less"},
    {"backend", OPTION_CHOICE, &options.backend, "cpu|scalar|avx2|avx512|avx512vbmi|avx512bf16|amx", 0, 0,
     "kernels to compute with; cpu: the fastest of those with the bits of avx2, so that statistics are the same on "
     "every machine that has it"},
    {"threads", OPTION_INT, &options.threads, "N", 0, 1024,
     "worker threads; 0: all CPUs; the statistics do not depend on it"},
    {NULL, OPTION_FLAG, NULL, NULL, 0, 0, NULL},
};

enum { SILENCE_MS = 60000 };

struct capture_run {
    struct store *store;
    struct manifest *manifest;
    struct thread_pool *pool;
    struct comm_region *region;
    struct comm *comm;
    struct model model;
    struct device *device;
    struct decoder decoder;
    struct token_list tokens; // of all windows
    struct capture_text text;
    struct calibration_header header;
    int64_t begin_ns, layers_run;
};

// ---- the text ------------------------------------------------------------------------------------------------------

// All windows one behind the other. None reaches into the next one.
static int cut_windows(struct capture_run *run, const struct token_list *ids, struct error *err)
{
    const struct model_desc *desc = &run->manifest->model;
    int64_t used = (int64_t)ids->count < options.tokens ? (int64_t)ids->count : options.tokens;
    struct text_windows windows = {.ids = ids->ids,
                                   .count = used,
                                   .bos = desc->bos_token_id,
                                   .context = options.window < desc->context ? options.window : desc->context};
    int64_t body = windows.stride = text_windows_body(&windows), count, first;
    if (used < 1 || body < 1)
        return error_set(err, ERR_USAGE, "%s: the text has no token to read in windows of %lld", options.text,
                         (long long)windows.context);
    run->tokens.ids = malloc((size_t)((used + body - 1) / body * windows.context) * sizeof *run->tokens.ids);
    if (!run->tokens.ids)
        return error_set(err, ERR_MEMORY, "no memory for %lld tokens", (long long)used);
    run->text = (struct capture_text){.tokens = run->tokens.ids, .window_tokens = windows.context};
    while (text_windows_next(&windows, run->tokens.ids + run->text.count, &count, &first))
        run->text.count += count;
    return 0;
}

static int read_windows(struct capture_run *run, struct checksum128 *hash, struct error *err)
{
    struct tokenizer_file tokenizer = {0};
    struct token_list ids = {0};
    char *text = NULL;
    size_t bytes = 0;
    int rc;
    if ((rc = read_text(options.text, &text, &bytes, err)) ||
        (rc = tokenizer_file_open(&tokenizer, run->store, run->manifest, err)) ||
        (rc = tokenizer_encode(tokenizer.tokenizer, text, bytes, 0, &ids, err)))
        goto done;
    *hash = checksum_whole(text, bytes);
    rc = cut_windows(run, &ids, err);
done:
    free(ids.ids);
    tokenizer_file_close(&tokenizer);
    free(text);
    return rc;
}

// ---- the model -----------------------------------------------------------------------------------------------------

static int open_comm(struct capture_run *run, struct error *err)
{
    uint64_t bytes = round_up(comm_region_bytes(1, 1, 1, 0), 4096);
    void *memory = aligned_alloc(4096, bytes);
    if (!memory)
        return error_set(err, ERR_MEMORY, "no memory for a rank");
    memset(memory, 0, bytes);
    run->region = comm_region_init(memory, 1, 1, 1, 0);
    return comm_open(&run->comm, run->region, 0, SILENCE_MS, err);
}

static int open_model(struct capture_run *run, const struct kernels *kernels, const char *dir,
                      const struct store_options *place, struct error *err)
{
    int64_t window = run->text.window_tokens;
    int threads = options.threads > 0 ? (int)options.threads : thread_pool_default_threads(), rc;
    const struct loader_options load = {.backend = &backend_cpu, .verify = VERIFY_FULL};
    if ((rc = open_comm(run, err)) || (rc = thread_pool_create(&run->pool, threads, err)) ||
        (rc = model_open(&run->model, dir, place, run->manifest, 0, run->comm, err)))
        return rc;
    const struct device_options device = {.kernels = kernels, .pool = run->pool, .tp_size = 1, .device = -1};
    const struct device_shape shape = {.desc = &run->model.desc,
                                       .share = &run->model.share,
                                       .max_rows = window,
                                       .max_sequences = 1,
                                       .decode_rows = 1,
                                       .context = window,
                                       .num_pages = (window + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS};
    struct loader_options with_device = load;
    if ((rc = backend_cpu.open(&run->device, &device, err)))
        return rc;
    with_device.device = run->device;
    if ((rc = model_load(&run->model, &with_device, err)) ||
        (rc = backend_cpu.prepare(run->device, &shape, &run->model.weights, err)) ||
        (rc = model_finish(&run->model, err)))
        return rc;
    run->decoder = (struct decoder){
        .model = &run->model, .backend = &backend_cpu, .device = run->device, .comm = run->comm, .pool = run->pool};
    return 0;
}

static void close_run(struct capture_run *run)
{
    model_stop(&run->model);
    backend_cpu.close(run->device);
    model_close(&run->model);
    comm_close(run->comm);
    thread_pool_free(run->pool);
    free(run->region);
    free(run->tokens.ids);
    manifest_free(run->manifest);
    store_close(run->store);
}

// ---- the command ---------------------------------------------------------------------------------------------------

static int64_t elems(const struct matrix *w) { return (int64_t)(w->shape.rows * w->shape.cols); }

// Of the matrices in all layers.
static double parameters(const struct model *model)
{
    int64_t count = 0;
    for (int64_t i = 0; i < model->desc.num_layers; i++) {
        const struct layer *l = &model->weights.layers[i];
        count += elems(&l->qkv) + elems(&l->q_a) + elems(&l->q_b) + elems(&l->kv_a) + elems(&l->kv_b) + elems(&l->o) +
                 elems(&l->mlp.gate_up) + elems(&l->mlp.down);
        for (int64_t e = 0; l->experts && e < model->share.num_experts_local; e++)
            count += elems(&l->experts[e].gate_up) + elems(&l->experts[e].down);
    }
    return (double)count;
}

static double seconds(const struct capture_run *run) { return 1e-9 * (double)(clock_now_ns() - run->begin_ns); }

static void show_layer(void *arg, int64_t layer)
{
    struct capture_run *run = arg;
    run->layers_run += layer >= 0;
    if (!common_options.quiet && layer >= 0)
        fprintf(stderr, "capture: layer %lld of %lld, %.0f s\n", (long long)layer + 1,
                (long long)run->model.desc.num_layers, seconds(run));
}

static int report(const struct capture_run *run, struct error *err)
{
    double took = seconds(run), billions = 1e-9 * parameters(&run->model) * (double)run->layers_run;
    billions /= (double)run->model.desc.num_layers; // of a run that went on, what it did itself
    double cost = billions > 0 ? clock_process_cpu_s() / 60 / billions : 0;
    if (common_options.json)
        return print_report(json_pack("{s:i, s:I, s:i, s:i, s:f, s:f}", "schema_version", 1, "tokens",
                                      (json_int_t)run->text.count, "window", (int)run->text.window_tokens, "threads",
                                      thread_pool_size(run->pool), "seconds", took,
                                      "cpu_minutes_per_billion_parameters", cost),
                            err);
    printf("%s: %lld tokens in windows of %lld, %.1f s; %.2f CPU minutes per billion parameters\n", options.output,
           (long long)run->text.count, (long long)run->text.window_tokens, took, cost);
    return 0;
}

static int make_header(struct capture_run *run, struct checksum128 text, const char *kernels, struct error *err)
{
    struct checksum128 model, weights;
    int rc;
    if ((rc = calibration_model_key(run->manifest, &model, err)) ||
        (rc = calibration_weights_key(run->manifest, &weights, err)))
        return rc;
    calibration_header_make(&run->header, (uint32_t)run->manifest->model.num_layers, (uint32_t)run->text.window_tokens,
                            (uint64_t)run->text.count, model, weights, text, kernels);
    return 0;
}

static void say_sizes(const struct capture_run *run)
{
    uint64_t memory, file, hidden = (uint64_t)run->manifest->model.hidden_size;
    capture_bytes(&run->manifest->model, &memory, &file);
    if (!common_options.quiet)
        fprintf(stderr,
                "capture: %lld tokens; statistics of %.2f GB on disk, at most %.2f GB in memory, residuals of %.2f GB "
                "on disk meanwhile\n",
                (long long)run->text.count, 1e-9 * (double)file, 1e-9 * (double)memory,
                1e-9 * 16 * (double)hidden * (double)run->text.count);
}

// Before the model is loaded, so that it is not loaded in vain, and again when it has taken its own.
static int check_memory(const struct capture_run *run, struct error *err)
{
    uint64_t memory, file;
    double available = host_memory_available();
    capture_bytes(&run->manifest->model, &memory, &file);
    if (available < 0 || (double)memory <= available)
        return 0;
    return error_set(err, ERR_MEMORY,
                     "capture needs %.2f GB of memory for the statistics of a layer and %.2f GB are available; capture "
                     "on a machine with more",
                     1e-9 * (double)memory, 1e-9 * available);
}

// By default not the fastest of all: some round activations to bf16 (kernels/kernels.h), and weights would depend on where they were calibrated. A machine
// without AVX2 has scalar alone.
static int choose_kernels(const struct kernels **out, struct error *err)
{
    bool named = strcmp(options.backend, "cpu") != 0;
    *out = named ? NULL : kernels_of_sums("avx2");
    return *out ? 0 : kernels_select(out, named ? options.backend : "auto", err);
}

int capture_run(int argc, char **argv, struct error *err)
{
    struct capture_run run = {.begin_ns = clock_now_ns()};
    struct store_options place;
    const struct kernels *kernels;
    struct checksum128 text;
    int rc;
    (void)argc;
    if (!options.text || !options.output)
        return error_set(err, ERR_USAGE, "capture needs --text FILE and --output FILE");
    if ((rc = choose_kernels(&kernels, err)) || (rc = choose_store(&place, argv[0], err)) ||
        (rc = store_open(&run.store, argv[0], &place, err)) || (rc = store_manifest(&run.manifest, run.store, err)))
        goto done;
    if (run.manifest->tp_size * run.manifest->pp_size != 1) {
        rc = error_set(err, ERR_USAGE,
                       "%s is cut for %u ranks; capture needs a directory of one: tpshard reshard --tp 1 makes it",
                       argv[0], run.manifest->tp_size * run.manifest->pp_size);
        goto done;
    }
    if ((rc = read_windows(&run, &text, err)) || (rc = make_header(&run, text, kernels->sums, err)))
        goto done;
    say_sizes(&run);
    if ((rc = check_memory(&run, err)) || (rc = open_model(&run, kernels, argv[0], &place, err)) ||
        (rc = check_memory(&run, err)) ||
        (rc = capture_write(&run.decoder, &run.text, options.output, &run.header, show_layer, &run, err)))
        goto done;
    rc = report(&run, err);
done:
    close_run(&run);
    return rc;
}
