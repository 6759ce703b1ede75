// Fibers. See fiber.h.
#include "tests/emulator/fiber.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#define WITH_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define WITH_ASAN 1
#endif
#endif

#ifdef WITH_ASAN
#include <sanitizer/common_interface_defs.h>
enum { STACK_BYTES = 512 << 10 };
#else
enum { STACK_BYTES = 128 << 10 };
#endif

static thread_local fiber *starting; // the fiber whose first switch is under way
static thread_local fiber *left;     // the one that was left for it

static void arrived(fiber *f)
{
#ifdef WITH_ASAN
    __sanitizer_finish_switch_fiber(f->fake_stack, &left->bottom, &left->bytes);
#else
    (void)f;
#endif
}

[[noreturn]] static void begin()
{
    fiber *f = starting;
    arrived(f);
    f->entry();
    abort(); // entries end with fiber_exit
}

#ifdef __x86_64__

// Saves what a function must keep, exchanges the stacks, and restores.
extern "C" void emulator_switch_stack(void **from, void *to);
__asm__(".text\n"
        ".hidden emulator_switch_stack\n"
        ".type emulator_switch_stack, @function\n"
        "emulator_switch_stack:\n"
        "    pushq %rbp\n"
        "    pushq %rbx\n"
        "    pushq %r12\n"
        "    pushq %r13\n"
        "    pushq %r14\n"
        "    pushq %r15\n"
        "    movq %rsp, (%rdi)\n"
        "    movq %rsi, %rsp\n"
        "    popq %r15\n"
        "    popq %r14\n"
        "    popq %r13\n"
        "    popq %r12\n"
        "    popq %rbx\n"
        "    popq %rbp\n"
        "    ret\n"
        ".size emulator_switch_stack, .-emulator_switch_stack\n");

static void switch_stack(fiber *from, fiber *to) { emulator_switch_stack(&from->stack_pointer, to->stack_pointer); }

static void prepare_stack(fiber *f)
{
    void **top = (void **)(void *)(f->memory + STACK_BYTES);
    *--top = nullptr; // so that the stack is aligned as after a call
    *--top = (void *)begin;
    for (int i = 0; i < 6; i++)
        *--top = nullptr;
    f->stack_pointer = top;
}

#else

static void switch_stack(fiber *from, fiber *to) { swapcontext(&from->context, &to->context); }

static void prepare_stack(fiber *f)
{
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = f->memory;
    f->context.uc_stack.ss_size = STACK_BYTES;
    f->context.uc_link = nullptr;
    makecontext(&f->context, begin, 0);
}

#endif

fiber *fiber_new(void (*entry)())
{
    fiber *f = new fiber;
    void *memory =
        mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        fprintf(stderr, "emulator: no memory for the stack of a thread\n");
        abort();
    }
    mprotect(memory, 4096, PROT_NONE); // a stack that grows too far stops here
    f->memory = (char *)memory;
    f->bottom = memory;
    f->bytes = STACK_BYTES;
    fiber_restart(f, entry);
    return f;
}

void fiber_free(fiber *f)
{
    munmap(f->memory, STACK_BYTES);
    delete f;
}

void fiber_restart(fiber *f, void (*entry)())
{
    f->entry = entry;
    f->fake_stack = nullptr;
    prepare_stack(f);
}

static void go(fiber *from, fiber *to, bool for_ever)
{
    starting = to;
    left = from;
#ifdef WITH_ASAN
    __sanitizer_start_switch_fiber(for_ever ? nullptr : &from->fake_stack, to->bottom, to->bytes);
#else
    (void)for_ever;
#endif
    switch_stack(from, to);
    arrived(from);
}

void fiber_switch(fiber *from, fiber *to) { go(from, to, false); }
void fiber_exit(fiber *from, fiber *to) { go(from, to, true); }
