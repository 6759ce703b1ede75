// What ranks of other processes compare when they meet: each option that decides what they compute or how they talk is refused with both values where
// two ranks differ, and what only reads otherwise, or is of one host, is not.
#include "engine/backends.h"
#include "engine/session_offer.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

enum { RANKS = 3 };

static const struct kernels scalar = {.name = "scalar", .sums = "scalar"}, others = {.name = "other", .sums = "other"};
static const struct backend device = {.name = "cuda"};
static struct manifest manifest = {.tp_size = RANKS, .wire_advice = "fp8"};

struct rank {
    struct worker_options worker;
    struct session_options given;
};

static struct rank usual(void)
{
    return (struct rank){
        .worker = {.manifest = &manifest, .backend = &backend_cpu, .kernels = &scalar, .transport = TRANSPORT_TCP},
        .given = session_defaults};
}

// Of three ranks, the last of which is this one.
static int compare(const struct rank *last, struct error *err)
{
    struct session_offer all[RANKS];
    struct rank first = usual();
    for (int r = 0; r < RANKS; r++)
        session_offer_make(&all[r], r == RANKS - 1 ? &last->worker : &first.worker,
                           r == RANKS - 1 ? &last->given : &first.given);
    return session_offers_compare(all, RANKS, err);
}

static void refused(const char *name, const struct rank *last, const char *words)
{
    struct error err = {0};
    int rc = compare(last, &err);
    if (rc != ERR_USAGE || !strstr(err.msg, words))
        fail_msg("%s: %d \"%s\", wanted \"%s\"", name, rc, err.msg, words);
}

static void test_options(void **state)
{
    (void)state;
    struct rank r;
#define REFUSED(change, words) r = usual(), change, refused(#change, &r, "rank 0 was started with " words)
    REFUSED(r.given.wire = "s8x", "--wire fp8, rank 2 with --wire s8x: start all ranks with the same");
    REFUSED(r.given.wire_feedback = "off", "--wire-feedback auto, rank 2 with --wire-feedback off");
    REFUSED(r.worker.transport = TRANSPORT_MPI, "--transport tcp, rank 2 with --transport mpi");
    REFUSED(r.given.sequence_parallel = "on", "--sequence-parallel off, rank 2 with --sequence-parallel on");
    REFUSED(r.given.overlap = "off", "--overlap auto, rank 2 with --overlap off");
    REFUSED(r.given.check_sums = 8, "--check-sums 0, rank 2 with --check-sums 8");
    REFUSED(r.given.kv_cache = "int4", "--kv-cache bf16, rank 2 with --kv-cache int4");
    REFUSED(r.given.verify = "sample", "--verify full, rank 2 with --verify sample");
    REFUSED(r.given.context = 512, "--context (the default), rank 2 with --context 512");
    // Devices: what is asked for has no other way out, as auto has.
    REFUSED((r.worker.transport = TRANSPORT_P2P, r.worker.transport_is_auto = true),
            "--transport tcp, rank 2 with --transport auto");
    REFUSED(r.worker.transport = TRANSPORT_P2P, "--transport tcp, rank 2 with --transport p2p");
#undef REFUSED
}

static void test_what_need_not_agree(void **state)
{
    (void)state;
    struct rank r = usual();
    r.given.wire = "fp8"; // as the shards advise
    r.given.sequence_parallel = "off";
    r.worker.transport_is_auto = true;
    r.given.threads = r.worker.threads = 7;
    r.given.load = "read";
    r.given.pin = "none";
    r.given.timeout_s = r.given.join_timeout_s = 77;
    r.worker.context = 99; // a command's
    struct error err = {0};
    if (compare(&r, &err))
        fail_msg("%s", err.msg);
}

// Other sums come first: that another transport is chosen follows from them.
static void test_what_computes(void **state)
{
    (void)state;
    struct rank r = usual();
    r.worker.kernels = &others;
    refused("kernels", &r, "rank 0 computes with scalar, rank 2 with other, and their sums differ");
    r = usual();
    r.worker.backend = &device;
    r.worker.transport = TRANSPORT_HOST;
    r.given.kv_cache = "int8";
    refused("a device", &r, "rank 0 computes with scalar, rank 2 with cuda, and their sums differ");
}

// Any bytes may come, of which nothing is shown.
static void test_no_offers(void **state)
{
    (void)state;
    struct rank r = usual();
    struct session_offer all[RANKS] = {0};
    char *const texts[] = {(char *)&all[2], all[2].sums.name, all[2].sums.sums, all[2].words[0],
                           all[2].words[SESSION_OFFER_WORDS - 1]};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        struct error err = {0};
        for (int rank = 0; rank < RANKS; rank++)
            session_offer_make(&all[rank], &r.worker, &r.given);
        memset(texts[i], 'A', i ? 16 : sizeof all[2]);
        if (session_offers_compare(all, RANKS, &err) != ERR_RANK || strstr(err.msg, "AA") ||
            !strstr(err.msg, "rank 2 does not say what it would compute with"))
            fail_msg("text %zu: %d \"%s\"", i, err.code, err.msg);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_options),
        cmocka_unit_test(test_what_need_not_agree),
        cmocka_unit_test(test_what_computes),
        cmocka_unit_test(test_no_offers),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
