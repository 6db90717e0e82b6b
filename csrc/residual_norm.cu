#include "common.cuh"
#include "residual_norm.h"

namespace dualparal {
namespace {

constexpr int kThreads = 256;

// One thread block per row. A thread comes back to the same elements in every pass, so passes need no barrier
// but those of the sums.
template <class T, int N>
__global__ void __launch_bounds__(kThreads) residual_norm_kernel(const ResidualNormParams p) {
    extern __shared__ float row[];  // [dim], x_new as stored
    const int64_t start = int64_t(blockIdx.x) * p.dim;
    const T* x = static_cast<const T*>(p.x) + start;
    const int dim = int(p.dim);
    const int step = kThreads * N;

    float local = 0.0f;
    for (int i = threadIdx.x * N; i < dim; i += step) {
        Pack<T, N> a = *reinterpret_cast<const Pack<T, N>*>(x + i);
        if (p.y) {
            const auto b = *reinterpret_cast<const Pack<T, N>*>(static_cast<const T*>(p.y) + start + i);
            Pack<float, N> gate;
            if (p.gate) gate = *reinterpret_cast<const Pack<float, N>*>(p.gate + i);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const float y = to_float(b.at[j]);
                a.at[j] = from_float<T>(to_float(a.at[j]) + (p.gate ? y * gate.at[j] : y));
            }
            *reinterpret_cast<Pack<T, N>*>(static_cast<T*>(p.x_new) + start + i) = a;
        }
        if (p.h) {
#pragma unroll
            for (int j = 0; j < N; ++j) {
                row[i + j] = to_float(a.at[j]);
                local += row[i + j];
            }
        }
    }
    if (!p.h) return;

    const float mean = block_sum(local) / float(dim);
    local = 0.0f;
    for (int i = threadIdx.x * N; i < dim; i += step) {
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const float d = row[i + j] - mean;
            local += d * d;
        }
    }
    const float factor = 1.0f / sqrtf(block_sum(local) / float(dim) + p.eps);

    for (int i = threadIdx.x * N; i < dim; i += step) {
        Pack<float, N> weight, bias;
        if (p.weight) weight = *reinterpret_cast<const Pack<float, N>*>(p.weight + i);
        if (p.bias) bias = *reinterpret_cast<const Pack<float, N>*>(p.bias + i);
        Pack<T, N> out;
#pragma unroll
        for (int j = 0; j < N; ++j) {
            float value = (row[i + j] - mean) * factor;
            if (p.weight) value *= weight.at[j];
            if (p.bias) value += bias.at[j];
            out.at[j] = from_float<T>(value);
        }
        *reinterpret_cast<Pack<T, N>*>(static_cast<T*>(p.h) + start + i) = out;
    }
}

}  // namespace

void residual_norm_cuda(const ResidualNormParams& p, int device, uintptr_t stream) {
    const DeviceGuard guard(device);
    const size_t shared = p.h ? row_bytes_in_shared(p.dim) : 0;
    const bool aligned = aligned16(p.x) && aligned16(p.y) && aligned16(p.gate) && aligned16(p.weight) &&
                         aligned16(p.bias) && aligned16(p.x_new) && aligned16(p.h);
    with_dtype(p.dtype, [&](auto zero) {
        using T = decltype(zero);
        const auto kernel = aligned && p.dim % kPack<T> == 0 ? residual_norm_kernel<T, kPack<T>> : residual_norm_kernel<T, 1>;
        kernel<<<unsigned(p.rows), kThreads, shared, as<CUstream_st>(stream)>>>(p);
    });
    check_cuda(cudaGetLastError(), "residual_norm launch");
}

}  // namespace dualparal
