// How many instructions do the hot loops take? Unlike time, their number does not depend on what else the machine does: what makes it grow by
// more than a twentieth fails here. Counted by single steps, so that every instruction set is counted that this CPU has.
//
// tests/golden/instruction_counts.txt has the numbers of the compiler that it names; with others, and with other options, nothing is compared.
//   RECORD=1 build/tests/test_instruction_counts     writes it anew, when a change is meant
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "kernels/attention.h"

#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define COUNTS "tests/golden/instruction_counts.txt"
#define MOST_GROWTH 1.05
enum { ROWS = 64, COLS = 128, MAX_TOKENS = 16, HEAD_DIM = 64, POSITIONS = 64, MAX_QUERIES = 16, MAX_CASES = 200 };

static const int64_t token_counts[] = {1, 4, MAX_TOKENS};
static const struct counted_kind {
    enum weight_kind kind;
    uint32_t group_size;
} counted_kinds[] = {{WEIGHT_INT4, 128}, {WEIGHT_INT4, 32}, {WEIGHT_INT8, 0},
                     {WEIGHT_NVFP4, 16}, {WEIGHT_FP8, 0},   {WEIGHT_BF16, 0}};

// ---- counting ------------------------------------------------------------------------------------------------------

static volatile long steps;

static void on_step(int number)
{
    (void)number;
    steps++;
}

// Has the processor trap after each instruction, or not.
static inline void step(bool on)
{
#ifdef __x86_64__
    enum { TRAP_FLAG = 0x100 };
    unsigned long long flags = __builtin_ia32_readeflags_u64();
    __builtin_ia32_writeeflags_u64(on ? flags | TRAP_FLAG : flags & ~(unsigned long long)TRAP_FLAG);
#else
    (void)on;
#endif
}

// Instructions of run(arg), in a process of its own; its second call, when all has been touched. -1: nothing traps here. A process that traces another one
// would see the same, and take twice as long.
static long count_instructions(void (*run)(void *arg), void *arg)
{
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        struct sigaction action = {.sa_handler = on_step};
        run(arg);
        sigaction(SIGTRAP, &action, NULL);
        step(true);
        run(arg);
        step(false);
        long counted = steps;
        _exit(write(ends[1], &counted, sizeof counted) == sizeof counted ? 0 : 1);
    }
    int status;
    long count = -1;
    close(ends[1]);
    assert_int_equal(read(ends[0], &count, sizeof count), sizeof count);
    close(ends[0]);
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
    return count > 0 ? count : -1;
}

// ---- what is counted -----------------------------------------------------------------------------------------------

struct product {
    const struct kernels *kernels;
    struct matrix w;
    struct activations act;
    int64_t tokens;
    float *y;
};

static void multiply(void *arg)
{
    struct product *p = arg;
    p->kernels->matmul(p->y, ROWS, &p->w, &p->act, p->tokens, 0, ROWS);
}

struct attending {
    const struct kernels *kernels;
    struct kv_view kv;
    struct attention_query queries[MAX_QUERIES];
    int64_t count;
    float *room;
};

static void attend(void *arg)
{
    struct attending *a = arg;
    const struct attention_scores scores = {.scale = 0.125f};
    for (int64_t i = 0; i < a->count; i++)
        attention_begin(&a->queries[i]);
    a->kernels->attention(a->queries, a->count, &a->kv, 0, 0, POSITIONS, &scores, a->room);
}

// ---- the list ------------------------------------------------------------------------------------------------------

static struct {
    char name[64];
    long count;
} found[MAX_CASES];
static int num_found;

static void note(const char *table, const char *what, int64_t tokens, long count)
{
    assert_true(num_found < MAX_CASES);
    snprintf(found[num_found].name, sizeof found[0].name, "%s %s %" PRId64, table, what, tokens);
    found[num_found++].count = count;
}

// Bytes that are ordinary numbers in every format.
static void *numbers(uint64_t bytes)
{
    uint8_t *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    assert_non_null(memory);
    for (uint64_t i = 0; i < bytes; i++)
        memory[i] = (uint8_t)(0x30 | (i * 7919 % 1013 & 0x8f));
    return memory;
}

static bool count_products(const struct kernels *kernels, const struct counted_kind *kind, const float *x, float *y)
{
    struct error err;
    struct product p = {.kernels = kernels, .y = y};
    char name[32];
    weight_shape_make(&p.w.shape, kind->kind, kind->group_size, ROWS, COLS);
    p.w.data = numbers(p.w.shape.data_bytes);
    p.w.scale = numbers(p.w.shape.scale_bytes + 64);
    assert_int_equal(activations_alloc(&p.act, MAX_TOKENS, COLS, &err), 0);
    kernels->prepare(&p.act, &p.w, x, COLS, 0, MAX_TOKENS);
    snprintf(name, sizeof name, "%s-%" PRIu32, weight_kind_name(kind->kind), kind->group_size);
    long count = 0;
    for (size_t i = 0; i < sizeof token_counts / sizeof *token_counts && count >= 0; i++) {
        p.tokens = token_counts[i];
        if ((count = count_instructions(multiply, &p)) >= 0)
            note(kernels->name, name, p.tokens, count);
    }
    activations_free(&p.act);
    free((void *)(uintptr_t)p.w.data);
    free((void *)(uintptr_t)p.w.scale);
    return count >= 0;
}

