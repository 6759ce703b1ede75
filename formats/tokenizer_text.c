// Text helpers of the tokenizer. See tokenizer_text.h.
#include "formats/tokenizer_text.h"

#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

bool tokenizer_text_reserve(struct tokenizer_text *text, size_t more_bytes)
{
    if (text->capacity - text->bytes >= more_bytes && text->data)
        return true;
    if (more_bytes > SIZE_MAX / 4 - text->bytes)
        return false;
    size_t wanted = text->bytes + more_bytes;
    size_t capacity = wanted < 64 ? 64 : wanted + wanted / 2;
    char *data = realloc(text->data, capacity);
    if (!data)
        return false;
    text->data = data;
    text->capacity = capacity;
    return true;
}

bool tokenizer_text_append(struct tokenizer_text *text, const char *data, size_t bytes)
{
    if (!tokenizer_text_reserve(text, bytes))
        return false;
    if (bytes)
        memcpy(text->data + text->bytes, data, bytes);
    text->bytes += bytes;
    return true;
}

void tokenizer_text_free(struct tokenizer_text *text)
{
    free(text->data);
    *text = (struct tokenizer_text){0};
}

// Table 3-7 of the Unicode standard: the second byte's range depends on the first, all later ones are 80..BF.
// Returns the sequence length that lead byte announces (0: not a lead byte) and the second byte's range.
static unsigned sequence_length(uint8_t lead, uint8_t *low, uint8_t *high)
{
    *low = 0x80;
    *high = 0xBF;
    if (lead < 0x80)
        return 1;
    if (lead >= 0xC2 && lead <= 0xDF)
        return 2;
    if (lead >= 0xE0 && lead <= 0xEF) {
        if (lead == 0xE0)
            *low = 0xA0;
        if (lead == 0xED)
            *high = 0x9F;
        return 3;
    }
    if (lead >= 0xF0 && lead <= 0xF4) {
        if (lead == 0xF0)
            *low = 0x90;
        if (lead == 0xF4)
            *high = 0x8F;
        return 4;
    }
    return 0;
}

// The bytes at the start that belong to one character or to one ill-formed subpart; *wanted is the length that the
// lead byte announces, 0 for none. A character is complete when both are equal.
static size_t take_sequence(const uint8_t *text, size_t bytes, unsigned *wanted)
{
    uint8_t low, high;
    *wanted = sequence_length(text[0], &low, &high);
    size_t length = 1;
    while (length < *wanted && length < bytes && text[length] >= low && text[length] <= high) {
        length++;
        low = 0x80;
        high = 0xBF;
    }
    return length;
}

size_t tokenizer_text_valid_prefix(const char *text, size_t bytes)
{
    const uint8_t *at = (const uint8_t *)text;
    size_t done = 0;
    while (done < bytes) {
        if (bytes - done >= 8) {
            uint64_t eight;
            memcpy(&eight, at + done, 8);
            if (!(eight & 0x8080808080808080u)) {
                done += 8;
                continue;
            }
        }
        unsigned wanted;
        size_t length = take_sequence(at + done, bytes - done, &wanted);
        if (length != wanted)
            break;
        done += length;
    }
    return done;
}

size_t tokenizer_text_bad_prefix(const char *text, size_t bytes, bool *unfinished)
{
    unsigned wanted;
    size_t length = take_sequence((const uint8_t *)text, bytes, &wanted);
    *unfinished = length < wanted && length == bytes;
    return length;
}

bool tokenizer_text_append_lossy(struct tokenizer_text *out, const char *text, size_t bytes, bool hold_unfinished,
                                 size_t *used)
{
    size_t done = 0;
    for (;;) {
        size_t valid = tokenizer_text_valid_prefix(text + done, bytes - done);
        if (!tokenizer_text_append(out, text + done, valid))
            return false;
        done += valid;
        if (done == bytes)
            break;
        bool unfinished;
        size_t bad = tokenizer_text_bad_prefix(text + done, bytes - done, &unfinished);
        if (unfinished && hold_unfinished)
            break;
        if (!tokenizer_text_append(out, "\xEF\xBF\xBD", 3))
            return false;
        done += bad;
    }
    *used = done;
    return true;
}

size_t tokenizer_text_next(const char *text, size_t bytes, uint32_t *code_point)
{
    const uint8_t *at = (const uint8_t *)text;
    unsigned wanted;
    size_t length = take_sequence(at, bytes, &wanted);
    if (length != wanted) {
        *code_point = 0xFFFD;
        return length;
    }
    static const uint8_t lead_bits[5] = {0, 0x7F, 0x1F, 0x0F, 0x07};
    uint32_t value = at[0] & lead_bits[length];
    for (size_t i = 1; i < length; i++)
        value = value << 6 | (at[i] & 0x3F);
    *code_point = value;
    return length;
}

const char *tokenizer_text_find(const char *text, size_t bytes, const char *wanted, size_t wanted_bytes)
{
    if (wanted_bytes > 4)
        return memmem(text, bytes, wanted, wanted_bytes);
    const char *end = text + bytes;
    while ((size_t)(end - text) >= wanted_bytes) {
        text = memchr(text, wanted[0], (size_t)(end - text) - wanted_bytes + 1);
        if (!text || !memcmp(text, wanted, wanted_bytes))
            return text;
        text++;
    }
    return NULL;
}

size_t tokenizer_text_last(const char *text, size_t bytes)
{
    size_t length = 1;
    while (length < 4 && length < bytes && ((uint8_t)text[bytes - length] & 0xC0) == 0x80)
        length++;
    return length;
}

bool tokenizer_text_is_space(uint32_t c)
{
    return (c >= 9 && c <= 13) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) ||
           c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

bool tokenizer_text_is_word(uint32_t c)
{
    if (c == 0x200C || c == 0x200D) // Join_Control
        return true;
    // Symbols that are Alphabetic: circled and squared Latin letters.
    if ((c >= 0x24B6 && c <= 0x24E9) || (c >= 0x1F130 && c <= 0x1F149) || (c >= 0x1F150 && c <= 0x1F169) ||
        (c >= 0x1F170 && c <= 0x1F189))
        return true;
    switch (utf8proc_category((utf8proc_int32_t)c)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
        return true;
    default:
        return false;
    }
}

bool tokenizer_text_is_nfc_at_sight(const char *text, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++)
        if ((uint8_t)text[i] >= 0xCC) // lead byte of U+0300 and above
            return false;
    return true;
}

bool tokenizer_text_append_nfc(struct tokenizer_text *out, const char *text, size_t bytes)
{
    utf8proc_uint8_t *composed = NULL;
    // The input is valid UTF-8, so a negative result can only mean that memory is out (or a text beyond 1 GiB).
    utf8proc_ssize_t length = utf8proc_map((const utf8proc_uint8_t *)text, (utf8proc_ssize_t)bytes, &composed,
                                           UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    bool done = length >= 0 && tokenizer_text_append(out, (const char *)composed, (size_t)length);
    free(composed);
    return done;
}
