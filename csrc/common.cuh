// Device helpers of the ops: conversion, 16-byte loads and stores, sums over a thread block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common.h"

namespace dualparal {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) { return x; }
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ inline __half from_float<__half>(float x) { return __float2half_rn(x); }

// N neighbouring elements, moved by one instruction when they fill at most 16 bytes and lie at a multiple of that.
template <class T, int N>
struct alignas(sizeof(T) * N > 16 ? 16 : sizeof(T) * N) Pack {
    T at[N];
};

template <class T>
constexpr int kPack = 16 / int(sizeof(T));

inline bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }  // null is

constexpr int kWarp = 32;

// The same sum in every thread. The order is fixed by the block's size, so the result is too.
__device__ inline float block_sum(float value) {
    __shared__ float warps[kWarp];
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    __syncthreads();  // the sum before this one may still be read
    if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
    __syncthreads();
    float total = 0.0f;
    for (int warp = 0; warp < int(blockDim.x) / kWarp; ++warp) total += warps[warp];
    return total;
}

// A row waits in shared memory between its passes; 48 KiB is what every device gives without asking.
inline size_t row_bytes_in_shared(int64_t dim) {
    constexpr int64_t limit = 12160;  // leaves room for block_sum
    DP_CHECK(dim <= limit, "a row of ", dim, " elements: the CUDA kernels take up to ", limit, "; use backend='torch'");
    return size_t(dim) * sizeof(float);
}

// Calls f with a value of the device type that goes with dtype.
template <class F>
void with_dtype(DType dtype, F f) {
    switch (dtype) {
        case DType::f32: return f(float{});
        case DType::bf16: return f(__nv_bfloat16{});
        case DType::f16: return f(__half{});
    }
}

}  // namespace dualparal