static void count_attention(const struct kernels *kernels, const float *q, float *out)
{
    static const int32_t pages[POSITIONS / KV_PAGE_TOKENS] = {0};
    const uint64_t bytes = (uint64_t)POSITIONS * HEAD_DIM * sizeof(uint16_t);
    struct attending a = {
        .kernels = kernels,
        .kv = {.format = KV_BF16,
               .pages = pages,
               .num_kv_heads = 1,
               .k_dim = HEAD_DIM,
               .v_dim = HEAD_DIM,
               .v_stride = HEAD_DIM},
        .room = numbers(sizeof(float) * (uint64_t)attention_room_floats(HEAD_DIM, HEAD_DIM)),
    };
    a.kv.k = numbers(bytes);
    a.kv.v = numbers(bytes);
    for (int64_t i = 0; i < MAX_QUERIES; i++)
        a.queries[i] = (struct attention_query){.q = q + i * HEAD_DIM, .end = POSITIONS, .out = out + i * HEAD_DIM};
    const int64_t counts[] = {1, MAX_QUERIES};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        a.count = counts[i];
        note(kernels->name, "attention", a.count, count_instructions(attend, &a));
    }
    free(a.kv.k);
    free(a.kv.v);
    free(a.room);
}

// ---- comparing -----------------------------------------------------------------------------------------------------

// "gcc-12" of a build as make makes it; else NULL.
static const char *compiler(void)
{
    static char name[32];
    char path[512], flags[4096] = "";
    const char *build = getenv("BUILD");
    snprintf(path, sizeof path, "%s/flags", build ? build : "build");
    FILE *f = fopen(path, "r");
    if (f && !fgets(flags, sizeof flags, f))
        flags[0] = 0;
    if (f)
        fclose(f);
    const char *level = strstr(flags, " -O3 ");
#ifdef __clang__
    level = NULL;
#endif
    if (!level || strstr(level + 1, " -O") || strstr(flags, "-fsanitize") || strstr(flags, "-march"))
        return NULL;
    snprintf(name, sizeof name, "gcc-%d", __GNUC__);
    return name;
}

static void record(void)
{
    FILE *f = fopen(COUNTS, "w");
    assert_non_null(f);
    fprintf(f, "compiler %s\n", compiler());
    for (int i = 0; i < num_found; i++)
        fprintf(f, "%s %ld\n", found[i].name, found[i].count);
    assert_int_equal(fclose(f), 0);
}

static long recorded(const char *name)
{
    char line[128];
    long count = -1;
    size_t length = strlen(name);
    FILE *f = fopen(COUNTS, "r");
    assert_non_null(f);
    while (fgets(line, sizeof line, f))
        if (strncmp(line, name, length) == 0 && line[length] == ' ')
            count = atol(line + length);
    fclose(f);
    return count;
}

static bool is_recorded_compiler(void)
{
    char line[128] = "", wanted[64];
    FILE *f = fopen(COUNTS, "r");
    assert_non_null(f);
    const char *name = compiler();
    bool same = name && fgets(line, sizeof line, f) && snprintf(wanted, sizeof wanted, "compiler %s\n", name) > 0 &&
                strcmp(line, wanted) == 0;
    fclose(f);
    return same;
}

static void test_counts(void **state)
{
    (void)state;
    if (getenv("RECORD") ? !compiler() : !is_recorded_compiler())
        skip();
    float *x = malloc(sizeof *x * MAX_TOKENS * COLS), *y = calloc((size_t)MAX_TOKENS * ROWS, sizeof *y);
    float *out = calloc((size_t)MAX_QUERIES * HEAD_DIM, sizeof *out);
    assert_true(x && y && out);
    for (int i = 0; i < MAX_TOKENS * COLS; i++)
        x[i] = (float)(i * 7919 % 1013) / 506.0f - 1;
    bool allowed = true;
    for (int t = 0; kernels_all[t] && allowed; t++) {
        // The tiles' table is the vectors' but for what has a count of its own in tests/test_amx_table.c; that of bf16 products
        // is but for bf16 and fp8.
        const char *name = kernels_all[t]->name;
        if (!kernels_all[t]->supported() || strcmp(name, "scalar") == 0 || strcmp(name, "amx") == 0)
            continue;
        bool floats_alone = strcmp(name, "avx512bf16") == 0;
        for (size_t k = 0; k < sizeof counted_kinds / sizeof *counted_kinds && allowed; k++)
            if (!floats_alone || counted_kinds[k].group_size + (counted_kinds[k].kind == WEIGHT_INT8) == 0)
                allowed = count_products(kernels_all[t], &counted_kinds[k], x, y);
        if (allowed && !floats_alone)
            count_attention(kernels_all[t], x, out);
    }
    free(x);
    free(y);
    free(out);
    if (!allowed || num_found == 0) // other processors have no such tables
        skip();
    if (getenv("RECORD"))
        record();
    int grown = 0;
    for (int i = 0; i < num_found; i++) {
        long before = recorded(found[i].name);
        if (!(before > 0 && (double)found[i].count <= MOST_GROWTH * (double)before)) {
            grown++;
            printf("# %s: %ld instructions, recorded were %ld\n", found[i].name, found[i].count, before);
        }
    }
    assert_int_equal(grown, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_counts)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
