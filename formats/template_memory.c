// Memory of the template interpreter: the arena, the run's limits, and strings that carry marks.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "formats/template_internal.h"

// ---- arena

enum { CHUNK_BYTES = 64 << 10, ALIGNMENT = 16 };

struct arena_chunk {
    struct arena_chunk *next;
    size_t bytes, used;
    _Alignas(ALIGNMENT) char data[];
};

void *arena_alloc(struct arena *arena, size_t bytes)
{
    size_t wanted = (bytes + ALIGNMENT - 1) & ~(size_t)(ALIGNMENT - 1);
    if (wanted < bytes || wanted > arena->limit_bytes - arena->bytes) {
        arena->bytes = arena->limit_bytes;
        return NULL;
    }
    struct arena_chunk *chunk = arena->chunks;
    if (!chunk || chunk->bytes - chunk->used < wanted) {
        size_t chunk_bytes = wanted > CHUNK_BYTES / 4 ? wanted : CHUNK_BYTES;
        struct arena_chunk *fresh = calloc(1, sizeof *fresh + chunk_bytes);
        if (!fresh)
            return NULL;
        fresh->bytes = chunk_bytes;
        if (chunk && chunk_bytes == wanted) { // a large one goes behind the chunk that still has room
            fresh->next = chunk->next;
            chunk->next = fresh;
        } else {
            fresh->next = chunk;
            arena->chunks = fresh;
        }
        chunk = fresh;
    }
    void *memory = chunk->data + chunk->used;
    chunk->used += wanted;
    arena->bytes += wanted;
    return memory;
}

void arena_free(struct arena *arena)
{
    for (struct arena_chunk *chunk = arena->chunks, *next; chunk; chunk = next) {
        next = chunk->next;
        free(chunk);
    }
    arena->chunks = NULL;
}

// ---- the run

void run_fail(struct run *r, const char *fmt, ...)
{
    char text[ERROR_MSG_BYTES];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    (void)error_set(r->err, r->bad_code, "%s, line %u: %s", r->name, r->line, text);
    longjmp(r->leave, 1);
}

void run_charge(struct run *r, uint64_t steps)
{
    r->steps += steps;
    if (r->steps > r->max_steps)
        run_fail(r, "the template takes more than %llu steps", (unsigned long long)r->max_steps);
}

void run_charge_bytes(struct run *r, uint64_t bytes)
{
    r->uncharged_bytes += bytes;
    run_charge(r, r->uncharged_bytes >> 10);
    r->uncharged_bytes &= 1023;
}

void *run_alloc(struct run *r, size_t count, size_t size)
{
    size_t bytes;
    void *memory = __builtin_mul_overflow(count, size, &bytes) ? NULL : arena_alloc(&r->arena, bytes);
    if (!memory) {
        if (r->arena.bytes < r->arena.limit_bytes && bytes <= r->arena.limit_bytes)
            r->bad_code = ERR_MEMORY;
        run_fail(r, "the template needs more than %llu MiB of memory",
                 (unsigned long long)(r->arena.limit_bytes >> 20));
    }
    return memory;
}

void run_enter(struct run *r)
{
    if (++r->depth > TEMPLATE_MAX_DEPTH)
        run_fail(r, "expressions, values or macros lie more than %d deep within each other", TEMPLATE_MAX_DEPTH);
}

// ---- characters

uint32_t text_next(const char *text, size_t *at)
{
    const uint8_t *p = (const uint8_t *)text + *at;
    if (p[0] < 0x80) {
        *at += 1;
        return p[0];
    }
    if (p[0] < 0xE0) {
        *at += 2;
        return (uint32_t)(p[0] & 0x1F) << 6 | (p[1] & 0x3F);
    }
    if (p[0] < 0xF0) {
        *at += 3;
        return (uint32_t)(p[0] & 0x0F) << 12 | (uint32_t)(p[1] & 0x3F) << 6 | (p[2] & 0x3F);
    }
    *at += 4;
    return (uint32_t)(p[0] & 0x07) << 18 | (uint32_t)(p[1] & 0x3F) << 12 | (uint32_t)(p[2] & 0x3F) << 6 | (p[3] & 0x3F);
}

