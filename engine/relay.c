// Commands over the world's collectives. See relay.h.
//
// A message is a head and, for each slot that the command works on, a slot_head with what follows it. Rank 0 keeps a mirror of what the others have; of
// tables it sends the run from the first to the last entry that differs there.
#include "engine/relay.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

enum { FIRST_BYTES = 4096 }; // at once; most steps of a few sequences fit

struct head {
    uint64_t bytes; // of the whole message
    int32_t command, kind;
    struct relay_forward forward;
    int64_t staggered, num_segments, num_choices; // segments follow
    int64_t num_slots;
};

struct slot_head {
    int64_t slot;
    int64_t settings_bytes; // of struct step_slot; 0: as before
    int64_t tokens_first, tokens_count, pages_first, pages_count, mask_first, mask_count;
};

struct relay {
    struct comm *comm;
    struct step_area area, mirror; // mirror: of rank 0
    uint8_t *mirror_memory, *buffer;
    uint64_t used, capacity;
    bool failed; // no memory
};

int relay_create(struct relay **out, struct comm *comm, const struct step_area *area, struct error *err)
{
    struct relay *relay = calloc(1, sizeof *relay);
    if (!relay)
        return error_set(err, ERR_MEMORY, "no memory for commands to other processes");
    relay->comm = comm;
    relay->area = relay->mirror = *area;
    relay->capacity = 2 * FIRST_BYTES;
    relay->buffer = calloc(1, relay->capacity);
    relay->mirror_memory = aligned_alloc(64, step_area_bytes(&relay->mirror));
    if (!relay->buffer || !relay->mirror_memory) {
        relay_free(relay);
        return error_set(err, ERR_MEMORY, "no memory for commands to other processes");
    }
    memset(relay->mirror_memory, 0, step_area_bytes(&relay->mirror));
    step_area_place(&relay->mirror, relay->mirror_memory);
    *out = relay;
    return 0;
}

void relay_free(struct relay *relay)
{
    if (!relay)
        return;
    free(relay->mirror_memory);
    free(relay->buffer);
    free(relay);
}

// ---- writing ---------------------------------------------------------------------------------------------------

static bool make_room(struct relay *r, uint64_t bytes)
{
    uint64_t capacity = r->capacity;
    while (capacity < bytes)
        capacity *= 2;
    if (capacity == r->capacity)
        return true;
    uint8_t *larger = realloc(r->buffer, capacity);
    if (!larger)
        return false;
    memset(larger + r->capacity, 0, capacity - r->capacity);
    r->buffer = larger;
    r->capacity = capacity;
    return true;
}

static void put(struct relay *r, const void *data, uint64_t bytes)
{
    if (r->failed || !make_room(r, r->used + bytes)) {
        r->failed = true;
        return;
    }
    memcpy(r->buffer + r->used, data, bytes);
    r->used += bytes;
}

// The run of 4-byte entries that differ.
static void find_run(const uint32_t *now, const uint32_t *before, int64_t count, int64_t *first, int64_t *run)
{
    int64_t end = count;
    *first = *run = 0;
    if (count <= 0 || memcmp(now, before, (size_t)count * sizeof *now) == 0)
        return;
    while (now[*first] == before[*first])
        ++*first;
    while (now[end - 1] == before[end - 1])
        end--;
    *run = end - *first;
}

static void put_run(struct relay *r, const uint32_t *now, uint32_t *before, int64_t first, int64_t run)
{
    put(r, now + first, (uint64_t)run * sizeof *now);
    if (!r->failed)
        memcpy(before + first, now + first, (size_t)run * sizeof *now);
}

