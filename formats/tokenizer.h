// Text <-> token ids, with the ids that Hugging Face `tokenizers` gives for the same tokenizer.json.
// Owns: BPE encoding, decoding, streaming decoding over a compiled image (format: tokenizer_file.md).
// Leaves to others: reading tokenizer.json (tokenizer_compile.h), chat templates, files and mmap.
//
// Text is UTF-8. Invalid UTF-8 is accepted: every maximal subpart of an ill-formed sequence is replaced by
// U+FFFD, as the Unicode standard (3.9, D93b) recommends and as web browsers and Rust do.
#ifndef TPSHARD_FORMATS_TOKENIZER_H
#define TPSHARD_FORMATS_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "formats/error.h"
#include "formats/marked_text.h"
#include "formats/tokenizer_compile.h"

struct tokenizer;        // immutable after opening: any number of threads may use one at the same time
struct tokenizer_stream; // one streaming decode; belongs to one thread

enum {
    TOKENIZER_ADD_SPECIAL = 1, // add what the post-processor adds (BOS, EOS)
    TOKENIZER_PLAIN_TEXT = 2,  // added tokens in the text are not recognised, and no special token can come out of
                               // the model either (the unknown token apart): user text never becomes a control token
};

// A growing list of ids. Start from {0}; the owner frees ids.
struct token_list {
    uint32_t *ids;
    size_t count, capacity; // both in tokens
};

// Wraps a compiled image, which stays owned by the caller and must outlive *out. Every field is validated:
// any bytes may be rejected (ERR_CORRUPT), none may crash. name_for_messages is copied.
int tokenizer_open(struct tokenizer **out, const uint8_t *bytes, size_t byte_count, const char *name_for_messages,
                   struct error *err);
void tokenizer_close(struct tokenizer *tok); // accepts NULL

// Appends the ids of the text to *out. On failure *out holds what it held before.
int tokenizer_encode(const struct tokenizer *tok, const char *text, size_t text_bytes, unsigned flags,
                     struct token_list *out, struct error *err);

// Appends the ids of a text of which some comes from a user: the segments, in order, cover it. What a user wrote never becomes
// an added token, special or not, neither as a whole nor together with text around it; added tokens that are white space
// alone control nothing and are found as ever. Apart from that the ids are those of the whole text: where no user wrote an
// added token they equal tokenizer_encode's. flags: TOKENIZER_ADD_SPECIAL or 0. ERR_USAGE for invalid UTF-8.
int tokenizer_encode_marked(const struct tokenizer *tok, const char *text, size_t text_bytes,
                            const struct text_segment *segments, size_t num_segments, unsigned flags,
                            struct token_list *out, struct error *err);

// The text of ids, as Hugging Face decode(ids, skip_special_tokens=skip_special) gives it. *out is malloc'ed (caller
// frees) and NUL-terminated; *out_bytes does not count the NUL. ERR_USAGE for an id that does not exist.
int tokenizer_decode(const struct tokenizer *tok, const uint32_t *ids, size_t count, bool skip_special, char **out,
                     size_t *out_bytes, struct error *err);

// Streaming decode: all texts of push and of the closing flush, put together, equal tokenizer_decode of all ids.
// A text may be empty; it always consists of complete UTF-8 sequences and is valid until the next call.
// Bytes whose text later ids may still change (an unfinished character, a run of byte-fallback tokens) are held back.
// An id without a token adds nothing: models have more ids than their tokenizer, and may choose one of those. After flush the stream is
// ready for a new sequence.
int tokenizer_stream_new(struct tokenizer_stream **out, const struct tokenizer *tok, bool skip_special,
                         struct error *err);
int tokenizer_stream_push(struct tokenizer_stream *stream, uint32_t id, const char **text, size_t *bytes,
                          struct error *err);
int tokenizer_stream_flush(struct tokenizer_stream *stream, const char **text, size_t *bytes, struct error *err);
void tokenizer_stream_free(struct tokenizer_stream *stream); // accepts NULL
// The bytes that an id adds to a text that has begun: perhaps a piece of a character, which pushing it would hold back. None for an id
// that does not exist, for the unknown token and for what skip_special drops. ERR_MODEL where the decoder looks at several tokens at once,
// so that one alone has no bytes. Valid until the next call; the stream must be new or flushed, and is so again.
int tokenizer_stream_token_bytes(struct tokenizer_stream *stream, uint32_t id, const char **bytes, size_t *count,
                                 struct error *err);

// One more than the largest id. Ids below it may be unused.
uint32_t tokenizer_vocab_size(const struct tokenizer *tok);

// Exact content of a token (as written in tokenizer.json) -> its id; false when there is none.
bool tokenizer_token_id(const struct tokenizer *tok, const char *content, uint32_t *id);

// True for added tokens marked special: control tokens, which plain text never yields.
bool tokenizer_is_special(const struct tokenizer *tok, uint32_t id);

#endif
