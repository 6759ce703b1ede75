// Runs a fuzz target without a fuzzer, so that every compiler and `make test` can: each file of the corpus as it is,
// every truncation of the small ones, and mutations from a fixed seed. Owns the choice of inputs; what is checked about
// them is the target's. The bound is a number of inputs, so that two runs see the same; a wall-clock limit only ends a
// run that a slow machine or sanitizer would draw out, and then says so.
//
//   build/tests/fuzz_json [file or folder]...      without arguments: tests/fuzz/corpus/json
//
// A crash leaves the input that caused it in <program>.input.
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "tests/fuzz/fuzz.h"

int LLVMFuzzerInitialize(int *argc, char ***argv) __attribute__((weak));
void __sanitizer_set_death_callback(void (*callback)(void)) __attribute__((weak)); // there under a sanitizer only

enum {
    TRUNCATE_BELOW_BYTES = 4096, // larger files are cut at a few places only
    MUTATIONS_PER_FILE = 400,
    MAX_INPUT_BYTES = 64 << 20,
    TIME_LIMIT_S = 60,
    SEED = 20240229,
};

static struct {
    const uint8_t *data; // the input that is being run; what on_crash writes
    size_t bytes;
    char path[4096];
} current;

static uint64_t num_files, num_inputs;
static time_t deadline_s;
static bool out_of_time;

// SplitMix64: the same mutations on every machine.
static uint64_t random_state;
static uint64_t random_next(void)
{
    uint64_t z = random_state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}
static size_t random_below(size_t bound) { return (size_t)(random_next() % bound); }

