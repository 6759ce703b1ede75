// What ranks say to each other when they meet (rendezvous.h), byte for byte. Little-endian. Between the one that listens and
// the one that has connected:
//
//   listener -> caller  struct meet_challenge   a fresh nonce
//   caller -> listener  struct meet_hello       who it is and what for, a nonce of its own, and what it brings
//   listener -> caller  MEET_NOTED              to who joins: it is counted; the rest comes when all are there
//   listener -> caller  struct meet_answer      yes or no; with a yes to who joins: where each rank listens, and rank 0's blob
//
// A tag is the HMAC-SHA256 of the other side's nonce and of everything said, under a key made of the token: who has not the
// token cannot make one, nor use one again, and the token itself is never sent.
#ifndef TPSHARD_ENGINE_RENDEZVOUS_WIRE_H
#define TPSHARD_ENGINE_RENDEZVOUS_WIRE_H

#include "formats/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    MEET_NONCE_BYTES = 32,
    MEET_TAG_BYTES = 32,
    MEET_KEY_BYTES = 32,
    MEET_VERSION_BYTES = 64,
    MEET_CONTRACT_BYTES = 16,
    MEET_SENTENCE_BYTES = 512,
    MEET_OFFER_BYTES = 512,
    MEET_MAX_RANKS = 64,
    MEET_BLOB_MAX_BYTES = 4096,
};
#define MEET_CHALLENGE "TPMEETC2" // the digit is the version of all of this
#define MEET_HELLO "TPMEETH2"
#define MEET_NOTED "TPMEETN2"
#define MEET_ANSWER "TPMEETA2"

struct meet_challenge {
    uint8_t magic[8]; //  0  MEET_CHALLENGE
    uint8_t nonce[MEET_NONCE_BYTES];
};
_Static_assert(sizeof(struct meet_challenge) == 40, "on the wire");

enum meet_purpose {
    MEET_JOIN, // rank > 0 at rank 0
    MEET_LINK, // a rank at a lower one: this connection is theirs
    MEET_FAIL, // a rank that cannot come, at rank 0
    MEET_PURPOSES
};

struct meet_hello {
    uint8_t magic[8];                      //   0  MEET_HELLO
    uint8_t nonce[MEET_NONCE_BYTES];       //   8
    uint8_t contract[MEET_CONTRACT_BYTES]; //  40  of the shard run
    uint32_t purpose;                      //  56  enum meet_purpose
    uint32_t rank, to;                     //  60  of the caller, below MEET_MAX_RANKS; of the one called
    uint32_t world, tp_size, pp_size;      //  68  1 .. MEET_MAX_RANKS
    uint32_t port;                         //  80  JOIN: where the caller listens, 1 .. 65535
    int32_t code;                          //  84  FAIL: an error's (meet_is_code); else 0
    char version[MEET_VERSION_BYTES];      //  88  of the program; ends with a 0
    uint8_t offer[MEET_OFFER_BYTES];       // 152  JOIN: what it wants to run with; FAIL: a sentence that ends with a 0
    uint8_t tag[MEET_TAG_BYTES];           // 664
};
_Static_assert(sizeof(struct meet_hello) == 696 && offsetof(struct meet_hello, tag) == 664, "on the wire");

struct meet_address {
    uint32_t family; // 4, 6; 0: where the reader has reached rank 0
    uint32_t port;
    uint32_t scope; // of a link-local address of version 6
    uint32_t reserved;
    uint8_t bytes[16]; // as on the network, the first 4 or all
};
_Static_assert(sizeof(struct meet_address) == 32, "on the wire");

struct meet_answer {
    uint8_t magic[8];                   //   0  MEET_ANSWER
    int32_t code;                       //   8  0: yes; else an error's code (meet_is_code)
    uint32_t num_addresses, blob_bytes; //  12  follow this; at most MEET_MAX_RANKS, MEET_BLOB_MAX_BYTES
    uint32_t reserved;                  //  20  0
    char sentence[MEET_SENTENCE_BYTES]; //  24  why not; ends with a 0
    uint8_t tag[MEET_TAG_BYTES];        // 536
};
_Static_assert(sizeof(struct meet_answer) == 568 && offsetof(struct meet_answer, tag) == 536, "on the wire");
enum { MEET_ANSWER_MAX_BYTES = 568 + 32 * MEET_MAX_RANKS + MEET_BLOB_MAX_BYTES };

// token may be NULL: then any program of the same job has the key. job: of the launcher, so that two jobs do not mix.
int meet_key(uint8_t key[MEET_KEY_BYTES], const char *token, const char *job, struct error *err);
// Unpredictable bytes. ERR_IO.
int meet_nonce(uint8_t nonce[MEET_NONCE_BYTES], struct error *err);

// nonce: of the challenge. Sets the tag.
void meet_hello_seal(struct meet_hello *hello, const uint8_t *key, const uint8_t *nonce);
// An error's code as another process may say it: negated it is an exit status, and never that of a success.
bool meet_is_code(int32_t code);
// Whether these are a hello at all and in their ranges (else ERR_CORRUPT), and whether the tag is right.
int meet_hello_check(const struct meet_hello *hello, const uint8_t *key, const uint8_t *nonce, bool *genuine,
                     struct error *err);
// nonce: of the hello. `bytes` of an answer and what follows it.
void meet_answer_seal(uint8_t *answer, size_t bytes, const uint8_t *key, const uint8_t *nonce);
// How many bytes follow an answer's head; ERR_CORRUPT where it is none.
int meet_answer_rest(const struct meet_answer *head, size_t *rest, struct error *err);
bool meet_answer_is_genuine(const uint8_t *answer, size_t bytes, const uint8_t *key, const uint8_t *nonce);

#endif
