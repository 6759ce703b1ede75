// The emulator's memory: allocations of devices and of the host, copies, and handles by which other processes open a device's memory. See emulator.h.
//
// An allocation that is handed out moves into a file in memory, under the same addresses; a handle names the process and its descriptor.
#include "tests/emulator/runtime.h"

#include <fcntl.h>
#include <map>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

using emulator::current_device;
using emulator::give;
using emulator::memory_lock;
using emulator::range;
using emulator::setting;
using emulator::view;

namespace
{

enum { GUARD_BYTES = 256, GUARD = 0xA5, POISON = 0xCD, PAGE = 4096, MOST_DEVICES = 64 };

struct allocation {
    size_t bytes = 0;
    int device = 0;
    int file = -1;                 // it has been handed out as
    int opened = 0;                // times; 0: it is this process's own
    char handle[64];               // of one that is opened
    view *seen[MOST_DEVICES] = {}; // by other devices
};

std::map<uintptr_t, allocation> on_device;
std::map<uintptr_t, size_t> pinned;
size_t taken[MOST_DEVICES];

// What cudaIpcMemHandle_t holds.
struct handle {
    uint64_t magic;
    int32_t pid, file, device, reserved;
    uint64_t bytes;
};
static_assert(sizeof(handle) <= sizeof(cudaIpcMemHandle_t), "a handle has its size");
const uint64_t HANDLE_MAGIC = 0x6970632d74657374u;

bool is_pinned(const void *pointer, size_t bytes)
{
    std::lock_guard<std::mutex> hold(memory_lock);
    auto after = pinned.upper_bound((uintptr_t)pointer);
    if (after == pinned.begin())
        return false;
    auto entry = std::prev(after);
    return (uintptr_t)pointer + bytes <= entry->first + entry->second;
}

// [guard][bytes][guard], whole pages.
size_t whole_of(size_t bytes) { return (bytes + 2 * GUARD_BYTES + PAGE - 1) / PAGE * PAGE; }

void *guarded(size_t bytes, int fill)
{
    if (bytes > SIZE_MAX / 2)
        return nullptr;
    size_t whole = whole_of(bytes);
    char *memory = (char *)aligned_alloc(PAGE, whole);
    if (!memory)
        return nullptr;
    memset(memory, GUARD, GUARD_BYTES);
    memset(memory + GUARD_BYTES, fill, bytes);
    memset(memory + GUARD_BYTES + bytes, GUARD, whole - GUARD_BYTES - bytes);
    return memory + GUARD_BYTES;
}

void check_guards(const void *pointer, size_t bytes, const char *what)
{
    const unsigned char *p = (const unsigned char *)pointer;
    for (size_t i = 0; i < GUARD_BYTES; i++)
        if (p[-1 - (long)i] != GUARD)
            emulator::fail("something wrote %zu bytes before %s of %zu bytes", i + 1, what, bytes);
    for (size_t i = bytes; i < whole_of(bytes) - GUARD_BYTES; i++)
        if (p[i] != GUARD)
            emulator::fail("something wrote at byte %zu of %s of %zu bytes", i, what, bytes);
}

void free_guarded(void *pointer) { free((char *)pointer - GUARD_BYTES); }

// The allocation that holds an address; under the lock. NULL: none.
std::pair<const uintptr_t, allocation> *find(const void *address)
{
    auto after = on_device.upper_bound((uintptr_t)address);
    if (after == on_device.begin())
        return nullptr;
    auto entry = std::prev(after);
    return (uintptr_t)address < entry->first + entry->second.bytes ? &*entry : nullptr;
}

// How a device sees it; NULL: plainly. Under the lock.
const view *seen_by(int device, std::pair<const uintptr_t, allocation> &entry)
{
    allocation &a = entry.second;
    if (device < 0 || (device == a.device && !a.opened))
        return nullptr;
    view *&v = a.seen[device];
    if (!v)
        v = emulator::view_new(emulator::fault_of(device, a.device, a.opened > 0), (const void *)entry.first, a.bytes);
    return v->fault ? v : nullptr;
}

void forget_views(allocation &a)
{
    for (view *&v : a.seen)
        if (v) {
            emulator::view_free(v);
            v = nullptr;
        }
}

} // namespace

namespace emulator
{

std::mutex memory_lock;

size_t memory_total(void) { return setting("EMULATED_MEMORY", 8ull << 30); }

size_t memory_taken(int device)
{
    std::lock_guard<std::mutex> hold(memory_lock);
    return taken[device];
}

range allocation_of(const void *address)
{
    range r = {0, 0, nullptr};
    int owner = -1;
    {
        std::lock_guard<std::mutex> hold(memory_lock);
        auto after = pinned.upper_bound((uintptr_t)address);
        if (after != pinned.begin() && (uintptr_t)address < std::prev(after)->first + std::prev(after)->second) {
            auto entry = std::prev(after);
            return {entry->first, entry->first + entry->second, nullptr};
        }
        auto *entry = find(address);
        if (!entry)
            return r;
        r = {entry->first, entry->first + entry->second.bytes, seen_by(running_device, *entry)};
        owner = entry->second.opened ? -1 : entry->second.device;
    }
    if (owner >= 0 && running_device >= 0 && owner != running_device && !peer_enabled(running_device, owner))
        fail("a kernel of device %d touches memory of device %d, to which it has no access", running_device, owner);
    return r;
}

} // namespace emulator

