// Collectives over MPI: this program starts itself under mpirun, as 2, 3 and 4 ranks, and looks at what they say. SKIP where
// there is no mpirun, or the library was not built. A rank that stops is named by the others, which then end them all; a rank
// that fails is, too, and one that is killed ends with all others, as mpirun has it.
//
// As a rank (COMM_MPI_CASE is set): COMM_MPI_CASE names what it does, COMM_MPI_STAGES the number of stages.
#include "engine/comm_mpi.h"
#include "kernels/clock.h"
#include "tests/comm_rank_help.h"
#include "tests/patience.h"

#include <libgen.h>
#include <limits.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

// ---- as a rank -----------------------------------------------------------------------------------------------------

static int be_rank(const char *name)
{
    const char *stages = getenv("COMM_MPI_STAGES");
    int rank, size, pp_size = stages ? atoi(stages) : 1;
    struct error err = {0};
    struct comm *comm;
    int rc = comm_mpi_start(getenv("COMM_MPI_LIBRARY"), &rank, &size, &err);
    if (rc) {
        printf("no rank: %s\n", err.msg);
        return 1;
    }
    int timeout_ms = comm_rank_timeout_ms(name);
    struct comm_region *region = comm_rank_region(size, pp_size);
    if ((rc = comm_open_mpi(&comm, region, timeout_ms, &err)))
        printf("rank %d of %d: %s\n", rank, size, err.msg);
    else
        rc = comm_rank_run(name, comm, region);
    if (!rc && (rc = comm_mpi_end(0, timeout_ms, &err)))
        printf("rank %d of %d: %s\n", rank, size, err.msg);
    fflush(stdout);
    return rc ? comm_mpi_end(3, 0, NULL) : 0;
}

// ---- as the one who starts them ----------------------------------------------------------------------------------------

enum { OUTPUT_BYTES = 65536 };

static char program[PATH_MAX], library[PATH_MAX + 32];

// What the ranks wrote; returns mpirun's exit code.
static int start_ranks(char output[OUTPUT_BYTES], int ranks, int stages, const char *name)
{
    char command[3 * PATH_MAX];
    snprintf(command, sizeof command,
             "COMM_MPI_LIBRARY='%s' COMM_MPI_STAGES=%d COMM_MPI_CASE=%s OMPI_MCA_rmaps_base_oversubscribe=1 "
             "timeout -k 1 %d mpirun --allow-run-as-root --oversubscribe --bind-to none -n %d '%s' 2>&1 </dev/null",
             library, stages, name, 60 * PATIENCE, ranks, program);
    FILE *pipe = popen(command, "r");
    assert_non_null(pipe);
    size_t bytes = fread(output, 1, OUTPUT_BYTES - 1, pipe);
    output[bytes] = 0;
    int status = pclose(pipe);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static void test_all_operations(void **state)
{
    (void)state;
    static const struct {
        int ranks, stages;
    } worlds[] = {{2, 1}, {3, 1}, {4, 1}, {4, 2}};
    static char output[OUTPUT_BYTES];
    for (size_t i = 0; i < sizeof worlds / sizeof *worlds; i++) {
        int code = start_ranks(output, worlds[i].ranks, worlds[i].stages, "all"), well = 0;
        for (const char *at = output; (at = strstr(at, "all is well")); at++)
            well++;
        if (code != 0 || well != worlds[i].ranks)
            fail_msg("%d ranks, %d stages: exit code %d:\n%s", worlds[i].ranks, worlds[i].stages, code, output);
    }
}

static void test_losses(void **state)
{
    (void)state;
    static const struct {
        const char *name, *part;
    } losses[] = {
        {"stop", "rank 1 was last seen in head"},
        {"fail", "rank 2 of 3 after"},
        {"fail", "rank 1 has an error of its own"},
        {"kill", "mpirun noticed that process rank 1"},
    };
    static char output[OUTPUT_BYTES];
    for (size_t i = 0; i < sizeof losses / sizeof *losses; i++) {
        double start_s = clock_now_s();
        int code = start_ranks(output, 3, 1, losses[i].name);
        double took_s = clock_now_s() - start_s;
        print_message("%s: %.1f s, exit code %d\n%.600s\n", losses[i].name, took_s, code, output);
        if (!strstr(output, losses[i].part))
            fail_msg("%s: \"%s\" is not in:\n%s", losses[i].name, losses[i].part, output);
        assert_int_not_equal(code, 0);
        assert_int_not_equal(code, 124); // timeout's
        assert_true(took_s < 30.0 * PATIENCE);
    }
}

int main(void)
{
    const char *name = getenv("COMM_MPI_CASE");
    if (name)
        return be_rank(name);
    ssize_t length = readlink("/proc/self/exe", program, sizeof program - 1);
    assert_true(length > 0);
    char folder[PATH_MAX];
    snprintf(folder, sizeof folder, "%s", program);
    snprintf(library, sizeof library, "%s/../libtpengine_mpi.so", dirname(folder));
    if (access(library, R_OK) != 0 || system("command -v mpirun >/dev/null 2>&1") != 0) {
        printf("SKIP no %s here\n", access(library, R_OK) ? "libtpengine_mpi.so" : "mpirun");
        return 77;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_all_operations),
        cmocka_unit_test(test_losses),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
