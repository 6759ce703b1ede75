// The host's side of the emulator: devices, streams, events and graphs of the CUDA runtime. See emulator.h; memory.cc and peers.cc have the memory.
//
// A stream is a queue of closures that run when the host waits for it. A graph is the list of those that were queued while it was captured.
#include "tests/emulator/runtime.h"

#include <atomic>
#include <deque>
#include <map>
#include <mutex>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <string>
#include <time.h>
#include <unistd.h>
#include <vector>

typedef std::function<void()> work;

struct CUstream_st {
    std::deque<work> queue;
    CUstream_st *captured_by = nullptr;             // where the capture began that it belongs to
    std::vector<work> captured;                     // of the capture that began here
    uint64_t capture = 0;                           // its number
    uint64_t captured_own = 0;                      // of its work
    std::map<const CUstream_st *, uint64_t> behind; // of other streams' work in the capture, what its own waits for
    bool before_others = false;                     // of high priority
    bool endless = false;                           // its work never ends
    bool gone = false;                              // destroyed; events that were recorded in it still look at `run`
    int device = -1;                                // -1: the one that is current
    uint64_t queued = 0, run = 0;
};
struct CUevent_st {
    CUstream_st *stream = nullptr; // where it was recorded last
    uint64_t ticket = 0;           // work of the stream before it
    uint64_t capture = 0;          // in which it was recorded last; 0: none
    std::map<const CUstream_st *, uint64_t> behind;
    double ms = 0;
};
struct CUgraph_st {
    std::vector<work> nodes;
};
struct CUgraphExec_st {
    std::vector<work> nodes;
};

namespace
{

std::mutex lock; // of what all threads share
int forced_sm;
bool hurry;
struct planned_failure {
    std::string name;
    int nth;
    cudaError_t error;
};
std::vector<planned_failure> failures;

thread_local cudaError_t last_error;
thread_local CUstream_st default_stream;

} // namespace

namespace emulator
{

uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

void bide(uint64_t *idle_since_ns)
{
    enum { SPIN_NS = 20000, NAP_US = 20 };
    uint64_t now = now_ns();
    if (*idle_since_ns == 0)
        *idle_since_ns = now;
    if (now - *idle_since_ns < SPIN_NS)
        sched_yield();
    else
        usleep(NAP_US);
}

thread_local int current_device;
thread_local int running_device = -1;

uint64_t setting(const char *name, uint64_t otherwise)
{
    const char *text = getenv(name);
    return text ? strtoull(text, nullptr, 10) : otherwise;
}

cudaError_t give(cudaError_t error)
{
    if (error != cudaSuccess && error != cudaErrorNotReady)
        last_error = error;
    return error;
}

int device_count(void) { return (int)setting("EMULATED_DEVICES", 1); }

static std::atomic<pid_t> driver_process; // that of the first call; 0: none yet

// Like the driver, which does not survive a fork.
static bool is_forked(void)
{
    pid_t first = 0, own = getpid();
    return !driver_process.compare_exchange_strong(first, own) && first != own;
}

cudaError_t planned(const char *name)
{
    if (is_forked()) // before the lock, which another thread may have held then
        return cudaErrorInitializationError;
    std::lock_guard<std::mutex> hold(lock);
    for (size_t i = 0; i < failures.size(); i++)
        if (failures[i].name == name && failures[i].nth-- == 0) {
            cudaError_t error = failures[i].error;
            failures.erase(failures.begin() + (long)i);
            return error;
        }
    return cudaSuccess;
}
} // namespace emulator

void emulator_new_process(void) { emulator::driver_process = 0; }

using emulator::current_device;
using emulator::give;
using emulator::planned;
using emulator::setting;

