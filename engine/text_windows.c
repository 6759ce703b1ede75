// Cutting a text into windows. See text_windows.h.
#include "engine/text_windows.h"

#include <string.h>

int64_t text_windows_body(const struct text_windows *w) { return w->context - (w->bos >= 0); }

// The window's piece of the text [begin, end), and from where on it is scored; false at the end.
static bool step(struct text_windows *w, int64_t *begin, int64_t *end, int64_t *from)
{
    if (w->scored >= w->count)
        return false;
    *begin = w->next;
    *end = w->count - *begin < text_windows_body(w) ? w->count : *begin + text_windows_body(w);
    *from = w->scored;
    if (w->bos < 0 && *from == *begin) // nothing predicts the first one
        ++*from;
    w->scored = *end;
    w->next = *begin + w->stride;
    return true;
}

bool text_windows_next(struct text_windows *w, uint32_t *tokens, int64_t *count, int64_t *first)
{
    int64_t begin, end, from, lead = w->bos >= 0;
    if (!step(w, &begin, &end, &from))
        return false;
    if (lead)
        tokens[0] = (uint32_t)w->bos;
    memcpy(tokens + lead, w->ids + begin, (size_t)(end - begin) * sizeof *tokens);
    *count = lead + end - begin;
    *first = lead + from - begin;
    return true;
}

int64_t text_windows_total(struct text_windows w)
{
    int64_t begin, end, from, total = 0;
    while (step(&w, &begin, &end, &from))
        total += end - from;
    return total;
}
