// fork beside other threads, under clang's AddressSanitizer.
//
// The C library's allocator may be used in the child of a process with threads: it takes its own locks over a fork. The sanitizer's, which is
// in its place, does so only in later versions. Here a lock that another thread held stayed taken for ever in the child, and a rank that the
// server started while it answered a request hung in its first calloc. Linked into tpengine where it is built so; it can go with clang 14.
#include <pthread.h>

#if defined(__clang_major__) && __clang_major__ < 17

// The sanitizer's own, of its leak check.
extern void lock_threads(void) __asm__("_ZN6__lsan18LockThreadRegistryEv");
extern void lock_allocator(void) __asm__("_ZN6__lsan13LockAllocatorEv");
extern void lock_stacks(void) __asm__("_ZN11__sanitizer17StackDepotLockAllEv");
extern void unlock_threads(void) __asm__("_ZN6__lsan20UnlockThreadRegistryEv");
extern void unlock_allocator(void) __asm__("_ZN6__lsan15UnlockAllocatorEv");
extern void unlock_stacks(void) __asm__("_ZN11__sanitizer19StackDepotUnlockAllEv");

static void before_fork(void)
{
    lock_threads();
    lock_allocator();
    lock_stacks();
}

static void after_fork(void)
{
    unlock_stacks();
    unlock_allocator();
    unlock_threads();
}

__attribute__((constructor)) static void watch_forks(void)
{
    if (pthread_atfork(before_fork, after_fork, after_fork))
        __builtin_trap();
}

#endif