namespace
{

CUstream_st *stream_of(cudaStream_t stream)
{
    if (stream && stream->gone)
        emulator::fail("the stream was destroyed");
    return stream ? stream : &default_stream;
}

thread_local bool not_done;      // said by the work that ran last
thread_local uint64_t work_done; // of any stream, by this thread of the host

// Runs what comes next; false: it waits for others and is tried again.
bool run_next(CUstream_st *s)
{
    enum { PAUSE_US = 200 };
    if (s->endless) {
        usleep(PAUSE_US);
        return false;
    }
    work next = std::move(s->queue.front());
    s->queue.pop_front();
    not_done = false;
    int before = emulator::running_device;
    emulator::running_device = s->device < 0 ? current_device : s->device;
    try {
        next();
    } catch (const emulator::endless &) {
        s->endless = not_done = true;
    }
    emulator::running_device = before;
    if (not_done) {
        s->queue.push_front(std::move(next));
        return false;
    }
    s->run++;
    work_done++;
    return true;
}

void run_until(CUstream_st *s, uint64_t ticket)
{
    uint64_t idle_since_ns = 0, done = 0;
    while (s->run < ticket) {
        if (!run_next(s) && work_done == done) {
            emulator::bide(&idle_since_ns);
        } else {
            idle_since_ns = 0;
            done = work_done;
        }
    }
    emulator::land_copies();
}

double now_ms() { return 1e-6 * (double)emulator::now_ns(); }

} // namespace

namespace emulator
{

cudaError_t enqueue(cudaStream_t stream, work w)
{
    CUstream_st *s = stream_of(stream);
    if (s->captured_by) {
        s->captured_by->captured.push_back(std::move(w));
        s->captured_own++;
    } else {
        s->queue.push_back(std::move(w));
        s->queued++;
        if (s->before_others && (hurry || setting("EMULATED_HURRY", 0)))
            run_until(s, s->queued);
    }
    return cudaSuccess;
}

bool misread_scales;

} // namespace emulator

// ---- the tests' own calls ------------------------------------------------------------------------------------------

bool emulator_present(void) { return true; }

void emulator_set_sm(int sm) { forced_sm = sm; }

void emulator_hurry(bool on) { hurry = on; }

void emulator_misread_scales(bool wrong) { emulator::misread_scales = wrong; }

void emulator_fail_call(const char *name, int nth, cudaError_t error)
{
    std::lock_guard<std::mutex> hold(lock);
    if (name)
        failures.push_back({name, nth, error});
    else
        failures.clear();
}

void emulator_enqueue(cudaStream_t stream, void (*fn)(void *arg), void *arg)
{
    emulator::enqueue(stream, [=] { fn(arg); });
}

void emulator_enqueue_until(cudaStream_t stream, bool (*done)(void *arg), void *arg)
{
    emulator::enqueue(stream, [=] { not_done = !done(arg); });
}

// ---- devices and errors --------------------------------------------------------------------------------------------

cudaError_t cudaGetDeviceCount(int *count)
{
    PLANNED();
    *count = emulator::device_count();
    return *count > 0 ? cudaSuccess : give(cudaErrorNoDevice);
}

cudaError_t cudaSetDevice(int device)
{
    PLANNED();
    if (device < 0 || device >= emulator::device_count())
        return give(cudaErrorInvalidDevice);
    current_device = device;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device)
{
    *device = current_device;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device)
{
    PLANNED();
    (void)device;
    int sm = forced_sm ? forced_sm : (int)setting("EMULATED_SM", 86);
    memset(properties, 0, sizeof *properties);
    snprintf(properties->name, sizeof properties->name, "emulated");
    properties->major = sm / 10;
    properties->minor = sm % 10;
    properties->totalGlobalMem = emulator::memory_total();
    properties->sharedMemPerBlockOptin = 99 << 10;
    properties->multiProcessorCount = 4;
    properties->l2CacheSize = 4 << 20;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device)
{
    struct cudaDeviceProp properties;
    cudaError_t error = cudaGetDeviceProperties(&properties, device);
    if (error != cudaSuccess)
        return error;
    switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
        *value = properties.multiProcessorCount;
        return cudaSuccess;
    case cudaDevAttrComputeMode:
        *value = (int)setting("EMULATED_COMPUTE_MODE", cudaComputeModeDefault);
        return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
        *value = properties.major;
        return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
        *value = properties.minor;
        return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        *value = (int)properties.sharedMemPerBlockOptin;
        return cudaSuccess;
    }
    return give(cudaErrorInvalidValue);
}

