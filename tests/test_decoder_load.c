// The decoder while its model is on its way, with a loader and a backend that only write down what is asked of them: each phase waits for what
// it reads and for nothing more, a failed load ends the step before anything reads what did not come, recorded steps wait for all of it, and orders
// of columns are checked as they arrive.
#include "engine/decoder.h"
#include "formats/checked.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#define PLAIN_MODEL "tests/golden/families/llama3"
#define ORDERED_MODEL "tests/golden/imports/gptq_act_order"

static char work[] = "/tmp/test_decoder_load_XXXXXX";

enum event_kind { NEED, BEGIN, EMBED, LAYER, LOGITS, RECORD, SAMPLE, READ_BACK };
struct event {
    enum event_kind kind;
    int64_t layer;        // of an operation
    uint64_t offset, end; // of a need
};

static struct {
    struct event events[4096];
    int count;
    bool is_mapped;
    uint64_t fails_at; // a need of this byte fails; UINT64_MAX: none does
    uint8_t *payload;
    struct model model;
    struct decoder decoder;
    struct comm_region *region;
    struct manifest *manifest;
} t;

static void note(struct event event)
{
    assert_true(t.count < (int)(sizeof t.events / sizeof *t.events));
    t.events[t.count++] = event;
}

// ---- the loader ------------------------------------------------------------------------------------------------------

struct loader {
    int unused;
};
static struct loader the_loader;

int loader_start(struct loader **out, const struct loader_options *options, const uint8_t **base, struct error *err)
{
    (void)err;
    assert_non_null(options->file);
    assert_non_null(options->source);
    *out = &the_loader;
    *base = t.payload;
    return 0;
}

int loader_need(struct loader *loader, uint64_t offset, uint64_t bytes, struct error *err)
{
    (void)loader;
    // Others see a rank that is starting.
    assert_int_equal(comm_region_position(t.region, 0).op, OP_LOAD);
    note((struct event){.kind = NEED, .offset = offset, .end = offset + bytes});
    return offset <= t.fails_at && t.fails_at < offset + bytes ? error_set(err, ERR_CORRUPT, "leaf 7") : 0;
}

int loader_finish(struct loader *loader, struct error *err)
{
    (void)loader, (void)err;
    return 0;
}
bool loader_is_done(const struct loader *loader) { return loader == NULL; }
bool loader_is_mapped(const struct loader *loader) { return loader && t.is_mapped; }
void loader_stop(struct loader *loader) { (void)loader; }
void loader_free(struct loader *loader) { (void)loader; }

// ---- the backend -----------------------------------------------------------------------------------------------------

static int operation(enum event_kind kind, int64_t layer)
{
    // Position and operation agree again.
    enum comm_operation op = comm_region_position(t.region, 0).op;
    assert_true(kind == BEGIN || kind == RECORD ? op == OP_LOAD || t.model.loaded : op != OP_LOAD || kind == SAMPLE);
    note((struct event){.kind = kind, .layer = layer});
    return 0;
}

static int64_t layer_of(const void *weight)
{
    const uint8_t *first = (const uint8_t *)t.model.weights.layers, *at = weight;
    int64_t bytes = t.model.desc.num_layers * (int64_t)sizeof(struct layer);
    assert_true(at >= first && at < first + bytes);
    return (at - first) / (int64_t)sizeof(struct layer);
}

static int begin(struct device *d, const struct token_row *rows, int64_t count, enum phase phase,
                 const struct kv_pages *pages, struct error *err)
{
    (void)d, (void)rows, (void)count, (void)phase, (void)pages, (void)err;
    return operation(BEGIN, -1);
}
static int embed(struct device *d, struct error *err)
{
    (void)d, (void)err;
    return operation(EMBED, -1);
}
static int norm(struct device *d, const struct join *join, const float *weight, const float *order,
                const struct matrix *next, struct error *err)
{
    (void)d, (void)join, (void)weight, (void)order, (void)err;
    return operation(LAYER, layer_of(next));
}
static int linear(struct device *d, enum buffer out, const struct matrix *w, struct error *err)
{
    (void)d, (void)out, (void)err;
    return operation(LAYER, layer_of(w));
}
static int of_layer(struct device *d, int64_t layer, struct error *err)
{
    (void)d, (void)err;
    return operation(LAYER, layer);
}
static int activate(struct device *d, const struct mlp *mlp, struct error *err)
{
    (void)d, (void)err;
    return operation(LAYER, layer_of(mlp));
}
static int logits(struct device *d, const struct join *join, const int64_t *row_index, int64_t count, float *host,
                  int64_t stride, struct error *err)
{
    (void)d, (void)join, (void)row_index, (void)count, (void)host, (void)stride, (void)err;
    return operation(LOGITS, -1);
}
static int sampling(struct device *d, const struct sampling *const *how, const uint64_t *steps,
                    const int64_t *row_index, int64_t count, struct error *err)
{
    (void)d, (void)how, (void)steps, (void)row_index, (void)count, (void)err;
    return 0;
}
static int record(struct device *d, bool *replayed, struct error *err)
{
    (void)d, (void)err;
    *replayed = false;
    return operation(RECORD, -1);
}
static int sample(struct device *d, struct error *err)
{
    (void)d, (void)err;
    return operation(SAMPLE, -1);
}
static int finish(struct device *d, struct error *err)
{
    (void)d, (void)err;
    return 0;
}
static int tokens(struct device *d, uint32_t *out, int64_t count, struct error *err)
{
    (void)d, (void)out, (void)count, (void)err;
    return 0;
}
static int load_read(struct device *d, uint64_t offset, void *to, uint64_t bytes, struct error *err)
{
    (void)d, (void)err;
    memcpy(to, t.payload + offset, bytes);
    note((struct event){.kind = READ_BACK});
    return 0;
}