// tokens: how many of the slot's first ones are needed.
static void put_slot(struct relay *r, int64_t slot, int64_t tokens)
{
    const struct step_area *a = &r->area, *m = &r->mirror;
    const struct step_slot *now = &a->slots[slot];
    struct slot_head head = {.slot = slot};
    int64_t edits = now->num_edits > 0 && now->num_edits <= STEP_MAX_EDITS ? now->num_edits : 0,
            pages = (tokens + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
    size_t settings = offsetof(struct step_slot, edits) + (size_t)edits * sizeof now->edits[0];
    tokens = now->prompt_count > tokens ? now->prompt_count : tokens;
    tokens = tokens < a->context ? tokens : a->context;
    pages = pages < a->pages_per_sequence ? pages : a->pages_per_sequence;
    const uint32_t *token_table = a->tokens + slot * a->context, *mask = a->masks + slot * a->mask_words;
    const uint32_t *page_table = (const uint32_t *)(const void *)(a->pages + slot * a->pages_per_sequence);
    uint32_t *sent_tokens = m->tokens + slot * a->context, *sent_mask = m->masks + slot * a->mask_words;
    uint32_t *sent_pages = (uint32_t *)(void *)(m->pages + slot * a->pages_per_sequence);
    if (memcmp(now, &m->slots[slot], settings) != 0)
        head.settings_bytes = (int64_t)settings;
    find_run(token_table, sent_tokens, tokens, &head.tokens_first, &head.tokens_count);
    find_run(page_table, sent_pages, pages, &head.pages_first, &head.pages_count);
    if (now->masked)
        find_run(mask, sent_mask, a->mask_words, &head.mask_first, &head.mask_count);
    put(r, &head, sizeof head);
    put(r, now, (uint64_t)head.settings_bytes);
    memcpy(&m->slots[slot], now, (size_t)head.settings_bytes);
    put_run(r, token_table, sent_tokens, head.tokens_first, head.tokens_count);
    put_run(r, page_table, sent_pages, head.pages_first, head.pages_count);
    put_run(r, mask, sent_mask, head.mask_first, head.mask_count);
}

// Each slot of the step once; returns how many.
static int64_t put_step(struct relay *r)
{
    const struct step *step = r->area.step;
    int64_t ends[MAX_SEQUENCES] = {0}, slots = 0;
    put(r, step->segments, (uint64_t)step->num_segments * sizeof step->segments[0]);
    for (int64_t i = 0; i < step->num_segments; i++) {
        const struct step_segment *s = &step->segments[i];
        if (s->sequence < 0 || s->sequence >= r->area.max_sequences || s->sequence >= MAX_SEQUENCES)
            continue; // what is wrong with it, each rank's own check says
        int64_t end = s->start + s->count;
        ends[s->sequence] = end > ends[s->sequence] ? end : ends[s->sequence];
    }
    for (int64_t slot = 0; slot < MAX_SEQUENCES; slot++) {
        if (ends[slot] <= 0)
            continue;
        put_slot(r, slot, ends[slot]);
        slots++;
    }
    return slots;
}

const uint8_t *relay_encode(struct relay *r, int command, enum relay_kind kind, const struct relay_forward *forward,
                            uint64_t *bytes)
{
    struct head head = {.command = command, .kind = kind};
    r->used = sizeof head;
    r->failed = false;
    if (kind == RELAY_STEP) {
        int64_t segments = r->area.step->num_segments;
        if (segments < 0 || segments > STEP_MAX_SEGMENTS)
            return NULL;
        head.staggered = r->area.step->staggered;
        head.num_segments = segments;
        head.num_choices = r->area.step->num_choices;
        head.num_slots = put_step(r);
    } else if (kind == RELAY_FORWARD) {
        head.forward = *forward;
        head.num_slots = 1;
        put_slot(r, forward->sequence, forward->start + forward->count);
    }
    if (r->failed)
        return NULL;
    head.bytes = r->used;
    memcpy(r->buffer, &head, sizeof head);
    *bytes = r->used;
    return r->buffer;
}

int relay_send(struct relay *r, int command, enum relay_kind kind, const struct relay_forward *forward,
               struct error *err)
{
    uint64_t bytes;
    if (kind == RELAY_FORWARD && (forward->sequence < 0 || forward->sequence >= r->area.max_sequences ||
                                  forward->start < 0 || forward->count < 0 || forward->count > r->area.context))
        return error_set(err, ERR_OTHER, "a forward of sequence %d, which does not exist", forward->sequence);
    if (!relay_encode(r, command, kind, forward, &bytes))
        return error_set(err, ERR_MEMORY, "no memory for a command to other processes");
    int rc = comm_broadcast_idle(r->comm, r->buffer, FIRST_BYTES, 0, err);
    for (uint64_t at = FIRST_BYTES; at < bytes && !rc; at += COMM_GATHER_MAX_BYTES) {
        uint64_t left = bytes - at;
        rc = comm_broadcast(r->comm, r->buffer + at, left < COMM_GATHER_MAX_BYTES ? left : COMM_GATHER_MAX_BYTES, 0,
                            err);
    }
    return rc;
}

// ---- reading ---------------------------------------------------------------------------------------------------

struct reader {
    const uint8_t *data;
    uint64_t left;
};

static bool get(struct reader *in, void *to, uint64_t bytes)
{
    if (bytes > in->left)
        return false;
    memcpy(to, in->data, bytes);
    in->data += bytes;
    in->left -= bytes;
    return true;
}

static bool get_run(struct reader *in, uint32_t *table, int64_t entries, int64_t first, int64_t run)
{
    return first >= 0 && run >= 0 && first <= entries && run <= entries - first &&
           get(in, table + first, (uint64_t)run * sizeof *table);
}

static bool get_slot(struct relay *r, struct reader *in)
{
    const struct step_area *a = &r->area;
    struct slot_head head;
    if (!get(in, &head, sizeof head) || head.slot < 0 || head.slot >= a->max_sequences || head.settings_bytes < 0 ||
        (uint64_t)head.settings_bytes > sizeof *a->slots)
        return false;
    if (head.pages_count > 0)
        ++*a->pages_version;
    return get(in, &a->slots[head.slot], (uint64_t)head.settings_bytes) &&
           get_run(in, a->tokens + head.slot * a->context, a->context, head.tokens_first, head.tokens_count) &&
           get_run(in, (uint32_t *)(void *)(a->pages + head.slot * a->pages_per_sequence), a->pages_per_sequence,
                   head.pages_first, head.pages_count) &&
           get_run(in, a->masks + head.slot * a->mask_words, a->mask_words, head.mask_first, head.mask_count);
}

int relay_decode(struct relay *r, const uint8_t *data, uint64_t bytes, int *command, struct relay_forward *forward,
                 struct error *err)
{
    struct reader in = {.data = data, .left = bytes};
    struct step *step = r->area.step;
    struct head head;
    bool sound = get(&in, &head, sizeof head) && head.bytes == bytes && head.num_segments >= 0 &&
                 head.num_segments <= STEP_MAX_SEGMENTS && head.num_slots >= 0 && head.num_slots <= MAX_SEQUENCES;
    if (sound && head.kind == RELAY_STEP) {
        step->staggered = head.staggered != 0;
        step->num_segments = head.num_segments;
        step->num_choices = head.num_choices;
        sound = get(&in, step->segments, (uint64_t)head.num_segments * sizeof step->segments[0]);
    }
    for (int64_t i = 0; sound && i < head.num_slots; i++)
        sound = get_slot(r, &in);
    if (!sound || in.left)
        return error_set(err, ERR_RANK, "a command of rank 0 of %llu bytes does not fit this rank's tables",
                         (unsigned long long)bytes);
    *command = head.command;
    *forward = head.forward;
    return 0;
}

int relay_receive(struct relay *r, int *command, struct relay_forward *forward, struct error *err)
{
    struct head head;
    int rc = comm_broadcast_idle(r->comm, r->buffer, FIRST_BYTES, 0, err);
    if (rc)
        return rc;
    memcpy(&head, r->buffer, sizeof head);
    if (head.bytes > UINT32_MAX || !make_room(r, head.bytes))
        return error_set(err, ERR_MEMORY, "no memory for a command of %llu bytes", (unsigned long long)head.bytes);
    for (uint64_t at = FIRST_BYTES; at < head.bytes && !rc; at += COMM_GATHER_MAX_BYTES) {
        uint64_t left = head.bytes - at;
        rc = comm_broadcast(r->comm, r->buffer + at, left < COMM_GATHER_MAX_BYTES ? left : COMM_GATHER_MAX_BYTES, 0,
                            err);
    }
    return rc ? rc : relay_decode(r, r->buffer, head.bytes, command, forward, err);
}
