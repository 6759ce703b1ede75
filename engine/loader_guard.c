// What happens when a page of a mapped file cannot be read. See loader_guard.h.
#include "engine/loader_guard.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

enum { MAX_GUARDS = 256 }; // ranks of a process, and rank files of each

// Free: end is 0. What lies between is set before end is, and stays until after it is 0 again; nobody touches a map whose guard has been given back.
struct loader_guard {
    atomic_uintptr_t begin, end;
    void (*on_lost)(void *arg, const struct error *why);
    void *arg;
    struct error error; // made beforehand: the handler may not format
};

// A handler may be reading on any thread at any time: nothing here is ever given back.
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; // of those who change what follows; the handler only reads
static struct loader_guard guards[MAX_GUARDS];
static struct sigaction before[2]; // the one that counts is never written
static atomic_int before_counts;

static _Thread_local sigjmp_buf *volatile way_out;

static const struct loader_guard *guard_of(uintptr_t address)
{
    for (int i = 0; i < MAX_GUARDS; i++) {
        uintptr_t end = atomic_load(&guards[i].end);
        if (address < end && address >= atomic_load(&guards[i].begin))
            return &guards[i];
    }
    return NULL;
}

static void on_sigbus(int number, siginfo_t *info, void *context)
{
    (void)context;
    // A signal that was sent, and not raised by an access, has no address.
    const struct loader_guard *guard = info->si_code > 0 ? guard_of((uintptr_t)info->si_addr) : NULL;
    if (!guard) {
        sigaction(SIGBUS, &before[atomic_load(&before_counts)],
                  NULL); // as if there were no guard; an access faults again
        if (info->si_code <= 0)
            raise(number);
        return;
    }
    if (way_out)
        siglongjmp(*way_out, 1);
    if (guard->on_lost)
        guard->on_lost(guard->arg, &guard->error);
    else if (write(STDERR_FILENO, guard->error.msg, strlen(guard->error.msg)) < 0 || write(STDERR_FILENO, "\n", 1) < 0)
        _exit(error_exit_code(ERR_IO)); // the exit code has to do
    _exit(error_exit_code(ERR_IO));
}

// Again for every guard: somebody may have set another one since.
static int set_handler(struct error *err)
{
    struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO}, now;
    if (sigaction(SIGBUS, NULL, &now) != 0)
        return error_set_errno(err, "cannot handle SIGBUS");
    if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_sigbus)
        return 0;
    int other = 1 - atomic_load(&before_counts);
    before[other] = now;
    atomic_store(&before_counts, other);
    return sigaction(SIGBUS, &action, NULL) == 0 ? 0 : error_set_errno(err, "cannot handle SIGBUS");
}

int loader_guard_new(struct loader_guard **out, const uint8_t *map, uint64_t bytes, const char *name,
                     void (*on_lost)(void *arg, const struct error *why), void *arg, struct error *err)
{
    pthread_mutex_lock(&lock);
    int rc = set_handler(err), place = 0;
    while (!rc && place < MAX_GUARDS && atomic_load(&guards[place].end))
        place++;
    if (!rc && place == MAX_GUARDS)
        rc = error_set(err, ERR_OTHER, "%s: more than %d files are mapped", name, MAX_GUARDS);
    if (!rc) {
        struct loader_guard *guard = &guards[place];
        guard->on_lost = on_lost;
        guard->arg = arg;
        loader_guard_error(name, &guard->error);
        atomic_store(&guard->begin, (uintptr_t)map);
        atomic_store(&guard->end, (uintptr_t)map + bytes);
        *out = guard;
    }
    pthread_mutex_unlock(&lock);
    return rc;
}

void loader_guard_free(struct loader_guard *guard)
{
    if (!guard)
        return;
    pthread_mutex_lock(&lock);
    atomic_store(&guard->end, 0);
    pthread_mutex_unlock(&lock);
}

bool loader_guard_try(void (*fn)(void *arg), void *arg)
{
    sigjmp_buf here;
    if (sigsetjmp(here, 1) != 0) {
        way_out = NULL;
        return false;
    }
    way_out = &here;
    fn(arg);
    way_out = NULL;
    return true;
}

int loader_guard_error(const char *name, struct error *err)
{
    return error_set(err, ERR_IO,
                     "%s: a part that is in use can no longer be read: the file was shortened or overwritten, or its "
                     "device failed; restore it (tpshard verify names what is damaged) and start again",
                     name);
}
