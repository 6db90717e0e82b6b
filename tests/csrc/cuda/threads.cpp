// Runs a kernel of csrc/ on a CPU: its own text, compiled by g++.
//
// Every CUDA thread is a fiber; a seeded scheduler picks who goes on at barriers and shuffles, and which thread block
// is next. Stops at barriers and shuffles that some threads do not reach, that threads reach at different places, or
// that read a lane which takes no part; memory.cpp looks at loads and stores.
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime_api.h"
#include "emulation.h"
#include "rows.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

int current = -1, barriers;

namespace {

constexpr size_t kStackBytes = 16 << 10;
constexpr int kWarp = 32, kMaxThreads = 1024;
constexpr size_t kMaxShared = 48 << 10;  // what a launch gets without asking for more
constexpr long kMaxSteps = 50'000'000;

std::mt19937 chance;
std::string failure;  // of this call, in words
cudaError_t last_error;
int device, launched_on;
CUstream_st* launched_in;
long steps;

ucontext_t scheduler;
std::vector<ucontext_t> fibers;
std::vector<char> stacks;
std::vector<int> ready;
int ended;

// Threads that wait for each other: a block at a barrier, a warp at a shuffle.
struct Meeting {
    const void* place = nullptr;
    std::vector<int> waiting;
};
Meeting barrier;
struct Warp : Meeting {
    unsigned mask = 0;
    int turn = 0;
    float values[2][kWarp];  // of this turn and the one before, which some lanes may not have read yet
};
std::vector<Warp> warps;

void sleep() { swapcontext(&fibers[current], &scheduler); }

void arrive(Meeting& meeting, const void* place, size_t expected, const char* what) {
    step();
    if (meeting.waiting.empty()) meeting.place = place;
    if (meeting.place != place) fault("threads wait for each other at different %s", what);
    meeting.waiting.push_back(current);
    if (meeting.waiting.size() < expected) return;
    ready.insert(ready.end(), meeting.waiting.begin(), meeting.waiting.end());
    meeting.waiting.clear();
}

struct Launch {
    void (*entry)(const void*);
    const void* call;
    size_t size;
};
Launch launched;

void run_fiber() {
    {
        alignas(16) char parameters[kMaxParameters];  // every thread has its own copy
        std::memcpy(parameters, launched.call, launched.size);
        launched.entry(parameters);
    }
    ++ended;
    sleep();
}

void run_block(size_t shared) {
    const int threads = int(blockDim.x * blockDim.y * blockDim.z);
    new_shared(shared);
    stacks.assign(threads * kStackBytes, char(0xff));  // NaN
    fibers.resize(threads);
    warps.assign((threads + kWarp - 1) / kWarp, {});
    barrier = {};
    barriers = ended = 0;
    ready.resize(threads);
    std::iota(ready.begin(), ready.end(), 0);
    for (int thread = 0; thread < threads; ++thread) {
        getcontext(&fibers[thread]);
        fibers[thread].uc_stack.ss_sp = &stacks[thread * kStackBytes];
        fibers[thread].uc_stack.ss_size = kStackBytes;
        fibers[thread].uc_link = nullptr;
        makecontext(&fibers[thread], run_fiber, 0);
    }
    const int order = int(chance() % 3);  // at random, who waits longest first, who waits shortest first
    while (!ready.empty() && failure.empty()) {
        const size_t next = order == 0 ? chance() % ready.size() : order == 1 ? 0 : ready.size() - 1;
        current = ready[next];
        ready.erase(ready.begin() + ptrdiff_t(next));
        threadIdx = {current % blockDim.x, current / blockDim.x % blockDim.y, current / blockDim.x / blockDim.y};
        swapcontext(&scheduler, &fibers[current]);
    }
    current = -1;
    if (failure.empty() && ended < threads) {
        const int at_barrier = int(barrier.waiting.size());
        failure = "deadlock: " + std::to_string(at_barrier) + " threads wait at a barrier, " +
                  std::to_string(threads - at_barrier - ended) + " at shuffles, " + std::to_string(ended) + " have ended";
    }
    for (int thread = 0; thread < threads; ++thread) {
        if (stacks[thread * kStackBytes] != char(0xff)) failure = "the emulation's stacks are too small";
    }
}

}  // namespace

void fault(const char* format, ...) {
    char words[256];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(words, sizeof words, format, arguments);
    va_end(arguments);
    failure = words;
    sleep();
    std::abort();  // nobody wakes it
}

void step() {
    if (++steps > kMaxSteps) fault("the kernel does not end");
}

Stack stack_of_current() {
    const auto first = reinterpret_cast<uintptr_t>(&stacks[current * kStackBytes]);
    return {first, first + kStackBytes};
}

