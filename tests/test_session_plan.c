// What rank 0 tells the ranks of other processes to do: good plans arrive as they were made, numbers out of their ranges are refused, and a rank
// that gets such a plan says so on both sides and does nothing of it.
#include "engine/backends.h"
#include "engine/loader.h"
#include "engine/rendezvous.h"
#include "engine/session.h"
#include "engine/session_plan.h"
#include "formats/checksum.h"
#include "version.h"

#include <limits.h>
#include <netinet/in.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

enum { CONTEXT = 128, PAGES = 40, TIMEOUT_MS = 5000 };

static char work[] = "/tmp/test_session_plan_XXXXXX";

static struct worker_options make_worker(void)
{
    return (struct worker_options){
        .context = CONTEXT,
        .max_sequences = 4,
        .logits_rows = 7,
        .residual_rows = 6,
        .least_pages = 3,
        .usual_choices = 9,
        .check_sums = 5,
        .limits = {.max_rows = 80, .decode_rows = 16, .prefill_rows = 64, .chunk = 32},
        .kv_format = KV_E4M3,
        .wire = WIRE_S8X,
        .transport = TRANSPORT_TCP,
        .transport_is_auto = true,
        .feedback = true,
        .deals = true,
        .overlap = OVERLAP_ON,
        .verify = VERIFY_OFF,
        .load_first = true,
    };
}

static struct manifest make_manifest(void)
{
    return (struct manifest){
        .tp_size = 2,
        .pp_size = 1,
        .model = {.context = 2 * CONTEXT, .num_heads = 4, .num_kv_heads = 2, .head_dim = 64, .hidden_size = 256}};
}

static void test_good_plans(void **state)
{
    (void)state;
    const struct worker_options from = make_worker();
    struct manifest manifest = make_manifest();
    struct worker_options to = {.threads = 3};
    struct session_plan plan, again;
    struct error err = {0};
    session_plan_make(&plan, &from, PAGES, TIMEOUT_MS);
    if (session_plan_check(&plan, &manifest, &backend_cpu, &err))
        fail_msg("%s", err.msg);
    session_plan_take(&plan, &to);
    session_plan_make(&again, &to, PAGES, TIMEOUT_MS);
    assert_memory_equal(&again, &plan, sizeof plan);
    assert_int_equal(to.threads, 3);
}

// ---- damage --------------------------------------------------------------------------------------------------------

static void test_numbers_out_of_range(void **state)
{
    (void)state;
    const struct worker_options worker = make_worker();
    struct manifest manifest = make_manifest();
    struct session_plan good, bad;
    session_plan_make(&good, &worker, PAGES, TIMEOUT_MS);
    const struct {
        int64_t *wide;
        int32_t *narrow;
        int64_t below, above;
        const char *words;
    } numbers[] = {
        {&bad.context, NULL, 0, 2 * CONTEXT + 1, "context"},
        {&bad.max_sequences, NULL, 0, MAX_SEQUENCES + 1, "sequences"},
        {&bad.logits_rows, NULL, -1, INT64_MAX, "rows of logits"},
        {&bad.residual_rows, NULL, -1, INT64_MAX, "rows of the residual"},
        {&bad.num_pages, NULL, 0, (int64_t)INT32_MAX + 1, "pages"},
        {&bad.least_pages, NULL, 0, PAGES + 1, "least pages"},
        {&bad.usual_choices, NULL, 0, INT64_MAX, "usual choices"},
        {&bad.check_sums, NULL, -1, INT64_MAX, "steps to a check"},
        {&bad.limits.max_rows, NULL, 0, INT64_MAX, "rows of a step"},
        {&bad.limits.decode_rows, NULL, 0, 81, "rows of decode"},
        {&bad.limits.prefill_rows, NULL, 0, 81, "rows of a prompt"},
        {&bad.limits.chunk, NULL, 0, 65, "rows of a chunk"},
        {NULL, &bad.kv_format, -1, KV_FORMAT_COUNT, "format of the KV cache"},
        {NULL, &bad.wire, -1, WIRE_COUNT, "wire"},
        {NULL, &bad.transport, -1, TRANSPORT_COUNT, "transport"},
        {NULL, &bad.transport, TRANSPORT_SHM, TRANSPORT_HOST, "transport"},
        {NULL, &bad.transport, TRANSPORT_P2P, TRANSPORT_NCCL, "transport"}, // NCCL: the CPU's ranks have no devices
        {NULL, &bad.transport_is_auto, -1, 2, "choice of the transport"},
        {NULL, &bad.feedback, -1, 2, "feedback"},
        {NULL, &bad.deals, -1, 2, "sequence parallelism"},
        {NULL, &bad.overlap, -1, OVERLAP_ON + 1, "overlap"},
        {NULL, &bad.verify, -1, VERIFY_OFF + 1, "verification"},
        {NULL, &bad.load_first, -1, 2, "order of loading"},
        {NULL, &bad.timeout_ms, 0, INT32_MIN, "timeout"},
    };
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        for (int above = 0; above < 2; above++) {
            struct error err = {0};
            int64_t value = above ? numbers[i].above : numbers[i].below;
            bad = good;
            if (numbers[i].wide)
                *numbers[i].wide = value;
            else
                *numbers[i].narrow = (int32_t)value;
            if (session_plan_check(&bad, &manifest, &backend_cpu, &err) != ERR_RANK ||
                !strstr(err.msg, numbers[i].words))
                fail_msg("%s %lld: \"%s\"", numbers[i].words, (long long)value, err.msg);
        }
}

static int never_open(struct device *device, const struct exchange_options *options, struct error *err)
{
    (void)device, (void)options;
    return error_set(err, ERR_OTHER, "opened");
}

