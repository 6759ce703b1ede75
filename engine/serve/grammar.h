// Restricting output to a language: JSON, JSON of a schema, fixed text around it, alternatives and repetition. A grammar is put together piece
// by piece and compiled once per request; a state follows the tokens of one sequence and says exactly which tokens of the vocabulary keep
// the text a prefix of the language.
//
//     grammar_create(&grammar, vocabulary, &err);
//     grammar_begin(grammar);
//     grammar_marker(grammar, "<tool_call>");
//     grammar_text(grammar, "\n{\"name\": \"f\", \"arguments\": ");
//     grammar_schema(grammar, parameters, "tools[0].function.parameters");
//     grammar_text(grammar, "}\n");
//     grammar_marker(grammar, "</tool_call>");
//     grammar_end(grammar, 1, -1, "\n");
//     grammar_compile(grammar, &err);
//
// Owns: schemas, the automaton. Leaves to others: the vocabulary's trie (vocabulary.h), sampling, what a request looks like.
// What is understood of JSON Schema, and how: grammar_schema.md.
#ifndef TPSHARD_ENGINE_SERVE_GRAMMAR_H
#define TPSHARD_ENGINE_SERVE_GRAMMAR_H

#include "engine/serve/vocabulary.h"
#include "formats/error.h"

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// Being put together it belongs to one thread; once compiled it is immutable, and any number of states on any threads may borrow it.
struct grammar;
// The vocabulary is borrowed. Success: the caller owns *out, a grammar of the empty text.
int grammar_create(struct grammar **out, struct vocabulary *vocabulary, struct error *err);
// Accepts NULL. Quick after grammar_compile, and waits for no other thread.
void grammar_free(struct grammar *grammar);

// Pieces follow each other in the order of the calls. Texts are copied, schemas referenced. A piece that is refused is reported by
// grammar_compile (the first one counts). path names the schema or expression in messages, as the client knows it:
// "response_format.json_schema.schema".
void grammar_text(struct grammar *grammar, const char *text); // these bytes
// The control token with this content where the vocabulary has one that is special, else its text.
void grammar_marker(struct grammar *grammar, const char *content);
// Any text up to and including the first occurrence of this one, such as a chain of thought up to "</think>".
void grammar_until(struct grammar *grammar, const char *text);
void grammar_blank(struct grammar *grammar);                  // up to 2 line ends or one blank, or nothing
void grammar_json(struct grammar *grammar, bool object_only); // any JSON value, or any object
void grammar_schema(struct grammar *grammar, const json_t *schema, const char *path);
void grammar_regex(struct grammar *grammar, const char *expression, const char *path); // the whole text matches it
// A group: begin, pieces, or, pieces, or, pieces, end. Any one of the alternatives, repeated min to max times (max -1: without limit) with
// separator between. grammar_end(grammar, 1, 1, "") is the group once.
void grammar_begin(struct grammar *grammar);
void grammar_or(struct grammar *grammar);
void grammar_end(struct grammar *grammar, int64_t min, int64_t max, const char *separator);

// ERR_USAGE: "response_format.json_schema.schema.properties.a: \"patternProperties\" is not supported" and the like; too large; no text
// satisfies it. ERR_MEMORY. Quick for what was compiled lately: the vocabulary keeps it. The pieces are gone afterwards.
int grammar_compile(struct grammar *grammar, struct error *err);

// One thread at a time; borrows the grammar. A token that is not allowed leaves a dead state.
struct grammar_state;
int grammar_state_create(struct grammar_state **out, struct grammar *grammar, struct error *err);
void grammar_state_free(struct grammar_state *state); // accepts NULL
// As struct token_filter wants them: state is a struct grammar_state *. End-of-sequence tokens are allowed where the text is complete, and are
// all that is in the dead state behind a token that was not allowed. The mask is empty where the text is incomplete and nothing goes on: the
// vocabulary lacks a byte, or the work or memory for the state ran out. An incomplete text never ends as if it were whole.
void grammar_state_fill(void *state, uint32_t *mask, int64_t words);
void grammar_state_advance(void *state, uint32_t token);
bool grammar_state_complete(const struct grammar_state *state); // the text so far is a whole sentence
bool grammar_state_dead(const struct grammar_state *state);
// Whether these bytes may follow; they are taken if so (for texts that a template has begun, and for tests).
bool grammar_state_take(struct grammar_state *state, const char *bytes, size_t count);
// The same, but nothing is taken.
bool grammar_state_admits(struct grammar_state *state, const char *bytes, size_t count);

#endif
