// The table of exchanges. See comm_select.h.
#include "engine/comm_select.h"

#include "formats/checksum.h"

#include <assert.h>
#include <stddef.h>
#include <string.h>

enum {
    CPU_RANKS = 1 << TRANSPORT_SHM | 1 << TRANSPORT_TCP | 1 << TRANSPORT_MPI,
    HOST = 1 << TRANSPORT_HOST,
    P2P = 1 << TRANSPORT_P2P,
    NCCL = 1 << TRANSPORT_NCCL,
    LOSSLESS = 1,
    COMPRESSED = 2,
    ANY = LOSSLESS | COMPRESSED,
    KB = 1 << 10,
    MB = 1 << 20,
    OVERLAP_BYTES = 8 * MB,
    HASH_VERSION = 4, // rises with the meaning of an algorithm
};

// The first row that fits is taken.
struct row {
    unsigned transports, wires;
    int most_ranks;
    uint64_t most_bytes; // of the message, as bf16
    enum exchange_algorithm algorithm;
    uint64_t chunk_bytes;
};
static const struct row table[] = {
    {HOST, LOSSLESS, 2, 256 * KB, ALGORITHM_ONE_SHOT, 0},
    {HOST, LOSSLESS, 4, 32 * KB, ALGORITHM_ONE_SHOT, 0},
    {HOST, LOSSLESS, COMM_MAX_RANKS, 8 * KB, ALGORITHM_ONE_SHOT, 0},
    {HOST, ANY, COMM_MAX_RANKS, 256 * KB, ALGORITHM_TWO_SHOT, 0},
    {HOST, ANY, COMM_MAX_RANKS, 512 * KB, ALGORITHM_CHUNKS, 256 * KB},
    {HOST, ANY, COMM_MAX_RANKS, 1 * MB, ALGORITHM_CHUNKS, 512 * KB},
    {P2P, LOSSLESS, 2, 1 * MB, ALGORITHM_ONE_SHOT, 0},
    {P2P, LOSSLESS, 4, 32 * KB, ALGORITHM_ONE_SHOT, 0},
    {P2P, LOSSLESS, COMM_MAX_RANKS, 8 * KB, ALGORITHM_ONE_SHOT, 0},
    {P2P, ANY, COMM_MAX_RANKS, 1 * MB, ALGORITHM_TWO_SHOT, 0},
    {HOST | P2P, ANY, COMM_MAX_RANKS, 4 * MB, ALGORITHM_CHUNKS, 1 * MB},
    {HOST | P2P, ANY, COMM_MAX_RANKS, UINT64_MAX, ALGORITHM_CHUNKS, 2 * MB},
    {1 << TRANSPORT_SHM, LOSSLESS, 2, UINT64_MAX, ALGORITHM_ONE_SHOT, 0},
    {1 << TRANSPORT_SHM, LOSSLESS, RANK_PARTS_MOST, 32 * KB, ALGORITHM_ONE_SHOT, 0},
    {CPU_RANKS | NCCL, ANY, COMM_MAX_RANKS, UINT64_MAX, ALGORITHM_TWO_SHOT, 0},
};
enum { ROWS = sizeof table / sizeof *table, ROW_FIELDS = 6, OPTION_FIELDS = 7 };

enum wire comm_select_wire(enum phase phase, enum wire wanted)
{
    return phase == PHASE_DECODE && wire_is_compressed(wanted) ? WIRE_BF16 : wanted;
}

struct exchange_choice comm_select(enum transport transport, int tp_size, uint64_t message_bytes, enum phase phase,
                                   enum wire wanted)
{
    assert((unsigned)transport < TRANSPORT_COUNT && tp_size >= 1 && tp_size <= COMM_MAX_RANKS);
    enum wire wire = comm_select_wire(phase, wanted);
    unsigned kind = wire_is_compressed(wire) ? COMPRESSED : LOSSLESS;
    const struct row *row = table;
    while (!(row->transports & 1u << transport) || !(row->wires & kind) || tp_size > row->most_ranks ||
           message_bytes > row->most_bytes)
        row++; // each transport has a row without bounds
    return (struct exchange_choice){.algorithm = row->algorithm, .wire = wire, .chunk_bytes = row->chunk_bytes};
}

bool comm_select_overlaps(enum transport transport, bool local, bool expands, uint64_t *least_bytes)
{
    bool devices = (1 << transport & (HOST | P2P | NCCL)) != 0;
    *least_bytes = devices ? OVERLAP_BYTES : 0;
    return devices ? !expands : !local;
}

int comm_select_transport(enum transport *out, const char *wanted, const char *const missing[TRANSPORT_COUNT],
                          struct error *err)
{
    static const enum transport best_first[TRANSPORT_COUNT] = {TRANSPORT_P2P, TRANSPORT_HOST, TRANSPORT_NCCL,
                                                               TRANSPORT_SHM, TRANSPORT_TCP,  TRANSPORT_MPI};
    bool any = strcmp(wanted, "auto") == 0;
    for (int i = 0; i < TRANSPORT_COUNT; i++) {
        enum transport transport = best_first[i];
        if (any ? missing[transport] != NULL : strcmp(wanted, transport_name(transport)) != 0)
            continue;
        if (missing[transport])
            return error_set(err, ERR_USAGE, "--transport %s: %s", wanted, missing[transport]);
        *out = transport;
        return 0;
    }
    return error_set(err, ERR_USAGE, "--transport %s: no such transport between these ranks", wanted);
}

uint64_t comm_select_hash(const struct comm_select_options *options)
{
    uint64_t words[ROWS * ROW_FIELDS + OPTION_FIELDS], *at = words;
    for (size_t i = 0; i < ROWS; i++) {
        const struct row *row = &table[i];
        *at++ = row->transports;
        *at++ = row->wires;
        *at++ = (uint64_t)row->most_ranks;
        *at++ = row->most_bytes;
        *at++ = (uint64_t)row->algorithm;
        *at++ = row->chunk_bytes;
    }
    *at++ = HASH_VERSION;
    *at++ = OVERLAP_BYTES;
    *at++ = WIRE_GROUP;
    *at++ = (uint64_t)options->transport;
    *at++ = (uint64_t)options->tp_size;
    *at++ = (uint64_t)options->wire;
    *at++ = options->feedback;
    uint8_t bytes[sizeof words]; // little-endian
    for (size_t i = 0; i < sizeof bytes; i++)
        bytes[i] = (uint8_t)(words[i / 8] >> i % 8 * 8);
    return checksum_leaf(bytes, sizeof bytes);
}

int comm_select_agree(struct comm *comm, uint64_t hash, struct error *err)
{
    uint8_t bytes[8]; // in the order in which the message prints them
    for (int i = 0; i < 8; i++)
        bytes[i] = (uint8_t)(hash >> (56 - 8 * i));
    return comm_handshake(comm, bytes, sizeof bytes, "table of exchanges", err);
}
