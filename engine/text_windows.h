// The windows of a text that is scored or captured: sequences of at most `context` tokens, each begun anew. Every token of the text is predicted
// once, those that have nothing in front of them excepted.
//
// A window is the beginning-of-sequence token, where the model has one, and a piece of the text. The next window begins `stride` tokens of
// the text later and scores only what the one before did not reach: with a stride below the window's length a token has at least
// length - stride tokens of the text in front of it, save in the first window. The last window ends with the text.
#ifndef TPSHARD_ENGINE_TEXT_WINDOWS_H
#define TPSHARD_ENGINE_TEXT_WINDOWS_H

#include <stdbool.h>
#include <stdint.h>

struct text_windows {
    const uint32_t *ids; // [count], the text
    int64_t count;
    int64_t bos;     // -1: the model has none
    int64_t context; // tokens of a window, with bos; at least 2
    int64_t stride;  // 1 .. text_windows_body
    // Where it stands:
    int64_t next;   // where in the text the next window begins
    int64_t scored; // so much of the text has been handed out
};

// Tokens of the text that a full window holds.
int64_t text_windows_body(const struct text_windows *windows);
// The next window: tokens [context] gets its *count tokens; those from *first (>= 1) on are to be scored, each by the logits of the one before it.
// False at the end.
bool text_windows_next(struct text_windows *windows, uint32_t *tokens, int64_t *count, int64_t *first);
// How many tokens all windows from here on score.
int64_t text_windows_total(struct text_windows windows);

#endif
