// One style of error: every check says the offending values, and reaches Python as ValueError (a caller's
// mistake) or RuntimeError (CUDA said no).
#pragma once

#include <sstream>
#include <stdexcept>

#ifdef __CUDACC__
#include <cuda_runtime_api.h>
#endif

namespace dualparal {

template <class Error, class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
    std::ostringstream message;
    (message << ... << parts);
    throw Error(message.str());
}

#define DP_CHECK(condition, ...)                                          \
    do {                                                                  \
        if (!(condition)) ::dualparal::fail<std::invalid_argument>(__VA_ARGS__); \
    } while (0)

#ifdef __CUDACC__
inline void check_cuda(cudaError_t status, const char* what) {
    if (status != cudaSuccess) {
        fail<std::runtime_error>(what, ": ", cudaGetErrorName(status), " (", int(status), "): ", cudaGetErrorString(status));
    }
}

// A stream belongs to a device, and a launch on it needs that device to be current. One process may drive several.
class DeviceGuard {
   public:
    explicit DeviceGuard(int device) {
        check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
        if (device != before_) {
            check_cuda(cudaSetDevice(device), "cudaSetDevice");
            changed_ = true;
        }
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

   private:
    int before_ = 0;
    bool changed_ = false;
};
#endif

}  // namespace dualparal
