// Fibers: stacks of their own that one thread switches between. On x86-64 a switch is a few instructions; elsewhere it is swapcontext.
#ifndef TPSHARD_TESTS_EMULATOR_FIBER_H
#define TPSHARD_TESTS_EMULATOR_FIBER_H

#include <stddef.h>

#ifndef __x86_64__
#include <ucontext.h>
#endif

struct fiber {
    void *stack_pointer = nullptr;
    char *memory = nullptr;     // the stack; null for the thread's own
    void *fake_stack = nullptr; // the address sanitizer's
    const void *bottom = nullptr;
    size_t bytes = 0;
    void (*entry)() = nullptr;
#ifndef __x86_64__
    ucontext_t context;
#endif
};

fiber *fiber_new(void (*entry)());
void fiber_free(fiber *f);
void fiber_restart(fiber *f, void (*entry)());
void fiber_switch(fiber *from, fiber *to);
void fiber_exit(fiber *from, fiber *to); // from does not run again before fiber_restart

#endif
