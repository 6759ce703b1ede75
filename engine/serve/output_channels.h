// The output of models that write messages into channels (gpt-oss, "harmony"), taken apart byte by byte:
//
//     <|channel|>analysis<|message|>what it thinks<|end|><|start|>assistant<|channel|>final<|message|>what it says<|return|>
//     <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>
//
// The recipient may also stand before the channel. Owns: heads of messages. Leaves to others: marks in text, calls, where deltas go
// (output_parser.c).
#ifndef TPSHARD_ENGINE_SERVE_OUTPUT_CHANNELS_H
#define TPSHARD_ENGINE_SERVE_OUTPUT_CHANNELS_H

#include <stdbool.h>
#include <stddef.h>

enum { OUTPUT_HEAD_BYTES = 512 };

// A message's head without its marks, as it comes. Start from {0}.
struct output_head {
    char text[OUTPUT_HEAD_BYTES];
    size_t bytes;
    size_t taken_bytes; // all of it
    size_t channel_at;  // behind <|channel|>
    bool has_channel;
    bool bounded; // <|constrain|> was there: what follows says nothing of channel or recipient
};

enum output_message { MESSAGE_CONTENT, MESSAGE_REASONING, MESSAGE_CALL };

void output_head_channel(struct output_head *head);         // at <|channel|>
bool output_head_take(struct output_head *head, char byte); // false: it is too long to be one
// What follows <|message|>. CALL: *name [*name_bytes], within head, of the function.
enum output_message output_head_message(const struct output_head *head, const char **name, size_t *name_bytes);

#endif