static const struct backend host = {.begin = begin,
                                    .embed = embed,
                                    .norm = norm,
                                    .linear = linear,
                                    .finish_qkv = of_layer,
                                    .attend = of_layer,
                                    .activate = activate,
                                    .logits = logits};
static struct backend device; // host's operations, and those that a device has beside them

// ---- one case --------------------------------------------------------------------------------------------------------

static void check(int rc, const struct error *err)
{
    if (rc)
        fail_msg("%s", err->msg);
}

static void open_model(const char *name, const struct backend *backend, bool is_mapped)
{
    char dir[256];
    struct error err;
    struct store *store;
    snprintf(dir, sizeof dir, "%s/%s", work, name);
    t.count = 0;
    t.is_mapped = is_mapped;
    t.fails_at = UINT64_MAX;
    check(store_open(&store, dir, NULL, &err), &err);
    check(store_manifest(&t.manifest, store, &err), &err);
    void *memory = aligned_alloc(4096, round_up(comm_region_bytes(1, 1, 64, 0), 4096));
    assert_non_null(memory);
    memset(memory, 0, comm_region_bytes(1, 1, 64, 0));
    t.region = comm_region_init(memory, 1, 1, 64, 0);
    memset(&t.decoder, 0, sizeof t.decoder);
    check(comm_open(&t.decoder.comm, t.region, 0, 1000, &err), &err);
    check(model_open(&t.model, dir, NULL, t.manifest, 0, t.decoder.comm, &err), &err);
    t.payload = calloc(1, shard_file_payload_bytes(t.model.file));
    const struct loader_options options = {.backend = backend};
    check(model_load(&t.model, &options, &err), &err);
    t.decoder.model = &t.model;
    t.decoder.backend = backend;
    store_close(store);
}

static void close_model(void)
{
    model_close(&t.model);
    manifest_free(t.manifest);
    comm_close(t.decoder.comm);
    free(t.region);
    free(t.payload);
}

static int forward(struct error *err)
{
    const struct token_row rows[] = {{.token = 1}, {.token = 5, .position = 1}};
    const struct kv_pages pages = {0};
    t.count = 0;
    return decoder_forward(&t.decoder, rows, 2, PHASE_PREFILL, &pages, err);
}

static void expect_need(int at, struct payload_range range)
{
    assert_true(at < t.count);
    if (t.events[at].kind != NEED || t.events[at].offset != range.begin || t.events[at].end != range.end)
        fail_msg("event %d is %d of [%llu, %llu), wanted a need of [%llu, %llu)", at, t.events[at].kind,
                 (unsigned long long)t.events[at].offset, (unsigned long long)t.events[at].end,
                 (unsigned long long)range.begin, (unsigned long long)range.end);
}

static int count_of(enum event_kind kind)
{
    int count = 0;
    for (int i = 0; i < t.count; i++)
        count += t.events[i].kind == kind;
    return count;
}

// From event `at` on: for each layer its need, then its operations alone. Returns what follows.
static int expect_layers(int at)
{
    for (int64_t layer = 0; layer < t.model.desc.num_layers; layer++) {
        int operations = 0;
        expect_need(at++, t.model.layers[layer]);
        for (; at < t.count && t.events[at].kind == LAYER; at++, operations++)
            assert_int_equal(t.events[at].layer, layer);
        assert_true(operations >= 8);
    }
    return at;
}

static void test_order(void **state)
{
    struct error err;
    float out[2] = {0};
    (void)state;
    for (int is_mapped = 0; is_mapped < 2; is_mapped++) {
        int at = 0;
        open_model("plain", &host, is_mapped);
        for (int part = 0; part < PART_COUNT; part++)
            assert_true(t.model.parts[part].end > t.model.parts[part].begin);
        check(forward(&err), &err);
        if (!is_mapped)
            expect_need(at++, t.model.parts[PART_EMBEDDING]);
        expect_need(at++, t.model.parts[PART_TABLES]);
        assert_int_equal(t.events[at++].kind, BEGIN);
        assert_int_equal(t.events[at++].kind, EMBED);
        at = expect_layers(at);
        assert_int_equal(at, t.count);
        check(decoder_logits(&t.decoder, NULL, 1, out, 1, &err), &err);
        expect_need(at++, t.model.parts[PART_FINAL_NORM]);
        expect_need(at++, t.model.parts[PART_HEAD]);
        assert_int_equal(t.events[at++].kind, LOGITS);
        // The layers have been there once; with everything there, nothing is asked for.
        check(forward(&err), &err);
        assert_int_equal(count_of(NEED), is_mapped ? 1 : 2);
        check(model_finish(&t.model, &err), &err);
        check(forward(&err), &err);
        check(decoder_logits(&t.decoder, NULL, 1, out, 1, &err), &err);
        assert_int_equal(count_of(NEED), 0);
        close_model();
    }
}