cudaError_t cudaDeviceGetPCIBusId(char *text, int bytes, int device)
{
    PLANNED();
    snprintf(text, (size_t)bytes, "0000:%02x:00.0", device + 1 + (int)setting("EMULATED_FIRST", 0));
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version)
{
    PLANNED();
    *version = (int)setting("EMULATED_DRIVER", 13000);
    return cudaSuccess;
}

cudaError_t cudaGetLastError(void)
{
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

cudaError_t cudaPeekAtLastError(void) { return last_error; }

const char *cudaGetErrorName(cudaError_t error)
{
    switch (error) {
    case cudaSuccess:
        return "cudaSuccess";
    case cudaErrorInvalidValue:
        return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
        return "cudaErrorMemoryAllocation";
    case cudaErrorInitializationError:
        return "cudaErrorInitializationError";
    case cudaErrorInvalidConfiguration:
        return "cudaErrorInvalidConfiguration";
    case cudaErrorNoDevice:
        return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice:
        return "cudaErrorInvalidDevice";
    case cudaErrorNotReady:
        return "cudaErrorNotReady";
    case cudaErrorDeviceUninitialized:
        return "cudaErrorDeviceUninitialized";
    case cudaErrorPeerAccessUnsupported:
        return "cudaErrorPeerAccessUnsupported";
    case cudaErrorInvalidResourceHandle:
        return "cudaErrorInvalidResourceHandle";
    case cudaErrorPeerAccessNotEnabled:
        return "cudaErrorPeerAccessNotEnabled";
    case cudaErrorPeerAccessAlreadyEnabled:
        return "cudaErrorPeerAccessAlreadyEnabled";
    case cudaErrorHostMemoryAlreadyRegistered:
        return "cudaErrorHostMemoryAlreadyRegistered";
    case cudaErrorLaunchFailure:
        return "cudaErrorLaunchFailure";
    case cudaErrorStreamCaptureUnjoined:
        return "cudaErrorStreamCaptureUnjoined";
    case cudaErrorStreamCaptureIsolation:
        return "cudaErrorStreamCaptureIsolation";
    case cudaErrorCapturedEvent:
        return "cudaErrorCapturedEvent";
    case cudaErrorStreamCaptureUnsupported:
        return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorUnknown:
        break;
    }
    return "cudaErrorUnknown";
}

const char *cudaGetErrorString(cudaError_t error)
{
    return error == cudaErrorNoDevice ? "no CUDA-capable device is detected" : cudaGetErrorName(error);
}

// ---- streams and events --------------------------------------------------------------------------------------------

static thread_local std::vector<CUstream_st *> streams; // of this thread, for cudaDeviceSynchronize

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags)
{
    PLANNED();
    (void)flags;
    *stream = new CUstream_st;
    (*stream)->device = current_device;
    streams.push_back(*stream);
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest)
{
    PLANNED();
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority)
{
    cudaError_t error = cudaStreamCreateWithFlags(stream, flags);
    if (error == cudaSuccess)
        (*stream)->before_others = priority < 0;
    return error;
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithFlags(stream, cudaStreamDefault); }

cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
    CUstream_st *s = stream_of(stream);
    cudaError_t error = planned(__func__);
    if (error != cudaSuccess) { // what was to run is lost
        s->queue.clear();
        s->run = s->queued;
        return give(error);
    }
    if (s->captured_by)
        return give(cudaErrorStreamCaptureUnsupported);
    run_until(s, s->queued);
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    if (stream->captured_by)
        emulator::fail("cudaStreamDestroy: the stream belongs to a capture that has not ended");
    cudaError_t error = stream->endless ? cudaSuccess : cudaStreamSynchronize(stream);
    for (size_t i = 0; i < streams.size(); i++)
        if (streams[i] == stream)
            streams.erase(streams.begin() + (long)i--);
    static std::mutex lock;
    static auto &destroyed = *new std::vector<CUstream_st *>; // found from here for ever: no leak
    std::lock_guard<std::mutex> hold(lock);
    stream->gone = true;
    destroyed.push_back(stream);
    return error;
}

cudaError_t cudaStreamQuery(cudaStream_t stream)
{
    CUstream_st *s = stream_of(stream);
    if (s->run == s->queued) {
        emulator::land_copies();
        return cudaSuccess;
    }
    run_next(s); // time passes
    return cudaErrorNotReady;
}

