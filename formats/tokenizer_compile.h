// tokenizer.json -> compiled tokenizer image (tokenizer_file.md), done once, offline.
// Owns: reading and judging the JSON. Leaves to others: using the image (tokenizer.h).
#ifndef TPSHARD_FORMATS_TOKENIZER_COMPILE_H
#define TPSHARD_FORMATS_TOKENIZER_COMPILE_H

#include <stddef.h>
#include <stdint.h>

#include "formats/error.h"

// Compiles into a freshly malloc'ed image (*out, *out_bytes; the caller frees). The image depends on the inputs alone.
// tokenizer_config_path: NULL or a path; when the file exists, its `added_tokens_decoder` adds tokens and corrects
// flags, as transformers does. Nothing else of it is used.
// vocab_size: rows of the model's embedding; every id must be below it.
// ERR_MODEL names the component that is not supported, or the token that is wrong. `truncation` and `padding`
// settings are ignored: they are for training batches, and transformers resets them too.
int tokenizer_compile(uint8_t **out, size_t *out_bytes, const char *tokenizer_json_path,
                      const char *tokenizer_config_path, uint64_t vocab_size, struct error *err);

#endif