static void save_current_input(void)
{
    int fd = open(current.path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    if (fd < 0)
        return;
    if (write(fd, current.data, current.bytes) == (ssize_t)current.bytes)
        dprintf(STDERR_FILENO, "the input that failed (%zu bytes) is in %s\n", current.bytes, current.path);
    close(fd);
}

static void on_crash(int signal_number)
{
    save_current_input();
    signal(signal_number, SIG_DFL);
    raise(signal_number);
}

// The target gets a copy of exactly this size on the heap, so that a sanitizer sees the first byte read past it.
static void run_input(const uint8_t *data, size_t bytes)
{
    if (out_of_time)
        return;
    uint8_t *copy = malloc(bytes ? bytes : 1);
    if (!copy) {
        fprintf(stderr, "replay: no memory for %zu bytes\n", bytes);
        exit(1);
    }
    if (bytes)
        memcpy(copy, data, bytes);
    current.data = data;
    current.bytes = bytes;
    LLVMFuzzerTestOneInput(copy, bytes);
    free(copy);
    num_inputs++;
    out_of_time = time(NULL) > deadline_s;
}

// One to four small changes, chosen among those that break parsers: bits, bytes at their limits, swapped lengths,
// removed, repeated and inserted stretches. buffer holds bytes and has room for twice as many plus 16.
static size_t mutate(uint8_t *buffer, size_t bytes)
{
    static const uint8_t limits[] = {0x00, 0x01, 0x7f, 0x80, 0xff, '"', '{', '}', '[', ']', '\\', ',', '-', '9'};
    size_t room = 2 * bytes + 16;
    for (size_t change = 1 + random_below(4); change > 0; change--) {
        size_t at = bytes ? random_below(bytes) : 0;
        size_t run = bytes ? 1 + random_below(bytes - at < 16 ? bytes - at : 16) : 0;
        switch (random_below(6)) {
        case 0: // one bit
            if (bytes)
                buffer[at] ^= (uint8_t)(1u << random_below(8));
            break;
        case 1: // a byte at its limits
            if (bytes)
                buffer[at] = limits[random_below(sizeof limits)];
            break;
        case 2: // a little-endian integer at its limits
            for (size_t i = 0, fill = random_next(); i < 8 && at + i < bytes; i++)
                buffer[at + i] = fill & 1 ? 0xff : (fill & 2 && i == 0);
            break;
        case 3: // a stretch goes
            memmove(buffer + at, buffer + at + run, bytes - at - run);
            bytes -= run;
            break;
        case 4: // a stretch comes twice
            if (bytes + run <= room) {
                memmove(buffer + at + run, buffer + at, bytes - at);
                bytes += run;
            }
            break;
        default: // a byte comes in
            if (bytes + 1 <= room) {
                memmove(buffer + at + 1, buffer + at, bytes - at);
                buffer[at] = limits[random_below(sizeof limits)];
                bytes++;
            }
        }
    }
    return bytes;
}

static void run_variants(const uint8_t *data, size_t bytes)
{
    run_input(data, bytes);
    if (bytes <= TRUNCATE_BELOW_BYTES)
        for (size_t cut = 0; cut < bytes; cut++)
            run_input(data, cut);
    else
        for (size_t cut = bytes / 2; cut > 0; cut /= 2)
            run_input(data, bytes - cut);

    uint8_t *buffer = malloc(2 * bytes + 16);
    if (!buffer) {
        fprintf(stderr, "replay: no memory for %zu bytes\n", 2 * bytes + 16);
        exit(1);
    }
    for (int i = 0; i < MUTATIONS_PER_FILE; i++) {
        if (bytes)
            memcpy(buffer, data, bytes);
        run_input(buffer, mutate(buffer, bytes));
    }
    free(buffer);
}

static void run_file(const char *path)
{
    FILE *file = fopen(path, "rb");
    struct stat status;
    if (!file || fstat(fileno(file), &status) || status.st_size > MAX_INPUT_BYTES) {
        fprintf(stderr, "replay: %s: cannot be read, or larger than %d bytes\n", path, MAX_INPUT_BYTES);
        exit(1);
    }
    size_t bytes = (size_t)status.st_size;
    uint8_t *data = malloc(bytes + 1);
    if (!data || fread(data, 1, bytes, file) != bytes) {
        fprintf(stderr, "replay: %s: cannot read %zu bytes\n", path, bytes);
        exit(1);
    }
    fclose(file);
    num_files++;
    random_state = SEED ^ bytes; // a file's mutations do not depend on the files before it
    run_variants(data, bytes);
    free(data);
}

static int not_hidden(const struct dirent *entry) { return entry->d_name[0] != '.'; }

static void run_path(const char *path)
{
    struct dirent **entries;
    int num_entries = scandir(path, &entries, not_hidden, alphasort);
    if (num_entries < 0) {
        if (errno == ENOTDIR)
            run_file(path);
        else if (errno != ENOENT)
            fprintf(stderr, "replay: %s: %s\n", path, strerror(errno)), exit(1);
        return;
    }
    for (int i = 0; i < num_entries; i++) {
        char name[4096];
        snprintf(name, sizeof name, "%s/%s", path, entries[i]->d_name);
        run_path(name);
        free(entries[i]);
    }
    free(entries);
}

int main(int argc, char **argv)
{
    const char *slash = strrchr(argv[0], '/');
    const char *name = slash ? slash + 1 : argv[0];
    const char *area = strncmp(name, "fuzz_", 5) == 0 ? name + 5 : name;
    snprintf(current.path, sizeof current.path, "%s.input", argv[0]);
    deadline_s = time(NULL) + TIME_LIMIT_S;

    // A sanitizer reports bad accesses itself, with a stack, and leaves these two to us.
    static const int crashes[] = {SIGABRT, SIGILL, SIGSEGV, SIGBUS, SIGFPE};
    size_t num_crashes = sizeof crashes / sizeof crashes[0];
    if (__sanitizer_set_death_callback) {
        __sanitizer_set_death_callback(save_current_input);
        num_crashes = 2;
    }
    for (size_t i = 0; i < num_crashes; i++)
        signal(crashes[i], on_crash);
    if (LLVMFuzzerInitialize)
        LLVMFuzzerInitialize(&argc, &argv);

    run_input((const uint8_t *)"", 0);
    if (argc > 1) {
        for (int i = 1; i < argc; i++)
            run_path(argv[i]);
    } else {
        char corpus[4096];
        snprintf(corpus, sizeof corpus, "tests/fuzz/corpus/%s", area);
        run_path(corpus);
    }
    if (num_files == 0) {
        printf("not ok %s: no file in tests/fuzz/corpus/%s\n", name, area);
        return 1;
    }
    printf("ok %s: %llu files, %llu inputs%s\n", name, (unsigned long long)num_files, (unsigned long long)num_inputs,
           out_of_time ? ", ended by the time limit" : "");
    return 0;
}
