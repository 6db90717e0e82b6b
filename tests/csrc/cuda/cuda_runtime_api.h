// The CUDA language and runtime, as far as csrc/ uses them, for g++. Kernels run on a CPU: threads.cpp.
#pragma once

#include <cstddef>
#include <functional>

#define __global__
#define __device__
#define __launch_bounds__(threads)
#define __shared__ static __attribute__((section("shared_memory")))

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

void __syncthreads();
float __shfl_xor_sync(unsigned mask, float value, int lanes);
[[noreturn]] void __trap();

struct CUstream_st;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorInvalidDevice = 101 };
struct cudaFuncAttributes {};

const char* cudaGetErrorName(cudaError_t status);
const char* cudaGetErrorString(cudaError_t status);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetLastError();
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
    return cudaSuccess;
}

namespace emulated {

// Runs host code of csrc/: 0, or 1 when the kernel is wrong, or 2 when the host code throws.
int guarded(const std::function<void()>& call);

void* dynamic_shared();  // what `extern __shared__` names
constexpr size_t kMaxParameters = 512;
void launch(dim3 grid, dim3 block, size_t shared, CUstream_st* stream, void (*entry)(const void*), const void* call,
            size_t size);

// kernel<<<grid, block, shared, stream>>>(params)
template <class Params>
void launch(dim3 grid, dim3 block, size_t shared, CUstream_st* stream, void (*kernel)(Params), const Params& params) {
    struct Call {
        void (*kernel)(Params);
        Params params;
    };
    static_assert(sizeof(Call) <= kMaxParameters);
    const Call call{kernel, params};
    const auto entry = [](const void* call) {
        static_cast<const Call*>(call)->kernel(static_cast<const Call*>(call)->params);
    };
    launch(grid, block, shared, stream, entry, &call, sizeof call);
}

}  // namespace emulated