// ---- allocations ---------------------------------------------------------------------------------------------------

cudaError_t cudaMalloc(void **pointer, size_t bytes)
{
    PLANNED();
    {
        std::lock_guard<std::mutex> hold(memory_lock);
        size_t total = emulator::memory_total(), here = taken[current_device];
        if (here > total || bytes > total - here)
            return give(cudaErrorMemoryAllocation);
    }
    *pointer = guarded(bytes, POISON);
    if (!*pointer)
        return give(cudaErrorMemoryAllocation);
    std::lock_guard<std::mutex> hold(memory_lock);
    taken[current_device] += bytes;
    allocation &a = on_device[(uintptr_t)*pointer];
    a.bytes = bytes;
    a.device = current_device;
    return cudaSuccess;
}

cudaError_t cudaFree(void *pointer)
{
    allocation a;
    if (!pointer)
        return cudaSuccess;
    {
        std::lock_guard<std::mutex> hold(memory_lock);
        auto entry = on_device.find((uintptr_t)pointer);
        if (entry == on_device.end() || entry->second.opened)
            return give(cudaErrorInvalidValue);
        a = entry->second;
        on_device.erase(entry);
        taken[a.device] -= a.bytes;
    }
    check_guards(pointer, a.bytes, "a device allocation");
    forget_views(a);
    if (a.file >= 0) { // the heap's own pages again
        if (mmap((char *)pointer - GUARD_BYTES, whole_of(a.bytes), PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
            emulator::fail("no memory to free an allocation of %zu bytes", a.bytes);
        close(a.file);
    }
    free_guarded(pointer);
    return cudaSuccess;
}

cudaError_t cudaMallocHost(void **pointer, size_t bytes)
{
    PLANNED();
    *pointer = guarded(bytes, POISON);
    if (!*pointer)
        return give(cudaErrorMemoryAllocation);
    std::lock_guard<std::mutex> hold(memory_lock);
    pinned[(uintptr_t)*pointer] = bytes;
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void *pointer)
{
    size_t bytes;
    if (!pointer)
        return cudaSuccess;
    {
        std::lock_guard<std::mutex> hold(memory_lock);
        auto entry = pinned.find((uintptr_t)pointer);
        if (entry == pinned.end())
            return give(cudaErrorInvalidValue);
        bytes = entry->second;
        pinned.erase(entry);
    }
    check_guards(pointer, bytes, "a pinned allocation");
    free_guarded(pointer);
    return cudaSuccess;
}

cudaError_t cudaHostRegister(void *pointer, size_t bytes, unsigned flags)
{
    PLANNED();
    (void)flags;
    if (bytes > setting("EMULATED_LOCKED", SIZE_MAX))
        return give(cudaErrorMemoryAllocation);
    std::lock_guard<std::mutex> hold(memory_lock);
    if (!pinned.insert({(uintptr_t)pointer, bytes}).second)
        return give(cudaErrorHostMemoryAlreadyRegistered);
    return cudaSuccess;
}

cudaError_t cudaHostUnregister(void *pointer)
{
    std::lock_guard<std::mutex> hold(memory_lock);
    return give(pinned.erase((uintptr_t)pointer) ? cudaSuccess : cudaErrorInvalidValue);
}

cudaError_t cudaHostGetDevicePointer(void **device, void *host, unsigned flags)
{
    PLANNED();
    (void)flags;
    *device = host;
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *available, size_t *total)
{
    PLANNED();
    size_t here = emulator::memory_taken(current_device);
    *total = emulator::memory_total();
    *available = *total > here ? *total - here : 0;
    return cudaSuccess;
}

// ---- copies --------------------------------------------------------------------------------------------------------

namespace
{

// Without access to each other devices copy over the host, where nothing is wrong.
emulator::side side_of(const void *address, int device)
{
    std::unique_lock<std::mutex> hold(memory_lock);
    auto *entry = find(address);
    if (!entry)
        return {(char *)address, (char *)address, nullptr};
    int owner = entry->second.device;
    bool opened = entry->second.opened > 0;
    const view *seen = seen_by(device, *entry);
    char *begin = (char *)entry->first;
    hold.unlock();
    bool plain = !opened && owner != device && !emulator::peer_enabled(device, owner);
    return {(char *)address, begin, plain ? nullptr : seen};
}

void copy_bytes(void *to, const void *from, size_t bytes, int device)
{
    emulator::side target = side_of(to, device), source = side_of(from, device);
    if (target.seen || source.seen)
        emulator::copy_seen(target, source, bytes);
    else
        memcpy(to, from, bytes);
}

} // namespace

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream)
{
    PLANNED();
    const void *host = kind == cudaMemcpyHostToDevice ? from : kind == cudaMemcpyDeviceToHost ? to : nullptr;
    if (host && !is_pinned(host, bytes))
        emulator::fail("an asynchronous copy of %zu bytes %s memory of the host that is not pinned", bytes,
                       kind == cudaMemcpyHostToDevice ? "from" : "to");
    return emulator::enqueue(stream, [=] { copy_bytes(to, from, bytes, emulator::running_device); });
}

// As with the runtime, streams made without blocking go on behind its back.
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind)
{
    PLANNED();
    (void)kind;
    int device = current_device;
    emulator::enqueue(nullptr, [=] { copy_bytes(to, from, bytes, device); });
    return cudaStreamSynchronize(nullptr);
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream)
{
    PLANNED();
    return emulator::enqueue(stream, [=] { memset(to, value, bytes); });
}

