// What the tests of the emulator share. It includes cmocka, whose names would disturb the emulator's: other headers of this kind stand above.
#ifndef TPSHARD_TESTS_EMULATOR_HELP_H
#define TPSHARD_TESTS_EMULATOR_HELP_H

#include "kernels/cuda/primitives.cuh"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

extern "C" {
#include <cmocka.h>
}

enum { WARP = 32, POISON = 0xCD };
static const uint32_t ALL = 0xffffffffu, POISON_WORD = 0xcdcdcdcdu;

// Device memory for count elements, poisoned.
template <typename T> static inline T *device(size_t count)
{
    void *p;
    assert_int_equal(cudaMalloc(&p, count * sizeof(T)), cudaSuccess);
    return static_cast<T *>(p);
}

// Launches and waits.
#define RUN(kernel, grid, block, shared_bytes, ...)                                                                    \
    do {                                                                                                               \
        assert_int_equal(LAUNCH(kernel, grid, block, shared_bytes, nullptr, __VA_ARGS__), cudaSuccess);                \
        assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);                                                        \
    } while (0)

static inline uint32_t random_bits(void)
{
    static uint64_t state = 1;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 16);
}

// Runs in a child, which must abort, and say these words.
static inline void expect_sentence(void (*fn)(int), int argument, const char *const *words)
{
    int to[2];
    assert_int_equal(pipe(to), 0);
    fflush(stdout);
    fflush(stderr);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        struct rlimit no_core = {0, 0};
        setrlimit(RLIMIT_CORE, &no_core);
        signal(SIGABRT, SIG_DFL);
        dup2(to[1], 2);
        close(to[0]);
        close(to[1]);
        emulator_new_process();
        fn(argument);
        _exit(0);
    }
    close(to[1]);
    char said[1000];
    size_t length = 0;
    ssize_t more;
    while ((more = read(to[0], said + length, sizeof said - 1 - length)) > 0)
        length += (size_t)more;
    said[length] = 0;
    close(to[0]);
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGABRT)
        fail_msg("'%s' was not found: status %d, said '%s'", words[0], status, said);
    for (; *words; words++)
        if (!strstr(said, *words))
            fail_msg("'%s' is not in '%s'", *words, said);
}

#endif
