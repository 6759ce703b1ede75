#include "tests/amx_emulator.h"

#include <setjmp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef __x86_64__
#include <immintrin.h>
#endif

struct tile {
    uint8_t byte[TILE_ROWS][TILE_ROW_BYTES];
};

static _Thread_local struct tile_config current; // palette 0: none
static _Thread_local struct tile tiles[TILE_COUNT];
_Thread_local struct amx_counts amx_counts;

// ---- Faults --------------------------------------------------------------------------------------------------------

static _Thread_local jmp_buf *catcher;
static _Thread_local const char *reason;

static _Noreturn void fault(const char *why)
{
    if (!catcher) {
        fprintf(stderr, "emulated AMX: %s\n", why);
        abort();
    }
    reason = why;
    longjmp(*catcher, 1);
}

const char *amx_fault_of(void (*fn)(void))
{
    jmp_buf here;
    catcher = &here;
    reason = NULL;
    if (setjmp(here) == 0)
        fn();
    catcher = NULL;
    return reason;
}

// ---- Configuration -------------------------------------------------------------------------------------------------

void amx_configure(const struct tile_config *config)
{
    static const uint8_t zero[sizeof config->reserved];
    amx_counts.configures++;
    if (config->palette > 1)
        fault("no such palette");
    if (config->start_row || memcmp(config->reserved, zero, sizeof zero) != 0)
        fault("reserved bytes of a configuration are not zero");
    for (int i = 0; i < 16; i++) {
        bool used = config->rows[i] || config->row_bytes[i];
        if (used && (config->palette == 0 || i >= TILE_COUNT))
            fault("a tile is configured that the palette lacks");
        if (config->rows[i] > TILE_ROWS || config->row_bytes[i] > TILE_ROW_BYTES)
            fault("a tile is configured larger than the palette's");
        if (used && (!config->rows[i] || !config->row_bytes[i]))
            fault("a tile is configured with rows or columns alone");
    }
    current = *config;
    memset(tiles, 0, sizeof tiles);
}

void amx_release(void)
{
    amx_counts.releases++;
    current = (struct tile_config){0};
    memset(tiles, 0, sizeof tiles);
}

bool amx_is_released(void) { return current.palette == 0; }

static struct tile *tile_at(int tile)
{
    if (tile < 0 || tile >= TILE_COUNT || current.palette == 0 || !current.rows[tile])
        fault("a tile is used that is not configured");
    return &tiles[tile];
}

// ---- Operations ----------------------------------------------------------------------------------------------------

void amx_zero(int tile) { memset(tile_at(tile), 0, sizeof(struct tile)); }

void amx_load(int tile, const void *from, int64_t stride)
{
    struct tile *t = tile_at(tile);
    amx_counts.loads++;
    memset(t, 0, sizeof *t);
    for (int r = 0; r < current.rows[tile]; r++)
        memcpy(t->byte[r], (const uint8_t *)from + r * stride, current.row_bytes[tile]);
}

void amx_store(int tile, void *to, int64_t stride)
{
    const struct tile *t = tile_at(tile);
    amx_counts.stores++;
    for (int r = 0; r < current.rows[tile]; r++)
        memcpy((uint8_t *)to + r * stride, t->byte[r], current.row_bytes[tile]);
}

// What every product of tiles wants of its three.
static void check_dot(int sum, int a, int b)
{
    tile_at(sum), tile_at(a), tile_at(b);
    amx_counts.dots++;
    if (sum == a || sum == b || a == b)
        fault("a product of tiles names one twice");
    if (current.row_bytes[sum] % 4 || current.row_bytes[a] % 4 || current.row_bytes[b] % 4)
        fault("a product of tiles whose rows are not whole words");
    if (current.rows[sum] != current.rows[a] || current.row_bytes[sum] != current.row_bytes[b] ||
        current.row_bytes[a] / 4 != current.rows[b])
        fault("a product of tiles whose shapes do not fit");
}

void amx_dot_int8(int sum, int a, int b)
{
    check_dot(sum, a, b);
    for (int m = 0; m < current.rows[sum]; m++) {
        int32_t row[TILE_ROW_BYTES / 4];
        memcpy(row, tiles[sum].byte[m], sizeof row);
        for (int k = 0; k < current.rows[b]; k++) {
            const int8_t *x = (const int8_t *)tiles[a].byte[m] + 4 * k, *w = (const int8_t *)tiles[b].byte[k];
            for (int n = 0; n < current.row_bytes[b] / 4; n++)
                row[n] += x[0] * w[4 * n] + x[1] * w[4 * n + 1] + x[2] * w[4 * n + 2] + x[3] * w[4 * n + 3];
        }
        memcpy(tiles[sum].byte[m], row, sizeof row);
    }
}

#ifdef __x86_64__

// What comes to stand behind the configured columns is neither stored nor used.
__attribute__((target("avx512f"), noinline)) static void dot_bf16_rows(struct tile *sum, const struct tile *a,
                                                                       const struct tile *b, int rows, int pairs)
{
    const __m512i upper = _mm512_set1_epi32((int32_t)0xffff0000);
    for (int m = 0; m < rows; m++) {
        __m512 even = _mm512_setzero_ps(), odd = even;
        for (int k = 0; k < pairs; k++) {
            int32_t pair;
            memcpy(&pair, a->byte[m] + 4 * k, sizeof pair);
            __m512i x = _mm512_set1_epi32(pair), w = _mm512_loadu_si512(b->byte[k]);
            even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
                                   _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), even);
            odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(x, upper)),
                                  _mm512_castsi512_ps(_mm512_and_si512(w, upper)), odd);
        }
        __m512 old = _mm512_loadu_ps(sum->byte[m]);
        _mm512_storeu_ps(sum->byte[m], _mm512_add_ps(old, _mm512_add_ps(even, odd)));
    }
}

// The vectors' multiply-add with the tiles' modes. In a function of its own, so that no arithmetic is moved over the change of modes.
void amx_dot_bf16(int sum, int a, int b)
{
    enum { TO_NEAREST = 0, NO_TRAPS = 0x1f80, SUBNORMALS_ARE_ZERO = 0x8040 };
    check_dot(sum, a, b);
    unsigned before = _mm_getcsr();
    _mm_setcsr(TO_NEAREST | NO_TRAPS | SUBNORMALS_ARE_ZERO);
    dot_bf16_rows(&tiles[sum], &tiles[a], &tiles[b], current.rows[sum], current.rows[b]);
    _mm_setcsr(before);
}

#endif