// What does not come is not read, and nothing behind it is asked for.
static void test_failure(void **state)
{
    struct error err;
    float out[2];
    (void)state;
    open_model("plain", &host, true);
    int64_t last = t.model.desc.num_layers - 1;
    t.fails_at = t.model.layers[last].begin;
    assert_int_equal(forward(&err), ERR_CORRUPT);
    assert_string_equal(err.msg, "leaf 7");
    assert_int_equal(t.events[t.count - 1].kind, NEED);
    for (int i = 0; i < t.count; i++)
        assert_true(t.events[i].kind != LAYER || t.events[i].layer < last);
    t.fails_at = t.model.parts[PART_TABLES].begin;
    assert_int_equal(forward(&err), ERR_CORRUPT);
    assert_int_equal(count_of(BEGIN), 0);
    t.fails_at = t.model.parts[PART_HEAD].end - 1;
    check(forward(&err), &err);
    assert_int_equal(decoder_logits(&t.decoder, NULL, 1, out, 1, &err), ERR_CORRUPT);
    assert_int_equal(count_of(LOGITS), 0);
    close_model();
}

// A step that will be replayed is not recorded while its weights are on their way.
static void test_recorded(void **state)
{
    const struct token_row row = {.token = 1};
    const struct kv_pages pages = {0};
    const struct sampling greedy = {.top_p = 1}, *how = &greedy;
    uint64_t step = 0;
    uint32_t token;
    struct error err;
    (void)state;
    open_model("plain", &device, false);
    for (int loaded = 0; loaded < 2; loaded++) {
        t.count = 0;
        check(decoder_sample(&t.decoder, &row, 1, PHASE_DECODE, &pages, NULL, &how, &step, 1, &token, &err), &err);
        assert_int_equal(count_of(RECORD), loaded);
        assert_int_equal(count_of(SAMPLE), 1);
        assert_int_equal(count_of(NEED) > 0, !loaded);
        check(model_finish(&t.model, &err), &err);
    }
    close_model();
}

static void test_column_orders(void **state)
{
    static const float bad[] = {-1, 0.5f, 1e9f, NAN};
    struct error err;
    (void)state;
    for (int turn = 0; turn < 2 * 2; turn++) {
        bool on_device = turn % 2, load_first = turn / 2;
        for (size_t i = 0; i <= sizeof bad / sizeof *bad; i++) {
            open_model("ordered", on_device ? &device : &host, !on_device);
            int64_t last = t.model.desc.num_layers - 1;
            const struct shard_tensor *order = shard_file_find(t.model.file, ROLE_GATE_UP_ORDER, (int32_t)last, -1);
            assert_non_null(order);
            bool is_bad = i < sizeof bad / sizeof *bad;
            if (is_bad) // the last column's
                memcpy(t.payload + order->data_offset + sizeof bad[0] * (order->shape.cols - 1), &bad[i],
                       sizeof bad[0]);
            assert_int_equal(load_first ? model_finish(&t.model, &err) : forward(&err), is_bad ? ERR_CORRUPT : 0);
            if (is_bad) {
                char place[64];
                snprintf(place, sizeof place, "gate_up_order of layer %lld names column", (long long)last);
                assert_non_null(strstr(err.msg, place));
                assert_false(t.model.loaded);
                for (int at = 0; at < t.count; at++)
                    assert_true(t.events[at].kind != LAYER || t.events[at].layer < last);
                // It does not become better by asking once more.
                assert_int_equal(model_finish(&t.model, &err), ERR_CORRUPT);
            }
            assert_int_equal(count_of(READ_BACK) > 0, on_device);
            close_model();
        }
    }
}

static int make_shards(void **state)
{
    char command[512];
    const char *build = getenv("BUILD") ? getenv("BUILD") : "build";
    (void)state;
    device = host;
    device.record = record;
    device.sampling = sampling;
    device.sample = sample;
    device.finish = finish;
    device.tokens = tokens;
    device.load_read = load_read;
    if (!mkdtemp(work))
        return -1;
    snprintf(command, sizeof command,
             "%s/tpshard --quiet --tp 1 --quant none " PLAIN_MODEL
             " %s/plain && %s/tpshard --quiet --tp 1 " ORDERED_MODEL " %s/ordered",
             build, work, build, work);
    return system(command);
}

static int remove_shards(void **state)
{
    char command[64];
    (void)state;
    snprintf(command, sizeof command, "rm -rf %s", work);
    return system(command);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_order),
        cmocka_unit_test(test_failure),
        cmocka_unit_test(test_recorded),
        cmocka_unit_test(test_column_orders),
    };
    return cmocka_run_group_tests(tests, make_shards, remove_shards);
}
