#include <algorithm>

#include "combine_guidance.h"
#include "common.cuh"

namespace dualparal {
namespace {

constexpr int kThreads = 256;

template <class T, int N>
__global__ void __launch_bounds__(kThreads) combine_guidance_kernel(const CombineGuidanceParams p) {
    using Packed = Pack<T, N>;
    const int64_t packs = p.size / N;
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < packs; i += int64_t(gridDim.x) * kThreads) {
        const Packed cond = static_cast<const Packed*>(p.cond)[i];
        const Packed uncond = static_cast<const Packed*>(p.uncond)[i];
        Packed out;
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const float from = to_float(uncond.at[j]);
            out.at[j] = from_float<T>(from + p.scale * (to_float(cond.at[j]) - from));
        }
        static_cast<Packed*>(p.out)[i] = out;
    }
}

}  // namespace

void combine_guidance_cuda(const CombineGuidanceParams& p, int device, uintptr_t stream) {
    const DeviceGuard guard(device);
    with_dtype(p.dtype, [&](auto zero) {
        using T = decltype(zero);
        const bool aligned = aligned16(p.cond) && aligned16(p.uncond) && aligned16(p.out) && p.size % kPack<T> == 0;
        const auto kernel = aligned ? combine_guidance_kernel<T, kPack<T>> : combine_guidance_kernel<T, 1>;
        const int64_t packs = p.size / (aligned ? kPack<T> : 1);
        const unsigned blocks = unsigned(std::min<int64_t>((packs + kThreads - 1) / kThreads, 1 << 16));
        kernel<<<blocks, kThreads, 0, as<CUstream_st>(stream)>>>(p);
    });
    check_cuda(cudaGetLastError(), "combine_guidance launch");
}

// Any kernel of the library stands for all: they are compiled for the same architectures.
std::string cuda_problem(int device) {
    try {
        const DeviceGuard guard(device);
        cudaFuncAttributes attributes;
        check_cuda(cudaFuncGetAttributes(&attributes, combine_guidance_kernel<float, 1>), "cudaFuncGetAttributes");
        return "";
    } catch (const std::runtime_error& error) {
        cudaGetLastError();  // a refused question must not surface at a later launch
        return error.what();
    }
}

}  // namespace dualparal
