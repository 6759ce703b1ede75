// What the two files of a rendezvous share.
//
//   rendezvous.c         sockets, calling others, the whole
//   rendezvous_listen.c  the one that is called
#ifndef TPSHARD_ENGINE_RENDEZVOUS_INTERNAL_H
#define TPSHARD_ENGINE_RENDEZVOUS_INTERNAL_H

#include "engine/rendezvous.h"

#include <netinet/in.h>
#include <sys/socket.h>

enum {
    MEET_WAITING = 32,                      // callers that have not yet said who they are
    MEET_NAME_BYTES = INET6_ADDRSTRLEN + 1, // of an address
    MEET_PAUSE_MS = 50,                     // between two tries, doubled each time
    MEET_PAUSE_MAX_MS = 1000,
    MEET_CLOSED = 1, // results that are no errors yet
    MEET_LATE = 2,
};
#define MEET_CALL_NS 5000000000ll // for one to connect, or to say who it is

struct caller {
    int fd; // -1: none
    int64_t until_ns;
    struct sockaddr_storage address;
    uint8_t nonce[MEET_NONCE_BYTES];
    struct meet_hello hello;
    size_t got;
};

struct member { // that has joined
    struct sockaddr_storage address;
    int port;
    uint8_t nonce[MEET_NONCE_BYTES];
    uint8_t offer[MEET_OFFER_BYTES];
};

struct meeting {
    const struct rendezvous_options *options;
    struct rendezvous *out;
    int rank, world;
    int64_t until_ns;
    uint8_t key[MEET_KEY_BYTES];
    int listener, port;
    struct caller callers[MEET_WAITING];
    struct member members[COMM_MAX_RANKS];
    struct meet_hello joined;            // other ranks: what they said to rank 0
    char sent_away[MEET_SENTENCE_BYTES]; // the last one; "": nobody
    int noted;                           // so many, up to those that are noted at once
    int64_t noted_ns, unnoted;           // the last one of these, and those since then that were not
    unsigned lookups;                    // of rank 0's name
    bool elsewhere;                      // rank 0: the others look for it at an address that is none of this host
    struct error ended; // rank 0: why the meeting has ended, for those who come yet; code 0: it has not
    int told;           // so many of them
};

// Until a descriptor is ready: > 0; 0: the time is over.
int meet_wait(int fd, short events, int64_t until_ns);
// All bytes: 0, MEET_CLOSED or MEET_LATE.
int meet_read(int fd, void *to, size_t bytes, int64_t until_ns);
int meet_write(int fd, const void *from, size_t bytes, int64_t until_ns);
void meet_close(int *fd);
void meet_name(char name[MEET_NAME_BYTES], const struct sockaddr_storage *address);
int meet_port(const struct sockaddr_storage *address);
void meet_set_port(struct sockaddr_storage *address, int port);
socklen_t meet_address_bytes(const struct sockaddr_storage *address); // as bind and connect want it
bool meet_is_loopback(const struct sockaddr_storage *address);
// Without a token only processes of this one's user are ranks: 0, or ERR_RANK for the other end of a connection within this host.
int meet_check_user(const struct meeting *m, int fd, struct error *err);
// Other ranks, once they have joined: 0 while rank 0 is there; else its last word, or that it has ended.
int meet_last_word(struct meeting *m, struct error *err);
// Rank 0's address by its name; of several, each in its turn. passive: to listen there.
int meet_resolve(struct meeting *m, struct sockaddr_storage *out, bool passive, struct error *err);

int meet_listen(struct meeting *m, struct error *err);
// Calls once: MEET_CLOSED, MEET_LATE where it may be tried again.
int meet_knock(const struct meeting *m, const struct sockaddr_storage *address, struct meet_hello *hello, int *out,
               struct error *err);
void meet_fill_hello(const struct meeting *m, struct meet_hello *hello, enum meet_purpose purpose, int to);
// This process would be rank 0, and somebody listens in its place: the refusal of another rank 0 there. 0: there is none.
int meet_ask_other_rank_0(struct meeting *m, const struct sockaddr_storage *address, struct error *err);
// Rank 0: who still comes hears why the meeting has ended, until all have heard it, for so long at most.
void meet_tell_latecomers(struct meeting *m, int limit_ms);
// Rank 0: until all others have joined; then they are told where each one is.
int meet_take_joins(struct meeting *m, const void *blob, size_t bytes, struct error *err);
// Until all higher ranks have called.
int meet_take_links(struct meeting *m, struct error *err);
// At the end: how many callers were sent away without a note.
void meet_note_rest(struct meeting *m);

#endif