cudaError_t cudaMemset(void *to, int value, size_t bytes)
{
    cudaError_t error = cudaMemsetAsync(to, value, bytes, nullptr);
    return error == cudaSuccess ? cudaStreamSynchronize(nullptr) : error;
}

// ---- memory of other processes -------------------------------------------------------------------------------------

namespace
{

// Moves an allocation into a file, under the same addresses. Nothing may write to it meanwhile.
int hand_out(char *memory, size_t whole)
{
    int file = memfd_create("emulated device memory", MFD_CLOEXEC);
    size_t done = 0;
    while (file >= 0 && done < whole) {
        ssize_t wrote = write(file, memory + done, whole - done);
        if (wrote <= 0)
            break;
        done += (size_t)wrote;
    }
    if (done < whole ||
        mmap(memory, whole, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_POPULATE, file, 0) == MAP_FAILED) {
        if (file >= 0)
            close(file);
        return -1;
    }
    return file;
}

void *map_of(const handle &h)
{
    char path[64];
    struct stat about;
    void *memory = MAP_FAILED;
    snprintf(path, sizeof path, "/proc/%d/fd/%d", (int)h.pid, (int)h.file);
    int file = open(path, O_RDWR | O_CLOEXEC);
    if (file >= 0 && fstat(file, &about) == 0 && (uint64_t)about.st_size == whole_of(h.bytes))
        memory = mmap(nullptr, whole_of(h.bytes), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, file, 0);
    if (file >= 0)
        close(file);
    return memory == MAP_FAILED ? nullptr : (char *)memory + GUARD_BYTES;
}

} // namespace

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *out, void *pointer)
{
    PLANNED();
    std::lock_guard<std::mutex> hold(memory_lock);
    auto entry = on_device.find((uintptr_t)pointer);
    if (entry == on_device.end() || entry->second.opened)
        return give(cudaErrorInvalidValue);
    allocation &a = entry->second;
    if (a.file < 0 && (a.file = hand_out((char *)pointer - GUARD_BYTES, whole_of(a.bytes))) < 0)
        return give(cudaErrorMemoryAllocation);
    handle h = {HANDLE_MAGIC, (int32_t)getpid(), a.file, a.device, 0, a.bytes};
    memset(out, 0, sizeof *out);
    memcpy(out, &h, sizeof h);
    return cudaSuccess;
}

cudaError_t cudaIpcOpenMemHandle(void **pointer, cudaIpcMemHandle_t from, unsigned flags)
{
    PLANNED();
    handle h;
    memcpy(&h, &from, sizeof h);
    if (flags != cudaIpcMemLazyEnablePeerAccess || h.magic != HANDLE_MAGIC)
        return give(cudaErrorInvalidValue);
    if (h.pid == (int32_t)getpid())
        return give(cudaErrorDeviceUninitialized);
    if (emulator::fault_of(current_device, h.device, true) == emulator::REFUSE)
        return give(cudaErrorPeerAccessUnsupported);
    std::lock_guard<std::mutex> hold(memory_lock);
    for (auto &entry : on_device)
        if (entry.second.opened && memcmp(entry.second.handle, &from, sizeof from) == 0) {
            entry.second.opened++;
            *pointer = (void *)entry.first;
            return cudaSuccess;
        }
    if (!(*pointer = map_of(h)))
        return give(cudaErrorInvalidResourceHandle);
    auto entry = on_device.insert({(uintptr_t)*pointer, allocation()}).first;
    allocation &a = entry->second;
    a.bytes = h.bytes;
    a.device = h.device;
    a.opened = 1;
    memcpy(a.handle, &from, sizeof from);
    seen_by(current_device, *entry); // from now on
    return cudaSuccess;
}

cudaError_t cudaIpcCloseMemHandle(void *pointer)
{
    PLANNED();
    std::lock_guard<std::mutex> hold(memory_lock);
    auto entry = on_device.find((uintptr_t)pointer);
    if (entry == on_device.end() || !entry->second.opened)
        return give(cudaErrorInvalidValue);
    allocation &a = entry->second;
    if (--a.opened > 0)
        return cudaSuccess;
    forget_views(a);
    munmap((char *)pointer - GUARD_BYTES, whole_of(a.bytes));
    on_device.erase(entry);
    return cudaSuccess;
}