// Devices exchange among themselves over these alone.
static void test_device_transports(void **state)
{
    (void)state;
    struct worker_options worker = make_worker();
    struct manifest manifest = make_manifest();
    struct backend devices = backend_cpu;
    struct session_plan made;
    struct error err;
    devices.exchange_open = never_open;
    session_plan_make(&made, &worker, PAGES, TIMEOUT_MS);
    for (int transport = 0; transport < TRANSPORT_COUNT; transport++) {
        made.transport = transport;
        assert_int_equal(session_plan_check(&made, &manifest, &devices, &err),
                         transport == TRANSPORT_SHM ? ERR_RANK : 0);
    }
}

// What a rank's backend lacks it does not begin.
static void test_backends(void **state)
{
    (void)state;
    struct worker_options worker = make_worker();
    struct manifest manifest = make_manifest();
    struct session_plan made;
    struct backend plain = backend_cpu;
    struct error err;
    plain.norm_own = NULL;
    session_plan_make(&made, &worker, PAGES, TIMEOUT_MS);
    assert_int_equal(session_plan_check(&made, &manifest, &plain, &err), ERR_RANK);
    assert_non_null(strstr(err.msg, "--sequence-parallel on, which the cpu backend"));
    plain = backend_cpu;
    plain.window = NULL;
    assert_int_equal(session_plan_check(&made, &manifest, &plain, &err), ERR_RANK);
    assert_non_null(strstr(err.msg, "--overlap on, which the cpu backend"));
    manifest.tp_size = 1; // one rank has nobody to do it with
    assert_int_equal(session_plan_check(&made, &manifest, &plain, &err), 0);
}

// ---- a rank that gets such a plan --------------------------------------------------------------------------------------

static int free_port(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t bytes = sizeof address;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    assert_int_equal(bind(fd, (struct sockaddr *)&address, sizeof address), 0);
    assert_int_equal(getsockname(fd, (struct sockaddr *)&address, &bytes), 0);
    close(fd);
    return ntohs(address.sin_port);
}

// A session of a rank: it meets rank 0 and ends. Its error is written to said.
static void be_rank_1(const char *dir, const char *master, int said)
{
    struct session_options options = session_defaults;
    struct session *session = NULL;
    struct error err = {0};
    options.backend = "cpu";
    options.join_timeout_s = 30;
    options.launcher = (struct launcher_options){
        .launcher = "auto", .rank = 1, .world_size = 2, .local_rank = LAUNCHER_NOT_GIVEN, .master = master};
    int rc = session_open(&session, dir, &options, 1, 0, &err);
    if (!rc)
        rc = session_run_rank(session, &err);
    err.code = rc;
    bool told = write(said, &err, sizeof err) == sizeof err;
    session_close(session);
    _exit(told ? 0 : 1);
}

static void test_a_rank_refuses(void **state)
{
    (void)state;
    char dir[256], master[64];
    struct session_options options = session_defaults;
    struct session *session;
    struct error err = {0}, theirs = {0};
    struct rendezvous met;
    int said[2], port = free_port();
    snprintf(dir, sizeof dir, "%s/2", work);
    snprintf(master, sizeof master, "127.0.0.1:%d", port);
    assert_int_equal(pipe(said), 0);
    pid_t pid = fork();
    if (pid == 0)
        be_rank_1(dir, master, said[1]);
    // Rank 0 is this one: its session is there for the contract.
    options.backend = "cpu";
    options.launcher.launcher = "none";
    if (session_open(&session, dir, &options, 1, 0, &err))
        fail_msg("%s", err.msg);
    struct launcher_place place = {
        .launcher = "options", .rank = 0, .world_size = 2, .local_rank = -1, .host = "127.0.0.1", .port = port};
    struct rendezvous_options meeting = {.place = &place,
                                         .version = TPSHARD_VERSION " (" TPSHARD_COMMIT ")",
                                         .tp_size = 2,
                                         .pp_size = 1,
                                         .timeout_ms = 30000};
    checksum128_to_bytes(session_manifest(session)->contract, meeting.contract);
    const struct worker_options worker = make_worker();
    struct session_plan bad;
    int64_t pages = PAGES;
    session_plan_make(&bad, &worker, PAGES, TIMEOUT_MS);
    bad.wire = 77;
    if (rendezvous_meet(&met, &meeting, &bad, sizeof bad, &err))
        fail_msg("%s", err.msg);
    assert_int_equal(rendezvous_least(&met, &pages, NULL, 30000, &err), ERR_RANK);
    rendezvous_close(&met);
    assert_int_equal(read(said[0], &theirs, sizeof theirs), sizeof theirs);
    assert_int_equal(waitpid(pid, NULL, 0), pid);
    close(said[0]), close(said[1]);
    print_message("rank 0: %s\nrank 1: %s\n", err.msg, theirs.msg);
    assert_non_null(strstr(err.msg, "rank 1: rank 0's plan: wire 77; wanted 0 to 3"));
    assert_string_equal(theirs.msg, err.msg);
    session_close(session);
}

static int set_up(void **state)
{
    char command[512];
    (void)state;
    if (!mkdtemp(work))
        return 1;
    snprintf(command, sizeof command, "%s/tpshard --tp 2 --quant int4 --group-size 32 tests/model %s/2 --quiet",
             getenv("BUILD") ? getenv("BUILD") : "build", work);
    return system(command) != 0;
}

static int tear_down(void **state)
{
    char command[256];
    (void)state;
    snprintf(command, sizeof command, "rm -r %s", work);
    return system(command) != 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_good_plans),        cmocka_unit_test(test_numbers_out_of_range),
        cmocka_unit_test(test_device_transports), cmocka_unit_test(test_backends),
        cmocka_unit_test(test_a_rank_refuses),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
