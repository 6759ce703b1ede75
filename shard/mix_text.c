// See mix_text.h.
#include "shard/mix_text.h"

#include <stdio.h>
#include <string.h>

enum { MAX_WORDS = 32 };

struct tally {
    char word[MATRIX_WORD_BYTES];
    int count;
};

static int count_words(struct tally words[MAX_WORDS], const struct matrix_kind *list, size_t count,
                       enum tensor_role role)
{
    int num_words = 0;
    for (size_t i = 0; i < count; i++) {
        char word[MATRIX_WORD_BYTES];
        int w = 0;
        if (list[i].role != role)
            continue;
        matrix_kind_print(word, list[i].kind, list[i].group_size);
        while (w < num_words && strcmp(words[w].word, word) != 0)
            w++;
        if (w == MAX_WORDS)
            continue;
        if (w == num_words) {
            memcpy(words[w].word, word, sizeof word);
            words[num_words++].count = 0;
        }
        words[w].count++;
        for (; w > 0 && words[w].count > words[w - 1].count; w--) {
            struct tally swap = words[w];
            words[w] = words[w - 1];
            words[w - 1] = swap;
        }
    }
    return num_words;
}

void mix_text_line(char *out, size_t out_bytes, const struct matrix_kind *list, size_t count)
{
    size_t at = 0;
    out[0] = 0;
    for (int role = 0; role < ROLE_COUNT; role++) {
        struct tally words[MAX_WORDS];
        int num_words = count_words(words, list, count, (enum tensor_role)role);
        for (int w = 0; w < num_words && at < out_bytes; w++) {
            const char *between = w > 0 ? ", " : at > 0 ? "; " : "";
            at += (size_t)snprintf(out + at, out_bytes - at, "%s%s%s%d %s", between,
                                   w == 0 ? tensor_role_name((enum tensor_role)role) : "", w == 0 ? " " : "",
                                   words[w].count, words[w].word);
        }
    }
}
