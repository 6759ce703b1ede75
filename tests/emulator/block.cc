// A block of threads on the CPU. See emulator.h.
//
// Each thread is a fiber. A fiber runs until it has to wait: at a barrier, or where the lanes of its warp meet. The scheduler then runs
// another that is ready, in an order that the seed decides; when none is ready and some are not at their end, they are deadlocked.
#include "tests/emulator/block.h"

#include "tests/emulator/fiber.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <string>
#include <tuple>
#include <vector>

namespace emulator
{

namespace
{

// What a block may have of shared memory on every chip from sm_80 on; and without asking, as LAUNCH does above ASKED_FROM dynamic bytes.
enum { MOST_SHARED = 99 << 10, UNASKED_SHARED = 48 << 10, ASKED_FROM = 32 << 10 };
enum { WARP = 32, POISON = 0xCD, COPY_BYTES = 16, SECTOR_BYTES = 32, BANKS = 32, BANK_BYTES = 4 };

struct copy {
    void *to;
    const void *from; // null: zeros
};

struct thread {
    fiber *stack = nullptr;
    indices where;
    bool done = false;
    place waits = {nullptr, 0};
    const char *waits_for = nullptr;
    std::vector<copy> copies;                                // that have not landed, in order
    std::vector<size_t> group_ends;                          // of groups that are complete, among these
    std::map<std::pair<const void *, int>, uint32_t> visits; // of counted accesses, by place
};

// Of this thread of the host: threads of the kernel that are ready, in all blocks, and those of them that have done nothing but give way one after the
// other, since when (0: none has).
__thread unsigned all_ready, ways_given;
__thread uint64_t idle_since_ns;

void note_progress()
{
    ways_given = 0;
    idle_since_ns = 0;
}

// Threads that are ready, in the order in which they became so.
struct line_up {
    enum { ROOM = 1024 }; // a block's threads, each once
    int waiting[ROOM];
    unsigned first = 0, count = 0;
    int &at(unsigned i) { return waiting[(first + i) % ROOM]; }
    void add(int t)
    {
        at(count++) = t;
        all_ready++;
    }
    int take_first()
    {
        int t = at(0);
        first++;
        count--;
        all_ready--;
        return t;
    }
    int take(unsigned i) // the last one takes its place
    {
        int t = at(i);
        at(i) = at(--count);
        all_ready--;
        return t;
    }
};

// Lanes that have come to a meeting of this mask.
struct meeting {
    uint32_t present = 0;
    const char *what = nullptr;
    lanes all = {};
};

struct request {
    space which;
    uint32_t present = 0;
    uint64_t address[WARP];
    size_t bytes = 0;
};

struct array {
    place where = {nullptr, 0};
    char *memory = nullptr;
    size_t bytes = 0;
    std::vector<uint16_t> not_landed; // copies on their way, for each unit of 16 bytes
};

struct warp {
    meeting whole;                      // of all lanes
    std::map<uint32_t, meeting> others; // by mask
};

struct block {
    const char *kernel = nullptr;
    std::vector<thread> threads;
    line_up ready;
    uint64_t *random = nullptr; // the order's state; null: as they became ready
    bool alone = true;          // no other block runs before its end
    std::vector<warp> warps;
    std::vector<array> arrays;
    array dynamic;
    size_t static_bytes = 0, dynamic_bytes = 0; // of shared memory
    std::vector<int> at_barrier;
    place barrier_place = {nullptr, 0};
    int alive = 0, current = -1;
    bool endless = false;
    fiber main;
    const std::function<void()> *body = nullptr;
    std::vector<range> known; // allocations that this launch has used
    size_t used_last = 0;     // of them
    std::vector<std::map<std::tuple<const void *, int, uint32_t>, request>> requests; // by warp
    struct emulator_stats stats = {};
};

__thread block *running;
// Stacks are kept from block to block, as long as the thread lives.
struct fiber_pool {
    std::vector<fiber *> spare;
    ~fiber_pool()
    {
        for (fiber *f : spare)
            fiber_free(f);
    }
};
thread_local fiber_pool fibers;

std::mutex lock; // of what follows
uint64_t seed;
bool counting;
std::map<std::string, struct emulator_stats> counts;

uint64_t next_random(uint64_t &state)
{
    state += 0x9e3779b97f4a7c15u;
    uint64_t z = state;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

void array_new(array &a, size_t bytes)
{
    a.memory = (char *)aligned_alloc(128, (bytes + 128) / 128 * 128);
    a.bytes = bytes;
    a.not_landed.assign((bytes + COPY_BYTES - 1) / COPY_BYTES, 0);
    memset(a.memory, POISON, bytes);
}

thread &self() { return running->threads[(size_t)running->current]; }

// Makes one of the threads that are ready the current one.
void choose(block &b)
{
    b.current = b.random ? b.ready.take((unsigned)(next_random(*b.random) % b.ready.count)) : b.ready.take_first();
    at = self().where;
}

// Where the current thread goes on: in the next one, or where the block began to run.
fiber *next_fiber(block &b)
{
    if (!b.alone || b.endless || !b.ready.count)
        return &b.main;
    settle_stores();
    choose(b);
    return self().stack;
}

// Others run until the current thread is chosen again.
void yield()
{
    fiber *own = self().stack, *next = next_fiber(*running);
    if (next != own)
        fiber_switch(own, next);
}

void wake(int t)
{
    running->threads[(size_t)t].waits_for = nullptr;
    running->ready.add(t);
}

void wait_for(const char *what, place where)
{
    thread &t = self();
    t.waits_for = what;
    t.waits = where;
    note_progress();
    yield();
}

void finish_barrier()
{
    for (int t : running->at_barrier)
        if (t != running->current)
            wake(t);
    running->at_barrier.clear();
}

void thread_main()
{
    block *b = running;
    (*b->body)();
    self().done = true;
    note_progress();
    b->alive--;
    if (b->alive > 0 && (int)b->at_barrier.size() == b->alive)
        finish_barrier();
    fiber *own = self().stack;
    fiber_exit(own, next_fiber(*b));
}

// ---- counting ------------------------------------------------------------------------------------------------------

void count_global(const request &r)
{
    std::vector<uint64_t> sectors;
    uint64_t bytes = 0;
    for (int l = 0; l < WARP; l++) {
        if (!(r.present >> l & 1))
            continue;
        bytes += r.bytes;
        for (uint64_t s = r.address[l] / SECTOR_BYTES; s <= (r.address[l] + r.bytes - 1) / SECTOR_BYTES; s++)
            sectors.push_back(s);
    }
    std::sort(sectors.begin(), sectors.end());
    uint64_t distinct = (uint64_t)(std::unique(sectors.begin(), sectors.end()) - sectors.begin());
    running->stats.global_requests++;
    running->stats.global_sectors += distinct;
    running->stats.global_ideal_sectors += std::min(distinct, (bytes + SECTOR_BYTES - 1) / SECTOR_BYTES);
}

// Accesses of 8 and 16 bytes are served by half and quarter warps. Within one such part each bank serves one word at a time; lanes that want
// the same word share it.
void count_shared(const request &r)
{
    int lanes_together = r.bytes >= 16 ? 8 : r.bytes >= 8 ? 16 : 32;
    running->stats.shared_requests++;
    for (int first = 0; first < WARP; first += lanes_together) {
        std::vector<uint64_t> words[BANKS];
        size_t wavefronts = 0;
        for (int l = first; l < first + lanes_together; l++)
            for (size_t at_byte = 0; (r.present >> l & 1) && at_byte < r.bytes; at_byte += BANK_BYTES) {
                uint64_t word = (r.address[l] + at_byte) / BANK_BYTES;
                std::vector<uint64_t> &bank = words[word % BANKS];
                if (std::find(bank.begin(), bank.end(), word) == bank.end())
                    bank.push_back(word);
                wavefronts = std::max(wavefronts, bank.size());
            }
        if (wavefronts > 1)
            running->stats.shared_conflicts += wavefronts - 1;
    }
}

void count(const request &r)
{
    if (is_global(r.which))
        count_global(r);
    else
        count_shared(r);
}

// ---- running -------------------------------------------------------------------------------------------------------

fiber *take_fiber()
{
    if (fibers.spare.empty())
        return fiber_new(thread_main);
    fiber *f = fibers.spare.back();
    fibers.spare.pop_back();
    fiber_restart(f, thread_main);
    return f;
}

[[noreturn]] void deadlock(const block &b)
{
    struct crowd {
        size_t first, count;
    };
    std::map<std::string, crowd> waiting; // by what for
    for (size_t i = 0; i < b.threads.size(); i++) {
        const thread &t = b.threads[i];
        if (t.done)
            continue;
        std::string what = std::string(t.waits_for) + " at " + t.waits.file + ":" + std::to_string(t.waits.line);
        waiting.insert({what, {i, 0}}).first->second.count++;
    }
    std::string all;
    for (const auto &entry : waiting)
        all += "; thread " + std::to_string(entry.second.first) + " and " + std::to_string(entry.second.count - 1) +
               " others wait for " + entry.first;
    dim3 index = b.threads[0].where.block;
    fail("kernel %s, block (%u, %u, %u): deadlock: %d of %zu threads are not at their end%s", b.kernel, index.x,
         index.y, index.z, b.alive, b.threads.size(), all.c_str());
}

void begin_block(block &b, dim3 index, dim3 size, dim3 grid, size_t dynamic_bytes)
{
    size_t count_threads = (size_t)size.x * size.y * size.z;
    b.threads.resize(count_threads);
    b.warps.resize((count_threads + WARP - 1) / WARP);
    b.requests.resize(b.warps.size());
    b.alive = (int)count_threads;
    b.static_bytes = 0;
    b.dynamic_bytes = dynamic_bytes;
    array_new(b.dynamic, dynamic_bytes);
    for (size_t t = 0; t < count_threads; t++) {
        thread &one = b.threads[t];
        one.stack = take_fiber();
        one.where = {dim3((unsigned)(t % size.x), (unsigned)(t / size.x % size.y), (unsigned)(t / size.x / size.y)),
                     index, size, grid};
        one.done = false;
        one.copies.clear();
        one.group_ends.clear();
        one.visits.clear();
        b.ready.add((int)t);
    }
}

// Runs one of the threads that are ready until it waits; of a block that is alone others go on then, until none is ready.
void run_thread(block &b)
{
    choose(b);
    fiber_switch(&b.main, self().stack);
    settle_stores();
    if (b.endless)
        throw endless();
}

void free_block(block &b)
{
    for (array &a : b.arrays)
        free(a.memory);
    b.arrays.clear();
    free(b.dynamic.memory);
}

void end_block(block &b)
{
    if (b.alive > 0)
        deadlock(b);
    land_stores();
    for (thread &t : b.threads)
        fibers.spare.push_back(t.stack);
    for (auto &of_warp : b.requests) {
        for (auto &entry : of_warp)
            if (entry.second.present)
                count(entry.second);
        of_warp.clear();
    }
    free_block(b);
}

// Its threads never come to an end: their stacks are kept, as they may stand anywhere.
void abandon_block(block &b)
{
    static auto &abandoned = *new std::vector<fiber *>; // found from here for ever: no leak
    std::lock_guard<std::mutex> hold(lock);
    for (thread &t : b.threads)
        abandoned.push_back(t.stack);
    free_block(b);
}

void run_block(block &b, dim3 index, dim3 size, dim3 grid, size_t dynamic_bytes)
{
    begin_block(b, index, size, grid, dynamic_bytes);
    try {
        while (b.ready.count)
            run_thread(b);
    } catch (const endless &) {
        abandon_block(b);
        running = nullptr;
        throw;
    }
    end_block(b);
}

dim3 index_of(uint64_t n, dim3 grid)
{
    return dim3((unsigned)(n % grid.x), (unsigned)(n / grid.x % grid.y), (unsigned)(n / grid.x / grid.y));
}

// All blocks at the same time, a thread of each in turn.
void run_together(const char *kernel, dim3 grid, dim3 size, size_t dynamic_bytes, const std::function<void()> &body,
                  uint64_t *random)
{
    std::vector<block> blocks((size_t)grid.x * grid.y * grid.z);
    for (size_t i = 0; i < blocks.size(); i++) {
        running = &blocks[i];
        blocks[i].kernel = kernel;
        blocks[i].body = &body;
        blocks[i].random = random;
        blocks[i].alone = blocks.size() == 1;
        begin_block(blocks[i], index_of(i, grid), size, grid, dynamic_bytes);
    }
    try {
        for (bool ran = true; ran;) {
            ran = false;
            for (block &b : blocks) {
                if (!b.ready.count)
                    continue;
                running = &b;
                run_thread(b);
                ran = true;
            }
        }
    } catch (const endless &) {
        for (block &b : blocks)
            abandon_block(b);
        running = nullptr;
        throw;
    }
    for (block &b : blocks) {
        running = &b;
        end_block(b);
    }
    running = nullptr;
}

void run_grid(const char *kernel, dim3 grid, dim3 size, size_t dynamic_bytes, const std::function<void()> &body,
              bool together)
{
    block b;
    uint64_t state, total = (uint64_t)grid.x * grid.y * grid.z;
    bool shuffled;
    {
        std::lock_guard<std::mutex> hold(lock);
        shuffled = seed != 0;
        state = seed;
        if (shuffled)
            seed += 0x632be59bd9b4e019u; // another order for the next launch
    }
    b.kernel = kernel;
    b.body = &body;
    if (running)
        fail("kernel %s was launched from a kernel", kernel);
    all_ready = 0;
    note_progress();
    if (together) {
        run_together(kernel, grid, size, dynamic_bytes, body, shuffled ? &state : nullptr);
        return;
    }
    running = &b;
    b.random = shuffled ? &state : nullptr;
    // A permutation of the blocks without storing it: i -> (i * stride + offset) mod total.
    uint64_t stride = 1, offset = shuffled ? next_random(state) % total : 0;
    while (shuffled && total > 2) {
        uint64_t a = stride = next_random(state) % total, c = total;
        while (a) {
            uint64_t rest = c % a;
            c = a;
            a = rest;
        }
        if (c == 1)
            break;
    }
    for (uint64_t i = 0; i < total; i++) {
        uint64_t n = (uint64_t)(((unsigned __int128)i * stride + offset) % total);
        run_block(b, index_of(n, grid), size, grid, dynamic_bytes);
    }
    running = nullptr;
    std::lock_guard<std::mutex> hold(lock);
    if (!counting)
        return;
    struct emulator_stats &sum = counts[kernel];
    sum.launches++;
    sum.global_requests += b.stats.global_requests;
    sum.global_sectors += b.stats.global_sectors;
    sum.global_ideal_sectors += b.stats.global_ideal_sectors;
    sum.shared_requests += b.stats.shared_requests;
    sum.shared_conflicts += b.stats.shared_conflicts;
}

} // namespace

__thread indices at;

void fail(const char *format, ...)
{
    va_list list;
    va_start(list, format);
    fprintf(stderr, "emulator: ");
    vfprintf(stderr, format, list);
    fprintf(stderr, "\n");
    va_end(list);
    abort();
}

static std::atomic<int> launching_threads; // of the host, so far

cudaError_t launch(const char *name, dim3 grid, dim3 size, size_t shared_bytes, cudaStream_t stream,
                   std::function<void()> body, bool together)
{
    enum { MOST_THREADS = 1024, MOST_ROWS = 65535 };
    if (!grid.x || !grid.y || !grid.z || !size.x || !size.y || !size.z || size.x * size.y * size.z > MOST_THREADS ||
        grid.x > 0x7fffffff || grid.y > MOST_ROWS || grid.z > MOST_ROWS)
        return cudaErrorInvalidConfiguration;
    if (shared_bytes > MOST_SHARED)
        return cudaErrorInvalidValue;
    static thread_local bool launches;
    launching_threads += !launches;
    launches = true;
    return enqueue(stream, [=] { run_grid(name, grid, size, shared_bytes, body, together); });
}

int lane(void) { return running->current % WARP; }

// A driver loads code when it is first run, unless it is told otherwise, and may wait before that for all kernels of the process on the device: for
// ever, if one of them waits for the one that is not there yet. Which threads of the host launch anything is all that is known here.
static void check_loading(void)
{
    static std::atomic<bool> eager;
    if (launching_threads < 2 || eager)
        return;
    const char *how = getenv("CUDA_MODULE_LOADING");
    if (!how || strcmp(how, "EAGER") != 0)
        fail("a kernel waits for those of another thread of this process, whose code may be loaded late: set "
             "CUDA_MODULE_LOADING=EAGER");
    eager = true;
}

void give_way(void)
{
    check_loading();
    running->ready.add(running->current);
    if (++ways_given >= all_ready) { // what all wait for may be another thread's of this process, or of another process
        ways_given = 0;
        bide(&idle_since_ns);
    }
    yield();
}

void never_ends(void)
{
    running->endless = true;
    yield();
    abort(); // nobody switches back
}

void *shared_array(place where, size_t bytes)
{
    for (array &a : running->arrays)
        if (a.where.line == where.line && a.where.file == where.file) {
            if (a.bytes != bytes)
                fail("kernel %s: two shared arrays are declared at %s:%d", running->kernel, where.file, where.line);
            return a.memory;
        }
    running->arrays.emplace_back();
    array &a = running->arrays.back();
    a.where = where;
    array_new(a, bytes);
    running->static_bytes += bytes;
    if (running->static_bytes + running->dynamic_bytes >
        (running->dynamic_bytes > ASKED_FROM ? MOST_SHARED : UNASKED_SHARED))
        fail("kernel %s: %zu bytes of static and %zu of dynamic shared memory are more than a launch may have",
             running->kernel, running->static_bytes, running->dynamic_bytes);
    return a.memory;
}

void *shared_dynamic(void) { return running->dynamic.memory; }

void barrier(place where)
{
    block &b = *running;
    if (b.at_barrier.empty())
        b.barrier_place = where;
    if (b.barrier_place.line != where.line ||
        (b.barrier_place.file != where.file && strcmp(b.barrier_place.file, where.file) != 0))
        fail("kernel %s, block (%u, %u, %u), thread %d: divergent barrier: it came to %s:%d while others wait at %s:%d",
             b.kernel, at.block.x, at.block.y, at.block.z, b.current, where.file, where.line, b.barrier_place.file,
             b.barrier_place.line);
    b.at_barrier.push_back(b.current);
    if ((int)b.at_barrier.size() == b.alive)
        finish_barrier();
    else
        wait_for("a barrier", where);
}

void meet(uint32_t mask, const char *what, const void *in, void *out, void (*run)(lanes &all))
{
    block &b = *running;
    int warp = b.current / WARP, mine = b.current % WARP;
    size_t left = b.threads.size() - (size_t)warp * WARP;
    uint32_t exist = left >= WARP ? 0xffffffffu : (1u << left) - 1;
    if (!(mask >> mine & 1))
        fail("kernel %s, thread %d: %s with a mask 0x%08x that does not hold the lane itself", b.kernel, b.current,
             what, mask);
    meeting &m = mask == 0xffffffffu ? b.warps[(size_t)warp].whole : b.warps[(size_t)warp].others[mask];
    if (m.present && m.what != what && strcmp(m.what, what) != 0)
        fail("kernel %s, block (%u, %u, %u), warp %d: lanes diverge: some are at %s, lane %d at %s", b.kernel,
             at.block.x, at.block.y, at.block.z, warp, m.what, mine, what);
    m.what = what;
    m.present |= 1u << mine;
    m.all.in[mine] = in;
    m.all.out[mine] = out;
    if (m.present != (mask & exist)) {
        wait_for(what, {"warp", warp});
        return;
    }
    m.all.mask = m.present;
    run(m.all);
    uint32_t waiting = m.present & ~(1u << mine);
    m.present = 0;
    for (int l = 0; l < WARP; l++)
        if (waiting >> l & 1)
            wake(warp * WARP + l);
}

namespace
{

[[noreturn]] void bad_access(place where, size_t bytes, const char *why)
{
    fail("kernel %s, block (%u, %u, %u), thread %d: %s:%d: an access of %zu bytes %s", running->kernel, at.block.x,
         at.block.y, at.block.z, running->current, where.file, where.line, bytes, why);
}

bool inside(const range &r, uintptr_t address, size_t bytes) { return address >= r.begin && address + bytes <= r.end; }

const range *known_allocation(uintptr_t address, size_t bytes)
{
    block &b = *running;
    if (b.used_last < b.known.size() && inside(b.known[b.used_last], address, bytes))
        return &b.known[b.used_last];
    for (b.used_last = 0; b.used_last < b.known.size(); b.used_last++)
        if (inside(b.known[b.used_last], address, bytes))
            return &b.known[b.used_last];
    range found = allocation_of((const void *)address);
    if (!inside(found, address, bytes))
        return nullptr;
    b.known.push_back(found);
    return &b.known.back();
}

array *shared_array_of(uintptr_t address, size_t bytes)
{
    auto holds = [=](const array &a) {
        uintptr_t begin = (uintptr_t)a.memory;
        return inside({begin, begin + a.bytes, nullptr}, address, bytes);
    };
    if (holds(running->dynamic))
        return &running->dynamic;
    for (array &a : running->arrays)
        if (holds(a))
            return &a;
    return nullptr;
}

uint16_t &not_landed(array &a, const void *address)
{
    return a.not_landed[(size_t)((const char *)address - a.memory) / COPY_BYTES];
}

} // namespace

void *note_access(space which, place where, const void *address, size_t bytes)
{
    block &b = *running;
    uintptr_t first = (uintptr_t)address;
    void *target = (void *)first;
    settle_stores();
    if (which != GLOBAL_LOAD)
        note_progress();
    if (bytes == 0 || (bytes & (bytes - 1)))
        bad_access(where, bytes, "that are no power of two");
    if (first & (bytes - 1))
        bad_access(where, bytes, "at an address that is no multiple of it");
    if (is_global(which)) {
        const range *allocation = known_allocation(first, bytes);
        if (!allocation)
            bad_access(where, bytes, "that is not inside an allocation");
        if (allocation->seen)
            target = through_view(*allocation, which, target, bytes);
    } else {
        array *shared = shared_array_of(first, bytes);
        if (!shared)
            bad_access(where, bytes, "that is not inside a shared array of the block");
        if (not_landed(*shared, address))
            bad_access(where, bytes, "where an asynchronous copy has not landed");
    }
    if (!counting)
        return target;
    uint32_t visit = self().visits[{where.file, where.line}]++;
    auto &warp = b.requests[(size_t)(b.current / WARP)];
    auto key = std::make_tuple((const void *)where.file, where.line * 8 + (int)which, visit);
    request &r = warp[key];
    int mine = b.current % WARP;
    r.which = which;
    r.bytes = bytes;
    r.present |= 1u << mine;
    r.address[mine] = (uint64_t)(uintptr_t)address;
    if (r.present == 0xffffffffu) {
        count(r);
        warp.erase(key);
    }
    return target;
}

void copy_async(void *to, const void *from, bool valid, place where)
{
    if ((uintptr_t)to % COPY_BYTES != 0 || (valid && (uintptr_t)from % COPY_BYTES != 0))
        fail("kernel %s, thread %d: %s:%d: an asynchronous copy of 16 bytes that is not aligned to them",
             running->kernel, running->current, where.file, where.line);
    if (valid)
        from = note_access(GLOBAL_LOAD, where, from, COPY_BYTES);
    note_access(SHARED_STORE, where, to, COPY_BYTES);
    memset(to, POISON, COPY_BYTES); // it may land at any time from now on
    not_landed(*shared_array_of((uintptr_t)to, COPY_BYTES), to)++;
    self().copies.push_back({to, valid ? from : nullptr});
}

void copy_async_commit() { self().group_ends.push_back(self().copies.size()); }

void copy_async_wait(int groups_left)
{
    thread &t = self();
    size_t groups = t.group_ends.size();
    if (groups <= (size_t)groups_left)
        return;
    size_t landing = groups - (size_t)groups_left, count = t.group_ends[landing - 1];
    for (size_t i = 0; i < count; i++) {
        const copy &c = t.copies[i];
        if (c.from)
            memcpy(c.to, c.from, COPY_BYTES);
        else
            memset(c.to, 0, COPY_BYTES);
        not_landed(*shared_array_of((uintptr_t)c.to, COPY_BYTES), c.to)--;
    }
    t.copies.erase(t.copies.begin(), t.copies.begin() + (long)count);
    t.group_ends.erase(t.group_ends.begin(), t.group_ends.begin() + (long)landing);
    for (size_t &end : t.group_ends)
        end -= count;
}

} // namespace emulator

void emulator_seed(uint64_t value)
{
    std::lock_guard<std::mutex> hold(emulator::lock);
    emulator::seed = value;
}

void emulator_stats_reset(void)
{
    std::lock_guard<std::mutex> hold(emulator::lock);
    emulator::counts.clear();
    emulator::counting = true;
}

struct emulator_stats emulator_count(const char *kernel)
{
    struct emulator_stats sum = {};
    std::lock_guard<std::mutex> hold(emulator::lock);
    for (const auto &entry : emulator::counts) {
        if (entry.first.find(kernel) == std::string::npos)
            continue;
        const struct emulator_stats &s = entry.second;
        sum.launches += s.launches;
        sum.global_requests += s.global_requests;
        sum.global_sectors += s.global_sectors;
        sum.global_ideal_sectors += s.global_ideal_sectors;
        sum.shared_requests += s.shared_requests;
        sum.shared_conflicts += s.shared_conflicts;
    }
    return sum;
}
