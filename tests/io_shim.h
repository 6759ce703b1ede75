// What the files of the shim share: kinds of calls, the page of counters, and whether a call is to fail. Hidden: a program that the shim is loaded
// into must not meet these names.
#ifndef TPSHARD_TESTS_IO_SHIM_H
#define TPSHARD_TESTS_IO_SHIM_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

enum kind {
    KIND_OPEN,
    KIND_READ,
    KIND_PREAD,
    KIND_WRITE,
    KIND_PWRITE,
    KIND_SYNC,
    KIND_RENAME,
    KIND_TRUNCATE,
    KIND_ALLOCATE,
    KIND_MAP,
    KIND_CLOSE,
    KIND_MKDIR,
    KIND_UNLINK,
    KIND_OPENDIR,
    KIND_READDIR,
    KIND_STAT,
    KIND_LOCK,
    KIND_THREAD,
    KIND_ALLOC,
    KIND_STEP,    // these are counted and never fail
    KIND_LIVE,    // allocations that are not freed
    KIND_WRITTEN, // bytes written by pwrite, but for those from a file's beginning on: heads
    KINDS
};

// Python: struct "<24q5q". The first fault to come is decided by `left`, so that whoever maps the page can arm one at any time.
struct page {
    _Atomic int64_t counts[24]; //   0  of each kind
    _Atomic int64_t kind;       // 192  that fails; NO_KIND
    _Atomic int64_t left;       // 200  calls of that kind until it fails: 1 is the next one
    _Atomic int64_t error;      // 208
    _Atomic int64_t always;     // 216
    _Atomic int64_t injected;   // 224  faults so far
};

// Fortified programs call functions of their own names, and all programs may call those for large files.
#define ALSO(name, other) extern __typeof__(name)(other) __attribute__((alias(#name)))

// glibc's own, under names that nobody interposes.
extern void *__libc_malloc(size_t bytes);
extern void *__libc_calloc(size_t count, size_t bytes);
extern void *__libc_realloc(void *memory, size_t bytes);
extern void *__libc_memalign(size_t alignment, size_t bytes);
extern void __libc_free(void *memory);

#pragma GCC visibility push(hidden)

extern struct page *io_shim_page; // NULL until the library has begun
extern int io_shim_stacks_fd;
extern pthread_mutex_t io_shim_steps;
// Set while the library itself calls, which must neither fail nor count.
extern __thread bool io_shim_inside __attribute__((tls_model("initial-exec")));

// True when this call is to fail; errno is set.
bool io_shim_fails(enum kind kind);

#pragma GCC visibility pop

#endif