void launch(dim3 grid, dim3 block, size_t shared, CUstream_st* stream, void (*entry)(const void*), const void* call,
            size_t size) {
    launched_on = device;
    launched_in = stream;
    const uint64_t threads = uint64_t(block.x) * block.y * block.z, blocks = uint64_t(grid.x) * grid.y * grid.z;
    if (threads == 0 || threads > kMaxThreads || blocks == 0 || grid.x >> 31 || grid.y > 65535 || grid.z > 65535) {
        last_error = cudaErrorInvalidConfiguration;
        return;
    }
    if (shared + static_shared_bytes() > kMaxShared) {
        last_error = cudaErrorInvalidValue;
        return;
    }
    launched = {entry, call, size};
    blockDim = block;
    gridDim = grid;
    std::vector<uint64_t> order(blocks);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), chance);
    for (uint64_t next : order) {
        blockIdx = {unsigned(next % grid.x), unsigned(next / grid.x % grid.y), unsigned(next / grid.x / grid.y)};
        if (failure.empty()) run_block(shared);
    }
    if (failure.empty()) failure = not_written();
}

int guarded(const std::function<void()>& call) {
    failure.clear();
    last_error = cudaSuccess;
    steps = 0;
    int status = 0;
    try {
        call();
    } catch (const std::exception& error) {
        failure = error.what();
        status = 2;
    }
    forget_tensors();
    std::vector<char>().swap(stacks);  // libraries stay loaded, one for each mutant
    return status ? status : !failure.empty();
}

}  // namespace emulated

using namespace emulated;

void __syncthreads() {
    arrive(barrier, __builtin_return_address(0), fibers.size(), "barriers");
    if (barrier.waiting.empty()) ++barriers;
    sleep();
}

float __shfl_xor_sync(unsigned mask, float value, int lanes) {
    Warp& warp = warps[current / kWarp];
    const int lane = current % kWarp, other = lane ^ lanes;
    if (!(mask >> lane & 1)) fault("a shuffle's mask leaves out who calls it");
    if (other < 0 || other >= kWarp || !(mask >> other & 1)) fault("a shuffle reads lane %d, which takes no part", other);
    if (!warp.waiting.empty() && warp.mask != mask) fault("threads wait for each other at different shuffles");
    warp.mask = mask;
    const int turn = warp.turn;
    warp.values[turn][lane] = value;
    arrive(warp, __builtin_return_address(0), size_t(__builtin_popcount(mask)), "shuffles");
    if (warp.waiting.empty()) warp.turn ^= 1;
    sleep();
    return warp.values[turn][other];
}

void __trap() { fault("trap"); }

const char* cudaGetErrorName(cudaError_t status) {
    return status == cudaErrorInvalidValue           ? "cudaErrorInvalidValue"
           : status == cudaErrorInvalidConfiguration ? "cudaErrorInvalidConfiguration"
           : status == cudaErrorInvalidDevice        ? "cudaErrorInvalidDevice"
                                                     : "cudaSuccess";
}
const char* cudaGetErrorString(cudaError_t status) { return cudaGetErrorName(status); }
cudaError_t cudaGetDevice(int* current_device) {
    *current_device = device;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int wanted) {
    if (wanted < 0 || wanted > 1) return last_error = cudaErrorInvalidDevice;
    device = wanted;
    return cudaSuccess;
}
cudaError_t cudaGetLastError() {
    const cudaError_t status = last_error;
    last_error = cudaSuccess;
    return status;
}

static float load(dualparal::DType dtype, uint16_t bits) {
    float value;
    dualparal::load_row(dtype, &bits, 1, &value);
    return value;
}
static uint16_t store(dualparal::DType dtype, float value) {
    uint16_t bits;
    dualparal::store_row(dtype, &value, 1, &bits);
    return bits;
}
float __bfloat162float(__nv_bfloat16 value) { return load(dualparal::DType::bf16, value.bits); }
__nv_bfloat16 __float2bfloat16_rn(float value) { return {store(dualparal::DType::bf16, value)}; }
float __half2float(__half value) { return load(dualparal::DType::f16, value.bits); }
__half __float2half_rn(float value) { return {store(dualparal::DType::f16, value)}; }

extern "C" {
__attribute__((visibility("default"))) void seed(unsigned number) { chance.seed(number); }
__attribute__((visibility("default"))) const char* message() { return failure.c_str(); }
// The device that was current at the last launch, the one that is now, and the launch's stream.
__attribute__((visibility("default"))) void where(int* at_launch, int* now, uintptr_t* stream) {
    *at_launch = launched_on;
    *now = device;
    *stream = reinterpret_cast<uintptr_t>(launched_in);
}
}
