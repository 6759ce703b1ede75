// Text of which it is known, byte for byte, whether it came from outside. A chat template puts texts of a request between its
// own control tokens; the tokenizer must tell the two apart.
#ifndef TPSHARD_FORMATS_MARKED_TEXT_H
#define TPSHARD_FORMATS_MARKED_TEXT_H

#include <stdbool.h>
#include <stddef.h>

struct text_segment {
    size_t begin, end; // bytes, begin < end
    bool from_user;    // false: the template's own or a trusted variable's text
};

#endif
