#include "tests/amx_emulator.h"

#include <setjmp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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

void amx_dot_int8(int sum, int a, int b)
{
    struct tile *ts = tile_at(sum);
    const struct tile *ta = tile_at(a), *tb = tile_at(b);
    amx_counts.dots++;
    if (sum == a || sum == b || a == b)
        fault("a product of tiles names one twice");
    if (current.row_bytes[sum] % 4 || current.row_bytes[a] % 4 || current.row_bytes[b] % 4)
        fault("a product of tiles whose rows are not whole words");
    if (current.rows[sum] != current.rows[a] || current.row_bytes[sum] != current.row_bytes[b] ||
        current.row_bytes[a] / 4 != current.rows[b])
        fault("a product of tiles whose shapes do not fit");
    for (int m = 0; m < current.rows[sum]; m++) {
        int32_t row[TILE_ROW_BYTES / 4];
        memcpy(row, ts->byte[m], sizeof row);
        for (int k = 0; k < current.rows[b]; k++) {
            const int8_t *x = (const int8_t *)ta->byte[m] + 4 * k, *w = (const int8_t *)tb->byte[k];
            for (int n = 0; n < current.row_bytes[b] / 4; n++)
                row[n] += x[0] * w[4 * n] + x[1] * w[4 * n + 1] + x[2] * w[4 * n + 2] + x[3] * w[4 * n + 3];
        }
        memcpy(ts->byte[m], row, sizeof row);
    }
}
