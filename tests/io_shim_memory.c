// The shim's memory: allocations that fail, those that are not freed, and where they come from. See io_shim.c.
#undef _FORTIFY_SOURCE
#include "tests/io_shim.h"

#include <errno.h>
#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <unwind.h>

struct stack {
    uint64_t hash;
    int depth;
};

static _Unwind_Reason_Code add_frame(struct _Unwind_Context *context, void *arg)
{
    struct stack *stack = arg;
    stack->hash = (stack->hash ^ (uint64_t)_Unwind_GetIP(context)) * 0x100000001B3u;
    return ++stack->depth < 24 ? _URC_NO_REASON : _URC_END_OF_STACK;
}

// Notes the number of this allocation when no other came from the same calls.
static void note_stack(int64_t number)
{
    enum { SLOTS = 1 << 16 };
    static uint64_t seen[SLOTS];
    struct stack stack = {.hash = 0xCBF29CE484222325u};
    io_shim_inside = true;
    _Unwind_Backtrace(add_frame, &stack);
    pthread_mutex_lock(&io_shim_steps);
    size_t slot = stack.hash % SLOTS;
    while (seen[slot] && seen[slot] != stack.hash)
        slot = (slot + 1) % SLOTS;
    if (!seen[slot]) {
        seen[slot] = stack.hash;
        dprintf(io_shim_stacks_fd, "%lld\n", (long long)number);
    }
    pthread_mutex_unlock(&io_shim_steps);
    io_shim_inside = false;
}

static bool allocation_fails(void)
{
    if (io_shim_page && !io_shim_inside && io_shim_stacks_fd >= 0)
        note_stack(io_shim_page->counts[KIND_ALLOC] + 1);
    return io_shim_fails(KIND_ALLOC);
}

static void *counted(void *memory)
{
    if (io_shim_page && memory)
        io_shim_page->counts[KIND_LIVE]++;
    return memory;
}

void free(void *memory)
{
    if (io_shim_page && memory)
        io_shim_page->counts[KIND_LIVE]--;
    __libc_free(memory);
}

void *malloc(size_t bytes) { return allocation_fails() ? NULL : counted(__libc_malloc(bytes)); }
void *calloc(size_t count, size_t bytes) { return allocation_fails() ? NULL : counted(__libc_calloc(count, bytes)); }
void *realloc(void *memory, size_t bytes)
{
    if (allocation_fails())
        return NULL;
    void *moved = __libc_realloc(memory, bytes);
    return memory ? moved : counted(moved);
}
void *memalign(size_t alignment, size_t bytes)
{
    return allocation_fails() ? NULL : counted(__libc_memalign(alignment, bytes));
}
void *aligned_alloc(size_t alignment, size_t bytes) { return memalign(alignment, bytes); }
int posix_memalign(void **out, size_t alignment, size_t bytes)
{
    if (allocation_fails())
        return ENOMEM;
    void *memory = __libc_memalign(alignment, bytes);
    if (!memory)
        return ENOMEM;
    *out = counted(memory);
    return 0;
}

void *mmap(void *wanted, size_t bytes, int protection, int flags, int fd, off_t offset)
{
    if (flags & MAP_ANONYMOUS ? allocation_fails() : io_shim_fails(KIND_MAP))
        return MAP_FAILED;
    return (void *)syscall(SYS_mmap, wanted, bytes, protection, flags, fd, offset);
}
ALSO(mmap, mmap64);
