// A code point as UTF-8. Questions about text that is there already: tokenizer_text.h.
#ifndef TPSHARD_FORMATS_UTF8_H
#define TPSHARD_FORMATS_UTF8_H

#include <stddef.h>
#include <stdint.h>

enum { UTF8_MAX_BYTES = 4, UTF8_REPLACEMENT = 0xFFFD }; // for what is no text

// The number of bytes, 1 to 4. Surrogates are written like others: the caller knows whether there are any.
static inline size_t utf8_put(char *to, uint32_t code_point)
{
    if (code_point < 0x80) {
        to[0] = (char)code_point;
        return 1;
    }
    size_t count = code_point < 0x800 ? 2 : code_point < 0x10000 ? 3 : 4;
    for (size_t i = count - 1; i > 0; i--, code_point >>= 6)
        to[i] = (char)(0x80 | (code_point & 0x3F));
    to[0] = (char)((0xF00 >> count) | code_point);
    return count;
}

#endif
