// Kernels with one fault each, and one without: what tests/csrc/cuda/ should find.
#include "common.cuh"

namespace dualparal {
namespace {

enum Fault : int {
    kNone, kReadThenWritten, kWrittenByAll, kBarrierOfSome, kTwoBarriers, kShuffleOfSome, kLaneOutside, kMaskWithoutCaller, kTwoShuffles,
    kNotWrittenShared, kBehindShared, kBehindOutput, kBeforeEverything, kTwice, kLeftOut, kInput, kOutput, kMisaligned,
    kIndex, kForever, kTrap, kTooManyThreads, kTooMuchShared
};

constexpr int kThreads = 64;

struct Params {
    const float* in;  // [kThreads]
    float* out;       // [kThreads]
    Fault fault;
};

__global__ void faulty(const Params p) {
    extern __shared__ float row[];  // [kThreads]
    const int i = threadIdx.x, lane = i % kWarp;
    float value = p.in[i];
    if (p.fault != kNotWrittenShared || i > 0) row[i] = value;
    __syncthreads();
    value = row[kThreads - 1 - i];
    if (p.fault == kReadThenWritten) row[i] = value;
    if (p.fault == kWrittenByAll) row[kThreads / 2 + i / 2] = value;
    if (p.fault == kBarrierOfSome && i < 40) __syncthreads();
    if (p.fault == kTwoBarriers) {
        if (i < 40) __syncthreads();
        else __syncthreads();
    }
    if (p.fault == kShuffleOfSome && lane < 20) value += __shfl_xor_sync(0xffffffffu, value, 1);
    if (p.fault == kLaneOutside && lane < 16) value += __shfl_xor_sync(0xffffu, value, 16);
    if (p.fault == kMaskWithoutCaller) value += __shfl_xor_sync(0xffffu, value, 1);
    if (p.fault == kTwoShuffles) {
        if (lane < 16) value += __shfl_xor_sync(0xffffffffu, value, 1);
        else value += __shfl_xor_sync(0xffffffffu, value, 1);
    }
    value += __shfl_xor_sync(0xffffffffu, value, 1);
    if (p.fault == kBehindShared) row[kThreads + i] = value;
    if (p.fault == kBehindOutput) p.out[kThreads + i] = value;
    if (p.fault == kBeforeEverything) *as<float>(8) = value;
    if (p.fault == kTwice && i == 1) p.out[0] = value;
    if (p.fault == kInput) const_cast<float*>(p.in)[i] = value;
    if (p.fault == kMisaligned) {
        const Pack<float, 2> pack{{value, value}};
        *reinterpret_cast<Pack<float, 2>*>(p.out + 1) = pack;
    }
    if (p.fault == kIndex) {
        float few[3] = {value, value, value};
        value = few[i];
    }
    while (p.fault == kForever) value += p.in[i];
    if (p.fault == kTrap) __trap();
    if (p.fault != kLeftOut || i != 5) p.out[i] = value;
    if (p.fault == kOutput) value += p.out[i];
}

void faulty_cuda(const Params& p) {
    const int threads = p.fault == kTooManyThreads ? 1025 : kThreads;
    const size_t shared = p.fault == kTooMuchShared ? 48 * 1024 + 1 : kThreads * sizeof(float);
    faulty<<<1, threads, shared, nullptr>>>(p);
    check_cuda(cudaGetLastError(), "launch");
}

}  // namespace
}  // namespace dualparal

extern "C" __attribute__((visibility("default"))) int run(const float* in, float* out, int fault) {
    return emulated::guarded([=] { dualparal::faulty_cuda({in, out, dualparal::Fault(fault)}); });
}