cudaError_t cudaDeviceSynchronize(void)
{
    PLANNED();
    cudaError_t error = cudaStreamSynchronize(nullptr);
    for (CUstream_st *s : streams)
        if (error == cudaSuccess)
            error = cudaStreamSynchronize(s);
    return error;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t fn, void *arg)
{
    return emulator::enqueue(stream, [=] { fn(arg); });
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags)
{
    PLANNED();
    (void)flags;
    *event = new CUevent_st;
    return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    cudaError_t error = cudaEventSynchronize(event);
    delete event;
    return error;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    PLANNED();
    CUstream_st *s = stream_of(stream);
    event->stream = s->captured_by ? nullptr : s;
    event->capture = s->captured_by ? s->captured_by->capture : 0;
    if (s->captured_by) {
        event->behind = s->behind;
        event->behind[s] = s->captured_own;
        return cudaSuccess;
    }
    emulator::enqueue(stream, [=] { event->ms = now_ms(); });
    event->ticket = s->queued;
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    PLANNED();
    if (event->stream)
        run_until(event->stream, event->ticket);
    return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event)
{
    if (!event->stream || event->stream->run >= event->ticket)
        return cudaSuccess;
    run_next(event->stream);
    return cudaErrorNotReady;
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t begin, cudaEvent_t end)
{
    *ms = (float)(end->ms - begin->ms);
    return cudaEventQuery(end);
}

// An event of a capture takes the stream into it.
static cudaError_t wait_in_capture(CUstream_st *s, const CUevent_st *event)
{
    CUstream_st *origin = s->captured_by;
    for (CUstream_st *other : streams)
        if (!origin && event->capture && other->captured_by == other && other->capture == event->capture)
            origin = other;
    if (!origin)
        return cudaErrorCapturedEvent; // its capture is over
    if (event->capture != origin->capture)
        return cudaErrorStreamCaptureIsolation;
    s->captured_by = origin;
    for (const auto &other : event->behind)
        if (s->behind[other.first] < other.second)
            s->behind[other.first] = other.second;
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags)
{
    (void)flags;
    CUstream_st *of = event->stream, *s = stream_of(stream);
    uint64_t ticket = event->ticket;
    if (!of && !event->capture)
        return cudaSuccess; // never recorded
    if (s->captured_by || event->capture)
        return give(wait_in_capture(s, event));
    return emulator::enqueue(stream, [=] {
        bool waits = of->run < ticket; // and the host, which waits for this stream, may look at other things
        if (waits) {
            run_next(of);
            waits = of->run < ticket;
        }
        not_done = waits;
    });
}

// ---- graphs --------------------------------------------------------------------------------------------------------

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode)
{
    static std::atomic<uint64_t> captures;
    PLANNED();
    (void)mode;
    if (!stream || stream->captured_by)
        return give(cudaErrorStreamCaptureUnsupported);
    stream->captured_by = stream;
    stream->capture = ++captures;
    stream->captured.clear();
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph)
{
    bool joined = true;
    if (stream->captured_by != stream)
        return give(cudaErrorInvalidValue);
    for (CUstream_st *s : streams)
        if (s->captured_by == stream) {
            joined = joined && (s == stream || stream->behind[s] == s->captured_own);
            s->captured_by = nullptr;
            s->captured_own = 0;
            if (s != stream)
                s->behind.clear();
        }
    stream->behind.clear();
    *graph = nullptr;
    std::vector<decltype(stream->captured)::value_type> nodes; // also after an error the capture has ended
    nodes.swap(stream->captured);
    PLANNED();
    if (!joined)
        return give(cudaErrorStreamCaptureUnjoined);
    *graph = new CUgraph_st;
    (*graph)->nodes.swap(nodes);
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags)
{
    PLANNED();
    (void)flags;
    *exec = new CUgraphExec_st;
    (*exec)->nodes = graph->nodes;
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream)
{
    PLANNED();
    for (const work &node : exec->nodes)
        emulator::enqueue(stream, node);
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec)
{
    delete exec;
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    delete graph;
    return cudaSuccess;
}
