// The chat template of a Hugging Face model and the special tokens that it writes, as files for the shard directory
// (formats/chat.h). Part of extras.c.
#ifndef TPSHARD_SHARD_EXTRAS_CHAT_H
#define TPSHARD_SHARD_EXTRAS_CHAT_H

#include "shard/extras.h"

// Looks for the template in chat_template.jinja, then additional_chat_templates/, then tokenizer_config.json; a model without
// one is no error. A template that cannot be used is taken all the same, and extras->warning says why.
int extras_chat_add(struct extras *extras, const char *model_dir, struct error *err);

#endif
