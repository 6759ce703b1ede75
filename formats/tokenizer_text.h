// Text helpers of the tokenizer: a growable byte string, UTF-8, and three Unicode questions.
#ifndef TPSHARD_FORMATS_TOKENIZER_TEXT_H
#define TPSHARD_FORMATS_TOKENIZER_TEXT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct tokenizer_text { // start from {0}
    char *data;
    size_t bytes, capacity;
};

// Each returns false when memory is out, and then leaves the text as it was.
bool tokenizer_text_reserve(struct tokenizer_text *text, size_t more_bytes);
bool tokenizer_text_append(struct tokenizer_text *text, const char *data, size_t bytes);
void tokenizer_text_free(struct tokenizer_text *text);

// The bytes from the start that are valid UTF-8.
size_t tokenizer_text_valid_prefix(const char *text, size_t bytes);

// text begins with an ill-formed sequence (bytes > 0): the bytes of its maximal subpart, which one U+FFFD replaces.
// *unfinished: the text ends inside what could still become a character.
size_t tokenizer_text_bad_prefix(const char *text, size_t bytes, bool *unfinished);

// Appends text with every maximal ill-formed subpart replaced by U+FFFD. With hold_unfinished a character cut off at
// the end is not appended; *used says how many bytes were consumed.
bool tokenizer_text_append_lossy(struct tokenizer_text *out, const char *text, size_t bytes, bool hold_unfinished,
                                 size_t *used);

// Code point at the start of valid UTF-8, bytes > 0. Returns its length.
size_t tokenizer_text_next(const char *text, size_t bytes, uint32_t *code_point);

// The first place of wanted (wanted_bytes > 0) in text, or NULL. Made for short texts such as a space or a word mark.
const char *tokenizer_text_find(const char *text, size_t bytes, const char *wanted, size_t wanted_bytes);

// Length of the last character of valid UTF-8, bytes > 0.
size_t tokenizer_text_last(const char *text, size_t bytes);

bool tokenizer_text_is_space(uint32_t code_point); // White_Space: 25 code points
bool tokenizer_text_is_word(uint32_t code_point);  // \w of Unicode TR18

// Appends the NFC form of valid UTF-8; false when memory is out.
bool tokenizer_text_append_nfc(struct tokenizer_text *out, const char *text, size_t bytes);

// True when the text certainly is in NFC already: no code point of U+0300 or above.
bool tokenizer_text_is_nfc_at_sight(const char *text, size_t bytes);

#endif
