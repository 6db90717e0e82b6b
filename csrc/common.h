// What every op shares at the border with Python: dtype codes, where to run, and a few checks of plain numbers.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>

#include "check.h"

namespace dualparal {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };  // the codes of kernels/backend.py

inline int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

inline DType to_dtype(int code) {
    DP_CHECK(code >= 0 && code <= 2, "dtype code ", code, " is none of 0 (float32), 1 (bfloat16), 2 (float16)");
    return static_cast<DType>(code);
}

// Where an op runs: on `threads` CPU threads, or, with device >= 0, on a stream of that CUDA device.
struct Where {
    int device;
    uintptr_t stream;
    int threads;
};

inline void check_where(const Where& where) {
    DP_CHECK(where.device >= -1, "device=", where.device, ": -1 (CPU) or a CUDA device number expected");
    // More than any machine has; the OpenMP runtime ends the process when it cannot start one.
    DP_CHECK(where.threads >= 1 && where.threads <= 4096, "threads=", where.threads, ": 1 to 4096 expected");
#ifndef DUALPARAL_WITH_CUDA
    DP_CHECK(where.device < 0, "device=", where.device, ": this dualparal._C was built without CUDA");
#endif
}

inline void check_sizes(int64_t rows, int64_t dim) {
    // 2^40 elements are far beyond any tensor, and products of two such numbers still fit.
    DP_CHECK(rows >= 0 && rows < (int64_t{1} << 31), "rows=", rows, ": 0 to 2^31 - 1 expected");
    DP_CHECK(dim >= 1 && dim < (int64_t{1} << 24), "dim=", dim, ": 1 to 2^24 - 1 expected");
}

inline void check_eps(double eps) {
    DP_CHECK(std::isfinite(eps) && eps >= 0, "eps=", eps, ": a finite number of 0 or more expected");
}

// For what may be absent, too: null is aligned.
inline void check_aligned(const char* name, uintptr_t pointer, int64_t size) {
    DP_CHECK(pointer % size == 0, name, " lies at address ", pointer, ": a multiple of ", size, " bytes expected");
}

// Nothing is read or written when there are no rows, and torch gives empty tensors a null pointer.
inline void check_pointer(const char* name, uintptr_t pointer, int64_t rows, int64_t size) {
    DP_CHECK(pointer != 0 || rows == 0, name, " is a null pointer, with rows=", rows);
    check_aligned(name, pointer, size);
}

template <class T>
T* as(uintptr_t pointer) {
    return reinterpret_cast<T*>(pointer);
}

}  // namespace dualparal
