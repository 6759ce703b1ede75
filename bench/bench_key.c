// bench_key [SAMPLES]: whether the time of an API key's check tells what the key is. Two classes of Authorization headers, in random order: a fixed
// one that shares all but its last character with a key, and random ones of the same length. Welch's t-test of the times of both (dudect: Reparaz,
// Balasch, Verbauwhede 2017), of all samples and of those below the median, where a difference would not drown in interruptions. |t| below 4.5:
// nothing is seen. The last line is a comparison that stops at the first difference, to show that the test would see one.
#include "engine/serve/api.h"
#include "engine/serve/api_auth.h"
#include "kernels/clock.h"
#include "version.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { KEYS = 4, KEY_CHARACTERS = 64, HEADER_BYTES = 7 + KEY_CHARACTERS + 1, CALLS = 16 }; // CALLS: of one sample

static uint64_t random_state = 0x9e3779b97f4a7c15u;

static uint64_t random_bits(void) // xorshift64*
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state * 0x2545f4914f6cdd1du;
}

static void random_key(char *out)
{
    for (int i = 0; i < KEY_CHARACTERS; i++)
        out[i] = (char)('!' + (random_bits() >> 40) % 94);
    out[KEY_CHARACTERS] = 0;
}

struct check { // one way to check a header
    const char *name;
    int (*run)(const struct check *check, const char *header);
    const struct api_auth *auth;
    const char *key; // of the naive way
};

static int run_auth(const struct check *check, const char *header) { return api_auth_check(check->auth, header); }

// What api_auth_check must not be.
static int run_naive(const struct check *check, const char *header)
{
    const volatile char *a = header + 7, *b = check->key;
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

struct sample {
    double ns;
    bool fixed;
};

static int by_time(const void *a, const void *b)
{
    double x = ((const struct sample *)a)->ns, y = ((const struct sample *)b)->ns;
    return (x > y) - (x < y);
}

// Of the first count samples.
static double t_value(const struct sample *samples, int64_t count)
{
    double n[2] = {0}, mean[2] = {0}, squares[2] = {0};
    for (int64_t i = 0; i < count; i++) {
        int class = samples[i].fixed;
        double distance = samples[i].ns - mean[class];
        n[class]++;
        mean[class] += distance / n[class];
        squares[class] += distance * (samples[i].ns - mean[class]);
    }
    if (n[0] < 2 || n[1] < 2)
        return 0;
    double error = squares[0] / (n[0] - 1) / n[0] + squares[1] / (n[1] - 1) / n[1];
    return error > 0 ? (mean[1] - mean[0]) / sqrt(error) : 0;
}

static void measure(const struct check *check, const char *fixed, struct sample *samples, int64_t count)
{
    static volatile int sink;
    char header[HEADER_BYTES] = "Bearer ", random[KEY_CHARACTERS + 1];
    for (int64_t i = -count / 10; i < count; i++) { // the first tenth warms up
        bool is_fixed = random_bits() >> 63;
        random_key(random); // for both, so that both find the caches alike
        memcpy(header + 7, is_fixed ? fixed : random, sizeof random);
        int64_t begin_ns = clock_now_ns();
        for (int k = 0; k < CALLS; k++)
            sink = check->run(check, header);
        int64_t end_ns = clock_now_ns();
        if (i >= 0)
            samples[i] = (struct sample){(double)(end_ns - begin_ns) / CALLS, is_fixed};
    }
    (void)sink;
    double whole = t_value(samples, count);
    qsort(samples, (size_t)count, sizeof *samples, by_time);
    double half = t_value(samples, count / 2), worst = fmax(fabs(whole), fabs(half));
    printf("key check=%s keys=%d samples=%lld median_ns=%.0f t=%.2f t_below_median=%.2f limit=4.5 seen=%s commit=%s\n",
           check->name, KEYS, (long long)count, samples[count / 2].ns, whole, half, worst < 4.5 ? "no" : "yes",
           TPSHARD_COMMIT);
}

int main(int argc, char **argv)
{
    char keys[KEYS][KEY_CHARACTERS + 1], fixed[KEY_CHARACTERS + 1];
    const char *list[KEYS];
    struct api_auth *auth;
    struct error err;
    long long count = argc > 1 ? atoll(argv[1]) : 100000;
    if (count < 1000) {
        fprintf(stderr, "usage: bench_key [SAMPLES], at least 1000\n");
        return 2;
    }
    for (int i = 0; i < KEYS; i++) {
        random_key(keys[i]);
        list[i] = keys[i];
    }
    memcpy(fixed, keys[1], sizeof fixed);
    fixed[KEY_CHARACTERS - 1] ^= 1;
    struct sample *samples = malloc((size_t)count * sizeof *samples);
    if (!samples || api_auth_create(&auth, list, KEYS, &err)) {
        fprintf(stderr, "bench_key: no memory\n");
        return 1;
    }
    const struct check checks[] = {{"api_auth", run_auth, auth, NULL}, {"naive", run_naive, NULL, keys[1]}};
    for (size_t i = 0; i < sizeof checks / sizeof *checks; i++)
        measure(&checks[i], fixed, samples, count);
    api_auth_free(auth);
    free(samples);
    return 0;
}
