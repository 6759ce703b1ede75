// The parts of a link: what goes out (comm_link_out.c), what comes in (comm_link_in.c), and the transport with its watching
// thread (comm_link.c). See comm_link.h. All functions are called under the link's lock.
#ifndef TPSHARD_ENGINE_COMM_LINK_INTERNAL_H
#define TPSHARD_ENGINE_COMM_LINK_INTERNAL_H

#include "engine/comm_frames.h"
#include "engine/comm_link.h"

#include <pthread.h>

enum {
    LINK_INPUT_BYTES = 32 * 1024,     // read at once where they are not for one place
    LINK_MAX_QUEUE = 2 * GROUP_COUNT, // of each group a phase and the next
};

struct out_frame {
    struct frame_head head;
    const uint8_t *payload;
};

// The other end of a connection.
struct peer {
    // What comes in: bytes begin .. end - 1 of input are not yet looked at.
    uint8_t *input, *packed; // packed [buffer_bytes]: groups on their way to their places
    size_t begin, end;
    struct frame_head head;
    size_t head_got;
    bool in_payload;
    uint8_t *to;
    size_t payload_got;
    struct frame_error error;
    bool greeted, left, gone; // HELLO and BYE have come; nothing more will
    // What it sent was not as it must be, or it was silent for too long: what more it sends is dropped, but it is told the error.
    bool refused;
    int64_t silent_ns;
    // What goes out.
    struct out_frame queue[LINK_MAX_QUEUE], now;
    unsigned queued;
    size_t now_sent;
    bool sending;
    struct frame_error told_error;
    uint64_t channel_sent, taken_told;
    bool hello_told, beat_due, abort_told, bye_due, bye_told;
};

struct link {
    const struct comm_carrier *carrier;
    void *data;
    struct comm_region *region;
    int rank, world_size;
    int64_t silence_ns, beat_ns, tick_ns;
    struct comm groups[GROUP_COUNT]; // this rank's places in the region; no ends that anyone waits with
    uint8_t *packed[GROUP_COUNT][2];
    pthread_mutex_t lock;
    pthread_t thread;
    bool watched, main_waits, closing;
    uint64_t told_position; // in beats
    int told_waits_for;
    _Atomic bool stop;
    int wake_thread, wake_main;
    struct peer peers[COMM_MAX_RANKS];
};

struct rank_slot *link_slot_of(const struct link *link, int rank);
void link_raise_alarm(int event_fd);
// All ranks end over an error, unless something came first.
void link_end_all(struct link *link, int rank, const struct error *found);
// A rank is lost: its connection, as errno says. Or how else, while its connection still stands: it is told the error as all others are, which it reads
// when it runs again, before the connection's end.
void link_give_up(struct link *link, int rank, const char *how);
void link_lose_connection(struct link *link, int rank);

struct frame_head link_make_head(const struct link *link, enum frame_kind kind);
struct frame_head link_make_hello(const struct link *link);
bool link_have_channels(const struct link *link, int rank); // between this rank and another
// Sends what there is; false when the carrier can take no more of it now.
bool link_flush_to(struct link *link, int rank);
// writers (may be NULL) [world]: who could not take all. Returns whether there is one.
bool link_flush_all(struct link *link, bool *writers);
// Takes in what has come from a rank, up to a bound.
void link_read_from(struct link *link, int rank);
void link_read_all(struct link *link);

#endif