bool text_is_space(uint32_t c)
{
    return (c >= 9 && c <= 13) || (c >= 28 && c <= 32) || c == 0x85 || c == 0xA0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

size_t text_space_end(const char *text, size_t bytes, size_t at)
{
    for (size_t next = at; at < bytes && text_is_space(text_next(text, &next)); at = next)
        ;
    return at;
}

size_t text_space_begin(const char *text, size_t begin, size_t end)
{
    while (end > begin) {
        size_t start = end - 1;
        while (start > begin && ((uint8_t)text[start] & 0xC0) == 0x80)
            start--;
        size_t next = start;
        if (!text_is_space(text_next(text, &next)))
            break;
        end = start;
    }
    return end;
}

// ---- strings

static size_t count_characters(const char *text, size_t bytes)
{
    size_t chars = 0;
    for (size_t i = 0; i < bytes; i++)
        chars += ((uint8_t)text[i] & 0xC0) != 0x80;
    return chars;
}

const struct string *string_new(struct run *r, const char *text, size_t bytes, bool user)
{
    struct builder b = builder_start(r);
    builder_add(&b, text, bytes, user);
    return builder_finish(&b);
}

const struct string *string_part(struct run *r, const struct string *s, size_t begin, size_t end)
{
    if (begin == 0 && end == s->bytes)
        return s;
    run_charge_bytes(r, end - begin);
    struct string *part = run_alloc(r, 1, sizeof *part);
    *part = (struct string){.text = s->text + begin,
                            .bytes = end - begin,
                            .chars = count_characters(s->text + begin, end - begin),
                            .marks = s->marks ? s->marks + begin : NULL,
                            .user = s->user,
                            .markup = s->markup};
    return part;
}

bool string_user_at(const struct string *s, size_t byte) { return s->marks ? s->marks[byte] : s->user; }

bool string_equal(const struct string *a, const struct string *b)
{
    return a->bytes == b->bytes && !memcmp(a->text, b->text, a->bytes);
}

bool string_is(const struct string *s, const char *text)
{
    return s->bytes == strlen(text) && !memcmp(s->text, text, s->bytes);
}

size_t string_offset(struct run *r, const struct string *s, size_t chars)
{
    if (s->chars == s->bytes || chars >= s->chars)
        return chars < s->chars ? chars : s->bytes;
    size_t at = 0;
    for (; chars; chars--)
        text_next(s->text, &at);
    run_charge_bytes(r, at);
    return at;
}

size_t string_find(struct run *r, const struct string *s, const struct string *wanted, size_t begin, size_t end)
{
    run_charge_items(r, 1);
    if (wanted->bytes > end - begin)
        return SIZE_MAX;
    if (!wanted->bytes)
        return begin;
    const char *found = memmem(s->text + begin, end - begin, wanted->text, wanted->bytes);
    size_t at = found ? (size_t)(found - s->text) : SIZE_MAX;
    run_charge_bytes(r, found ? at + wanted->bytes - begin : end - begin); // what was read, not the whole rest
    return at;
}

size_t string_find_last(struct run *r, const struct string *s, const struct string *wanted, size_t begin, size_t end)
{
    run_charge_items(r, 1);
    if (wanted->bytes > end - begin)
        return SIZE_MAX;
    if (!wanted->bytes)
        return end;
    for (size_t stop = end - wanted->bytes + 1; stop > begin;) { // places before stop are left
        const char *found = memrchr(s->text + begin, *wanted->text, stop - begin);
        size_t at = found ? (size_t)(found - s->text) : begin;
        run_charge_bytes(r, stop - at);
        if (found && s->text[at + wanted->bytes - 1] == wanted->text[wanted->bytes - 1]) {
            run_charge_bytes(r, wanted->bytes);
            if (!memcmp(found, wanted->text, wanted->bytes))
                return at;
        }
        stop = at;
    }
    return SIZE_MAX;
}

struct builder builder_start(struct run *r) { return (struct builder){.run = r}; }

static void builder_reserve(struct builder *b, size_t bytes)
{
    if (b->limit_bytes && bytes > b->limit_bytes - b->bytes)
        run_fail(b->run, "the template writes more than %llu bytes", (unsigned long long)b->limit_bytes);
    if (bytes <= b->capacity - b->bytes)
        return;
    if (bytes > SIZE_MAX / 4)
        run_alloc(b->run, SIZE_MAX, 1); // too much: leaves
    size_t capacity = b->bytes + bytes;
    capacity = b->capacity ? 2 * capacity : capacity;
    char *text = run_alloc(b->run, capacity, 1);
    if (b->bytes)
        memcpy(text, b->text, b->bytes);
    if (b->marks) {
        uint8_t *marks = run_alloc(b->run, capacity, 1);
        memcpy(marks, b->marks, b->bytes);
        b->marks = marks;
    }
    b->text = text;
    b->capacity = capacity;
}

// The marks of what is there become a list, so that others can follow.
static void spread_marks(struct builder *b)
{
    if (b->marks)
        return;
    b->marks = run_alloc(b->run, b->capacity, 1);
    memset(b->marks, b->user, b->bytes);
}

void builder_add(struct builder *b, const char *text, size_t bytes, bool user)
{
    if (!bytes)
        return;
    run_charge_bytes(b->run, bytes);
    builder_reserve(b, bytes);
    if (!b->bytes)
        b->user = user;
    if (b->user != user)
        spread_marks(b);
    if (b->marks)
        memset(b->marks + b->bytes, user, bytes);
    memcpy(b->text + b->bytes, text, bytes);
    b->bytes += bytes;
}

void builder_add_text(struct builder *b, const char *text) { builder_add(b, text, strlen(text), false); }

void builder_add_part(struct builder *b, const struct string *s, size_t begin, size_t end)
{
    if (begin >= end)
        return;
    if (!s->marks) {
        builder_add(b, s->text + begin, end - begin, s->user);
        return;
    }
    builder_reserve(b, end - begin);
    if (!b->bytes)
        b->user = s->marks[begin];
    spread_marks(b);
    memcpy(b->marks + b->bytes, s->marks + begin, end - begin);
    memcpy(b->text + b->bytes, s->text + begin, end - begin);
    b->bytes += end - begin;
    run_charge_bytes(b->run, end - begin);
}

void builder_add_string(struct builder *b, const struct string *s) { builder_add_part(b, s, 0, s->bytes); }

const struct string *builder_finish(struct builder *b)
{
    struct string *s = run_alloc(b->run, 1, sizeof *s);
    *s = (struct string){.text = b->text ? b->text : "",
                         .bytes = b->bytes,
                         .chars = count_characters(b->text, b->bytes),
                         .marks = b->marks,
                         .user = b->user};
    return s;
}
