// Devices that reach each other's memory, and what can be wrong with that. See emulator.h for the faults.
//
// An access through a view goes where the fault sends it. A byte that changes on its way changes behind the store: the store goes to a buffer of this
// thread, from where it moves on, changed, before the next access.
#include "tests/emulator/runtime.h"

#include <set>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <string>
#include <unistd.h>
#include <utility>
#include <vector>

namespace
{

enum { CORRUPT_EVERY = 4096, CORRUPT_AT = 1000, LINE_BYTES = 64 };

std::set<std::pair<int, int>> enabled; // by memory_lock

alignas(LINE_BYTES) thread_local char scratch[LINE_BYTES]; // where stores go that vanish or change
struct held_back {
    void *to;
    uintptr_t offset; // in its allocation
    size_t bytes;
    bool until_end; // of the block
};
thread_local held_back held; // if store_held
struct under_way {
    char *to;
    std::string bytes;
};
thread_local std::vector<under_way> copies, stores; // LATE, LOOSE

void land(std::vector<under_way> &all)
{
    for (const under_way &one : all)
        memcpy(one.to, one.bytes.data(), one.bytes.size());
    all.clear();
}

[[noreturn]] void bad_setting(const char *text)
{
    emulator::fail("EMULATED_PEERS=%s: wanted fault, or a>b:fault, with commas between; faults: mirror drop stale "
                   "corrupt hang refuse late loose slow",
                   text);
}

emulator::fault fault_named(const std::string &name, const char *text)
{
    static const char *const names[] = {"none", "mirror", "drop", "stale", "corrupt",
                                        "hang", "refuse", "late", "loose", "slow"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (name == names[i])
            return (emulator::fault)i;
    bad_setting(text);
}

// The bytes that corrupt changes.
bool is_corrupted(uintptr_t offset) { return offset % CORRUPT_EVERY == CORRUPT_AT; }
void corrupt(char *memory, uintptr_t offset, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++)
        if (is_corrupted(offset + i))
            memory[i] = (char)(memory[i] ^ 0x10);
}

} // namespace

namespace emulator
{

// The last entry that fits counts.
enum fault fault_of(int from, int to, bool other_process)
{
    const char *text = getenv("EMULATED_PEERS");
    enum fault found = NO_FAULT;
    for (const char *at = text ? text : ""; *at;) {
        std::string entry(at, strcspn(at, ","));
        at += entry.size() + (at[entry.size()] == ',');
        int a = -1, b = -1, used = 0;
        bool is_pair = sscanf(entry.c_str(), "%d>%d:%n", &a, &b, &used) == 2 && used > 0;
        enum fault fault = fault_named(is_pair ? entry.substr((size_t)used) : entry, text);
        if (is_pair ? a == from && b == to : from != to || (other_process && fault != REFUSE))
            found = fault;
    }
    return found;
}

bool peer_enabled(int from, int to)
{
    std::lock_guard<std::mutex> hold(memory_lock);
    return enabled.count({from, to}) > 0;
}

view *view_new(enum fault fault, const void *memory, size_t bytes)
{
    view *v = new view;
    v->fault = fault;
    if (fault == MIRROR || fault == STALE) {
        v->copy = (char *)malloc(bytes ? bytes : 1);
        memcpy(v->copy, memory, bytes);
    }
    return v;
}

void view_free(view *v)
{
    free(v->copy);
    delete v;
}

__thread bool store_held;

static char *hold_store(void *to, uintptr_t offset, size_t bytes, bool until_end)
{
    held = {to, offset, bytes, until_end};
    store_held = true;
    return scratch;
}

void settle_held_store(void)
{
    if (held.until_end) {
        stores.push_back({(char *)held.to, std::string(scratch, held.bytes)});
    } else {
        corrupt(scratch, held.offset, held.bytes);
        memcpy(held.to, scratch, held.bytes);
    }
    store_held = false;
}

void land_stores(void) { land(stores); }
void land_copies(void) { land(copies); }

void *through_view(const range &r, space which, void *address, size_t bytes)
{
    uintptr_t offset = (uintptr_t)address - r.begin;
    bool stores = which != GLOBAL_LOAD;
    switch (r.seen->fault) {
    case MIRROR:
        return r.seen->copy + offset;
    case STALE:
        return stores ? address : r.seen->copy + offset;
    case DROP:
        return stores ? scratch : address;
    case CORRUPT:
        break;
    case HANG:
        never_ends();
    case LOOSE:
        if (which != GLOBAL_STORE)
            return address;
        return hold_store(address, offset, bytes, true);
    case NO_FAULT:
    case REFUSE:
    case LATE:
    case SLOW:
        return address;
    }
    for (size_t i = 0; i < bytes && stores; i++)
        if (is_corrupted(offset + i))
            return hold_store(address, offset, bytes, false);
    return address;
}

static void copy_slowly(char *target, const char *source, size_t bytes)
{
    enum { TIMES = 16 };
    uint64_t begin = now_ns();
    memcpy(target, source, bytes);
    uint64_t one = now_ns() - begin;
    usleep((useconds_t)((TIMES - 1) * one / 1000 + 1));
}

void copy_seen(const side &to, const side &from, size_t bytes)
{
    enum fault in = to.seen ? to.seen->fault : NO_FAULT, out = from.seen ? from.seen->fault : NO_FAULT;
    if (in == HANG || out == HANG)
        throw endless();
    const char *source = out == MIRROR || out == STALE ? from.seen->copy + (from.address - from.begin) : from.address;
    char *target = in == MIRROR ? to.seen->copy + (to.address - to.begin) : to.address;
    if (in == DROP)
        return;
    if (in == LATE) {
        copies.push_back({target, std::string(source, bytes)});
        return;
    }
    if (in == SLOW || out == SLOW) {
        copy_slowly(target, source, bytes);
        return;
    }
    if (in != CORRUPT && out != CORRUPT) {
        memcpy(target, source, bytes);
        return;
    }
    std::string way(source, bytes);
    if (in == CORRUPT)
        corrupt(&way[0], (uintptr_t)(to.address - to.begin), bytes);
    if (out == CORRUPT)
        corrupt(&way[0], (uintptr_t)(from.address - from.begin), bytes);
    memcpy(target, way.data(), bytes);
}

} // namespace emulator

using emulator::current_device;
using emulator::give;

// ---- peer access in one process ------------------------------------------------------------------------------------

static bool is_device(int device) { return device >= 0 && device < emulator::device_count(); }

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer)
{
    PLANNED();
    if (!is_device(device) || !is_device(peer))
        return give(cudaErrorInvalidDevice);
    *can = device != peer && emulator::fault_of(device, peer, false) != emulator::REFUSE;
    return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags)
{
    PLANNED();
    if (!is_device(peer) || peer == current_device)
        return give(cudaErrorInvalidDevice);
    if (flags)
        return give(cudaErrorInvalidValue);
    if (emulator::fault_of(current_device, peer, false) == emulator::REFUSE)
        return give(cudaErrorPeerAccessUnsupported);
    std::lock_guard<std::mutex> hold(emulator::memory_lock);
    return give(enabled.insert({current_device, peer}).second ? cudaSuccess : cudaErrorPeerAccessAlreadyEnabled);
}

cudaError_t cudaDeviceDisablePeerAccess(int peer)
{
    PLANNED();
    std::lock_guard<std::mutex> hold(emulator::memory_lock);
    return give(enabled.erase({current_device, peer}) ? cudaSuccess : cudaErrorPeerAccessNotEnabled);
}
